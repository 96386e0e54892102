"""Metrics and samples: a resumed run's files equal an undisturbed one's, and W&B never harms a run."""

from __future__ import annotations

import errno
import importlib.util
import os
import subprocess
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any

import pytest

from rlhf.config.tracking import TrackingConfig
from rlhf.errors import DiskFullError, Stopped
from rlhf.runs import manifest, wandb_logger
from rlhf.runs.folder import RunFolder
from rlhf.runs.metrics_file import rewind
from rlhf.runs.tracking import Tracker
from tests.command import environment
from tests.silent_server import silent_server
from tests.unit.runs_example import read_jsonl

DISABLED = TrackingConfig(wandb="disabled")


def log_steps(run: RunFolder, stage: str, first: int, last: int, resume_step: int = 0) -> None:
    """What a stage does between its start (or resume) and its end (or death)."""
    with Tracker.open(run, DISABLED, stage, last, resume_step) as tracker:
        for step in range(first, last + 1):
            tracker.log(step, {f"{stage}/score": step / 7, f"{stage}/a": step, "perf/x": float("nan")})
            if step % 2 == 0:
                tracker.log_samples(step, [{"prompt": "p\n\u2028", "response": f"r{step}"}])


def test_line_format(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    with Tracker.open(run, DISABLED, "ppo", 1) as tracker:
        tracker.log(3, {"ppo/b": float("inf"), "ppo/a": 1, "perf/c": 0.5})
        tracker.log_samples(3, [{"response": "x", "prompt": "y"}])
        assert run.metrics.read_text() == '{"stage": "ppo", "step": 3, "perf/c": 0.5, "ppo/a": 1, "ppo/b": null}\n'
        assert run.samples.read_text() == '{"stage": "ppo", "step": 3, "response": "x", "prompt": "y"}\n'
        with pytest.raises(ValueError, match="'step'"):
            tracker.log(4, {"step": 1.0})


@pytest.mark.parametrize(("checkpoint", "died_at"), [(4, 7), (4, 4), (8, 9), (0, 3)])
def test_resumed_files_equal_undisturbed_ones(tmp_path: Path, checkpoint: int, died_at: int) -> None:
    whole, resumed = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "resumed")
    for run in (whole, resumed):
        log_steps(run, "sft", 0, 12)
    log_steps(whole, "ppo", 0, 10)
    log_steps(resumed, "ppo", 0, died_at)
    for path in (resumed.metrics, resumed.samples):
        path.write_bytes(path.read_bytes() + b'{"stage": "ppo", "step": 8, "ppo/')
    log_steps(resumed, "ppo", checkpoint + 1 if checkpoint else 0, 10, resume_step=checkpoint)
    assert resumed.metrics.read_bytes() == whole.metrics.read_bytes()
    assert resumed.samples.read_bytes() == whole.samples.read_bytes()
    assert [entry["step"] for entry in read_jsonl(whole.metrics) if entry["stage"] == "ppo"] == list(range(11))


def test_line_torn_anywhere_is_removed(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    log_steps(run, "ppo", 1, 3)
    content = run.metrics.read_bytes()
    last = content.rstrip(b"\n").rindex(b"\n") + 1
    for cut in range(last, len(content)):
        run.metrics.write_bytes(content[:cut])
        rewind(run.metrics, "sft", 0)
        assert run.metrics.read_bytes() == content[:last]


def test_rewind_leaves_a_whole_file_alone(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    log_steps(run, "sft", 1, 3)
    before = run.metrics.stat().st_ino
    rewind(run.metrics, "ppo", 0)
    rewind(run.metrics, "sft", 3)
    assert run.metrics.stat().st_ino == before
    rewind(tmp_path / "missing", "sft", 0)


def test_other_ranks_do_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Tracker.open(RunFolder(tmp_path / "run"), DISABLED, "ppo", 1, is_main=False) as tracker:
        tracker.log(1, {"ppo/a": 1.0})
        tracker.log_samples(1, [{"a": 1}])
        tracker.progress(1)
        tracker.message("hello")
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""


def test_full_disk_while_logging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder(tmp_path)
    log_steps(run, "ppo", 1, 2)
    whole = run.metrics.read_bytes()
    real = os.write

    def half_then_full(descriptor: int, content: Any) -> int:
        if len(content) < 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, content[:-10])

    with Tracker.open(run, DISABLED, "ppo", 3, resume_step=2) as tracker:
        monkeypatch.setattr(os, "write", half_then_full)
        with pytest.raises(DiskFullError, match=r"metrics\.jsonl"):
            tracker.log(3, {"ppo/score": 1.0})
        monkeypatch.undo()
    assert run.metrics.read_bytes() != whole
    rewind(run.metrics, "ppo", 2)
    assert run.metrics.read_bytes() == whole


class FakeRun:
    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments = arguments
        # The steps that the server has of earlier attempts.
        self.starting_step = 0
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.defined: list[tuple[str, dict[str, Any]]] = []
        self.config: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}
        self.used: list[FakeArtifact] = []
        self.made: list[tuple[FakeArtifact, list[str]]] = []
        self.told: list[str] = []
        self.exit_code: int | None = None

    def define_metric(self, name: str, **options: Any) -> None:
        self.defined.append((name, options))

    def log(self, values: dict[str, Any], step: int) -> None:
        self.logged.append((step, values))

    def _log_artifact(self, artifact: FakeArtifact, is_user_created: bool, use_after_commit: bool) -> None:
        assert is_user_created
        assert use_after_commit
        self.used.append(artifact)

    def log_artifact(self, artifact: FakeArtifact, aliases: list[str]) -> None:
        self.made.append((artifact, aliases))

    def mark_preempting(self) -> None:
        self.told.append("preempting")

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code
        self.told.append("finish")


class FakeArtifact:
    def __init__(self, name: str, type: str, metadata: dict[str, Any]) -> None:
        self.name, self.type, self.metadata = name, type, metadata
        self.content: list[str] = []

    def add_reference(self, uri: str, name: str) -> None:
        self.content.append(uri)

    def add_dir(self, path: str, policy: str) -> None:
        assert policy == "immutable"  # else W&B copies everything first
        self.content.append(path)

    add_file = add_dir


class FakeWandb(types.ModuleType):
    """Records what is asked of W&B; `fails` names the modes whose init fails."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.runs: list[FakeRun] = []
        self.fails: set[str] = set()
        self.starting_step = 0
        self.Artifact = FakeArtifact
        self.teardowns = 0

    def init(self, **arguments: Any) -> FakeRun:
        if arguments["mode"] in self.fails:
            # W&B has exceptions without a public base class.
            raise type("ServerError", (Exception,), {"__module__": "wandb.sdk.somewhere"})("no server")
        self.runs.append(FakeRun(arguments))
        self.runs[-1].starting_step = self.starting_step
        return self.runs[-1]

    def teardown(self) -> None:
        self.teardowns += 1

    @staticmethod
    def Settings(**options: Any) -> dict[str, Any]:  # noqa: N802 - the name W&B has
        return options

    @staticmethod
    def Table(columns: list[str], data: list[list[Any]]) -> tuple[list[str], list[list[Any]]]:  # noqa: N802
        return columns, data


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    for name in ("MODE", "DISABLED", "API_KEY", "BASE_URL", "RUN_ID", "SWEEP_ID", "SILENT", "NAME", "RUN_GROUP"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb_settings"))
    return fake


def test_wandb_gets_one_run_for_all_stages(tmp_path: Path, wandb: FakeWandb) -> None:
    run = RunFolder(tmp_path / "run")
    config = TrackingConfig(project="p", entity="e", tags=("t",))
    for stage in ("sft", "ppo"):
        with Tracker.open(run, config, stage, 2, run_config={"experiment": "quickstart"}) as tracker:
            tracker.log(1, {f"{stage}/loss": 0.5, "perf/x": 2.0, f"{stage}/bad": float("nan")})
            tracker.log(2, {f"{stage}/loss": 0.25})
            tracker.log_samples(2, [{"prompt": [{"role": "user"}], "score": 1.0}])
    sft, ppo = wandb.runs
    assert sft.arguments["mode"] == "offline"
    assert sft.arguments["id"] == ppo.arguments["id"] == run.wandb_id.read_text().strip()
    assert {sft.arguments[name] for name in ("project", "entity", "group", "name")} == {"p", "e", "quickstart", "run"}
    assert sft.arguments["resume"] == "allow"
    assert sft.arguments["dir"] == str(run.path)
    assert ("ppo/*", {"step_metric": "ppo/step"}) in ppo.defined
    # The names are those of metrics.jsonl, whatever the group.
    assert sft.logged[0] == (0, {"sft/step": 1, "sft/loss": 0.5, "perf/x": 2.0, "sft/bad": sft.logged[0][1]["sft/bad"]})
    # W&B's own step goes on from stage to stage; samples go into the row of the stage's newest numbers.
    assert [step for step, _ in sft.logged + ppo.logged] == [0, 1, 1, 2, 3, 3]
    assert sft.logged[2][1] == {"sft/samples": (["step", "prompt", "score"], [[2, "[{'role': 'user'}]", 1.0]])}
    assert (sft.exit_code, ppo.exit_code) == (0, 0)


def test_a_stop_is_written_down_before_a_slow_wandb_and_does_not_wait_for_it(
    tmp_path: Path, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder(tmp_path / "run")
    manifest.start_manifest(run, command=["rlhf"], config={}, config_hash="", seed=0, stages=["sft"])
    monkeypatch.setattr(wandb_logger, "HURRIED_FINISH_SECONDS", 0.2)
    slow, noted = threading.Event(), []

    def finish(self: FakeRun, exit_code: int) -> None:
        noted.append((exit_code, manifest.read_manifest(run)["stages"]["sft"].get("stopped")))
        slow.wait(300)

    monkeypatch.setattr(FakeRun, "finish", finish)
    began = time.monotonic()
    try:
        with pytest.raises(Stopped), Tracker.open(run, TrackingConfig(), "sft", 5):
            raise Stopped(15, 3)
        assert time.monotonic() - began < 60
        # A stop that went wrong is in as much of a hurry.
        full = DiskFullError("no room")
        full.__context__ = Stopped(15)  # as where it is raised by what answers the stop
        with pytest.raises(DiskFullError), Tracker.open(run, TrackingConfig(), "sft", 5):
            raise full
        assert time.monotonic() - began < 120
    finally:
        slow.set()
    while len(noted) < 2 and time.monotonic() - began < 180:  # a thread of its own tells W&B
        time.sleep(0.01)
    assert noted == [(code, {"signal": "SIGTERM", "step": 3}) for code in (143, 1)]
    assert capsys.readouterr().out.count("W&B had not finished after 0.2 s") == 2


def test_wandb_modes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wandb: FakeWandb) -> None:
    auto = TrackingConfig()
    assert wandb_logger.resolve_mode(auto) == "offline"
    (tmp_path / "netrc").write_text("machine api.wandb.ai\n login user\n password secret\n")
    assert wandb_logger.resolve_mode(auto) == "online"
    (tmp_path / "wandb_settings").mkdir()
    (tmp_path / "wandb_settings" / "settings").write_text("[default]\nbase_url = https://wandb.example.org\n")
    assert wandb_logger.resolve_mode(auto) == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "k")
    assert wandb_logger.resolve_mode(auto) == "online"
    assert wandb_logger.resolve_mode(TrackingConfig(wandb="offline")) == "offline"
    monkeypatch.setenv("WANDB_MODE", "dryrun")
    assert wandb_logger.resolve_mode(auto) == "offline"
    monkeypatch.setenv("WANDB_DISABLED", "true")
    assert wandb_logger.resolve_mode(auto) == "disabled"
    monkeypatch.delenv("WANDB_DISABLED")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_logger.resolve_mode(auto) == "disabled"
    assert wandb_logger.resolve_mode(TrackingConfig(wandb="online")) == "online"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert wandb_logger.resolve_mode(TrackingConfig(wandb="online")) == "disabled"


def test_wandb_in_a_sweep(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wandb: FakeWandb) -> None:
    monkeypatch.setenv("WANDB_SWEEP_ID", "s")
    monkeypatch.setenv("WANDB_RUN_ID", "given")
    with Tracker.open(RunFolder(tmp_path / "run"), TrackingConfig(project="p"), "sft", 1):
        pass
    arguments = wandb.runs[0].arguments
    assert arguments["id"] == "given"
    assert arguments["project"] is None


def test_unreachable_server_falls_back(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wandb: FakeWandb, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k")
    wandb.fails = {"online"}
    with Tracker.open(RunFolder(tmp_path / "run"), TrackingConfig(), "sft", 1) as tracker:
        tracker.log(1, {"sft/loss": 1.0})
    assert wandb.runs[0].arguments["mode"] == "offline"
    assert wandb.teardowns == 1
    assert len(wandb.runs[0].logged) == 1
    assert capsys.readouterr().out.count("no server") == 1


def test_wandb_failures_are_told_once(tmp_path: Path, wandb: FakeWandb, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunFolder(tmp_path / "run")
    with Tracker.open(run, TrackingConfig(), "sft", 3) as tracker:

        def broken(values: dict[str, Any], step: int) -> None:
            raise ConnectionResetError("gone")

        wandb.runs[0].log = broken  # type: ignore[method-assign]
        for step in (1, 2, 3):
            tracker.log(step, {"sft/loss": 1.0})
    assert capsys.readouterr().out.count("gone") == 1
    assert len(read_jsonl(run.metrics)) == 3
    with Tracker.open(run, TrackingConfig(), "sft", 3) as tracker:

        def interrupted(values: dict[str, Any], step: int) -> None:
            raise KeyboardInterrupt

        wandb.runs[1].log = interrupted  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            tracker.log(1, {"sft/loss": 1.0})


def test_a_real_server_that_never_answers_does_not_hold_the_run_up(tmp_path: Path) -> None:
    code = """
import sys, time
from pathlib import Path
from rlhf.config.tracking import TrackingConfig
from rlhf.runs import wandb_logger
from rlhf.runs.folder import RunFolder, StageResult
from rlhf.runs.tracking import StageSinks, Tracker, record_result
from rlhf.worker import leave

connect = wandb_logger._init

def connect_at_any_speed(start, mode):
    wandb_logger.INIT_SECONDS = 3.0 if mode == "online" else 300.0
    return connect(start, mode)

wandb_logger._init = connect_at_any_speed
wandb_logger.FINISH_SECONDS = 300.0
started = time.monotonic()
with Tracker.open(RunFolder(Path(sys.argv[1])), TrackingConfig(), "sft", 2) as tracker:
    for step in (1, 2):
        tracker.log(step, {"sft/loss": 1.0})
print("seconds", time.monotonic() - started, time.time())
leave(0)
"""
    with silent_server() as address:
        extra = {"WANDB_BASE_URL": address, "WANDB_API_KEY": "0" * 40, "no_proxy": "127.0.0.1"}
        env = environment(extra)
        # What W&B has put into the environment of this process, if another test has used it here, is not of this one.
        env = {name: value for name, value in env.items() if not name.startswith("WANDB_") or name in extra}
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)],
            env=env,
            capture_output=True,
            text=True,
            check=True,
            timeout=400,
        )
        ended = time.time()
    assert done.stdout.count("W&B could not start online, so it logs offline (wandb sync uploads later)") == 1
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 2
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb")), done.stdout
    seconds, left = (float(number) for number in done.stdout.splitlines()[-1].split()[1:])
    # Three seconds of patience with the server, where W&B's own is 90; starting W&B twice takes the rest.
    assert seconds < 80
    # Nothing waits for it at the end.
    assert ended - left < 60
