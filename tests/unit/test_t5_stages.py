"""Stages sft and reward_model on T5: losses of the whole step, EOS, dropout, resume, what is published."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers.models.t5.modeling_t5 import T5Attention

from rlhf.config import RLHFConfig
from rlhf.config.model import ScratchConfig
from rlhf.data import load_demonstrations
from rlhf.data.tokenization import EncodedPair, encode_pair
from rlhf.errors import ConfigError
from rlhf.models import ScalarModel, build_from_scratch, generate, load_policy, load_tokenizer, row_uniforms
from rlhf.ops.sequences import left_pad
from rlhf.records import Comparison, read_records
from rlhf.stages import demonstration_loss, reward_model, sft, trl_adapter
from rlhf.stages.reward_measures import encode_all, score_sequences
from rlhf.stages.seq2seq_training import (
    ComparisonCollator,
    ComparisonTrainer,
    DemonstrationCollator,
    reward_rows,
    sft_rows,
)
from tests.stage_example import (
    make_context,
    metrics_of,
    tiny_config,
    weight_bytes,
    write_comparisons,
    write_demonstrations,
)

SCRATCH = {"architecture": "t5", "num_layers": 2, "hidden_size": 32, "num_heads": 2, "vocab_size": 300}
PAIRS = [EncodedPair([5, 6, 1], [7, 8, 1]), EncodedPair([9, 1], [1]), EncodedPair([5, 5, 5, 5, 1], [9, 9, 9, 9, 9, 1])]


def t5_config(folder: Path, **sections: dict[str, Any]) -> RLHFConfig:
    return tiny_config(folder, model={"scratch": SCRATCH}, **sections)


@cache
def t5() -> PreTrainedModel:
    """A tiny T5. Not to be changed."""
    config = ScratchConfig.model_validate(SCRATCH)
    return build_from_scratch(config, ["the film was good"] * 9, seed=3)[0]


def run_sft(folder: Path, run: str, **sections: dict[str, Any]) -> Path:
    write_demonstrations(folder / "data")
    sft.run(make_context(t5_config(folder, **sections), folder / run, "sft"))
    return folder / run / "stages/sft/model"


def run_reward(folder: Path, run: str, base: Path, **sections: dict[str, Any]) -> Path:
    write_comparisons(folder / "comparisons")
    inputs = {"base": str(base), "comparisons": str(folder / "comparisons")}
    reward_model.run(make_context(t5_config(folder, **sections), folder / run, "reward_model", inputs))
    return folder / run / "stages/reward_model/model"


def test_row_44_batches_hold_the_response_with_eos_behind_the_start_token() -> None:
    batch = DemonstrationCollator(t5())(
        [dict(zip(sft_rows(PAIRS), row, strict=True)) for row in zip(*sft_rows(PAIRS).values(), strict=True)]
    )
    assert batch["input_ids"].tolist() == [[0, 0, 5, 6, 1], [0, 0, 0, 9, 1], [5, 5, 5, 5, 1]]
    assert batch["attention_mask"].sum(-1).tolist() == [3, 2, 5]
    assert batch["decoder_input_ids"].tolist()[0] == [0, 7, 8, 1, 0, 0]
    assert batch["decoder_input_ids"].tolist()[2] == [0, 9, 9, 9, 9, 9]
    assert batch["labels"].tolist() == [
        [7, 8, 1, -100, -100, -100],
        [1, -100, -100, -100, -100, -100],
        [9, 9, 9, 9, 9, 1],
    ]


def test_row_38_scores_are_read_behind_the_last_token_of_each_response() -> None:
    rows = reward_rows([(PAIRS[0], EncodedPair([5, 6, 1], [9, 1])), (PAIRS[2], EncodedPair([5, 5, 5, 5, 1], [1]))])
    batch = ComparisonCollator(t5())([dict(zip(rows, row, strict=True)) for row in zip(*rows.values(), strict=True)])
    assert batch["labels"].tolist() == [3, 6, 2, 1], "chosen first, then rejected"
    assert batch["decoder_input_ids"].tolist()[:2] == [[0, 7, 8, 1, 0, 0, 0], [0, 9, 9, 9, 9, 9, 1]]
    assert batch["decoder_attention_mask"].sum(-1).tolist() == [4, 7, 3, 2]
    assert batch["input_ids"].tolist() == [[0, 0, 5, 6, 1], [5, 5, 5, 5, 1]] * 2


def test_sums_of_the_validation_loss_follow_from_single_rows() -> None:
    model: Any = t5()
    expected = torch.zeros(3, dtype=torch.float64)
    with torch.no_grad():
        for prompt, response in PAIRS:
            logits = model(
                input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([[0, *response[:-1]]])
            ).logits[0]
            logprobs = logits.double().log_softmax(-1)
            for place, token in enumerate(response):
                right = float(logits[place].argmax() == token)
                expected += torch.tensor([-float(logprobs[place, token]), right, 1.0], dtype=torch.float64)
    found = demonstration_loss.loss_and_correct(model, PAIRS, 0, torch.device("cpu"))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_row_11_accumulation_gives_what_one_batch_gives(tmp_path: Path) -> None:
    """Responses have one to five words, so a mean of means would weigh their tokens otherwise."""
    steps: dict[str, Any] = {"max_steps": 3}
    whole = run_sft(tmp_path, "whole", sft=steps)
    split = run_sft(tmp_path, "split", sft={**steps, "micro_batch_size": 2})
    expected, found = load_file(whole / "model.safetensors"), load_file(split / "model.safetensors")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=2e-4, rtol=1e-3)
    lines = [metrics_of(tmp_path / run, "sft") for run in ("whole", "split")]
    for name in ("loss", "grad_norm", "token_accuracy", "entropy"):
        assert lines[1][0][f"sft/{name}"] == pytest.approx(lines[0][0][f"sft/{name}"], rel=1e-5), name
    base = run_reward(tmp_path, "whole", whole, reward_model=steps)
    pieces = run_reward(tmp_path, "split", whole, reward_model={**steps, "micro_batch_size": 2})
    expected, found = load_file(base / "model.safetensors"), load_file(pieces / "model.safetensors")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=2e-4, rtol=1e-3)
    assert bool((expected["classification_head.out_proj.bias"] == 0).all()), "no pair says anything about it"
    lines = [metrics_of(tmp_path / run, "reward_model") for run in ("whole", "split")]
    for name in ("loss", "grad_norm", "accuracy", "margin", "score_mean"):
        assert lines[1][0][f"reward_model/{name}"] == pytest.approx(lines[0][0][f"reward_model/{name}"], rel=1e-4), name


def test_the_first_loss_is_the_token_mean_of_the_first_batch(tmp_path: Path) -> None:
    write_demonstrations(tmp_path / "data")
    config = t5_config(tmp_path, sft={"log_every": 1, "max_steps": 1, "micro_batch_size": 4})
    context = make_context(config, tmp_path / "run", "sft")
    sft.run(context)
    model = load_policy(context.stage.path / "initial")
    tokenizer = load_tokenizer(context.stage.path / "initial")
    schedule = trl_adapter.plan_schedule(config.sft, name="sft", num_examples=40, world_size=1)
    order = trl_adapter.example_order(schedule, seed=config.seed, purpose="sft")
    splits = load_demonstrations(config.data).train
    first = [encode_pair(tokenizer, splits[place].prompt, splits[place].response) for place in order[:8]]
    assert len({len(pair.response_ids) for pair in first}) > 2
    loss, correct, count = demonstration_loss.loss_and_correct(model, first, 0, torch.device("cpu")).tolist()
    line = metrics_of(tmp_path / "run", "sft")[0]
    assert line["sft/loss"] == pytest.approx(loss / count, rel=1e-5)
    assert line["sft/token_accuracy"] == pytest.approx(correct / count, rel=1e-5)


def test_row_44_a_model_that_learned_eight_examples_stops_and_writes_them(tmp_path: Path) -> None:
    write_demonstrations(tmp_path / "data", {"train": 8, "validation": 2, "test": 2})
    section = {"max_steps": 150, "learning_rate": 1e-2, "warmup_steps": 10, "log_every": 150, "save_every": 150}
    context = make_context(t5_config(tmp_path, sft=section), tmp_path / "run", "sft")
    sft.run(context)
    model, tokenizer = load_policy(context.stage.model), load_tokenizer(context.stage.model)
    pairs = [encode_pair(tokenizer, row.prompt, row.response) for row in load_demonstrations(context.config.data).train]
    ids, mask = left_pad([pair.prompt_ids for pair in pairs], pad_id=0)
    uniforms = row_uniforms(1, "test", 0, range(8), 0, 40)
    result = generate(
        model, ids, mask, uniforms=uniforms, temperature=0.1, max_response_tokens=40, stop_ids=[tokenizer.eos_token_id]
    )
    assert bool(result.stopped.all())
    written = [row[real].tolist() for row, real in zip(result.response_ids, result.response_mask, strict=True)]
    assert written == [pair.response_ids for pair in pairs]


def test_a_killed_stage_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = run_sft(tmp_path, "whole")
    run_reward(tmp_path, "whole", base)

    class KilledError(Exception):
        pass

    class Killing(trl_adapter._TrackingCallback):
        def on_step_end(self, args: object, state: Any, control: Any, **kwargs: Any) -> Any:
            if state.global_step == 7:
                raise KilledError
            return super().on_step_end(args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(trl_adapter, "_TrackingCallback", Killing)
        with pytest.raises(KilledError):
            run_sft(tmp_path, "killed")
        with pytest.raises(KilledError):
            run_reward(tmp_path, "killed", base)
    run_sft(tmp_path, "killed")
    run_reward(tmp_path, "killed", base)
    for stage in ("sft", "reward_model"):
        assert weight_bytes(tmp_path / "killed", stage) == weight_bytes(tmp_path / "whole", stage)
        assert metrics_of(tmp_path / "killed", stage) == metrics_of(tmp_path / "whole", stage)


def test_stages_learn_and_publish_what_plain_transformers_loads(tmp_path: Path) -> None:
    base = run_sft(tmp_path, "run", sft={"max_steps": 40, "log_every": 10})
    losses = [line["sft/loss"] for line in metrics_of(tmp_path / "run", "sft")]
    assert losses[-1] < losses[0] / 2
    assert type(AutoModelForSeq2SeqLM.from_pretrained(base)).__name__ == "T5ForConditionalGeneration"
    reward = run_reward(tmp_path, "run", base, reward_model={"max_steps": 30})
    plain = cast(Any, AutoModelForSequenceClassification.from_pretrained(reward))
    assert type(plain).__name__ == "T5ForSequenceClassification"
    last = metrics_of(tmp_path / "run", "reward_model")[-1]
    assert last["reward_model/test_accuracy"] == 1.0
    scores = score_sequences(ScalarModel.load(reward), PAIRS, torch.device("cpu"))
    one_by_one = [score_sequences(ScalarModel.load(reward), [p], torch.device("cpu"))[0] for p in PAIRS]
    assert scores == pytest.approx(one_by_one, abs=1e-5)


def test_the_center_coefficient_charges_the_squared_sum_of_a_pairs_scores(tmp_path: Path) -> None:
    base = run_sft(tmp_path, "run", sft={"max_steps": 1})
    losses = []
    for name, coefficient in (("free", 0.0), ("centred", 0.3)):
        section = {"center_coefficient": coefficient, "max_steps": 1, "log_every": 1}
        run_reward(tmp_path, name, base, reward_model=section)
        losses.append(metrics_of(tmp_path / name, "reward_model")[0]["reward_model/loss"])
    config = t5_config(tmp_path)
    schedule = trl_adapter.plan_schedule(config.reward_model, name="reward_model", num_examples=40, world_size=1)
    order = trl_adapter.example_order(schedule, seed=config.seed, purpose="reward_model")[:8]
    records = [read_records(tmp_path / "comparisons/train.jsonl", Comparison)[place] for place in order]
    scalar, device = ScalarModel.from_policy(base, seed=config.seed), torch.device("cpu")
    pairs = encode_all(load_tokenizer(base), records)
    chosen, rejected = (score_sequences(scalar, [pair[side] for pair in pairs], device) for side in (0, 1))
    expected = sum(0.3 * (first + second) ** 2 for first, second in zip(chosen, rejected, strict=True)) / 8
    assert expected > 1e-3
    assert losses[1] - losses[0] == pytest.approx(expected, rel=1e-3)


def test_dropout_is_off_while_a_reward_model_learns() -> None:
    model = ScalarModel.from_policy(t5(), seed=1).model
    for module in model.modules():
        if isinstance(module, T5Attention):
            module.dropout = 0.1
        elif isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    with pytest.raises(TypeError):  # the Trainer itself is not what this test is about
        ComparisonTrainer(model=model, center_coefficient=0.0, nonsense=1)
    assert all(module.dropout == 0.0 for module in model.modules() if isinstance(module, T5Attention))
    assert all(module.p == 0.0 for module in model.modules() if isinstance(module, torch.nn.Dropout))


def test_training_on_the_prompt_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"sft.train_on_prompt"):
        run_sft(tmp_path, "run", sft={"train_on_prompt": True})
