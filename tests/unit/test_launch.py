"""The launcher: environment of the ranks, ends of all kinds, and nothing left behind. No torch is imported here."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

import rlhf
from rlhf.distributed.launch import SignalWatch, _Ranks, available_cores, launch, reserved_port, threads_per_rank
from rlhf.distributed.peers import LaunchResult, Placement, Word
from rlhf.errors import Stopped

MARK = "RLHF_TEST_MARK"


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A value in the environment of every process a test starts, by which left-over ones are found."""
    value = uuid.uuid4().hex
    monkeypatch.setenv("PYTHONPATH", str(Path(rlhf.__file__).parent.parent))
    monkeypatch.setenv(MARK, value)
    yield value
    for pid in marked(value):
        os.kill(pid, signal.SIGKILL)


def marked(value: str) -> list[int]:
    """Processes other than this one that carry the mark, zombies included."""
    found = []
    for process in psutil.process_iter(["pid"]):
        if process.pid == os.getpid():
            continue
        try:
            environment = process.environ()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        if environment.get(MARK) == value:
            found.append(process.pid)
    zombies = [child.pid for child in psutil.Process().children() if child.status() == psutil.STATUS_ZOMBIE]
    return found + zombies


def wait_until_gone(value: str, seconds: float = 60.0) -> list[int]:
    """The marked processes left after `seconds` at most, which is less than they would live if nobody ended them."""
    deadline = time.monotonic() + seconds
    while (left := marked(value)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def python(code: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(code)]


def wait_for(*paths: Path, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, f"no {paths}"
        time.sleep(0.02)


def supervisor(tmp_path: Path, rank_code: str, **arguments: float) -> subprocess.Popen[str]:
    """A process that launches two ranks and prints the result's exit code; returns when both ranks run."""
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, pathlib, signal, subprocess, sys, time\n"
        "from rlhf.distributed.launch import die_with_parent\n"
        "die_with_parent()\n"
        f"folder = pathlib.Path({str(tmp_path)!r})\n"
        "rank = os.environ['RANK']\n" + textwrap.dedent(rank_code)
    )
    keywords = "".join(f", {name}={value!r}" for name, value in arguments.items())
    code = f"""
        import sys
        from rlhf.distributed.launch import launch
        sys.exit(launch([sys.executable, {str(script)!r}], 2{keywords}).exit_code)
    """
    process = subprocess.Popen(python(code), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for(tmp_path / "ready0", tmp_path / "ready1")
    return process


# They sleep for longer than anybody here waits for their end.
SLEEP = """
subprocess.Popen(["sleep", "600"])
(folder / f"ready{rank}").touch()
time.sleep(600)
"""
STUBBORN = """
signal.signal(signal.SIGTERM, lambda *_: (folder / f"asked{rank}").touch())
subprocess.Popen(["sleep", "600"])
(folder / f"ready{rank}").touch()
while True:
    time.sleep(0.05)
"""
POLITE = """
def end(*_):
    (folder / f"saved{rank}").touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
(folder / f"ready{rank}").touch()
time.sleep(600)
"""


@pytest.mark.parametrize(("number", "num_threads"), [(1, None), (2, None), (2, 3)])
def test_every_rank_gets_its_environment(
    tmp_path: Path, mark: str, monkeypatch: pytest.MonkeyPatch, number: int, num_threads: int | None
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    code = f"""
        import json, os, pathlib
        pathlib.Path({str(tmp_path)!r}, "env" + os.environ["RANK"]).write_text(
            json.dumps({{**os.environ, "session": os.getsid(0) == os.getpid()}}))
    """
    result = launch(python(code), number, env_extra={"COLOUR": "blue"}, num_threads=num_threads)
    assert result == LaunchResult(0)
    assert result.describe() == "all ranks succeeded"
    environments = [json.loads((tmp_path / f"env{rank}").read_text()) for rank in range(number)]
    for rank, environment in enumerate(environments):
        assert environment["RANK"] == environment["LOCAL_RANK"] == str(rank)
        assert environment["WORLD_SIZE"] == environment["LOCAL_WORLD_SIZE"] == str(number)
        assert environment["COLOUR"] == "blue"
        assert environment["OMP_NUM_THREADS"] == str(num_threads or max(1, available_cores() // number))
        assert environment["session"] is True
    assert len({environment["MASTER_PORT"] for environment in environments}) == 1
    assert not marked(mark)


def test_a_failing_rank_ends_all_and_the_end_of_its_log_is_returned(
    tmp_path: Path, mark: str, capfd: pytest.CaptureFixture[str]
) -> None:
    code = f"""
        import os, pathlib, sys, time
        ready = pathlib.Path({str(tmp_path)!r}, "ready")
        print("hello from rank", os.environ["RANK"], flush=True)
        if os.environ["RANK"] == "1":
            while not ready.exists():
                time.sleep(0.01)
            print("earlier", *range(50), sep="\\n")
            sys.exit(7)
        ready.touch()
        time.sleep(150)
    """
    started = time.monotonic()
    result = launch(python(code), 2, log_folder=tmp_path)
    assert time.monotonic() - started < 100
    assert (result.exit_code, result.rank) == (7, 1)
    assert result.describe() == "rank 1 ended with exit code 7"
    assert result.log_tail == "\n".join(str(number) for number in range(30, 50))
    assert capfd.readouterr() == ("hello from rank 0\n", "")
    assert (tmp_path / "rank1.log").read_text().startswith("hello from rank 1\n")
    assert not (tmp_path / "rank0.log").exists()
    assert not marked(mark)


def test_a_killed_rank_is_reported_as_137_and_stubborn_ones_are_killed(tmp_path: Path, mark: str) -> None:
    code = f"""
        import os, pathlib, signal, subprocess, time
        ready = pathlib.Path({str(tmp_path)!r}, "ready")
        if os.environ["RANK"] == "0":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            subprocess.Popen(["sleep", "600"])
            ready.touch()
            time.sleep(150)
        while not ready.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    started = time.monotonic()
    result = launch(python(code), 2, failure_grace_seconds=0.5)
    assert time.monotonic() - started < 100
    assert (result.exit_code, result.rank) == (137, 1)
    assert "signal 9 (SIGKILL); often this means that memory ran out" in result.describe()
    assert wait_until_gone(mark) == []


def test_what_a_successful_rank_leaves_running_is_ended(mark: str) -> None:
    code = "import subprocess; subprocess.Popen(['sleep', '600'])"
    assert launch(python(code), 1).exit_code == 0
    assert wait_until_gone(mark) == []


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_is_passed_on_and_the_ranks_may_save(tmp_path: Path, mark: str, number: int, exit_code: int) -> None:
    process = supervisor(tmp_path, POLITE, grace_seconds=300)
    process.send_signal(number)
    assert process.wait(timeout=60) == exit_code
    assert (tmp_path / "saved0").exists()
    assert (tmp_path / "saved1").exists()
    assert process.communicate()[0] == ""
    assert wait_until_gone(mark) == []


def test_ranks_that_do_not_end_are_killed_after_the_grace(tmp_path: Path, mark: str) -> None:
    process = supervisor(tmp_path, STUBBORN, grace_seconds=4)
    process.send_signal(signal.SIGTERM)
    wait_for(tmp_path / "asked0", tmp_path / "asked1")
    assert process.wait(timeout=60) == 143
    assert wait_until_gone(mark) == []


def test_a_second_interrupt_kills_at_once(tmp_path: Path, mark: str) -> None:
    process = supervisor(tmp_path, STUBBORN, grace_seconds=300)
    process.send_signal(signal.SIGINT)
    wait_for(tmp_path / "asked0", tmp_path / "asked1")
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert wait_until_gone(mark) == []


def test_no_rank_and_no_helper_of_one_outlives_a_killed_supervisor(tmp_path: Path, mark: str) -> None:
    process = supervisor(tmp_path, SLEEP)
    assert len(marked(mark)) == 6  # with the watchdog
    process.kill()
    process.wait()
    assert wait_until_gone(mark) == []


def test_launches_at_the_same_time_get_ports_of_their_own(mark: str) -> None:
    # Rank 0 listens on the port as torch's store does; rank 1 connects and both exchange the launch's name.
    code = """
        import os, socket, time
        address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
        if os.environ["RANK"] == "0":
            server = socket.socket()
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(address)
            server.listen()
            connection, _ = server.accept()
            connection.sendall(os.environ["NAME"].encode())
        else:
            for attempt in range(5000):
                try:
                    client = socket.create_connection(address)
                    break
                except ConnectionRefusedError:
                    time.sleep(0.02)
            assert client.recv(100).decode() == os.environ["NAME"]
    """
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda name: launch(python(code), 2, env_extra={"NAME": name}), ["a", "b", "c", "d"]))
    assert [result.exit_code for result in results] == [0, 0, 0, 0]
    with reserved_port() as first, reserved_port() as second:
        assert first != second


def test_a_command_that_is_not_there_raises_and_leaves_nothing(mark: str) -> None:
    with pytest.raises(FileNotFoundError):
        launch(["/no/such/program"], 2)
    assert not marked(mark)


def test_configured_threads_come_first_then_the_environment_then_the_cores() -> None:
    assert threads_per_rank(2, 5, {"OMP_NUM_THREADS": "3"}) == 5
    assert threads_per_rank(2, None, {"OMP_NUM_THREADS": "3"}) == 3
    assert threads_per_rank(10**6, None, {}) == 1


class ScriptedPeers:
    """Another node that says these words, one at each look, once a rank here has failed or `ready` is there."""

    placement = Placement(1, 2, "127.0.0.1", 29400, None)

    def __init__(self, words: list[Word], ready: Path | None = None) -> None:
        self.words = words
        self.ready = ready
        self.failures: list[LaunchResult] = []

    def tell_failure(self, failure: LaunchResult) -> None:
        self.failures.append(failure)

    def tell_signal(self, number: int, at_once: bool) -> None:
        raise AssertionError("nobody sent a signal")

    def poll(self) -> list[Word]:
        due = bool(self.failures) if self.ready is None else self.ready.exists()
        return [self.words.pop(0)] if due and self.words else []

    def busy(self) -> bool:
        return bool(self.words)

    def give_up(self) -> None:
        raise AssertionError("the other node answered")


def test_of_failures_on_two_nodes_the_one_by_a_signal_is_the_cause(tmp_path: Path, mark: str) -> None:
    """A rank that fails because its peer is gone is noticed first at times, before the other node's word arrives."""
    killed = LaunchResult(137, rank=0, where="node 0 (other)")
    lost = LaunchResult(1, problem="node 0 (other) is gone")
    for cause in (killed, lost):
        peers = ScriptedPeers([Word(cause)])
        code = python("import sys; sys.exit(1)")
        result = launch(code, 1, log_folder=tmp_path, peers=peers, failure_grace_seconds=60)
        assert result == cause
        assert peers.failures == [LaunchResult(1, rank=1)]
    assert killed.describe().startswith("rank 0 on node 0 (other) was ended by signal 9")
    assert lost.describe() == "node 0 (other) is gone"
    peers = ScriptedPeers([Word(LaunchResult(4, rank=0))])
    first = launch(python("import sys; sys.exit(3)"), 1, peers=peers, failure_grace_seconds=60)
    assert (first.exit_code, first.rank) == (3, 1)


def test_whatever_the_other_nodes_say_a_rank_is_asked_to_end_once(tmp_path: Path, mark: str) -> None:
    code = f"""
        import pathlib, signal, sys, time
        folder = pathlib.Path({str(tmp_path)!r})
        def end(*_):
            with (folder / "asked").open("a") as file:
                file.write("x")
            time.sleep(0.5)
            sys.exit(143)
        signal.signal(signal.SIGTERM, end)
        (folder / "ready").touch()
        time.sleep(150)
    """
    words = [Word(), Word(LaunchResult(9, rank=0)), Word(signal=15), Word(signal=2)]
    peers = ScriptedPeers(words, ready=tmp_path / "ready")
    result = launch(python(code), 1, peers=peers, failure_grace_seconds=60)
    assert result == LaunchResult(143, interrupted_by=15)
    assert (tmp_path / "asked").read_text() == "x"


ASKED = """
    import pathlib, signal, sys, time
    def end(*_):
        {ending}
    signal.signal(signal.SIGTERM, end)
    pathlib.Path({ready!r}).touch()
    while True:
        time.sleep(0.05)
"""


@pytest.mark.parametrize(
    ("ending", "rest"),
    [
        ("sys.exit(143)", LaunchResult(143)),
        ("signal.signal(15, signal.SIG_DFL); signal.raise_signal(15)", LaunchResult(143)),
        (
            "print('No space left'); sys.exit(1)",
            LaunchResult(143, while_stopping=(LaunchResult(1, rank=1, log_tail="No space left"),)),
        ),
        ("signal.raise_signal(9)", LaunchResult(143, while_stopping=(LaunchResult(137, rank=1),))),
        ("pass", LaunchResult(143, killed=True)),
    ],
    ids=["well", "by_the_signal", "full_disk", "out_of_memory", "not"],
)
def test_what_goes_wrong_while_stopping_is_kept(tmp_path: Path, mark: str, ending: str, rest: LaunchResult) -> None:
    ready = tmp_path / "ready"
    code = python(ASKED.format(ending=ending, ready=str(ready)))
    peers = ScriptedPeers([Word(signal=15)], ready=ready)
    grace = 1.0 if rest.killed else 60.0  # the shorter one runs out
    result = launch(code, 1, log_folder=tmp_path, peers=peers, grace_seconds=grace)
    assert result == replace(rest, interrupted_by=15)
    assert peers.failures == list(rest.while_stopping)


def test_what_goes_wrong_elsewhere_while_stopping_is_kept(tmp_path: Path, mark: str) -> None:
    ready, full = tmp_path / "ready", LaunchResult(1, rank=0, log_tail="No space left", where="node 0 (other)")
    code = python(ASKED.format(ending="time.sleep(0.3); sys.exit(143)", ready=str(ready)))
    peers = ScriptedPeers([Word(signal=15), Word(full)], ready=ready)
    result = launch(code, 1, log_folder=tmp_path, peers=peers)
    assert result == LaunchResult(143, interrupted_by=15, while_stopping=(full,))


def test_a_signal_after_the_last_look_is_not_lost(mark: str, monkeypatch: pytest.MonkeyPatch) -> None:
    leave = _Ranks.__exit__

    def leave_late(self: _Ranks, *error: Any) -> None:
        signal.raise_signal(signal.SIGTERM)
        leave(self, *error)

    monkeypatch.setattr(_Ranks, "__exit__", leave_late)
    with pytest.raises(Stopped, match="SIGTERM"):
        launch(python(""), 1)
    # Whoever watches around the launch gets it instead; and a failure is no success because of it.
    with SignalWatch() as watch:
        assert launch(python(""), 1) == LaunchResult(0)
        assert watch.received == [signal.SIGTERM]
    assert launch(python("import sys; sys.exit(3)"), 1).exit_code == 3


def test_a_ctrl_c_before_the_stage_is_the_first_of_two(mark: str) -> None:
    with SignalWatch() as watch:
        signal.raise_signal(signal.SIGINT)
        assert launch(["sleep", "90"], 1) == LaunchResult(130, interrupted_by=2)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which the rank inherits; leaving the watch undoes it
        code = python(f"import os, time; os.kill({os.getpid()}, 2); time.sleep(90)")
        assert launch(code, 1) == LaunchResult(130, interrupted_by=2, killed=True)
    assert watch.received == [signal.SIGINT] * 2
