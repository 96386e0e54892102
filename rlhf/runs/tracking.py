"""Where a stage's numbers and samples go: `metrics.jsonl` and `samples.jsonl` always, the console, and the sinks.

A number has one name everywhere: `group/name`, as in `metrics.jsonl`. A sink is a file and a line of `SINKS`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any

from rlhf.config.tracking import TrackingConfig
from rlhf.errors import ConfigError, Stopped, StorageError
from rlhf.runs import manifest
from rlhf.runs.console import StageProgress
from rlhf.runs.folder import RunFolder, StageResult
from rlhf.runs.metrics_file import LineWriter, count_lines, rewind
from rlhf.runs.sinks import Ending, Sink, Start
from rlhf.runs.tensorboard import TensorBoardSink
from rlhf.runs.wandb_logger import WandbLogger
from rlhf.terminal import say

RESERVED = ("stage", "step")
# Opens the sink of a stage, or returns None where the config does not want it.
SINKS: dict[str, Callable[[Start], Sink | None]] = {
    "wandb": WandbLogger.open,
    "tensorboard": TensorBoardSink.open,
}


def check_tracking(config: TrackingConfig) -> None:
    """Raises `ConfigError` when a package that the config asks for is missing. Imports none."""
    if config.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ConfigError(
            "tracking.tensorboard=true needs the package tensorboard, which is not installed. Install it with "
            "`pip install tensorboard`, or set tracking.tensorboard=false."
        )


class StageSinks:
    """The sinks of a stage until its result is recorded: a context manager around the stage, on every rank.

    They are opened by the stage's tracker, which knows where the stage goes on, or at the latest by `record`. On other
    ranks than the main one nothing is opened.
    """

    def __init__(
        self, folder: RunFolder, config: TrackingConfig, stage: str, run_config: Mapping[str, Any], is_main: bool = True
    ) -> None:
        self.folder = folder
        self.config = config
        self.stage = stage
        self.run_config = run_config
        self.is_main = is_main
        self._open: list[Sink] | None = None

    def open(
        self, warn: Callable[[str], None] = say, resume_step: int | None = None, lines_before: int = 0, lines: int = 0
    ) -> list[Sink]:
        """Opens them, once; see `Start`."""
        if self._open is None:
            start = Start(self.folder, self.config, self.stage, self.run_config, warn, resume_step, lines_before, lines)
            opened = [open_sink(start) for open_sink in SINKS.values()] if self.is_main else []
            self._open = [sink for sink in opened if sink is not None]
        return self._open

    def record(self, result: StageResult, inputs: Mapping[str, str]) -> None:
        """Tells them the stage's result; `inputs` are its inputs, name to path or hub id."""
        num_lines = count_lines(self.folder.metrics) if self.is_main else 0
        for sink in self.open(lines_before=num_lines, lines=num_lines):
            sink.record(result, inputs)

    def close(self, error: BaseException | None = None) -> None:
        """Closes them; `error` is what ended the stage."""
        for sink in self._open or ():
            sink.close(Ending.of(error))
        self._open = []

    def __enter__(self) -> StageSinks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(error)


def record_result(folder: RunFolder, config: TrackingConfig, result: StageResult, **known: Mapping[str, Any]) -> None:
    """Records a stage that no process of ranks has run, such as a study; `known` are `run_config` and `inputs`."""
    with StageSinks(folder, config, result.stage, known["run_config"]) as sinks:
        sinks.record(result, known["inputs"])


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
        sinks: StageSinks | None = None,
        folder: RunFolder | None = None,
        *,
        closes_sinks: bool = True,
    ) -> None:
        self.stage = stage
        self._metrics = metrics
        self._samples = samples
        self._progress = progress
        self._sinks = sinks
        self._closes_sinks = closes_sinks
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
        sinks: StageSinks | None = None,
    ) -> Tracker:
        """Opens the files, after taking back this stage's lines beyond `resume_step` (0: all of them; the stage
        begins anew) and torn lines: a resumed run's files equal those of an undisturbed one.

        `total_steps` is the step at which the stage ends, None when unknown; `run_config` is shown at W&B. `sinks`
        are left open at the end, for the stage's result. Raises `DiskFullError`.
        """
        if not is_main:
            return cls(stage)
        folder.create()
        lines_before = count_lines(folder.metrics)
        rewind(folder.metrics, stage, resume_step)
        rewind(folder.samples, stage, resume_step)
        progress = StageProgress(stage, total_steps, initial_step=resume_step)
        metrics, samples = LineWriter(folder.metrics), LineWriter(folder.samples)
        own = sinks or StageSinks(folder, config, stage, run_config or {})
        own.open(progress.message, resume_step, lines_before, metrics.num_lines)
        return cls(stage, metrics, samples, progress, own, folder, closes_sinks=sinks is None)

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
        for sink in self._open_sinks():
            sink.log(line, step, metrics)

    def log_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes sampled texts, one line each."""
        if self._samples is None or self._metrics is None:
            return
        for row in rows:
            self._samples.append({"stage": self.stage, "step": step, **row})
        self.progress(step)
        for sink in self._open_sinks():
            sink.log_samples(self._metrics.num_lines - 1, step, rows)

    def progress(self, step: int, metrics: Mapping[str, float | None] | None = None) -> None:
        """Shows progress on the console only; for counts that are not worth a line in the files."""
        if self._progress is not None:
            self._progress.update(step, metrics or {})

    def message(self, text: str) -> None:
        """Prints a line without disturbing the progress line."""
        if self._progress is not None:
            self._progress.message(text)

    def close(self, error: BaseException | None = None) -> None:
        """Flushes and closes everything, in a hurry when `error` is a stop; closing again does nothing."""
        if self._progress is not None:
            self._progress.close()
        if self._sinks is not None and (self._closes_sinks or error is not None):
            self._sinks.close(error)
        for writer in (self._metrics, self._samples):
            if writer is not None:
                writer.close()

    def _open_sinks(self) -> Sequence[Sink]:
        return () if self._sinks is None else self._sinks.open()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, Stopped) and self._folder is not None and manifest.read_manifest(self._folder):
            # Before anything that may take longer than a stop is given. A full disk is the next start's affair.
            with suppress(StorageError):
                manifest.note_stop(self._folder, self.stage, error)
        self.close(error)
