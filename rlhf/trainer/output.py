"""What a trainer writes: numbers, samples and checkpoints in `output_dir`, or nothing; and what it remembers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.config.ppo import PPOConfig
from rlhf.config.tracking import TrackingConfig
from rlhf.distributed.checkpoints import checkpoints_in
from rlhf.errors import ConfigError
from rlhf.runs.console import StageProgress
from rlhf.runs.files import clean_partial, disk_errors, write_json
from rlhf.runs.folder import RunFolder
from rlhf.runs.jsonable import read_json
from rlhf.runs.metrics_file import LineWriter, count_lines, rewind
from rlhf.runs.tracking import StageSinks, Tracker

if TYPE_CHECKING:
    from rlhf.distributed.runtime import Runtime

STAGE = "ppo"
SETTINGS_FILE = "trainer.json"


class MemoryTracker(Tracker):
    """A tracker that also keeps every line of numbers in `history`; without files it shows progress all the same."""

    def __init__(self, history: list[dict[str, float]], progress: StageProgress | None = None, **files: Any) -> None:
        super().__init__(STAGE, progress=progress, **files)
        self.history = history
        self._writes = files.get("metrics") is not None

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Keeps, shows and, with files, writes the numbers of a step."""
        numbers = {name: float("nan") if value is None else float(value) for name, value in sorted(metrics.items())}
        self.history.append({"step": float(step), **numbers})
        super().log(step, metrics)
        if not self._writes:
            self.progress(step, metrics)


@dataclass(frozen=True)
class Output:
    """Where a training goes. `folder=None` writes nothing."""

    folder: Path | None
    tracking: TrackingConfig
    verbose: bool
    runtime: Runtime
    history: list[dict[str, float]] = field(default_factory=list)

    @property
    def checkpoints(self) -> Path | None:
        """States to resume from."""
        return None if self.folder is None else self.folder / "checkpoints"

    def lock(self) -> AbstractContextManager[object]:
        """Keeps other processes out of the folder; rank 0 holds it."""
        return RunFolder(self.folder).lock() if self.folder is not None and self.runtime.is_main else nullcontext()

    def begin(self, settings: Mapping[str, Any], *, resume: bool) -> None:
        """Makes the folder ready; all ranks call it.

        Raises `ConfigError` when the folder holds another training, or the same one and `resume` is False.
        """
        if self.folder is None:
            if resume:
                raise ConfigError(
                    "train(resume=True) goes on from a checkpoint: give the trainer the output_dir it is in"
                )
            return
        if self.runtime.is_main:
            with disk_errors(self.folder):
                try:
                    self.folder.mkdir(parents=True, exist_ok=True)
                except OSError as error:
                    raise ConfigError(f"output_dir={self.folder} cannot be made: {error}") from error
        trouble = self._trouble(self.folder, settings, resume) if self.runtime.is_main else None
        trouble = self.runtime.broadcast_object(trouble)
        if trouble is not None:
            raise ConfigError(trouble)

    def start(self, settings: Mapping[str, Any]) -> None:
        """Notes what this training is, for a later `begin`, and removes what a killed attempt left half-written."""
        if self.folder is not None and self.runtime.is_main:
            checkpoints = self.folder / "checkpoints"
            clean_partial(checkpoints)
            write_json(self.folder / SETTINGS_FILE, settings)

    def _trouble(self, folder: Path, settings: Mapping[str, Any], resume: bool) -> str | None:
        numbers = RunFolder(folder).metrics
        if not checkpoints_in(folder / "checkpoints") and not (numbers.exists() and numbers.stat().st_size):
            return None
        if not resume:
            return (
                f"output_dir={folder} holds a training already. Go on with it by train(resume=True), give another "
                "folder, or remove this one"
            )
        before = read_json(folder / SETTINGS_FILE)
        if not isinstance(before, dict):
            return f"output_dir={folder} holds something that no trainer wrote ({SETTINGS_FILE} is missing)"
        now = json.loads(json.dumps(settings))
        changed = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
        if not changed:
            return None
        copied = " ref_model is by default a copy of model." if "ref_model" in changed else ""
        return (
            f"output_dir={folder} holds a training with other settings ({', '.join(changed)}): it can go on only as it "
            f"began.{copied} Set them back, or give another folder"
        )

    def open(self, args: PPOConfig, done: int) -> Tracker:
        """The tracker of a training that has done `done` updates; lines of later ones are taken back first."""
        self.history.clear()
        if self.folder is None:
            progress = StageProgress(STAGE, args.num_updates, initial_step=done) if self._shows else None
            return MemoryTracker(self.history, progress)
        folder = RunFolder(self.folder)
        lines_before = count_lines(folder.metrics)
        if self.runtime.is_main:
            rewind(folder.metrics, STAGE, done)
            rewind(folder.samples, STAGE, done)
            self.history.extend(_read_history(folder.metrics))
        earlier = self.runtime.broadcast_object(list(self.history))
        if not self.runtime.is_main:
            self.history.extend(earlier)
            return MemoryTracker(self.history)
        progress = StageProgress(STAGE, args.num_updates, initial_step=done) if self._shows else None
        metrics = LineWriter(folder.metrics)
        sinks = StageSinks(folder, self.tracking, STAGE, args.model_dump(mode="json"))
        sinks.open(_message_of(progress), done, lines_before, metrics.num_lines)
        return MemoryTracker(
            self.history,
            progress,
            metrics=metrics,
            samples=LineWriter(folder.samples),
            sinks=sinks,
        )

    @property
    def _shows(self) -> bool:
        return self.verbose and self.runtime.is_main


def _message_of(progress: StageProgress | None) -> Any:
    return (lambda text: None) if progress is None else progress.message


def _read_history(path: Path) -> list[dict[str, float]]:
    if not path.exists():
        return []
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [
        {name: float("nan") if value is None else float(value) for name, value in line.items() if name != "stage"}
        for line in lines
        if line["stage"] == STAGE
    ]
