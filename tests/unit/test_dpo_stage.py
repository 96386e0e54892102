"""Stage dpo: its losses by hand, TRL's loss against an oracle in float64, resume bit for bit, what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from rlhf.config import RLHFConfig
from rlhf.config.dpo import DPOConfig
from rlhf.config.model import ScratchConfig
from rlhf.config.root import PIPELINE
from rlhf.data.tokenization import EncodedPair, encode_pair
from rlhf.errors import ConfigError, DataError
from rlhf.models import build_from_scratch, load_tokenizer
from rlhf.models.loading import load_policy
from rlhf.models.paths import is_adapter
from rlhf.models.saving import save_model
from rlhf.pipeline import plan_stage, preflight, resolve_inputs
from rlhf.planning.plan import make_plan
from rlhf.records import Comparison, dump_line
from rlhf.runs.folder import RunFolder, StageResult
from rlhf.stages import dpo, trl_adapter
from rlhf.stages.comparisons import comparisons_of
from rlhf.stages.dpo import Pair, log_ratios, pair_losses
from tests.stage_example import make_context, metrics_of, recorded_resumes, tiny_config, weight_bytes, write_comparisons

STEPS = {"batch_size": 8, "max_steps": 4, "learning_rate": 1e-2, "log_every": 1, "save_every": 2}
LOSSES: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "hinge": {},
    "ipo": {},
    "robust": {"label_smoothing": 0.2},
    "exo_pair": {"label_smoothing": 0.1},
    "apo_zero": {},
    "apo_down": {},
    "sppo_hard": {},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Comparisons, two policies with one tokenizer, and a finished run in `whole`."""
    folder = tmp_path_factory.mktemp("dpo")
    write_comparisons(folder / "comparisons")
    config = ScratchConfig.model_validate({"num_layers": 2, "hidden_size": 32, "num_heads": 2, "vocab_size": 300})
    for name, seed in (("policy", 3), ("other", 4)):
        policy, tokenizer = build_from_scratch(config, ["the film was good and bad"] * 9, seed=seed)
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.mul_(2.0)  # so that the two disagree about a response by more than rounding
        save_model(policy, tokenizer, folder / name)
    summary = train(folder, "whole")
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def context_of(folder: Path, name: str, sections: dict[str, Any] | None = None, **values: Any) -> Any:
    config = tiny_config(folder, dpo={**STEPS, **values}, **(sections or {}))
    inputs = {
        "policy": str(folder / "policy"),
        "reference": str(folder / "policy"),
        "comparisons": str(folder / "comparisons"),
    }
    return make_context(config, folder / name, "dpo", inputs)


def train(folder: Path, name: str, sections: dict[str, Any] | None = None, **values: Any) -> dict[str, Any]:
    return dpo.run(context_of(folder, name, sections, **values)).summary


def section(loss: str, **values: Any) -> DPOConfig:
    return DPOConfig.model_validate({"loss": loss, "beta": 0.5, **LOSSES[loss], **values})


# --- the losses -------------------------------------------------------------------------------------------------------


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        # beta = 0.5, log-ratios 1.2 and -0.4, so h = 0.8; four and two tokens.
        ("sigmoid", math.log(1 + math.exp(-0.8))),
        ("hinge", 0.2),
        ("ipo", (1.2 / 4 + 0.4 / 2 - 1) ** 2),
        ("robust", (0.8 * math.log(1 + math.exp(-0.8)) - 0.2 * math.log(1 + math.exp(0.8))) / 0.6),
        (
            "exo_pair",
            sigmoid(0.8) * math.log(sigmoid(0.8) / 0.9) + sigmoid(-0.8) * math.log(sigmoid(-0.8) / 0.1),
        ),
        ("apo_zero", 1 - sigmoid(0.6) + sigmoid(-0.2)),
        ("apo_down", sigmoid(0.6) + 1 - sigmoid(0.8)),
        ("sppo_hard", 0.2**2 + 0.6**2),
    ],
)
def test_losses_by_hand(loss: str, expected: float) -> None:
    ratios = torch.tensor([[1.2], [-0.4]], dtype=torch.float64)
    lengths = torch.tensor([[4.0], [2.0]], dtype=torch.float64)
    assert pair_losses(section(loss), ratios, lengths).item() == pytest.approx(expected, rel=1e-12)


def slow_logprob(model: Any, ids: list[int], response: list[int]) -> Tensor:
    """The response's log-probability, a token at a time, without padding."""
    logits = model(input_ids=torch.tensor([ids + response])).logits[0]
    rows = [logits[len(ids) + place - 1].log_softmax(-1)[token] for place, token in enumerate(response)]
    return torch.stack(rows).sum()


def pairs_of(files: Path) -> list[Pair]:
    tokenizer = load_tokenizer(files / "policy")
    rows = [Comparison("the film", " was good", " was bad and poor"), Comparison("a much longer film", " fine", " bad")]
    return [(encode_pair(tokenizer, r.prompt, r.chosen), encode_pair(tokenizer, r.prompt, r.rejected)) for r in rows]


@pytest.mark.parametrize("loss", LOSSES)
def test_the_trainer_minimises_the_oracles_loss(files: Path, loss: str) -> None:
    """Loss and gradients of one batch by TRL's trainer against a slow loop over tokens, models in float64.

    TRL's head gives log-probs in float32.
    """
    context = context_of(files, f"oracle-{loss}", loss=loss, beta=0.5, batch_size=2, max_steps=1, **LOSSES[loss])
    pairs, config = pairs_of(files), context.config.dpo
    # Loaded as doubles: the trainer copies nothing.
    policy, reference, again = (
        load_policy(files / name, None, torch.float64) for name in ("policy", "other", "policy")
    )
    schedule = trl_adapter.plan_schedule(config, name="dpo", num_examples=2, world_size=1)
    with trl_adapter.open_tracker(context, schedule, None, []) as tracker:
        training = trl_adapter.Training(
            "dpo",
            context,
            config,
            schedule,
            tracker,
            model=policy,
            tokenizer=load_tokenizer(files / "policy"),
            rows=dpo.training_rows(pairs),
            reference=reference,
        )
        trainer = training.trainer
        rows = [trainer.train_dataset[index] for index in range(2)]
        trainer.model.train()
        found = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
        found.backward()
    ratios = torch.stack(
        [
            torch.stack([slow_logprob(again, *pair[side]) - slow_logprob(reference, *pair[side]) for pair in pairs])
            for side in (0, 1)
        ]
    )
    lengths = torch.tensor([[len(pair[side].response_ids) for pair in pairs] for side in (0, 1)])
    expected: Any = pair_losses(config, ratios, lengths).mean()
    expected.backward()
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    wanted = {name: parameter.grad for name, parameter in again.named_parameters()}
    assert any(gradient is not None and gradient.abs().max() > 1e-3 for gradient in wanted.values())
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-4, atol=1e-5)
    quick = log_ratios(again, reference, pairs, 0, torch.device("cpu"))
    torch.testing.assert_close(quick, ratios.detach(), rtol=1e-5, atol=1e-5)


# --- the stage --------------------------------------------------------------------------------------------------------


def test_training_starts_at_the_reference_and_learns_the_comparisons(files: Path) -> None:
    lines = metrics_of(files / "whole", "dpo")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    # The first step's ratios are 1: -log sigmoid(0).
    assert lines[0]["dpo/loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert lines[0]["dpo/margin"] == pytest.approx(0.0, abs=1e-6)
    assert lines[-1]["dpo/loss"] < 0.9 * math.log(2)
    last = lines[-1]
    assert last["dpo/margin"] == pytest.approx(last["dpo/chosen_reward"] - last["dpo/rejected_reward"], abs=1e-6)
    for name in ("accuracy", "grad_norm", "learning_rate", "entropy", "chosen_logprob", "rejected_logprob", "epoch"):
        assert f"dpo/{name}" in last
    summary = json.loads((files / "summary.json").read_text())
    assert summary["test_accuracy"]["value"] == last["dpo/test_accuracy"] == 1.0
    assert (summary["num_train"], summary["num_test"]) == (40, 7)


def test_pairs_of_equal_rewards_are_half_right() -> None:
    ratios = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    side = EncodedPair([1], [2])
    assert dpo._sums(section("sigmoid"), ratios, [(side, side)] * 3).tolist()[1:] == [1.5, 0.0, 0.5, 0.5, 3.0]


def test_what_is_reported_is_measured_on_the_published_model(files: Path) -> None:
    summary = json.loads((files / "summary.json").read_text())
    context = context_of(files, "whole")
    tokenizer = load_tokenizer(context.stage.model)
    policy, reference = load_policy(context.stage.model), load_policy(files / "policy")
    for split in ("validation", "test"):
        rows = comparisons_of(context, tokenizer).named(split)
        encoded = [
            (encode_pair(tokenizer, r.prompt, r.chosen), encode_pair(tokenizer, r.prompt, r.rejected)) for r in rows
        ]
        with torch.no_grad():
            rewards = [
                [0.1 * float(slow_logprob(policy, *side) - slow_logprob(reference, *side)) for side in pair]
                for pair in encoded
            ]
        margins = [chosen - rejected for chosen, rejected in rewards]
        loss = sum(math.log1p(math.exp(-margin)) for margin in margins) / len(margins)
        assert summary[f"{split}_loss"] == pytest.approx(loss, rel=1e-4)
        right = sum(margin > 0 for margin in margins) / len(margins)
        assert summary[f"{split}_accuracy"]["value"] == pytest.approx(right)
        assert summary[f"{split}_accuracy"]["low"] < right
    assert summary["test_margin"] == pytest.approx(sum(margins) / len(margins), rel=1e-4)
    assert summary["test_chosen_reward"] == pytest.approx(sum(c for c, _ in rewards) / len(rewards), rel=1e-3)


def test_a_killed_run_goes_on_bit_for_bit(files: Path) -> None:
    """It dies behind step 3, of which there is no checkpoint, and goes on from step 2."""
    whole = trl_adapter._TrackingCallback.on_step_end

    def dying(self: Any, arguments: object, state: Any, control: Any, **keywords: Any) -> Any:
        if state.global_step == 3:
            raise KeyboardInterrupt
        return whole(self, arguments, state, control, **keywords)

    with mock.patch.object(trl_adapter._TrackingCallback, "on_step_end", dying), pytest.raises(KeyboardInterrupt):
        train(files, "killed")
    with recorded_resumes() as resumed:
        train(files, "killed")
    assert resumed == ["checkpoint-2"]
    assert weight_bytes(files / "killed", "dpo") == weight_bytes(files / "whole", "dpo")
    assert metrics_of(files / "killed", "dpo") == metrics_of(files / "whole", "dpo")


def test_micro_batches_change_nothing_and_settings_do(files: Path) -> None:
    wanted = metrics_of(files / "whole", "dpo")
    train(files, "micro", micro_batch_size=2, gradient_checkpointing=True, max_steps=2)
    for line, expected in zip(metrics_of(files / "micro", "dpo"), wanted[:2], strict=True):
        for name in ("loss", "grad_norm", "margin", "chosen_reward", "accuracy"):
            assert line[f"dpo/{name}"] == pytest.approx(expected[f"dpo/{name}"], rel=1e-4, abs=1e-5), name
    # The gradient of the first step is beta / 2 times that of the log-ratio.
    train(files, "beta", beta=0.2, max_steps=1)
    beta = metrics_of(files / "beta", "dpo")[0]
    assert beta["dpo/grad_norm"] == pytest.approx(2 * wanted[0]["dpo/grad_norm"], rel=1e-4)
    context = context_of(files, "other-reference", max_steps=1)
    dpo.run(
        make_context(
            context.config, files / "other-reference", "dpo", {**context.inputs, "reference": str(files / "other")}
        )
    )
    other = metrics_of(files / "other-reference", "dpo")[0]
    assert abs(other["dpo/margin"]) > 1e-3
    assert other["dpo/grad_norm"] != pytest.approx(wanted[0]["dpo/grad_norm"], rel=1e-3)


def test_adapters_train_against_the_whole_reference(files: Path) -> None:
    lora = {"peft": {"type": "lora", "rank": 2}}
    summary = train(files, "lora", lora)
    model = files / "lora/stages/dpo/model"
    assert is_adapter(str(model))
    lines = metrics_of(files / "lora", "dpo")
    assert lines[0]["dpo/loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert lines[-1]["dpo/loss"] < 0.95 * math.log(2)
    assert summary["test_accuracy"]["value"] == 1.0
    # An adapter is continued, and the reference has it merged in: the second training starts at log 2 again.
    context = context_of(files, "more", lora, max_steps=1)
    inputs = {**context.inputs, "policy": str(model), "reference": str(model)}
    dpo.run(make_context(context.config, files / "more", "dpo", inputs))
    assert metrics_of(files / "more", "dpo")[0]["dpo/loss"] == pytest.approx(math.log(2), rel=1e-5)


# --- which comparisons ------------------------------------------------------------------------------------------------


def write_rows(folder: Path, train: list[Comparison]) -> None:
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(dump_line(row) + "\n" for row in train))


def test_ties_are_left_out_and_the_first_comparisons_count_before_that(files: Path, tmp_path: Path) -> None:
    rows = [Comparison(f"film {n}", " good", " bad", probability=0.5 if n % 3 == 0 else 0.8) for n in range(12)]
    write_rows(tmp_path / "rows", rows)
    context = context_of(files, "ties", max_steps=1, num_comparisons=7)
    inputs = {**context.inputs, "comparisons": str(tmp_path / "rows")}
    context = make_context(context.config, tmp_path / "run", "dpo", inputs)
    summary = dpo.run(context).summary
    assert (summary["num_train"], summary["num_ties_left_out"], summary["num_test"]) == (4, 3, 0)
    assert "test_accuracy" not in summary
    write_rows(tmp_path / "ties", rows[:1])
    inputs["comparisons"] = str(tmp_path / "ties")
    config = tiny_config(files, dpo=STEPS)
    with pytest.raises(DataError, match=r"all 1 training comparisons of stage dpo are ties"):
        dpo.run(make_context(config, tmp_path / "none", "dpo", inputs))


@pytest.mark.parametrize("stage", ["dpo", "reward_model"])
def test_the_first_comparisons_of_the_training_split(files: Path, stage: str) -> None:
    context = make_context(tiny_config(files), files / "first", stage, {"comparisons": str(files / "comparisons")})
    tokenizer = load_tokenizer(files / "policy")
    every, first = comparisons_of(context, tokenizer), comparisons_of(context, tokenizer, 5)
    assert first.train == every.train[:5]
    assert (first.validation, first.test) == (every.validation, every.test)
    with pytest.raises(DataError, match=rf"{stage}\.num_comparisons=41, but the training split has 40 comparisons"):
        comparisons_of(context, tokenizer, 41)


# --- what is refused, and the wiring ----------------------------------------------------------------------------------


def test_other_tokenizers_and_encoder_decoders_are_refused(files: Path, tmp_path: Path) -> None:
    scratch = {"num_layers": 1, "hidden_size": 16, "num_heads": 2, "vocab_size": 280}
    for name, kind in (("words", {}), ("t5", {"architecture": "t5"})):
        config = ScratchConfig.model_validate({**scratch, **kind})
        policy, tokenizer = build_from_scratch(config, ["other words have other ids"] * 9, seed=3)
        save_model(policy, tokenizer, tmp_path / name)
    context = context_of(files, "refused")

    def run(**inputs: str) -> None:
        dpo.run(make_context(context.config, tmp_path / "run", "dpo", {**context.inputs, **inputs}))

    with pytest.raises(
        ConfigError, match=r"dpo\.reference: the reference .*words has another tokenizer than the policy"
    ):
        run(reference=str(tmp_path / "words"))
    with pytest.raises(ConfigError, match=r"dpo\.policy: T5ForConditionalGeneration is an encoder-decoder model"):
        run(policy=str(tmp_path / "t5"), reference=str(tmp_path / "t5"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"label_smoothing": 0.1}, "belongs to loss=robust or exo_pair; loss is sigmoid"),
        ({"loss": "exo_pair"}, "needs label_smoothing above 0"),
        ({"loss": "robust", "label_smoothing": 0.5}, "less than 0.5"),
        ({"beta": 0.0}, "greater than 0"),
    ],
)
def test_sections_that_say_nothing_sensible_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DPOConfig.model_validate(values)


def test_inputs_come_from_the_run_and_evaluate_judges_the_model(files: Path, tmp_path: Path) -> None:
    run, policy = RunFolder(tmp_path / "run"), str(files / "policy")
    stages = run.path / "stages"

    def config(*names: str, **sections: Any) -> RLHFConfig:
        return RLHFConfig.model_validate({"stages": names, **sections})

    assert "dpo" not in PIPELINE
    inputs = resolve_inputs(config("sft", "collect", "dpo"), run, "dpo")
    sft = str(stages / "sft/model")
    assert inputs == {"policy": sft, "reference": sft, "comparisons": str(stages / "collect/comparisons")}
    given = {"policy": policy, "reference": "r", "comparisons": "c"}
    assert resolve_inputs(config("dpo", dpo=given), run, "dpo") == given
    assert resolve_inputs(config("sft", "dpo", "evaluate"), run, "evaluate")["policy"] == str(stages / "dpo/model")
    both = config("sft", "reward_model", "ppo", "dpo", "evaluate")
    assert resolve_inputs(both, run, "evaluate")["policy"] == str(stages / "ppo/model")
    ppo = run.stage("ppo")
    ppo.path.mkdir(parents=True)
    ppo.write_result(StageResult("ppo", "f", 1.0, {}, {}))
    assert resolve_inputs(config("sft", "evaluate"), run, "evaluate")["policy"] == str(stages / "ppo/model")
    assert resolve_inputs(config("sft", "dpo", "evaluate"), run, "evaluate")["policy"] == str(stages / "dpo/model")
    with pytest.raises(ConfigError, match=r"stage dpo needs comparisons: data=embedded has none of its own"):
        preflight(config("dpo", dpo={"policy": policy}), RunFolder(tmp_path / "new"))
    with pytest.raises(ConfigError, match=r"stage dpo needs a policy.*dpo\.policy=FOLDER_OR_HUB_ID"):
        preflight(config("dpo", dpo={"comparisons": str(files / "comparisons")}), RunFolder(tmp_path / "new"))
    with pytest.raises(ConfigError, match=r"dpo\.comparisons=.*nowhere: expected a folder with train\.jsonl"):
        preflight(config("dpo", dpo={"policy": policy, "comparisons": str(tmp_path / "nowhere")}), run)


def test_ranks_share_a_batch_and_the_plan_leaves_the_stage_out(files: Path, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"dpo\.batch_size \(9\) must be a multiple .*dpo\.batch_size=10"):
        RLHFConfig.model_validate({"stages": ("dpo",), "dpo": {"batch_size": 9}, "distributed": {"num_processes": 2}})
    with pytest.raises(ConfigError, match=r"no training stage that is planned \(sft, reward_model, ppo; dpo is not\)"):
        make_plan(RLHFConfig.model_validate({"stages": ("dpo",)}))

    def fingerprint(**values: Any) -> str:
        given = {"policy": str(files / "policy"), "comparisons": str(files / "comparisons"), **values}
        return plan_stage(tiny_config(files, dpo=given), RunFolder(tmp_path), "dpo", "0").fingerprint

    before = fingerprint()
    assert fingerprint(save_every=7, micro_batch_size=2) == before
    changes: list[dict[str, Any]] = [
        {"beta": 0.3},
        {"loss": "ipo"},
        {"num_comparisons": 3},
        {"reference": str(files / "other")},
    ]
    assert len({before, *(fingerprint(**change) for change in changes)}) == 5
