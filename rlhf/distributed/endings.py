"""What is said of ranks that did not end well."""

from __future__ import annotations

import signal
from collections.abc import Iterator

from rlhf.config import StageName
from rlhf.distributed.peers import LaunchResult
from rlhf.errors import describe_stop


def ending(name: StageName, result: LaunchResult, stopped_by: int | None, note: object) -> Iterator[str]:
    """What is said of ranks that did not end well; rank 0 has explained its own failure."""
    for failure in result.while_stopping or (result,):
        if failure.rank is not None and failure.log_tail and (stopped_by is None or failure is not result):
            when = "" if stopped_by is None else " while stopping"
            yield f"{failure.culprit} failed{when}; the end of its log:\n{failure.log_tail}"
    if stopped_by is not None:
        yield f"stage {name}: {_how_it_stopped(result, stopped_by, note)}"
    elif result.exit_code > 128 or result.problem:
        yield f"stage {name}: {result.describe()}"


def _how_it_stopped(result: LaunchResult, number: int, note: object) -> str:
    """`note` is what rank 0 left about its stop, None when it could not."""
    if isinstance(note, dict):
        return describe_stop(number, note.get("step"))
    stopped = f"stopped by {signal.Signals(number).name}"
    if result.while_stopping:
        first = result.while_stopping[0]
        return (
            f"{stopped}, but could not write its checkpoint: {first.describe()}; the same command goes on from the "
            "checkpoint before"
        )
    if result.killed:
        return (
            f"{stopped} without time for a checkpoint; the same command goes on from the one before. "
            "distributed.stop_seconds is the time that a stop may take"
        )
    return describe_stop(number, None)
