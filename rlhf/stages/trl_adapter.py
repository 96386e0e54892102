"""Between our config, run folder and tracker and the trainers: arguments, order of examples, callbacks, resume.

TRL's trainers train causal models on plain losses, those of `rlhf.stages.sum_trainer` everything else.

The trainer decides nothing that a number of ranks could change: it is given the examples of every step in order, all
batches are full, and the last batch of an epoch goes on into the next one.
"""

from __future__ import annotations

import math
import random
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import huggingface_hub.constants
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback, TrainingArguments
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import RewardTrainer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from rlhf.distributed.placing import linear_put_back, place
from rlhf.distributed.runtime import reset_library_state
from rlhf.distributed.stopping import StopPoll, polled
from rlhf.distributed.zero import deepspeed_json
from rlhf.errors import ConfigError, DataError, Stopped
from rlhf.models.loading import quiet
from rlhf.runs.files import disk_errors
from rlhf.runs.tracking import Tracker
from rlhf.stages.trl_checkpoints import Checkpoint, TrainerCheckpoints

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerControl, TrainerState

    from rlhf.config.training import TrainingConfig
    from rlhf.stages.context import StageContext

Kind = Literal["sft", "reward_model"]

# The trainer's name of a metric → ours, behind the stage's name.
_METRICS = {
    "loss": "loss",
    "grad_norm": "grad_norm",
    "learning_rate": "learning_rate",
    "entropy": "entropy",
    "mean_token_accuracy": "token_accuracy",
    "accuracy": "accuracy",
    "margin": "margin",
    "mean_reward": "score_mean",
    "squared_error": "squared_error",
}
_TRL_TRAINERS: dict[Kind, Any] = {"sft": SFTTrainer, "reward_model": RewardTrainer}
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
    runtime = context.runtime
    on_cpu = runtime.device.type == "cpu"
    deepspeed = deepspeed_json(
        context.config.zero,
        precision=runtime.precision,
        micro_batch_size=schedule.micro_batch_size,
        accumulation_steps=schedule.accumulation_steps,
        max_grad_norm=section.max_grad_norm,
        device_type="cpu" if on_cpu else "cuda",
    )
    arguments: dict[str, Any] = {
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
        "optim": "adamw_torch",
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
    if own:
        return TrainingArguments(**arguments)
    if kind == "sft":
        # The rows come with ids and labels; there is nothing left to prepare.
        arguments |= {"dataset_kwargs": {"skip_prepare_dataset": True}, "packing": False, "shuffle_dataset": False}
        return SFTConfig(**arguments, max_length=None)
    arguments |= {"disable_dropout": True, "center_rewards_coefficient": _center_coefficient(section)}
    return RewardConfig(**arguments, max_length=None)


def _center_coefficient(section: TrainingConfig) -> float:
    """Of the section of a reward model."""
    return float(getattr(section, "center_coefficient", 0.0))


class _TrackingCallback(TrainerCallback):
    """Sends the trainer's logs to our tracker under our names, and stops the trainer when asked:
    after an optimiser step, which is never cut short, the same one on all ranks, with a checkpoint of it."""

    def __init__(self, context: StageContext, section: TrainingConfig, schedule: Schedule, tracker: Tracker) -> None:
        self.context = context
        self.section = section
        self.schedule = schedule
        self.tracker = tracker
        self.timing: dict[str, float] = {}
        self.stop = StopPoll()
        self.stopped_by: int | None = None
        self.checkpoints: TrainerCheckpoints | None = None
        self._clock = 0.0
        self._step = 0
        self._num_tokens = 0.0

    def on_train_begin(self, args: object, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._clock, self._step = time.monotonic(), state.global_step
        if self.checkpoints is not None:
            self._num_tokens = self.checkpoints.restore_averages()
        # Preparing the model may have taken long; nothing is trained yet that a checkpoint could keep.
        number = self.stop.agreed()
        if number is not None:
            raise Stopped(number, state.global_step)

    def on_step_end(self, args: object, state: TrainerState, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        if state.global_step >= self.schedule.num_steps:
            control.should_log = True
        self.stopped_by = self.stop.agreed()
        if self.stopped_by is not None:
            control.should_save = True
            control.should_training_stop = True
        if not control.should_log:
            self.tracker.progress(state.global_step)
        return control

    def on_log(
        self,
        args: object,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs:
            return
        now, step = time.monotonic(), state.global_step
        seconds = max(now - self._clock, 1e-9)
        tokens = logs.get("num_tokens", 0.0)
        self.timing = {
            "perf/step_seconds": seconds / max(step - self._step, 1),
            "perf/train_tokens_per_second": max(tokens - self._num_tokens, 0.0) / seconds,
        }
        self._clock, self._step, self._num_tokens = now, step, tokens
        # The last step's line is written by `log_last_step`, together with what is measured after training.
        if step < self.schedule.num_steps:
            metrics = _renamed(logs, self.context.stage.name, step, self.schedule)
            self.tracker.log(step, {**metrics, **self.timing})

    def on_save(self, args: object, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # A checkpoint takes time that belongs to no step.
        self._clock = time.monotonic()


def _renamed(logs: Mapping[str, float], stage: str, step: int, schedule: Schedule) -> dict[str, float]:
    metrics = {f"{stage}/{ours}": float(logs[theirs]) for theirs, ours in _METRICS.items() if theirs in logs}
    return {**metrics, f"{stage}/epoch": step * schedule.batch_size / schedule.num_examples}


def _tied(state: dict[str, Any] | None, model: PreTrainedModel) -> dict[str, Any] | None:
    """`state` with one tensor for every weight that `model` has under several names: gathering copies each name's."""
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = names.setdefault(id(parameter), name)
        if state is not None and first in state and name in state:
            state[name] = state[first]
    return state


@contextmanager
def _silence() -> Iterator[None]:
    with warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")
        yield


class Training:
    """One training of a stage by a trainer, from its arguments to the trained weights."""

    def __init__(
        self,
        kind: Kind,
        context: StageContext,
        section: TrainingConfig,
        schedule: Schedule,
        tracker: Tracker,
        *,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        rows: Mapping[str, Sequence[Any]],
        collator: Any = None,
        trainer_class: Callable[..., Any] | None = None,
    ) -> None:
        """`rows` are the columns of the tokenised examples, in any order that is the same on all ranks.

        `trainer_class` makes a `SumTrainer` for what TRL's trainer of this kind cannot do (None: that one).
        """
        self.context, self.schedule, self.tracker = context, schedule, tracker
        self._use_cache = model.config.use_cache
        self._last: Mapping[str, float] = {}
        self._callback = _TrackingCallback(context, section, schedule, tracker)
        order = example_order(schedule, seed=context.config.seed, purpose=kind)
        # A library that reports its use to its maker would also wait for the network.
        huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True
        with _silence():
            arguments = training_arguments(kind, section, context, schedule, own=trainer_class is not None)
            if context.config.zero.stage == 3:  # before DeepSpeed moves all of it to the device
                place(model, context.runtime, cast("dict[str, Any]", arguments.deepspeed))
            self.trainer: Any = (trainer_class or _TRL_TRAINERS[kind])(
                model=model,
                args=arguments,
                train_dataset=Dataset.from_dict(dict(rows)).select(order),
                processing_class=tokenizer,
                data_collator=collator,
                callbacks=[self._callback],
            )
        self.trainer.remove_callback(PrinterCallback)
        self._checkpoints = TrainerCheckpoints(context, self.trainer, section.keep_checkpoints)
        self._callback.checkpoints = self._checkpoints
        ranks = self.trainer.accelerator.num_processes
        if ranks != context.runtime.world_size:
            raise RuntimeError(f"the trainer sees {ranks} processes, the launcher started {context.runtime.world_size}")
        if kind == "sft":
            # The loss is a sum over the tokens of the global batch whatever the model's own loss can do.
            self.trainer.model_accepts_loss_kwargs = True

    def run(self, checkpoint: Checkpoint | None) -> None:
        """Trains to the last step, from `checkpoint` where there is one. Raises `DiskFullError`.

        Told to stop by a signal, raises `Stopped` after a step of which there is a checkpoint.
        """
        runtime, parent = self.context.runtime, self.context.stage.checkpoints
        with (
            _silence(),
            linear_put_back(),
            self._checkpoints.resuming(checkpoint) as start,
            disk_errors(parent),
            polled(runtime) as self._callback.stop,
        ):
            self.trainer.train(resume_from_checkpoint=start)
            if self._callback.stopped_by is not None:
                runtime.barrier()  # one that left now would look like a failure, and rank 0 may still be writing
                raise Stopped(self._callback.stopped_by, self.trainer.state.global_step)
        self.trainer.model.config.use_cache = self._use_cache
        self._last = next(entry for entry in reversed(self.trainer.state.log_history) if "loss" in entry)

    def weights(self) -> dict[str, Tensor] | None:
        """The gathered weights, complete on rank 0, where they are sharded; None where the model itself has them.

        All ranks call it.
        """
        if not self.trainer.is_deepspeed_enabled:
            return None
        state = self.trainer.accelerator.get_state_dict(self.trainer.model_wrapped)
        return cast("dict[str, Tensor] | None", _tied(state, self.trainer.model))

    @property
    def last_loss(self) -> float:
        """The training loss of the last steps, as the last line of the metrics has it."""
        return float(self._last["loss"])

    def log_last_step(self, measured: Mapping[str, float]) -> None:
        """Writes the last step's line with `measured`, which was found after training; also after a resume."""
        step = self.schedule.num_steps
        metrics = _renamed(self._last, self.context.stage.name, step, self.schedule)
        self.tracker.log(step, {**metrics, **self._callback.timing, **measured})

    def close(self) -> None:
        """Frees the trainer's memory; models loaded from here on are whole again, also after ZeRO-3."""
        trainer = self.trainer
        if trainer.is_deepspeed_enabled:
            trainer.model_wrapped.destroy()
        trainer.accelerator.free_memory()
        trainer.args.hf_deepspeed_config = None
        reset_library_state()
        del self.trainer


def open_tracker(
    context: StageContext, schedule: Schedule, checkpoint: Checkpoint | None, notes: Sequence[str]
) -> Tracker:
    """The stage's tracker, its files taken back to `checkpoint`; prints `notes`."""
    # The very last step's line is always written anew, since what it says is measured after the last checkpoint.
    resume_step = 0 if checkpoint is None else min(checkpoint.step, schedule.num_steps - 1)
    tracker = Tracker.open(
        context.run,
        context.config.tracking,
        context.stage.name,
        schedule.num_steps,
        resume_step,
        context.config.model_dump(mode="json"),
        context.runtime.is_main,
    )
    for note in notes:
        tracker.message(note)
    return tracker
