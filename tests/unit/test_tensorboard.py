"""TensorBoard's own reader finds in the event files what metrics.jsonl has, each step once, also after a resume."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf.config.tracking import TrackingConfig
from rlhf.errors import ConfigError
from rlhf.runs.folder import RunFolder
from rlhf.runs.tensorboard import event_folder, markdown_table
from rlhf.runs.tracking import StageSinks, Tracker, check_tracking

CONFIG = TrackingConfig(wandb="disabled", tensorboard=True)


def log(run: RunFolder, stage: str, first: int, last: int, resume_step: int = 0, factor: float = 1.0) -> None:
    with Tracker.open(run, CONFIG, stage, last, resume_step) as tracker:
        for step in range(first, last + 1):
            tracker.log(step, {f"{stage}/loss": factor * step, "perf/x": 2.0, f"{stage}/bad": float("nan")})
            tracker.log_samples(step, [{"prompt": "<b>p|q", "score": step / 2}])


def read(run: RunFolder, stage: str) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(event_folder(run, stage))).Reload()


def scalars(run: RunFolder, stage: str, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in read(run, stage).Scalars(tag)]


def test_the_names_and_steps_are_those_on_disk_and_a_resume_doubles_none(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    log(run, "sft", 1, 2)
    log(run, "ppo", 1, 4)
    # The checkpoint is that of step 2. What the second start measures differs, to tell the two apart.
    log(run, "ppo", 3, 5, resume_step=2, factor=10.0)
    assert scalars(run, "sft", "sft/loss") == [(1, 1.0), (2, 2.0)]
    assert scalars(run, "ppo", "ppo/loss") == [(1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0), (5, 50.0)]
    assert scalars(run, "ppo", "perf/x") == [(step, 2.0) for step in range(1, 6)]
    found = read(run, "ppo")
    assert set(found.Tags()["scalars"]) == {"ppo/loss", "perf/x"}
    texts = found.Tensors("ppo/samples")
    assert [event.step for event in texts] == [1, 2, 3, 4, 5]
    assert texts[0].tensor_proto.string_val[0].decode() == (
        "| prompt | score |\n| --- | --- |\n| &lt;b&gt;p&#124;q | 0.5 |"
    )
    with StageSinks(run, CONFIG, "ppo", {}) as sinks:  # a supervisor that only tells of the end
        sinks.open()
    assert len(scalars(run, "ppo", "ppo/loss")) == 5
    # Begun anew, it leaves nothing of the earlier attempts, and nothing of the other stage is touched.
    log(run, "ppo", 1, 1, factor=7.0)
    assert scalars(run, "ppo", "ppo/loss") == [(1, 7.0)]
    assert len(scalars(run, "sft", "sft/loss")) == 2


def test_a_killed_writer_leaves_whole_records(tmp_path: Path) -> None:
    code = """
import os, sys
from pathlib import Path
from rlhf.runs.folder import RunFolder
from rlhf.config.tracking import TrackingConfig
from rlhf.runs.tracking import Tracker
tracker = Tracker.open(RunFolder(Path(sys.argv[1])), TrackingConfig(wandb="disabled", tensorboard=True), "sft", 2)
tracker.log(1, {"sft/loss": 0.5})
assert "torch" not in sys.modules and "tensorflow" not in sys.modules
os.kill(os.getpid(), 9)
"""
    run = tmp_path / "run"
    assert subprocess.run([sys.executable, "-c", code, str(run)], check=False).returncode == -9
    assert scalars(RunFolder(run), "sft", "sft/loss") == [(1, 0.5)]


def test_off_by_default_and_a_missing_package_is_told_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(tmp_path / "run")
    with Tracker.open(run, TrackingConfig(wandb="disabled"), "sft", 1) as tracker:
        tracker.log(1, {"sft/loss": 1.0})
    assert not (run.path / "tensorboard").exists()
    check_tracking(TrackingConfig())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_tracking(TrackingConfig())
    with pytest.raises(ConfigError, match=r"pip install tensorboard`, or set tracking\.tensorboard=false"):
        check_tracking(CONFIG)


def test_markdown_of_samples() -> None:
    rows: list[dict[str, Any]] = [{"prompt": "a\nb", "score": 1.23456}, {"prompt": None, "kl": [1, 2]}]
    assert markdown_table(rows).splitlines() == [
        "| prompt | score | kl |",
        "| --- | --- | --- |",
        "| a<br>b | 1.235 |  |",
        "|  |  | &#91;1, 2&#93; |",
    ]
