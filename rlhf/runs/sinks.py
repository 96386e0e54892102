"""What a tracker needs of a place that its numbers go to besides the run folder's own files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rlhf.config.tracking import TrackingConfig
from rlhf.errors import Stopped
from rlhf.runs.folder import RunFolder, StageResult


@dataclass(frozen=True)
class Start:
    """What a stage starts from. `run_config` is the config as plain values, `warn` prints a line.

    `resume_step` is the step of the checkpoint it goes on from, 0 when it begins anew, None when nothing is going to be
    logged and only its result or its end is told. `lines_before` and `lines` count the lines of `metrics.jsonl` before
    and after those of later steps were taken back.
    """

    folder: RunFolder
    config: TrackingConfig
    stage: str
    run_config: Mapping[str, Any]
    warn: Callable[[str], None]
    resume_step: int | None = None
    lines_before: int = 0
    lines: int = 0


@dataclass(frozen=True)
class Ending:
    """How a stage ended: `error` is what ended it, `stop` the signal behind it where there was one."""

    error: BaseException | None = None
    stop: KeyboardInterrupt | None = None

    @classmethod
    def of(cls, error: BaseException | None) -> Ending:
        """The ending by `error`; what answers a stop and fails has the stop as its context."""
        cause = error
        while cause is not None and not isinstance(cause, KeyboardInterrupt):
            cause = cause.__context__
        return cls(error, cause)

    @property
    def exit_code(self) -> int:
        """0, 128 + the signal of a stop that went well, or 1."""
        if self.error is None:
            return 0
        return self.error.exit_code if isinstance(self.error, Stopped) else 1


class Sink(Protocol):
    """One stage's connection to such a place, on rank 0 alone. Once it fails, every method does nothing."""

    def log(self, line: int, step: int, metrics: Mapping[str, float | None]) -> None:
        """One line of `metrics.jsonl`, with its number there."""

    def log_samples(self, line: int, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Sampled texts; `line` is that of the stage's newest numbers."""

    def record(self, result: StageResult, inputs: Mapping[str, str]) -> None:
        """The finished stage: its result, and its inputs as name to path or hub id."""

    def close(self, ending: Ending) -> None:
        """Ends the connection in a bounded time, in a hurry after a stop; closing again does nothing."""


def result_metrics(stage: str, summary: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a stage's result under the names they have everywhere: `<stage>/<name>`, `perf/<name>`.

    An estimate with its interval gives `<stage>/<name>` and the ends, `<stage>/<name>.low` and `.high`; a deeper table
    gives one name for each number. Texts and what is not there are left out.
    """
    found: dict[str, float] = {}
    for name, value in summary.items():
        grouped = name if name.startswith((f"{stage}/", "perf/")) else f"{stage}/{name}"
        found |= _numbers(grouped, value)
    return found


def _numbers(name: str, value: Any) -> dict[str, float]:
    if isinstance(value, Mapping):
        found: dict[str, float] = {}
        for key, part in value.items():
            found |= _numbers(name if key == "value" else f"{name}.{key}", part)
        return found
    return {name: float(value)} if isinstance(value, (int, float)) else {}
