"""What every stage gets and gives back, and how a trained model is put into its folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.models.loading import quiet
from rlhf.models.saving import save_model
from rlhf.runs.files import PARTIAL, discard, disk_errors, publish_folder
from rlhf.runs.tracking import StageSinks, Tracker
from rlhf.runs.wandb_logger import resolve_mode, run_id

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rlhf.config import RLHFConfig
    from rlhf.distributed.runtime import Runtime
    from rlhf.runs.folder import RunFolder, StageFolder


@dataclass(frozen=True)
class StageContext:
    """One stage of one run, on one rank.

    `inputs` maps the names of what the stage reads (`policy`, `base`, `reference`, `reward_model`, `value_model`,
    `baseline`, `comparisons`) to a local path or hub id. `sinks` are where its tracker's numbers go besides the run
    folder; they stay open until the result is recorded. None: the tracker opens and closes its own.
    """

    config: RLHFConfig
    run: RunFolder
    stage: StageFolder
    runtime: Runtime
    inputs: Mapping[str, str] = field(default_factory=dict)
    sinks: StageSinks | None = None

    def open_tracker(self, total_steps: int | None, resume_step: int = 0) -> Tracker:
        """The stage's tracker, see `Tracker.open`; on other ranks than the main one it does nothing."""
        return Tracker.open(
            self.run,
            self.config.tracking,
            self.stage.name,
            total_steps,
            resume_step,
            self.config.model_dump(mode="json"),
            self.runtime.is_main,
            self.sinks,
        )

    @property
    def provenance(self) -> dict[str, str]:
        """What a checkpoint belongs to: the hash of config, data and inputs, and the W&B run, as far as there are.

        A run folder whose `wandb_id` is lost takes that run up again from its checkpoints.
        """
        found = {"fingerprint": self.stage.read_fingerprint()}
        if self.runtime.is_main and resolve_mode(self.config.tracking) != "disabled":
            run_id(self.run)  # it is chosen here where this comes before the tracker, as in PPO
        if self.run.wandb_id.exists():
            found["wandb_run_id"] = self.run.wandb_id.read_text(encoding="utf-8").strip()
        return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True)
class StageOutput:
    """What a stage hands back: its key results, and the paths, relative to its folder, that count as its output."""

    summary: dict[str, Any]
    outputs: list[str]


def save_partial(
    context: StageContext,
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    state_dict: dict[str, Tensor] | None = None,
) -> None:
    """Writes folder `name` of the stage under its unfinished name. Rank 0 alone calls it. Raises `DiskFullError`."""
    with writing_partial(context, name) as folder:
        save_model(model, tokenizer, folder, state_dict=state_dict)


@contextmanager
def writing_partial(context: StageContext, name: str) -> Iterator[Path]:
    """The unfinished folder `name`, empty, to be written into. Rank 0 alone enters. Raises `DiskFullError`."""
    temporary = partial_folder(context, name)
    with disk_errors(temporary), quiet():
        discard(temporary)
        yield temporary


def partial_folder(context: StageContext, name: str) -> Path:
    """Where folder `name` of the stage lies until `publish` gives it its name; a killed run's is removed later."""
    return context.stage.path / (name + PARTIAL)


def publish(context: StageContext, name: str) -> Path:
    """Makes what rank 0 saved as `name` whole and visible, and returns where. All ranks call and return together."""
    final = context.stage.path / name
    if context.runtime.is_main:
        publish_folder(partial_folder(context, name), final)
    context.runtime.barrier()
    return final


def publish_model(
    context: StageContext,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    state_dict: dict[str, Tensor] | None = None,
) -> Path:
    """Writes the stage's `model/`, which is whole or absent whenever the process dies. All ranks call it.

    `state_dict` replaces the model's own weights where those are sharded; it may be None on the other ranks.
    """
    name = context.stage.model.name
    if context.runtime.is_main:
        save_partial(context, name, model, tokenizer, state_dict)
    return publish(context, name)
