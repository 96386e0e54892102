"""The adapter to TRL's trainers: schedules, order of examples, checkpoints that are whole, publication."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.config.stages import SFTConfig
from rlhf.data.tokenization import EncodedPair
from rlhf.distributed.frozen import equal_batches
from rlhf.distributed.runtime import Runtime
from rlhf.errors import ConfigError, DataError
from rlhf.models.loading import load_policy, load_tokenizer
from rlhf.stages import context as context_module
from rlhf.stages import sft
from rlhf.stages.context import StageContext, partial_folder, publish_model
from rlhf.stages.trl_adapter import Schedule, example_order, plan_schedule, training_arguments
from tests.stage_example import make_context, tiny_config, write_demonstrations


def _context(folder: Path) -> StageContext:
    return make_context(tiny_config(folder), folder / "run", "sft")


def test_a_schedule_counts_examples_of_all_ranks() -> None:
    section = SFTConfig(batch_size=12, micro_batch_size=3, num_epochs=2.0)
    assert plan_schedule(section, name="sft", num_examples=50, world_size=2) == Schedule(50, 9, 12, 3, 2)
    assert plan_schedule(SFTConfig(batch_size=12, max_steps=4), name="sft", num_examples=5, world_size=1).num_steps == 4
    # 0.1 * 30 is a little more than 3 in binary, and still one batch of 3.
    tenth = SFTConfig(batch_size=3, num_epochs=0.1)
    assert plan_schedule(tenth, name="sft", num_examples=30, world_size=1).num_steps == 1


@pytest.mark.parametrize(
    ("section", "ranks", "named"),
    [
        (SFTConfig(batch_size=12, micro_batch_size=5), 1, "sft.micro_batch_size (5) must divide"),
        (SFTConfig(batch_size=12, micro_batch_size=12), 2, "sft.micro_batch_size (12) must divide"),
        (SFTConfig(batch_size=12), 5, "sft.batch_size (12) must be a multiple"),
    ],
)
def test_batches_that_cannot_be_shared_out_are_refused(section: SFTConfig, ranks: int, named: str) -> None:
    with pytest.raises(ConfigError, match=r"sft\.") as caught:
        plan_schedule(section, name="sft", num_examples=50, world_size=ranks)
    assert named in str(caught.value)


def test_ranks_measure_in_equally_many_batches_every_row_once() -> None:
    shares = [list(equal_batches(range(5), 1, Runtime(rank, 2, rank, torch.device("cpu"), "fp32"))) for rank in (0, 1)]
    assert [[list(batch) for batch in batches] for batches in shares] == [[[0], [2], [4]], [[1], [3], []]]


def test_an_empty_training_split_is_refused() -> None:
    with pytest.raises(DataError, match="no training examples"):
        plan_schedule(SFTConfig(), name="sft", num_examples=0, world_size=1)


def test_every_epoch_is_a_permutation_of_its_own_and_the_seed_decides() -> None:
    schedule = Schedule(num_examples=10, num_steps=6, batch_size=4, micro_batch_size=4, accumulation_steps=1)
    order = example_order(schedule, seed=1, purpose="sft")
    assert len(order) == 24
    first, second = order[:10], order[10:20]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert len(set(order[20:])) == 4
    assert order == example_order(schedule, seed=1, purpose="sft")
    assert order != example_order(schedule, seed=2, purpose="sft")
    assert order != example_order(schedule, seed=1, purpose="reward_model")
    # The order does not depend on how a step's examples are shared out.
    assert order == example_order(dataclasses.replace(schedule, micro_batch_size=1), seed=1, purpose="sft")


def test_arguments_say_what_the_section_says(tmp_path: Path) -> None:
    section = SFTConfig(
        batch_size=8,
        micro_batch_size=2,
        max_steps=7,
        learning_rate=3e-4,
        schedule="linear",
        warmup_steps=3,
        weight_decay=0.1,
        adam_beta1=0.8,
        adam_beta2=0.95,
        adam_epsilon=1e-6,
        max_grad_norm=0.7,
        gradient_checkpointing=True,
        log_every=5,
        save_every=6,
    )
    schedule = plan_schedule(section, name="sft", num_examples=40, world_size=1)
    arguments = training_arguments("sft", section, _context(tmp_path), schedule)
    assert arguments.use_cpu
    assert not arguments.bf16
    assert arguments.deepspeed is None
    assert (arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps) == (2, 4)
    assert (arguments.max_steps, arguments.learning_rate, arguments.warmup_steps) == (7, 3e-4, 3)
    assert (arguments.adam_beta1, arguments.adam_beta2, arguments.adam_epsilon) == (0.8, 0.95, 1e-6)
    assert (arguments.weight_decay, arguments.max_grad_norm, arguments.gradient_checkpointing) == (0.1, 0.7, True)
    assert (arguments.logging_steps, arguments.save_steps, arguments.lr_scheduler_type) == (5, 6, "linear")
    assert arguments.report_to == []
    assert arguments.seed == arguments.data_seed == 1


def test_labels_leave_the_prompt_out_and_keep_eos() -> None:
    pairs = [EncodedPair([1, 5, 6], [7, 2]), EncodedPair([1], [8, 9, 2])]
    assert sft.training_rows(pairs, train_on_prompt=False) == {
        "input_ids": [[1, 5, 6, 7, 2], [1, 8, 9, 2]],
        "labels": [[-100, -100, -100, 7, 2], [-100, 8, 9, 2]],
    }
    assert sft.training_rows(pairs, train_on_prompt=True)["labels"] == [[1, 5, 6, 7, 2], [1, 8, 9, 2]]


def test_a_model_is_published_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_demonstrations(tmp_path / "data")
    context = _context(tmp_path)
    base = sft.base_model(context)
    assert sft.base_model(context) == base
    model: Any = load_policy(base)
    tokenizer = load_tokenizer(base)
    publish_model(context, model, tokenizer)
    before = (context.stage.model / "model.safetensors").read_bytes()

    def torn(model: object, tokenizer: object, folder: Path, state_dict: object = None) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with torch.no_grad():
        model.get_input_embeddings().weight.zero_()
    with monkeypatch.context() as patch:
        patch.setattr(context_module, "save_model", torn)
        with pytest.raises(KeyboardInterrupt):
            publish_model(context, model, tokenizer)
    assert (context.stage.model / "model.safetensors").read_bytes() == before
    # What the interruption left does not disturb the next attempt.
    publish_model(context, model, tokenizer)
    assert (context.stage.model / "model.safetensors").read_bytes() != before
    assert not partial_folder(context, "model").exists()


def test_an_sft_with_adapters_leaves_the_base_alone_and_feels_dropout(tmp_path: Path) -> None:
    write_demonstrations(tmp_path / "data")
    base = sft.base_model(_context(tmp_path))
    before = {path.name: path.read_bytes() for path in Path(base).iterdir()}
    weights = []
    for number, dropout in enumerate((0.0, 0.5)):
        config = tiny_config(
            tmp_path,
            peft={"type": "lora", "rank": 2, "dropout": dropout},
            model={"path": base},
            sft={"max_steps": 2, "log_every": 1},
        )
        context = make_context(config, tmp_path / f"run{number}", "sft", {"base": base})
        sft.run(context)
        weights.append((context.stage.model / "adapter_model.safetensors").read_bytes())
        assert not (context.stage.model / "model.safetensors").exists()
    assert weights[0] != weights[1]
    assert {path.name: path.read_bytes() for path in Path(base).iterdir()} == before
