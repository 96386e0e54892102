"""Stages sft and reward_model from their inputs to their folder, in one process."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf.config import RLHFConfig, config_from_values
from rlhf.data import load_demonstrations
from rlhf.data.tokenization import EncodedPair, encode_pair
from rlhf.distributed import checkpoints
from rlhf.models.loading import load_policy, load_tokenizer
from rlhf.models.scalar import ScalarModel, ensure_distinct_pad
from rlhf.stages import reward_model, sft, trl_adapter
from rlhf.stages.comparisons import comparisons_of
from rlhf.stages.context import StageOutput
from rlhf.stages.reward_measures import encode_all, score_sequences
from rlhf.stages.trl_adapter import Schedule, example_order
from tests.stage_example import (
    SPLIT_SIZES,
    make_context,
    metrics_of,
    recorded_resumes,
    tiny_config,
    weight_bytes,
    write_comparisons,
    write_demonstrations,
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stages")
    write_demonstrations(folder / "data")
    write_comparisons(folder / "comparisons")
    return folder


@pytest.fixture(scope="module")
def base(files: Path) -> Path:
    """The finished run of stage sft that the tests below start from and compare with."""
    sft.run(make_context(tiny_config(files), files / "base", "sft"))
    return files / "base"


def _run(module: ModuleType, config: RLHFConfig, run: Path, files: Path, base: Path) -> StageOutput:
    stage = module.__name__.rpartition(".")[2]
    inputs: dict[str, str] = {}
    if stage == "reward_model":
        inputs = {"base": str(base / "stages/sft/model"), "comparisons": str(files / "comparisons")}
    output: StageOutput = module.run(make_context(config, run, stage, inputs))
    return output


BOTH = pytest.mark.parametrize("module", [sft, reward_model], ids=["sft", "reward_model"])


def _stage(module: ModuleType) -> str:
    return module.__name__.rpartition(".")[2]


# --- the loss -----------------------------------------------------------------------------------------------------


def _first_batch(files: Path, initial: Path, purpose: str) -> list[EncodedPair]:
    tokenizer = load_tokenizer(initial)
    rows = load_demonstrations(tiny_config(files).data).train
    order = example_order(Schedule(len(rows), 1, 8, 8, 1), seed=1, purpose=purpose)
    return [encode_pair(tokenizer, rows[number].prompt, rows[number].response) for number in order]


def _token_mean_by_hand(model: torch.nn.Module, pairs: list[EncodedPair], *, with_prompt: bool) -> torch.Tensor:
    """One sequence at a time, without padding; the sum over all counted tokens divided once, in float64."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for prompt, response in pairs:
        ids = torch.tensor([prompt + response])
        logits = model(input_ids=ids).logits[0].double()
        for place in range(1 if with_prompt else len(prompt), ids.shape[1]):
            total = total + torch.logsumexp(logits[place - 1], 0) - logits[place - 1, ids[0, place]]
            count += 1
    return total / count


@pytest.mark.parametrize(("micro", "with_prompt"), [(2, False), (None, True)])
def test_sft_loss_is_the_mean_over_the_tokens_of_the_whole_batch(
    files: Path, tmp_path: Path, micro: int | None, with_prompt: bool
) -> None:
    """Responses of two to six tokens: a mean of micro-batch means would be another number."""
    section = {"max_steps": 1, "micro_batch_size": micro, "train_on_prompt": with_prompt, "max_grad_norm": 1e6}
    sft.run(make_context(tiny_config(files, sft=section), tmp_path, "sft"))
    [line] = metrics_of(tmp_path, "sft")
    initial = tmp_path / "stages/sft/initial"
    model = load_policy(initial)
    loss = _token_mean_by_hand(model, _first_batch(files, initial, "sft"), with_prompt=with_prompt)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients))
    assert line["sft/loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert line["sft/grad_norm"] == pytest.approx(norm, rel=1e-5)


def test_reward_loss_is_the_mean_over_the_pairs_of_the_whole_batch(files: Path, base: Path, tmp_path: Path) -> None:
    section = {"max_steps": 1, "micro_batch_size": 2, "center_coefficient": 0.3}
    config = tiny_config(files, reward_model=section)
    _run(reward_model, config, tmp_path, files, base)
    [line] = metrics_of(tmp_path, "reward_model")
    policy = base / "stages/sft/model"
    scalar = ScalarModel.from_policy(policy, seed=1)
    tokenizer = ensure_distinct_pad(load_tokenizer(policy), scalar.model)
    context = make_context(config, tmp_path, "reward_model", {"comparisons": str(files / "comparisons")})
    pairs = encode_all(tokenizer, comparisons_of(context, tokenizer).train)
    order = example_order(Schedule(len(pairs), 1, 8, 8, 1), seed=1, purpose="reward_model")
    total = 0.0
    for number in order:
        chosen, rejected = (_score_alone(scalar, pair) for pair in pairs[number])
        total += math.log1p(math.exp(rejected - chosen)) + 0.3 * (chosen + rejected) ** 2
    assert line["reward_model/loss"] == pytest.approx(total / 8, rel=1e-5)


@torch.no_grad()
def _score_alone(scalar: ScalarModel, pair: EncodedPair) -> float:
    """The score of an unpadded sequence."""
    ids = torch.tensor([pair.prompt_ids + pair.response_ids])
    return float(scalar(ids, torch.ones_like(ids, dtype=torch.bool))[0, -1])


@BOTH
def test_accumulation_changes_nothing(files: Path, base: Path, tmp_path: Path, module: ModuleType) -> None:
    stage = _stage(module)
    for name, micro in (("whole", None), ("split", 2)):
        section = {"micro_batch_size": micro, "max_steps": 4}
        _run(module, tiny_config(files, **{stage: section}), tmp_path / name, files, base)
    whole, split = (
        load_file(tmp_path / name / "stages" / stage / "model/model.safetensors") for name in ("whole", "split")
    )
    for name, weight in whole.items():
        torch.testing.assert_close(split[name], weight, rtol=1e-4, atol=2e-5)
    for one, other in zip(metrics_of(tmp_path / "whole", stage), metrics_of(tmp_path / "split", stage), strict=True):
        assert other[f"{stage}/loss"] == pytest.approx(one[f"{stage}/loss"], rel=1e-4)


# --- what comes out -----------------------------------------------------------------------------------------------


def test_sft_publishes_a_model_that_transformers_loads(base: Path, files: Path) -> None:
    folder = base / "stages/sft/model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids, policy = torch.tensor([tokenizer.encode("the train film 3 was good")]), load_policy(folder)
    weights = model.state_dict()
    assert weights.keys() == policy.state_dict().keys()
    assert all(torch.equal(weights[name], value) for name, value in policy.state_dict().items())
    with torch.no_grad():
        # Where weights lie in memory may change the last bits.
        torch.testing.assert_close(model(ids).logits, policy(ids).logits, rtol=1e-5, atol=1e-5)
    # The trainer switches the cache off; the published model generates with one.
    assert model.config.use_cache
    assert not (folder / "training_args.bin").exists()
    lines = metrics_of(base, "sft")
    # Checkpoints, at 4 and 8, change nothing of it.
    assert [line["step"] for line in lines] == [3, 6, 9, 10]
    assert lines[-1]["sft/loss"] < lines[0]["sft/loss"]
    validation = [
        encode_pair(tokenizer, row.prompt, row.response)
        for row in load_demonstrations(tiny_config(files).data).validation
    ]
    with torch.no_grad():
        expected = _token_mean_by_hand(model, validation, with_prompt=False).item()
    assert lines[-1]["sft/validation_loss"] == pytest.approx(expected, rel=1e-6)


def test_reward_model_scores_survive_saving_and_padding(files: Path, undisturbed: Path, tmp_path: Path) -> None:
    folder = undisturbed / "stages/reward_model/model"
    plain, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    scalar = ScalarModel.load(folder)
    context = make_context(tiny_config(files), tmp_path, "reward_model", {"comparisons": str(files / "comparisons")})
    splits = comparisons_of(context, tokenizer)
    scores: dict[str, list[tuple[float, float]]] = {}
    for split in ("validation", "test"):
        pairs = encode_all(tokenizer, splits.named(split))
        scores[split] = [(_score_alone(scalar, chosen), _score_alone(scalar, rejected)) for chosen, rejected in pairs]
        # Padded batches, as the stage scores them, and transformers' own pooling give what one sequence alone gives.
        batched = score_sequences(scalar, [chosen for chosen, _ in pairs], torch.device("cpu"))
        longest = max(len(chosen.prompt_ids + chosen.response_ids) for chosen, _ in pairs)
        rows = [chosen.prompt_ids + chosen.response_ids for chosen, _ in pairs]
        ids = torch.tensor([row + [tokenizer.pad_token_id] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        with torch.no_grad():
            pooled = plain(input_ids=ids, attention_mask=mask).logits.squeeze(-1).tolist()
        alone = [chosen for chosen, _ in scores[split]]
        assert batched == pytest.approx(alone, abs=1e-5)
        assert pooled == pytest.approx(alone, abs=1e-5)
    right = sum(chosen > rejected for chosen, rejected in scores["test"])
    accuracy = json.loads((undisturbed / "summary.json").read_text())["accuracy"]
    assert accuracy["value"] == right / SPLIT_SIZES["test"]
    assert accuracy["low"] <= accuracy["value"] <= accuracy["high"]
    flat = [score for pair in scores["validation"] for score in pair]
    mean = sum(flat) / len(flat)
    std = math.sqrt(sum((score - mean) ** 2 for score in flat) / len(flat))
    statistics = json.loads((folder / "rlhf_reward.json").read_text())
    assert statistics["score_mean"] == pytest.approx(mean, abs=1e-5)
    assert statistics["score_std"] == pytest.approx(std, abs=1e-5)


def test_a_model_that_knows_eight_texts_by_heart_stops_after_each(tmp_path: Path) -> None:
    """EOS is in the labels, also where it is the padding token."""
    write_demonstrations(tmp_path / "data", {"train": 8, "validation": 2, "test": 2})
    section = {"max_steps": 80, "schedule": "constant", "log_every": 40, "save_every": 80}
    sft.run(make_context(tiny_config(tmp_path, sft=section), tmp_path / "run", "sft"))
    folder = tmp_path / "run/stages/sft/model"
    model: Any = load_policy(folder)
    tokenizer = load_tokenizer(folder)
    for row in load_demonstrations(tiny_config(tmp_path).data).train:
        prompt, response = encode_pair(tokenizer, row.prompt, row.response)
        generated = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            do_sample=False,
            max_new_tokens=40,
            pad_token_id=tokenizer.pad_token_id,
        )
        assert generated[0, len(prompt) :].tolist() == response


# --- the same again, and after a kill -----------------------------------------------------------------------------


class Killed(BaseException):
    """Not an `Exception`: nothing that means well may catch it."""


def _kill_at_step(step: int) -> Callable[[pytest.MonkeyPatch], None]:
    def apply(patch: pytest.MonkeyPatch) -> None:
        original = trl_adapter._TrackingCallback.on_step_end

        def on_step_end(self: Any, args: object, state: Any, control: Any, **kwargs: Any) -> Any:
            if state.global_step == step:
                raise Killed
            return original(self, args, state, control, **kwargs)

        patch.setattr(trl_adapter._TrackingCallback, "on_step_end", on_step_end)

    return apply


def _kill_while_saving(step: int) -> Callable[[pytest.MonkeyPatch], None]:
    def apply(patch: pytest.MonkeyPatch) -> None:
        def commit(folder: Path, *arguments: Any) -> None:
            if folder.name == f"checkpoint-{step}":
                raise Killed
            checkpoints.commit(folder, *arguments)

        patch.setattr("rlhf.distributed.training_checkpoints.commit", commit)

    return apply


def _kill_after_training(patch: pytest.MonkeyPatch) -> None:
    def close(self: Any) -> None:
        raise Killed

    patch.setattr(trl_adapter.Training, "close", close)


# The stage, the kill, and what the next attempt goes on from. Both stages resume by the same code.
KILLS: dict[str, tuple[ModuleType, Callable[[pytest.MonkeyPatch], None], list[str]]] = {
    "before_any_checkpoint": (sft, _kill_at_step(2), []),
    "between_checkpoints": (reward_model, _kill_at_step(7), ["checkpoint-4"]),
    "while_saving": (sft, _kill_while_saving(8), ["checkpoint-4"]),
    "after_training": (reward_model, _kill_after_training, ["checkpoint-10"]),
}


@pytest.fixture(scope="module")
def undisturbed(files: Path, base: Path) -> Path:
    """Both stages once more, from the same configuration."""
    run = files / "undisturbed"
    _run(sft, tiny_config(files), run, files, base)
    summary = _run(reward_model, tiny_config(files), run, files, base).summary
    (run / "summary.json").write_text(json.dumps(summary))
    return run


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(
    files: Path, base: Path, undisturbed: Path, tmp_path: Path
) -> None:
    assert weight_bytes(undisturbed, "sft") == weight_bytes(base, "sft")
    assert metrics_of(undisturbed, "sft") == metrics_of(base, "sft")
    _run(reward_model, tiny_config(files), tmp_path / "again", files, base)
    assert weight_bytes(tmp_path / "again", "reward_model") == weight_bytes(undisturbed, "reward_model")
    assert metrics_of(tmp_path / "again", "reward_model") == metrics_of(undisturbed, "reward_model")
    body = {**tiny_config(files).model_dump(mode="json"), "seed": 2}
    _run(reward_model, config_from_values(body, "test"), tmp_path / "other", files, base)
    assert weight_bytes(tmp_path / "other", "reward_model") != weight_bytes(undisturbed, "reward_model")


@pytest.mark.parametrize(("module", "kill", "resumed"), KILLS.values(), ids=KILLS.keys())
def test_a_killed_stage_goes_on_to_the_same_bytes(
    files: Path,
    base: Path,
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: ModuleType,
    kill: Callable[[pytest.MonkeyPatch], None],
    resumed: list[str],
) -> None:
    stage = _stage(module)
    with monkeypatch.context() as patch:
        kill(patch)
        with pytest.raises(Killed):
            _run(module, tiny_config(files), tmp_path, files, base)
    with recorded_resumes() as found:
        output = _run(module, tiny_config(files), tmp_path, files, base)
    assert found == resumed
    assert output.outputs == ["model"]
    assert weight_bytes(tmp_path, stage) == weight_bytes(undisturbed, stage)
    assert metrics_of(tmp_path, stage) == metrics_of(undisturbed, stage)


@BOTH
def test_libraries_print_nothing(
    files: Path, base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], module: ModuleType
) -> None:
    _run(module, tiny_config(files, **{_stage(module): {"max_steps": 2}}), tmp_path, files, base)
    out, err = capfd.readouterr()
    assert all(line.startswith(_stage(module)) for line in out.splitlines()), out
    assert err == ""
