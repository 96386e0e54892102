"""Several nodes, as processes on this host with small scripts for ranks: they meet, end together and let nobody in."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from rlhf.distributed import channel
from rlhf.distributed.follower import _Joining, _LeaderPeers, _obey, follow
from rlhf.distributed.launch import launch
from rlhf.distributed.nodes import NodePlace
from rlhf.distributed.peers import LaunchResult
from rlhf.errors import UserError
from tests.node_example import READY, SLEEP, outputs, start_node, values_of, write_settings
from tests.unit.test_launch import mark, marked, wait_for, wait_until_gone

__all__ = ["mark"]  # the fixture

POLITE = """
def end(*_):
    with (folder / f"asked{rank}").open("a") as file:
        file.write("x")
    time.sleep(0.3)
    sys.exit(143)
signal.signal(signal.SIGTERM, end)
(folder / f"ready{rank}").touch()
time.sleep(600)
"""


@pytest.fixture
def two(tmp_path: Path, mark: str) -> Iterator[tuple[subprocess.Popen[str], subprocess.Popen[str]]]:
    """Two nodes whose ranks wait, politely."""
    settings = write_settings(tmp_path, POLITE)
    nodes = start_node(settings, 0), start_node(settings, 1)
    wait_for(tmp_path / "ready0", tmp_path / "ready1")
    yield nodes
    assert wait_until_gone(mark) == []


def test_every_rank_on_every_node_gets_its_environment(tmp_path: Path, mark: str) -> None:
    code = """
    assert not list(folder.glob(".nodes-*.json"))  # a secret needs to lie there only while nodes meet
    stage = sys.argv[1]
    (folder / f"{stage}{rank}").write_text(json.dumps(dict(os.environ)))
    print("hello from rank", rank)
    """
    settings = write_settings(tmp_path, code, num_processes=2, num_nodes=3, stages=["sft", "ppo"])
    (tmp_path / ".nodes-00.json").write_text("{}")  # what a killed run left
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "HF_", "GLOO_"))}
    lead = {**plain, "WANDB_API_KEY": "k", "HF_TOKEN": "t", "NCCL_DEBUG": "INFO", "OTHER": "o", "HF_HOME": "/zero"}
    nodes = [start_node(settings, 2, env=plain), start_node(settings, 1, env={**plain, "HF_HOME": "/one"})]
    nodes.insert(0, start_node(settings, 0, env=lead))
    printed = outputs(*nodes)
    assert [node.returncode for node in nodes] == [0, 0, 0], printed
    assert "hello from rank 0" in printed[0]
    assert "hello from rank 1" in (tmp_path / "logs/rank1.log").read_text()
    assert "hello" not in printed[1]
    assert not (tmp_path / "logs/rank0.log").exists()
    for stage in ("sft", "ppo"):
        environments = [json.loads((tmp_path / f"{stage}{rank}").read_text()) for rank in range(6)]
        for rank, environment in enumerate(environments):
            assert environment["LOCAL_RANK"] == str(rank % 2)
            assert (environment["WORLD_SIZE"], environment["LOCAL_WORLD_SIZE"]) == ("6", "2")
            assert environment["GLOO_SOCKET_IFNAME"] == "lo"
            assert environment["MASTER_ADDR"] == "127.0.0.1"
            assert [environment[name] for name in ("WANDB_API_KEY", "HF_TOKEN", "NCCL_DEBUG")] == ["k", "t", "INFO"]
            assert environment["HF_HOME"] == ("/one" if rank in (2, 3) else "/zero")
            assert ("OTHER" in environment) == (rank < 2)
        assert len({environment["MASTER_PORT"] for environment in environments}) == 1
    assert not list(tmp_path.glob(".nodes-*"))
    assert not marked(mark)


def test_a_killed_rank_on_one_node_ends_all_nodes(tmp_path: Path, mark: str) -> None:
    # Rank 1 fails as ranks do whose peers are gone; the cause is still the killed one.
    code = """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (folder / f"ready{rank}").touch()
    if rank == "2":
        while not all((folder / f"ready{other}").exists() for other in range(4)):
            time.sleep(0.01)
        print("last words")
        subprocess.Popen(["sleep", "600"])
        (folder / "unfinished").write_text(str(os.getpid()))
        (folder / "unfinished").rename(folder / "pid2")
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == "1":
        while not (folder / "pid2").exists():
            time.sleep(0.01)
        while os.path.exists("/proc/" + (folder / "pid2").read_text()):  # until its supervisor has seen its end
            time.sleep(0.001)
        os._exit(1)
    time.sleep(600)
    """
    settings = write_settings(tmp_path, code, num_processes=2)
    nodes = [start_node(settings, 0), start_node(settings, 1)]
    printed = outputs(*nodes)
    assert [node.returncode for node in nodes] == [137, 137], printed
    assert "sft: rank 2 on node 1 (" in printed[0]
    assert "was ended by signal 9 (SIGKILL)" in printed[0]
    assert "last words" in printed[0]
    assert "node 0 ended the run with exit code 137" in printed[1]
    assert wait_until_gone(mark) == []


def test_a_failing_rank_of_node_0_gives_all_nodes_its_exit_code(tmp_path: Path, mark: str) -> None:
    settings = write_settings(tmp_path, f"{READY}time.sleep(600 if rank == '1' else 0.5)\nsys.exit(7)")
    nodes = [start_node(settings, 0), start_node(settings, 1)]
    outputs(*nodes)
    assert [node.returncode for node in nodes] == [7, 7]
    assert wait_until_gone(mark) == []


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_any_node_stops_all_ranks_once(
    tmp_path: Path,
    two: tuple[subprocess.Popen[str], subprocess.Popen[str]],
    rank: int,
    number: int,
    code: int,
) -> None:
    two[rank].send_signal(number)
    printed = outputs(*two)
    assert [node.returncode for node in two] == [code, code], printed
    assert [(tmp_path / f"asked{rank}").read_text() for rank in (0, 1)] == ["x", "x"]


def test_a_signal_to_all_nodes_at_once_still_reaches_a_rank_once(
    tmp_path: Path, two: tuple[subprocess.Popen[str], subprocess.Popen[str]]
) -> None:
    for node in two:
        node.terminate()
    printed = outputs(*two)
    assert [node.returncode for node in two] == [143, 143], printed
    assert [(tmp_path / f"asked{rank}").read_text() for rank in (0, 1)] == ["x", "x"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_second_interrupt_on_any_node_kills_at_once(tmp_path: Path, mark: str, rank: int) -> None:
    stubborn = 'signal.signal(signal.SIGTERM, lambda *_: (folder / f"asked{rank}").touch())\n' + READY
    settings = write_settings(tmp_path, stubborn + "while True:\n    time.sleep(0.05)\n")
    nodes = [start_node(settings, 0), start_node(settings, 1)]
    wait_for(tmp_path / "ready0", tmp_path / "ready1")
    nodes[rank].send_signal(signal.SIGINT)
    wait_for(tmp_path / "asked0", tmp_path / "asked1")
    nodes[rank].send_signal(signal.SIGINT)
    printed = outputs(*nodes)
    assert [node.returncode for node in nodes] == [130, 130], printed
    assert wait_until_gone(mark) == []


def test_a_signal_to_a_node_between_stages_ends_all_without_starting_ranks(tmp_path: Path, mark: str) -> None:
    code = "(folder / f'{sys.argv[1]}{rank}').touch()\ntime.sleep(600 if sys.argv[1] == 'ppo' else 0)"
    settings = write_settings(tmp_path, code, stages=["sft", "ppo"], pause="told")
    nodes = [start_node(settings, 0), start_node(settings, 1)]
    wait_for(tmp_path / "paused")
    nodes[1].terminate()
    printed = outputs(*nodes)
    assert [node.returncode for node in nodes] == [143, 143], printed
    assert "was told to end" in printed[0]
    assert sorted(path.name for path in tmp_path.glob("*[01]")) == ["sft0", "sft1"]


class _Scripted:
    """A channel to a node 0 that says `messages` and, once the ranks are done, the end. The first poll gets SIGTERM."""

    local_address, lost = "127.0.0.1", None

    def __init__(self, *messages: channel.Message | None) -> None:
        self.sent: list[str] = []
        self._messages = list(messages)
        self._told = False

    def send(self, kind: str, **values: Any) -> None:
        self.sent.append(kind)

    def poll(self) -> channel.Message | None:
        if not self._told:
            self._told = True
            signal.raise_signal(signal.SIGTERM)
        if "done" in self.sent:
            return {"type": "end", "exit_code": 143}
        return self._messages.pop(0) if self._messages else None


@pytest.mark.parametrize("early", [True, False])
def test_a_signal_to_a_node_just_before_a_stage_ends_its_ranks_at_once(tmp_path: Path, mark: str, early: bool) -> None:
    """Read before the stage is, it starts no ranks; else, with the signal known already, they are ended."""
    started = []

    def run_ranks(stage: str, peers: _LeaderPeers) -> LaunchResult:
        started.append(stage)
        return launch(["sleep", "90"], 1, log_folder=tmp_path, peers=peers)

    stage: channel.Message = {"type": "stage", "name": "sft", "port": 1}
    scripted = _Scripted(None, stage) if early else _Scripted(stage)
    place = NodePlace(1, 2, "127.0.0.1", 1, 1, 120, 60)
    begun = time.monotonic()
    assert _obey(place, cast(channel.Channel, scripted), {"stages": ["sft"]}, run_ranks) == 143
    assert time.monotonic() - begun < 60
    assert scripted.sent == ["signal", "done"]
    assert started == ([] if early else ["sft"])


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_supervisor_ends_the_other_node(tmp_path: Path, mark: str, rank: int) -> None:
    settings = write_settings(tmp_path, SLEEP)
    nodes = [start_node(settings, 0), start_node(settings, 1)]
    wait_for(tmp_path / "ready0", tmp_path / "ready1")
    nodes[rank].kill()
    other = nodes[1 - rank]
    printed = outputs(other)[0]
    assert other.returncode == 1
    assert f"node {rank}" in printed
    assert "is gone: it closed the connection" in printed
    nodes[rank].communicate()
    assert wait_until_gone(mark) == []


def test_a_node_that_falls_silent_ends_the_run(tmp_path: Path, mark: str) -> None:
    settings = write_settings(tmp_path, SLEEP, silent=6)
    nodes = [start_node(settings, 0), start_node(settings, 1)]
    wait_for(tmp_path / "ready0", tmp_path / "ready1")
    nodes[1].send_signal(signal.SIGSTOP)  # as if its host hung: the connection stays open
    started = time.monotonic()
    printed = outputs(nodes[0])[0]
    assert time.monotonic() - started > 2
    assert nodes[0].returncode == 1
    assert "is gone: nothing was heard of it" in printed
    nodes[1].kill()
    nodes[1].communicate()
    assert wait_until_gone(mark) == []


def test_a_busy_node_is_not_silent(tmp_path: Path, mark: str) -> None:
    """Between two stages node 0 may hash models for minutes: its heart-beat goes on."""
    settings = write_settings(tmp_path, READY, stages=["sft", "ppo"], silent=6, pause=8)
    nodes = [start_node(settings, 0), start_node(settings, 1)]
    printed = outputs(*nodes)
    assert [node.returncode for node in nodes] == [0, 0], printed


def test_node_0_that_fails_while_a_stage_runs_says_why_on_all_nodes(tmp_path: Path, mark: str) -> None:
    settings = write_settings(tmp_path, SLEEP, raises="no such thing")
    nodes = [start_node(settings, 0), start_node(settings, 1)]
    printed = outputs(*nodes)
    assert [node.returncode for node in nodes] == [2, 2], printed
    assert "node 0 ended the run with exit code 2: no such thing" in printed[1]
    assert wait_until_gone(mark) == []


def test_a_rank_killed_on_one_of_three_nodes_ends_all(tmp_path: Path, mark: str) -> None:
    code = READY + 'os.kill(os.getpid(), signal.SIGKILL) if rank == "2" else time.sleep(600)\n'
    settings = write_settings(tmp_path, code, num_nodes=3)
    nodes = [start_node(settings, rank) for rank in range(3)]
    printed = outputs(*nodes)
    assert [node.returncode for node in nodes] == [137, 137, 137], printed
    assert "rank 2 on node 2 (" in printed[0]
    assert "node 0 ended the run with exit code 137" in printed[1]
    assert wait_until_gone(mark) == []


def test_a_supervisor_killed_on_one_of_three_nodes_ends_all(tmp_path: Path, mark: str) -> None:
    settings = write_settings(tmp_path, SLEEP, num_nodes=3)
    nodes = [start_node(settings, rank) for rank in range(3)]
    wait_for(*(tmp_path / f"ready{rank}" for rank in range(3)))
    nodes[2].kill()
    printed = outputs(*nodes)
    assert [node.returncode for node in nodes] == [1, 1, -9], printed
    assert "node 2 (" in printed[0]
    assert "is gone: it closed the connection" in printed[0]
    assert "node 0 ended the run with exit code 1" in printed[1]  # it was told, and not hung up on in the end
    assert wait_until_gone(mark) == []


def joined_by_hand(settings: Path) -> channel.Channel:
    """Node 1 of the settings' run, of which nothing comes but the heart-beat."""
    read = json.loads(settings.read_text())
    place = NodePlace(1, 2, "127.0.0.1", read["port"], 1, 120, 60)
    joined = _Joining(place, settings.parent, values_of(read, 1)).join()[0]
    joined.send("ready")
    return joined


def test_a_node_that_never_says_that_its_ranks_ended_is_given_up(tmp_path: Path, mark: str) -> None:
    settings = write_settings(tmp_path, "time.sleep(0.2)\nsys.exit(7)", patience=1)
    leader = start_node(settings, 0)
    other = joined_by_hand(settings)
    printed = outputs(leader)[0]
    assert leader.returncode == 7, printed
    assert "does not say that its ranks have ended: node 0 waits no longer" in printed
    said, deadline = [], time.monotonic() + 60
    while other.lost is None and time.monotonic() < deadline:
        message = other.poll()
        if message is None:
            time.sleep(0.01)
        else:
            said.append(message["type"])
    assert said == ["stage", "stop"]
    other.close()


def test_a_node_that_cannot_start_its_ranks_says_why_on_node_0(tmp_path: Path, mark: str) -> None:
    settings = write_settings(tmp_path, SLEEP)
    leader = start_node(settings, 0)
    read = json.loads(settings.read_text())
    place = NodePlace(1, 2, "127.0.0.1", read["port"], 1, 120, 60)
    with pytest.raises(FileNotFoundError):
        follow(place, tmp_path, values_of(read, 1), lambda stage: ["/there/is/no/such/python"])
    printed = outputs(leader)[0]
    assert leader.returncode == 1
    assert "sft: node 1 (" in printed
    assert "FileNotFoundError: " in printed
    assert "/there/is/no/such/python" in printed


def test_a_stage_that_is_not_of_this_run_is_refused(tmp_path: Path, mark: str) -> None:
    settings = write_settings(tmp_path, SLEEP, stages=["../../etc"])
    leader = start_node(settings, 0)
    read = json.loads(settings.read_text())
    place = NodePlace(1, 2, "127.0.0.1", read["port"], 1, 120, 60)
    values = _Hiding(values_of(read, 1))
    with pytest.raises(UserError, match=r"asked for the stage '\.\./\.\./etc', but this run's stages are sft\."):
        follow(place, tmp_path, values, lambda stage: ["false"])
    assert "asked for the stage '../../etc'" in outputs(leader)[0]


class _Hiding(dict[str, Any]):
    """A config that is node 0's when it is compared, and another one when it is asked."""

    def get(self, key: str, default: Any = None) -> Any:
        return ["sft"] if key == "stages" else super().get(key, default)
