"""A run of a sweep that is stopped where no rank talks to W&B, between two stages for instance, says so all the same.

To W&B's server the run ended well when its last stage did. Only one that says that it is being preempted, and then ends
otherwise, is handed out again.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from rlhf.config import RLHFConfig
from rlhf.errors import EXIT_STOPPED, Stopped
from rlhf.runs import manifest
from rlhf.runs.folder import RunFolder
from rlhf.runs.metrics_file import count_lines
from rlhf.runs.sweep_agent import sweep_run_id
from rlhf.runs.tracking import StageSinks


def telling(config: RLHFConfig, run: RunFolder, work: Callable[[], int]) -> int:
    """Does the run's work and returns its exit code; after a stop in a sweep the trackers have been told."""
    try:
        code = work()
    except Stopped as stopped:
        _tell(config, run, stopped)
        raise
    if code in EXIT_STOPPED:
        _tell(config, run, Stopped(code - 128))
    return code


def _tell(config: RLHFConfig, run: RunFolder, stopped: Stopped) -> None:
    stage = _stage_that_told_nothing(run)
    if stage is None or sweep_run_id(os.environ) is None:
        return
    num_lines = count_lines(run.metrics)
    sinks = StageSinks(run, config.tracking, stage, config.model_dump(mode="json"))
    sinks.open(lines_before=num_lines, lines=num_lines)
    sinks.close(stopped)


def _stage_that_told_nothing(run: RunFolder) -> str | None:
    """The stage that was stopped, or was to come next, unless its training was: then rank 0 has told it."""
    stages = manifest.read_manifest(run).get("stages", {})
    for name, entry in stages.items():
        note = entry.get("stopped") or {}
        if entry.get("status") == "interrupted":
            return None if note.get("step") is not None else str(name)
    return next((str(name) for name, entry in stages.items() if entry.get("status") != "finished"), None)
