"""Where a stage's numbers and samples go: `metrics.jsonl` and `samples.jsonl` always, the console, and W&B."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any

from rlhf.config.tracking import TrackingConfig
from rlhf.errors import Stopped, StorageError
from rlhf.runs import manifest
from rlhf.runs.console import StageProgress
from rlhf.runs.folder import RunFolder
from rlhf.runs.metrics_file import LineWriter, rewind
from rlhf.runs.wandb_logger import WandbLogger

RESERVED = ("stage", "step")


class Tracker:
    """One stage's tracker; use it as a context manager. On other ranks than the main one every method does nothing.

    Log a step before saving the checkpoint of that step: a resumed run keeps the lines up to its checkpoint.
    """

    def __init__(
        self,
        stage: str,
        metrics: LineWriter | None = None,
        samples: LineWriter | None = None,
        progress: StageProgress | None = None,
        wandb: WandbLogger | None = None,
        folder: RunFolder | None = None,
    ) -> None:
        self.stage = stage
        self._metrics = metrics
        self._samples = samples
        self._progress = progress
        self._wandb = wandb
        self._folder = folder

    @classmethod
    def open(
        cls,
        folder: RunFolder,
        config: TrackingConfig,
        stage: str,
        total_steps: int | None,
        resume_step: int = 0,
        run_config: Mapping[str, Any] | None = None,
        is_main: bool = True,
    ) -> Tracker:
        """Opens the files, after taking back this stage's lines beyond `resume_step` (0: all of them; the stage
        begins anew) and torn lines: a resumed run's files equal those of an undisturbed one.

        `total_steps` is the step at which the stage ends, None when unknown; `run_config` is shown at W&B.
        Raises `DiskFullError`.
        """
        if not is_main:
            return cls(stage)
        folder.create()
        rewind(folder.metrics, stage, resume_step)
        rewind(folder.samples, stage, resume_step)
        progress = StageProgress(stage, total_steps, initial_step=resume_step)
        return cls(
            stage,
            LineWriter(folder.metrics),
            LineWriter(folder.samples),
            progress,
            WandbLogger.open(folder, config, stage, run_config or {}, progress.message),
            folder,
        )

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Writes one line of numbers, `group/name` each, sorted by name. NaN and infinities are written as null.

        Raises `ValueError` for a metric named `stage` or `step`, and `DiskFullError`.
        """
        if self._metrics is None:
            return
        for name in RESERVED:
            if name in metrics:
                raise ValueError(f"a metric cannot be named {name!r}: it names the line's own field")
        line = self._metrics.num_lines
        self._metrics.append({"stage": self.stage, "step": step, **dict(sorted(metrics.items()))})
        if self._progress is not None:
            self._progress.update(step, metrics)
        if self._wandb is not None:
            self._wandb.log(line, step, metrics)

    def log_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes sampled texts, one line each."""
        if self._samples is None or self._metrics is None:
            return
        for row in rows:
            self._samples.append({"stage": self.stage, "step": step, **row})
        self.progress(step)
        if self._wandb is not None:
            self._wandb.log_samples(self._metrics.num_lines, step, rows)

    def progress(self, step: int, metrics: Mapping[str, float | None] | None = None) -> None:
        """Shows progress on the console only; for counts that are not worth a line in the files."""
        if self._progress is not None:
            self._progress.update(step, metrics or {})

    def message(self, text: str) -> None:
        """Prints a line without disturbing the progress line."""
        if self._progress is not None:
            self._progress.message(text)

    def close(self, *, failed: bool = False, stopping: bool = False) -> None:
        """Flushes and closes everything, in a hurry when `stopping`; closing again does nothing."""
        if self._progress is not None:
            self._progress.close()
        if self._wandb is not None:
            self._wandb.close(failed=failed, hurry=stopping)
        for writer in (self._metrics, self._samples):
            if writer is not None:
                writer.close()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        stop = _stop_behind(error)
        if isinstance(error, Stopped) and self._folder is not None and manifest.read_manifest(self._folder):
            # Before anything that may take longer than a stop is given. A full disk is the next start's affair.
            with suppress(StorageError):
                manifest.note_stop(self._folder, self.stage, error)
        self.close(failed=error is not None, stopping=stop)


def _stop_behind(error: BaseException | None) -> bool:
    """Whether the process was told to end, also where that went wrong."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None
