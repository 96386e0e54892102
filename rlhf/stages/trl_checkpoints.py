"""Checkpoints of a TRL trainer: the trainer decides when, what is written and read is ours.

The trainer's own ones are pickles, sharded ones can be read by as many ranks as wrote them alone, and the sums between
two logs are in none. Ours are those of our own loop (`rlhf.distributed.training_checkpoints`), with the trainer's
counters and its log beside the weights.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import transformers.trainer

from rlhf.distributed.checkpoints import checkpoint_folder, prune_checkpoints
from rlhf.distributed.training_checkpoints import TrainingCheckpoints, check_provenance
from rlhf.distributed.training_checkpoints import find_checkpoint as find_training_checkpoint
from rlhf.stages.trl_averages import LogAverages

if TYPE_CHECKING:
    from rlhf.stages.context import StageContext

# What a transformers Trainer reads its counters from, in the folder it resumes from.
_TRAINER_STATE = "trainer_state.json"


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint to go on from."""

    path: Path
    step: int


def find_checkpoint(context: StageContext) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint of the stage, and notes for the user on it, on damaged ones and on another shape.

    All ranks call it and get the same answer.
    """
    path, notes = find_training_checkpoint(context.stage.checkpoints, context.runtime, context.config.zero.stage)
    if path is None:
        return None, notes
    notes.append(f"the training goes on from {path.name}")
    return Checkpoint(path, int(path.name.rpartition("-")[2])), notes


class TrainerCheckpoints:
    """Writes and reads the checkpoints of one trainer, in place of its own methods for that.

    Those have no public names: `tests/pipeline/test_trl_stages.py` fails when a library renames them.
    """

    def __init__(self, context: StageContext, trainer: Any, keep: int) -> None:
        self._context, self._trainer, self._keep = context, trainer, keep
        self._averages = LogAverages(trainer, context.runtime)
        self._parts: TrainingCheckpoints | None = None
        self._loaded: dict[str, Any] | None = None
        trainer._save_checkpoint = lambda model, trial: self._save()
        trainer.create_optimizer = partial(_without_empty_groups, trainer.create_optimizer)
        for name in ("_load_from_checkpoint", "_load_optimizer_and_scheduler", "_load_scaler"):
            setattr(trainer, name, _nothing)

    @contextmanager
    def resuming(self, start: Checkpoint | None) -> Iterator[str | None]:
        """Yields what the trainer takes as `resume_from_checkpoint`; `start` is read when it has set itself up."""
        if start is None:
            yield None
            return
        trainer, library = self._trainer, cast(Any, transformers.trainer)
        whole = library.deepspeed_load_checkpoint
        body, _ = TrainingCheckpoints.read(start.path, self._context.runtime)
        check_provenance(start.path, body["provenance"], self._context.provenance)
        trainer._load_optimizer_and_scheduler = lambda folder: self._load(start.path)
        trainer._load_rng_state = lambda folder: self._training().set_generators(start.path)
        with tempfile.TemporaryDirectory(prefix="rlhf-trainer-") as folder:
            # How often it logs and saves is this run's affair.
            steps = {name: getattr(trainer.args, name) for name in ("save_steps", "logging_steps")}
            (Path(folder) / _TRAINER_STATE).write_text(json.dumps({**body["trainer"], **steps}), encoding="utf-8")
            # A function of the module and no method; it would look for DeepSpeed's own files.
            library.deepspeed_load_checkpoint = _nothing
            try:
                yield folder
            finally:
                library.deepspeed_load_checkpoint = whole

    def restore_averages(self) -> float:
        """To be called when training begins, after the trainer has reset its sums. How many tokens were trained on."""
        if self._loaded is None:
            return 0.0
        self._averages.load_state_dict(self._loaded["averages"])
        return float(self._loaded["averages"]["num_tokens"])

    def _save(self) -> None:
        trainer, runtime, parent = self._trainer, self._context.runtime, self._context.stage.checkpoints
        shared = {
            "trainer": asdict(trainer.state),
            "scheduler": trainer.lr_scheduler.state_dict(),
            "averages": self._averages.state_dict(),
            "provenance": self._context.provenance,
        }
        self._training().save(checkpoint_folder(parent, trainer.state.global_step), shared=shared)
        if runtime.is_main:
            prune_checkpoints(parent, self._keep)

    def _load(self, folder: Path) -> None:
        self._loaded, _ = self._training().load(folder, verified=True)
        self._trainer.lr_scheduler.load_state_dict(self._loaded["scheduler"])

    def _training(self) -> TrainingCheckpoints:
        """What there is to save; known when the trainer has wrapped model and optimiser."""
        if self._parts is None:
            trainer = self._trainer
            sharded = trainer.model_wrapped if trainer.is_deepspeed_enabled else None
            optimizer = trainer.optimizer if sharded is None else sharded.optimizer
            optimizer = getattr(optimizer, "optimizer", optimizer)
            self._parts = TrainingCheckpoints(trainer.model, optimizer, self._context.runtime, sharded)
        return self._parts


def _without_empty_groups(create: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    """With adapters the trainer's group without weight decay is empty, and DeepSpeed drops it: so none has it."""
    optimizer = create(*arguments, **keywords)
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
    return optimizer


def _nothing(*arguments: object, **keywords: object) -> None:
    """In place of a method that has nothing to do here."""
