"""What a signal does to a process: where it is when the signal comes, and what it does when it comes again."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf import rank_pipeline
from rlhf.distributed import endings, stopping
from rlhf.distributed.peers import LaunchResult
from rlhf.errors import EXIT_STOPPED, Stopped, describe_stop
from rlhf.runs import manifest
from rlhf.runs.folder import RunFolder
from rlhf.stages.ppo import loop
from rlhf.stages.ppo.prepare import prepare_job
from tests.command import environment
from tests.ppo_example import ppo_config, ppo_context, write_models
from tests.stage_example import metrics_of, weight_bytes

# A runtime of one rank, as far as a poll needs it.
SCRIPT_START = """
import os, sys, time
from types import SimpleNamespace
from rlhf.distributed import stopping
from rlhf.errors import Stopped
alone = SimpleNamespace(world_size=1, is_main=True, stop_seconds=25, barrier=lambda: None)
def say(text):
    print(text, flush=True)
stopping.install()
"""


def _start(script: str, extra: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """Runs a script to the line where it says `ready`."""
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT_START + textwrap.dedent(script)],
        env=environment(extra),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


WAITS = """
try:
    say("ready")
    time.sleep(300)
except Exception:
    say("swallowed")
except Stopped as stopped:
    say(str(stopped))
    sys.exit(stopped.exit_code)
"""

POLLS = """
with stopping.polled(alone) as stop:
    say("ready")
    while not stop.asked:
        time.sleep(0.01)
    say("asked")
    time.sleep(SECONDS)
    say("saved")
"""


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)], ids=["term", "int", "hup"]
)
def test_a_signal_ends_what_does_not_poll_at_once(number: signal.Signals, code: int) -> None:
    process = _start(WAITS)
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == code
    assert said == f"stopped by {number.name}; the same command goes on where it stopped\n"
    assert code in EXIT_STOPPED


def test_what_polls_goes_on_to_where_it_looks() -> None:
    process = _start(
        "try:" + textwrap.indent(POLLS.replace("SECONDS", "0.2"), "    ") + "\nexcept Stopped: sys.exit(7)"
    )
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    # It was asked, finished what it did, and the block ended with the signal that nobody had answered.
    assert said == "asked\nsaved\n"
    assert process.returncode == 7


def test_a_second_signal_ends_at_once() -> None:
    process = _start(POLLS.replace("SECONDS", "300"))
    assert process.stdout is not None
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "asked\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert process.stdout.read() == ""


@pytest.mark.parametrize("extra", [{"RLHF_SUPERVISOR_PID": "1"}, {"RANK": "0"}], ids=["our_rank", "other_launcher"])
def test_a_rank_that_hears_of_one_signal_twice_still_saves(extra: dict[str, str]) -> None:
    # Other launchers repeat a signal soon; how soon is a matter of the machine here. It saves once it is told to.
    script = "stopping._ECHO_SECONDS *= 100\nstopping.install()\n" + POLLS
    process = _start(script.replace("time.sleep(SECONDS)", "sys.stdin.readline()"), extra)
    assert process.stdin is not None
    assert process.stdout is not None
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "asked\n"
    process.send_signal(signal.SIGTERM)
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == "saved\n"
    process.communicate(timeout=60)


def test_under_another_launcher_a_later_signal_ends_at_once() -> None:
    process = _start(POLLS.replace("SECONDS", "300"), {"RANK": "0"})
    assert process.stdout is not None
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "asked\n"
    time.sleep(1.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143


def test_a_forked_helper_dies_of_the_signal_as_ever() -> None:
    script = """
    with stopping.polled(alone):
        heard, told = os.pipe()
        helper = os.fork()
        if helper == 0:
            say("ready")
            os.write(told, b"x")
            time.sleep(300)
        os.read(heard, 1)
        os.kill(helper, 15)
        _, status = os.waitpid(helper, 0)
        say(f"helper ended by {os.WTERMSIG(status)}, asked {stopping.requested()}")
    """
    process = _start(script)
    said, _ = process.communicate(timeout=60)
    assert said == "helper ended by 15, asked None\n"


def test_the_message_says_what_is_on_disk() -> None:
    assert "at step 12; a checkpoint was written; the same command goes on from there" in describe_stop(15, 12)
    assert "before the first step" in describe_stop(2, 0)
    assert str(Stopped(2)) == "stopped by SIGINT; the same command goes on where it stopped"


@pytest.mark.parametrize(
    ("result", "note", "said"),
    [
        (LaunchResult(143, killed=True), {"signal": "SIGTERM", "step": 4}, ["at step 4; a checkpoint was written"]),
        (LaunchResult(143, killed=True), None, ["without time for a checkpoint"]),
        (LaunchResult(143), None, ["stopped by SIGTERM; the same command goes on where it stopped"]),
        (
            LaunchResult(143, while_stopping=(LaunchResult(1, rank=1, log_tail="No space left"),)),
            None,
            [
                "rank 1 failed while stopping; the end of its log:\nNo space left",
                "but could not write its checkpoint: rank 1 ended with exit code 1;",
            ],
        ),
    ],
    ids=["saved", "killed", "nothing_to_save", "full_disk"],
)
def test_the_message_says_why_there_is_no_checkpoint(
    result: LaunchResult, note: dict[str, Any] | None, said: list[str]
) -> None:
    lines = list(endings.ending("ppo", result, 15, note))
    assert len(lines) == len(said)
    for line, part in zip(lines, said, strict=True):
        assert part in line


def test_other_ranks_wait_until_the_stop_is_written_down(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    began = time.monotonic()
    rank_pipeline._wait_for_note(run, 120)  # no manifest can be read here
    assert time.monotonic() - began < 60
    manifest.start_manifest(run, command=["rlhf"], config={}, config_hash="", seed=0, stages=["sft"])
    began = time.monotonic()
    rank_pipeline._wait_for_note(run, 0.2)
    assert time.monotonic() - began >= 0.2
    writer = threading.Timer(0.3, manifest.finish_manifest, (run, 143))
    began = time.monotonic()
    writer.start()
    rank_pipeline._wait_for_note(run, 120)
    writer.join()
    assert 0.2 < time.monotonic() - began < 60


def test_ctrl_c_while_modules_are_imported_is_no_traceback(tmp_path: Path) -> None:
    script = """
    import builtins, signal
    real = builtins.__import__
    def load(name, *arguments, **keywords):
        if name == "rlhf.config.compose":
            signal.raise_signal(signal.SIGINT)
        return real(name, *arguments, **keywords)
    builtins.__import__ = load
    from rlhf.cli import main
    main(["run", "experiment=smoke", "run.dir=run"])
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    said = "rlhf: stopped by SIGINT; the same command goes on where it stopped\n"
    assert (result.returncode, result.stderr) == (130, said)


class _Ranks:
    """Two ranks as one of them sees them, the other's flags being `others`."""

    world_size = 2
    device = "cpu"

    def __init__(self, others: list[float]) -> None:
        self.others = others

    stop_seconds = 25.0
    is_main = True

    def barrier(self) -> None: ...

    def sum_over_ranks(self, flags: Any) -> Any:
        import torch

        return flags + torch.tensor(self.others)


@pytest.fixture
def nothing_requested() -> Any:
    before = stopping._requests
    stopping._requests = stopping._Requests()
    yield stopping._requests
    stopping._requests = before


@pytest.mark.parametrize(
    ("own", "others", "agreed"),
    [
        (None, [0.0, 0.0, 0.0], None),
        (None, [0.0, 1.0, 0.0], signal.SIGINT),
        (signal.SIGINT, [0.0, 0.0, 0.0], signal.SIGINT),
        (signal.SIGINT, [1.0, 0.0, 0.0], signal.SIGTERM),
        (signal.SIGHUP, [0.0, 1.0, 0.0], signal.SIGINT),
    ],
)
def test_what_one_rank_was_told_counts_for_all(
    nothing_requested: Any, own: int | None, others: list[float], agreed: int | None
) -> None:
    nothing_requested.number = own
    assert stopping.StopPoll(_Ranks(others)).agreed() == agreed  # type: ignore[arg-type]


def test_steps_that_take_longer_than_a_stop_may_are_named_once(
    nothing_requested: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    looks = iter([0.0, 20.0, 40.0, 60.0, 80.0, 111.0, 150.0])
    monkeypatch.setattr(stopping, "time", SimpleNamespace(monotonic=lambda: next(looks)))
    poll = stopping.StopPoll(SimpleNamespace(world_size=1, is_main=True, stop_seconds=25))  # type: ignore[arg-type]
    poll.agreed()
    poll.agreed()
    poll.give_up_if_asked()  # while responses are sampled it could have stopped
    poll.agreed()
    assert capsys.readouterr().err == ""
    poll.agreed()
    poll.agreed()
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "for 31 s the training could not have stopped, and distributed.stop_seconds=25" in said
    assert "lower save_every" in said


# --- stage ppo: a stop in the middle of a rollout leaves the training as it was before --------------------------------


REWARD = """
import os
import random
import signal

def noisy(completions, **columns):
    # Draws from the generators that everything shares, as rewards of users do.
    flag = os.environ.get("STOP_AT_SCORING")
    if flag is not None:
        left = int(flag)
        os.environ["STOP_AT_SCORING"] = str(left - 1)
        if left == 0:
            os.kill(os.getpid(), signal.SIGTERM)
    return [len(text) / 10 + random.random() for text in completions]
"""


def test_a_stop_during_a_rollout_takes_back_the_rollout(
    nothing_requested: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rewards.py").write_text(REWARD)
    inputs = write_models(tmp_path / "models")
    config = ppo_config(
        num_updates=4,
        save_every=100,
        rollout_batch_size=4,
        score_normalization="running",
        ema_decay=0.5,
        rewards={"noisy": {"type": "function", "file": str(tmp_path / "rewards.py"), "function": "noisy"}},
    )
    _seed(config.seed)
    loop.run(ppo_context(config, tmp_path / "whole", inputs))
    # The first half of the third rollout is scored when the signal comes: two halves a rollout.
    monkeypatch.setenv("STOP_AT_SCORING", "4")
    handlers = {number: signal.getsignal(number) for number in stopping.SIGNALS}
    stopping.install()
    try:
        _seed(config.seed)
        with pytest.raises(Stopped, match=r"at step 2"):
            loop.train(prepare_job(ppo_context(config, tmp_path / "run", inputs)))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    monkeypatch.delenv("STOP_AT_SCORING")
    nothing_requested.number = None
    _seed(99)
    loop.run(ppo_context(config, tmp_path / "run", inputs))
    assert weight_bytes(tmp_path / "run", "ppo") == weight_bytes(tmp_path / "whole", "ppo")
    assert metrics_of(tmp_path / "run", "ppo") == metrics_of(tmp_path / "whole", "ppo")


def _seed(seed: int) -> None:
    """As `Runtime.start` does for a stage."""
    import random

    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
