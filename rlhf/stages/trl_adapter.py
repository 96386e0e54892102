"""Between our config, run folder and tracker and the trainers: arguments, order of examples, callbacks, resume.

TRL's trainers train causal models on plain losses, those of `rlhf.stages.sum_trainer` everything else.

The trainer decides nothing that a number of ranks could change: it is given the examples of every step in order, all
batches are full, and the last batch of an epoch goes on into the next one.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import huggingface_hub.constants
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback
from trl.trainer.reward_trainer import RewardTrainer
from trl.trainer.sft_trainer import SFTTrainer

from rlhf.distributed.placing import linear_put_back, place
from rlhf.distributed.runtime import reset_library_state
from rlhf.distributed.stopping import StopPoll, polled
from rlhf.errors import Stopped
from rlhf.models.loading import quiet
from rlhf.runs.files import disk_errors
from rlhf.runs.tracking import Tracker
from rlhf.stages.dpo_trainer import PreparedDPOTrainer
from rlhf.stages.trl_arguments import Kind as Kind
from rlhf.stages.trl_arguments import Schedule as Schedule
from rlhf.stages.trl_arguments import example_order as example_order
from rlhf.stages.trl_arguments import plan_schedule as plan_schedule
from rlhf.stages.trl_arguments import training_arguments as training_arguments
from rlhf.stages.trl_checkpoints import Checkpoint, TrainerCheckpoints

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerControl, TrainerState

    from rlhf.config.training import TrainingConfig
    from rlhf.stages.context import StageContext


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
    "rewards/accuracies": "accuracy",
    "rewards/margins": "margin",
    "rewards/chosen": "chosen_reward",
    "rewards/rejected": "rejected_reward",
    "logps/chosen": "chosen_logprob",
    "logps/rejected": "rejected_logprob",
}
_TRL_TRAINERS: dict[Kind, Any] = {"sft": SFTTrainer, "reward_model": RewardTrainer, "dpo": PreparedDPOTrainer}


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
        reference: PreTrainedModel | None = None,
    ) -> None:
        """`rows` are the columns of the tokenised examples, in any order that is the same on all ranks.

        `trainer_class` makes a `SumTrainer` for what TRL's trainer of this kind cannot do (None: that one). DPO has a
        frozen `reference`, another object than the model.
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
                **({} if reference is None else {"ref_model": reference}),
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
            if getattr(trainer, "ref_model", None) is not None:
                trainer.ref_model.destroy()
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
    tracker = context.open_tracker(schedule.num_steps, resume_step)
    for note in notes:
        tracker.message(note)
    return tracker
