"""Real runs that are told to end, or lose a rank: what they say, what is left of them, and that nothing is lost."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.command import SMOKE, environment, rlhf_command
from tests.run_example import Run, announced_update, hook
from tests.stage_example import metrics_of, weight_bytes

# Long enough to be met in the middle, checkpoints only at the end, and logs over several steps.
LONG = (
    "stages=[sft,collect,reward_model,ppo]",
    *("sft.max_steps=24", "sft.log_every=7", "sft.save_every=1000"),
    *("reward_model.max_steps=24", "reward_model.log_every=7", "reward_model.save_every=1000"),
    *("ppo.num_updates=7", "ppo.save_every=1000", "ppo.score_normalization=running", "ppo.ema_decay=0.9"),
    "distributed.stop_seconds=100",
)
# Where the stages are held, see `run_example.held`, and the step of theirs that is: logs of sft and reward_model come
# at 7, 14, ..., so theirs is in the middle of an average. PPO is stopped in the rollout of its fourth update.
HOLDS = {"sft": (11, 10), "reward_model": (11, 10), "ppo": (7, 3)}
# What `LONG` gives a stop, so that a slow machine loses no checkpoint.
STOP_SECONDS = 100
# A stop that waits for nothing takes 3 s and what the machine needs; what it does not wait for takes minutes.
SOON = 10
# A rank that waits where its training would begin: until then there is nothing to save.
WAIT_FOR_TRAINING = """
import sys, time
if "rlhf.worker" in sys.orig_argv:
    from rlhf.distributed import stopping
    stopping.polled = lambda runtime: time.sleep(600)
"""


def _stages_manifest(run: Path) -> dict[str, Any]:
    body: dict[str, Any] = json.loads((run / "manifest.json").read_text())
    return body


def _checkpoints(run: Path, stage: str) -> list[int]:
    folders = (run / "stages" / stage / "checkpoints").glob("checkpoint-*")
    return sorted(int(folder.name.rpartition("-")[2]) for folder in folders)


def _check_stop(run: Run, stage: str, number: signal.Signals) -> int:
    """Stops the run in a stage's training and checks how it ended; the step it stopped at."""
    code, said, seconds = run.stop(number)
    assert code == 128 + number, said
    assert seconds < STOP_SECONDS
    assert "Traceback" not in said
    manifest = _stages_manifest(run.path)
    assert (manifest["status"], manifest["exit_status"]) == ("interrupted", code)
    entry = manifest["stages"][stage]
    assert entry["status"] == "interrupted"
    assert entry["stopped"]["signal"] == number.name
    step: int = entry["stopped"]["step"]
    assert f"stage {stage}: stopped by {number.name} at step {step}; a checkpoint was written" in said
    assert step in _checkpoints(run.path, stage)
    return step


def _check_equal(run: Path, undisturbed: Path, stages: tuple[str, ...]) -> None:
    for stage in stages:
        assert weight_bytes(run, stage) == weight_bytes(undisturbed, stage), stage
        assert metrics_of(run, stage) == metrics_of(undisturbed, stage), stage


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody stopped."""
    folder = tmp_path_factory.mktemp("undisturbed")
    result = rlhf_command("run", *SMOKE, "run.dir=run", *LONG, cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder / "run"


def test_a_run_stopped_in_every_stage_ends_as_if_nothing_had_happened(undisturbed: Path, tmp_path: Path) -> None:
    for stage, number in (("sft", signal.SIGTERM), ("reward_model", signal.SIGINT), ("ppo", signal.SIGTERM)):
        times, step = HOLDS[stage]
        with Run(tmp_path, *LONG, hold=(stage, times)) as run:
            run.wait_for_hold()
            assert _check_stop(run, stage, number) == step
    result = rlhf_command("run", *SMOKE, "run.dir=run", *LONG, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    _check_equal(tmp_path / "run", undisturbed, ("sft", "reward_model", "ppo"))
    assert metrics_of(tmp_path / "run", "collect") == metrics_of(undisturbed, "collect")
    manifest = _stages_manifest(tmp_path / "run")
    assert [attempt["outcome"] for attempt in manifest["attempts"]] == [*["interrupted"] * 3, "finished"]
    assert manifest["stages"]["ppo"]["stopped"] is None


def test_a_run_whose_reader_left_trains_on_and_stops_well(tmp_path: Path) -> None:
    """As `rlhf run ... 2>&1 | head -1`, and Ctrl-C much later."""
    reader, writer = os.pipe()
    with Run(tmp_path, *LONG, "sft.max_steps=100000", output=writer) as run:
        os.close(writer)
        assert os.read(reader, 1) != b""
        os.close(reader)
        run.wait_for_step("sft", 14)
        code, _, seconds = run.stop(signal.SIGINT)
    assert code == 130
    assert seconds < STOP_SECONDS
    manifest = _stages_manifest(run.path)
    assert (manifest["status"], manifest["exit_status"]) == ("interrupted", 130)
    stopped = manifest["stages"]["sft"]["stopped"]
    assert stopped["signal"] == "SIGINT"
    assert _checkpoints(run.path, "sft") == [stopped["step"]]


@pytest.mark.distributed
def test_two_ranks_under_zero_stop_at_the_same_step(undisturbed: Path, tmp_path: Path) -> None:
    arguments = (*LONG, *_ppo_alone(undisturbed), "ppo.num_updates=5", "distributed.num_processes=2", "zero=stage2")
    (tmp_path / "whole").mkdir()
    (tmp_path / "stopped").mkdir()
    whole = rlhf_command("run", *SMOKE, "run.dir=run", *arguments, cwd=tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    times, step = HOLDS["ppo"]
    with Run(tmp_path / "stopped", *arguments, hold=("ppo", times)) as run:
        run.wait_for_hold()
        assert _check_stop(run, "ppo", signal.SIGTERM) == step
    again = rlhf_command("run", *SMOKE, "run.dir=run", *arguments, cwd=tmp_path / "stopped")
    assert again.returncode == 0, again.stderr
    _check_equal(tmp_path / "stopped/run", tmp_path / "whole/run", ("ppo",))


def _ppo_alone(undisturbed: Path) -> tuple[str, ...]:
    models = undisturbed / "stages"
    return (
        *("stages=[ppo]", f"ppo.policy={models}/sft/model", f"ppo.reward_model={models}/reward_model/model"),
        "ppo.num_updates=2",
    )


@contextmanager
def _in_a_long_update(undisturbed: Path, folder: Path, stop_seconds: int) -> Iterator[Run]:
    """A run whose first update, of minutes, has begun."""
    begun, variables = announced_update(folder)
    keys = ("ppo.num_epochs=20000", f"distributed.stop_seconds={stop_seconds}")
    with Run(folder, *_ppo_alone(undisturbed), *keys, extra=variables) as run:
        run.wait_until(begun.exists, "update")
        yield run


def test_a_second_ctrl_c_does_not_wait_for_the_update(undisturbed: Path, tmp_path: Path) -> None:
    with _in_a_long_update(undisturbed, tmp_path, stop_seconds=600) as run:
        run.process.send_signal(signal.SIGINT)
        time.sleep(1)
        assert run.process.poll() is None, "the first Ctrl-C waits for the update"
        code, said, seconds = run.stop(signal.SIGINT)
    assert code == 130
    assert seconds < SOON
    assert "without time for a checkpoint" in said
    assert _stages_manifest(run.path)["status"] == "interrupted"


def test_what_does_not_end_in_time_is_killed(undisturbed: Path, tmp_path: Path) -> None:
    with _in_a_long_update(undisturbed, tmp_path, stop_seconds=1) as run:
        code, said, seconds = run.stop(signal.SIGTERM)
    assert code == 143
    assert 0.9 < seconds < SOON
    assert "without time for a checkpoint" in said


def test_a_stage_without_training_ends_at_once(tmp_path: Path) -> None:
    # While models and libraries are being loaded there is nothing to save.
    arguments = ("stages=[sft]", "distributed.stop_seconds=600")
    with Run(tmp_path, *arguments, extra=hook(tmp_path, "training", WAIT_FOR_TRAINING)) as run:
        run.wait_until(lambda: bool(run.ranks()), "rank")
        time.sleep(1)
        code, said, seconds = run.stop(signal.SIGTERM)
    assert code == 143
    assert seconds < SOON
    assert "Traceback" not in said
    assert "stage sft: stopped by SIGTERM" in said
    assert _checkpoints(run.path, "sft") == []


def test_a_rank_of_another_launcher_stops_as_well(tmp_path: Path) -> None:
    ranks = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    with Run(tmp_path, *LONG, "sft.max_steps=100000", extra=ranks) as run:
        run.wait_for_step("sft", 7)
        code, said, _ = run.stop(signal.SIGTERM)
    step = _stages_manifest(run.path)["stages"]["sft"]["stopped"]["step"]
    assert code == 143
    assert said.startswith(f"rlhf: stopped by SIGTERM at step {step}; a checkpoint was written")
    assert said.count("\n") == 1
    assert _checkpoints(run.path, "sft") == [step]
    assert _stages_manifest(run.path)["status"] == "interrupted"


@pytest.mark.distributed
def test_one_killed_rank_ends_the_others(tmp_path: Path) -> None:
    with Run(tmp_path, "stages=[sft]", "distributed.num_processes=2", "sft.max_steps=100000") as run:
        run.wait_for_step("sft", 3)
        _, second = run.ranks()
        began = time.monotonic()
        second.send_signal(signal.SIGKILL)
        _, said = run.process.communicate(timeout=200)
        assert time.monotonic() - began < SOON
        assert run.process.returncode == 137
        assert "rank 1 was ended by signal 9 (SIGKILL)" in said
        run.check_nothing_left()
    assert _stages_manifest(run.path)["status"] == "failed"


@pytest.mark.distributed
def test_two_runs_at_once_do_not_meet(tmp_path: Path) -> None:
    def finish(name: str) -> Path:
        (tmp_path / name).mkdir()
        with Run(tmp_path / name, "stages=[sft]", "distributed.num_processes=2") as run:
            _, said = run.process.communicate(timeout=900)
            assert run.process.returncode == 0, said
            run.check_nothing_left()
        return run.path

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(finish, ("first", "second"))
    assert weight_bytes(first, "sft") == weight_bytes(second, "sft")


# A command whose supervisor sleeps where it would look at the data, between preflight and the first stage.
SLOW_DATA = """
import sys, time
from pathlib import Path
from rlhf import cli, data
def data_content(config):
    Path("hashing").touch()
    time.sleep(900)
data.data_content = data_content
cli.main(sys.argv[1:])
"""


@pytest.fixture
def slow_start(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_DATA, "run", *SMOKE, "run.dir=run"],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    end = time.monotonic() + 300
    while not (tmp_path / "hashing").exists():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.02)
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["term", "int"])
def test_a_stop_between_stages_releases_the_folder(
    slow_start: subprocess.Popen[str], tmp_path: Path, number: signal.Signals
) -> None:
    slow_start.send_signal(number)
    _, said = slow_start.communicate(timeout=200)
    assert slow_start.returncode == 128 + number
    assert said == f"rlhf: stopped by {number.name}; the same command goes on where it stopped\n"
    assert _stages_manifest(tmp_path / "run")["status"] == "interrupted"
    with (tmp_path / "run/.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
