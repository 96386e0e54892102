"""A run of a sweep that is stopped where no rank talks to W&B: the supervisor says that it is being preempted."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from rlhf.config import RLHFConfig
from rlhf.errors import Stopped
from rlhf.runs import manifest, tracking
from rlhf.runs.folder import RunFolder
from rlhf.runs.preemption import telling


class Sink:
    """Hears how a stage ended."""

    def __init__(self, heard: list[Any], start: Any) -> None:
        self.heard = heard
        heard.append((start.stage, start.lines))

    def close(self, ending: Any) -> None:
        self.heard.append(ending.exit_code)


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    found: list[Any] = []
    monkeypatch.setattr(tracking, "SINKS", {"own": lambda start: Sink(found, start)})
    monkeypatch.setattr("rlhf.runs.machine.code_state", dict)
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")
    monkeypatch.setenv("WANDB_RUN_ID", "abc123")
    return found


def _run(folder: Path, **stages: dict[str, Any]) -> RunFolder:
    run = RunFolder(folder)
    run.create()
    manifest.start_manifest(run, command=[], config={}, config_hash="c", seed=1, stages=list(stages))
    for name, entry in stages.items():
        manifest.update_stage(run, name, **entry)
    run.metrics.write_text('{"stage": "sft", "step": 1}\n')
    return run


STOPPED_TRAINING = {"status": "interrupted", "stopped": {"signal": "SIGTERM", "step": 4}}
STOPPED_AT_START = {"status": "interrupted", "stopped": {"signal": "SIGTERM", "step": None}}


@pytest.mark.parametrize(
    ("ppo", "expected"),
    [
        ({"status": "pending"}, [("ppo", 1), 143]),
        ({"status": "interrupted"}, [("ppo", 1), 143]),
        (STOPPED_AT_START, [("ppo", 1), 143]),
        (STOPPED_TRAINING, []),  # rank 0 had the connection, and has said it
        ({"status": "finished"}, []),
    ],
)
def test_a_stop_is_told_once(ppo: dict[str, Any], expected: list[Any], heard: list[Any], tmp_path: Path) -> None:
    run = _run(tmp_path, sft={"status": "finished"}, ppo=ppo)
    assert telling(RLHFConfig(), run, lambda: 143) == 143
    assert heard == expected


def test_a_stop_that_rises_is_told(heard: list[Any], tmp_path: Path) -> None:
    def stop() -> int:
        raise Stopped(signal.SIGTERM)

    run = _run(tmp_path, sft={"status": "pending"})
    with pytest.raises(Stopped):
        telling(RLHFConfig(), run, stop)
    assert heard == [("sft", 1), 143]


@pytest.mark.parametrize("code", [0, 1, 137])
def test_only_a_stop_is_told(code: int, heard: list[Any], tmp_path: Path) -> None:
    run = _run(tmp_path, sft={"status": "failed"})
    assert telling(RLHFConfig(), run, lambda: code) == code
    assert heard == []


def test_outside_a_sweep_nothing_is_told(heard: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_SWEEP_ID")
    assert telling(RLHFConfig(), _run(tmp_path, sft={"status": "pending"}), lambda: 143) == 143
    assert heard == []
