"""Of a training by a trainer: how many steps it has, the order of their examples, and the trainer's arguments."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from transformers import TrainingArguments
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.reward_config import RewardConfig
from trl.trainer.sft_config import SFTConfig

from rlhf.config.dpo import DPOConfig as DPOSection
from rlhf.distributed.zero import deepspeed_json
from rlhf.errors import ConfigError, DataError

if TYPE_CHECKING:
    from rlhf.config.training import TrainingConfig
    from rlhf.stages.context import StageContext

Kind = Literal["sft", "reward_model", "dpo"]

_OPTIMIZERS = {"adamw": "adamw_torch", "rmsprop": "rmsprop"}
_SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


@dataclass(frozen=True)
class Schedule:
    """How many optimiser steps there are and how a step's examples are shared out."""

    num_examples: int
    num_steps: int
    batch_size: int
    micro_batch_size: int
    accumulation_steps: int


def plan_schedule(section: TrainingConfig, *, name: str, num_examples: int, world_size: int) -> Schedule:
    """The schedule of a training section over `num_examples` examples on `world_size` ranks.

    Raises `ConfigError` when the batch cannot be shared out evenly, `DataError` when there is nothing to train on.
    """
    if num_examples == 0:
        raise DataError(
            f"stage {name} has no training examples: the training split is empty. Look at data.path, data.splits and "
            "data.on_bad_row"
        )
    per_rank, rest = divmod(section.batch_size, world_size)
    if rest:
        raise ConfigError(
            f"{name}.batch_size ({section.batch_size}) must be a multiple of the number of processes ({world_size})"
        )
    micro = per_rank if section.micro_batch_size is None else section.micro_batch_size
    if per_rank % micro:
        raise ConfigError(
            f"{name}.micro_batch_size ({micro}) must divide {name}.batch_size / processes = {section.batch_size} / "
            f"{world_size} = {per_rank}"
        )
    steps = section.max_steps
    if steps is None:
        # The tolerance keeps 0.1 * 30 examples from being a step more than 3 examples are.
        steps = max(1, math.ceil(section.num_epochs * num_examples / section.batch_size - 1e-9))
    return Schedule(num_examples, steps, section.batch_size, micro, per_rank // micro)


def example_order(schedule: Schedule, *, seed: int, purpose: str) -> list[int]:
    """Indices of the examples of all steps: a new permutation for each epoch, one after the other."""
    needed = schedule.num_steps * schedule.batch_size
    order: list[int] = []
    while len(order) < needed:
        epoch = list(range(schedule.num_examples))
        random.Random(f"{seed}/{purpose}/{len(order) // schedule.num_examples}").shuffle(epoch)
        order += epoch
    return order[:needed]


def training_arguments(
    kind: Kind,
    section: TrainingConfig,
    context: StageContext,
    schedule: Schedule,
    *,
    own: bool = False,
) -> TrainingArguments:
    """The arguments of TRL's trainer of this kind, or of an `own` one (`SumTrainer`).

    Under ZeRO-3 models loaded after this call are sharded: load them before.
    """
    arguments = _common_arguments(section, context, schedule)
    if own:
        return TrainingArguments(**arguments)
    if kind == "sft":
        # The rows come with ids and labels; there is nothing left to prepare.
        arguments |= {"dataset_kwargs": {"skip_prepare_dataset": True}, "packing": False, "shuffle_dataset": False}
        return SFTConfig(**arguments, max_length=None)
    if kind == "dpo":
        return DPOConfig(**arguments, **_dpo_arguments(section))
    arguments |= {"disable_dropout": True, "center_rewards_coefficient": _center_coefficient(section)}
    return RewardConfig(**arguments, max_length=None)


def _common_arguments(section: TrainingConfig, context: StageContext, schedule: Schedule) -> dict[str, Any]:
    """What all trainers are told alike."""
    runtime = context.runtime
    on_cpu = runtime.device.type == "cpu"
    deepspeed = deepspeed_json(
        context.config.zero,
        precision=runtime.precision,
        micro_batch_size=schedule.micro_batch_size,
        accumulation_steps=schedule.accumulation_steps,
        max_grad_norm=section.max_grad_norm,
        device_type="cpu" if on_cpu else "cuda",
        overlap=not runtime.strict,
    )
    return {
        "output_dir": str(context.stage.checkpoints),
        # Without it `torchrun` on a machine without GPU trains an independent copy on every rank.
        "use_cpu": on_cpu,
        "bf16": runtime.precision == "bf16",
        "gradient_checkpointing": section.gradient_checkpointing,
        "deepspeed": deepspeed,
        "ddp_find_unused_parameters": False,
        "per_device_train_batch_size": schedule.micro_batch_size,
        "gradient_accumulation_steps": schedule.accumulation_steps,
        "max_steps": schedule.num_steps,
        "train_sampling_strategy": "sequential",
        "dataloader_num_workers": 0,
        "remove_unused_columns": False,
        "optim": _OPTIMIZERS[section.optimizer],
        "learning_rate": section.learning_rate,
        "lr_scheduler_type": _SCHEDULES[section.schedule],
        "warmup_steps": section.warmup_steps,
        "weight_decay": section.weight_decay,
        "adam_beta1": section.adam_beta1,
        "adam_beta2": section.adam_beta2,
        "adam_epsilon": section.adam_epsilon,
        "max_grad_norm": section.max_grad_norm,
        "seed": context.config.seed,
        "data_seed": context.config.seed,
        # What determinism needs, the runtime has set. This switch also refuses kernels without a deterministic twin.
        "full_determinism": False,
        "logging_strategy": "steps",
        "logging_steps": section.log_every,
        # A NaN shows as NaN in the metrics.
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": section.save_every,
        "save_total_limit": None,
        "eval_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "log_level": "error",
        "log_level_replica": "error",
        "push_to_hub": False,
    }


def _center_coefficient(section: TrainingConfig) -> float:
    """Of the section of a reward model."""
    return float(getattr(section, "center_coefficient", 0.0))


def _dpo_arguments(section: TrainingConfig) -> dict[str, Any]:
    """Of section `dpo`."""
    assert isinstance(section, DPOSection)
    return {
        "disable_dropout": True,
        "max_length": None,
        "loss_type": [section.loss],
        "beta": section.beta,
        "label_smoothing": section.label_smoothing,
    }
