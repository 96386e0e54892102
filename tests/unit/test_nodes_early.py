"""Before a run's nodes have met: node 0 may end, any node may be told to, and strangers may try."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from rlhf import supervisor
from rlhf.config import load_config
from rlhf.distributed import follower
from rlhf.distributed.channel import ChannelError, Lines, proof
from rlhf.distributed.leader import Leader
from rlhf.distributed.nodes import NodePlace, Secret, installed
from rlhf.distributed.stopping import SIGNALS
from rlhf.errors import ConfigError, Stopped, UserError
from tests.node_example import SLEEP, outputs, start_node, write_settings
from tests.unit.test_launch import mark, wait_for, wait_until_gone
from tests.unit.test_nodes_join import free_place, leader_thread, next_secret

__all__ = ["mark"]  # the fixture


def test_a_node_that_waits_hears_that_node_0_ended_before_they_could_meet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = free_place(0)

    def lead() -> None:
        with suppress(ConfigError), Leader(place) as leader:
            while not leader._greeted:
                time.sleep(0.02)
            raise ConfigError("another run works in this folder")

    thread = threading.Thread(target=lead)
    thread.start()
    code = follower.follow(NodePlace(1, 2, place.host, place.port, 1, 120, 60), tmp_path, {}, lambda stage: ["false"])
    thread.join()
    assert code == 2
    assert "node 0 ended the run with exit code 2: another run works in this folder" in capsys.readouterr().err


def test_what_is_not_proven_to_be_node_0_cannot_make_a_success(tmp_path: Path) -> None:
    place = free_place(1)
    listener = socket.create_server((place.host, place.port))

    def pretend() -> None:
        with listener, listener.accept()[0] as connection:
            Lines(connection, 60).send("end", exit_code=0)

    thread = threading.Thread(target=pretend)
    thread.start()
    assert follower.follow(place, tmp_path, {}, lambda stage: ["false"]) == 1
    thread.join()


@pytest.mark.parametrize("error", [ConfigError("there is no such model"), Stopped(signal.SIGTERM)])
def test_a_node_that_cannot_work_ends_the_waiting_for_it(tmp_path: Path, error: ConfigError | Stopped) -> None:
    def prepare() -> None:
        raise error

    place = free_place(0)
    failures: list[UserError | Stopped] = []
    thread = leader_thread(Leader(place), tmp_path, failures)
    node = NodePlace(1, 2, place.host, place.port, 1, 120, 60)
    with pytest.raises(type(error)):
        follower.follow(node, tmp_path, {"a": 1}, lambda stage: ["false"], prepare=prepare)
    thread.join()
    (failure,) = failures
    assert failure.exit_code == error.exit_code
    assert str(failure) == (str(error) if isinstance(error, Stopped) else f"node 1 ({socket.gethostname()}): {error}")


def test_a_node_looks_at_its_inputs_after_it_has_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else node 0 and the others, which never hear of a mistake, would wait for it until their time is up."""
    folder = tmp_path / "run"

    def followed(place: NodePlace, run_folder: Path, *rest: Any, prepare: Callable[[], object], **more: Any) -> int:
        assert run_folder == folder
        assert not folder.exists()
        prepare()
        assert folder.is_dir()
        return 0

    monkeypatch.setattr(supervisor, "follow", followed)
    place = ("distributed.num_nodes=2", "distributed.node_rank=1", "distributed.rendezvous=127.0.0.1:29400")
    config = load_config(["experiment=smoke", f"run.dir={folder}", *place]).config
    assert supervisor.supervise(config, ["rlhf"], debug=False) == 0


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_any_node_ends_the_waiting_for_others(
    tmp_path: Path, mark: str, rank: int, number: signal.Signals
) -> None:
    settings = write_settings(tmp_path, SLEEP, num_nodes=3)
    both = [start_node(settings, 0), start_node(settings, 1)]
    wait_for(tmp_path / "1.joined")
    both[rank].send_signal(number)
    printed = outputs(*both)
    assert [node.returncode for node in both] == [128 + number, 128 + number], printed
    assert not list(tmp_path.glob(".nodes-*"))
    assert wait_until_gone(mark) == []


def test_a_node_0_that_was_there_and_is_gone_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follower, "REFUSED_SECONDS", 3.0)
    place = free_place(1)
    listener = socket.create_server((place.host, place.port))

    def die() -> None:
        with listener, listener.accept()[0]:
            pass

    thread = threading.Thread(target=die)
    thread.start()
    with pytest.raises(UserError, match=r"is gone before node 1 had joined: .*refused"):
        follower.follow(place, tmp_path, {}, lambda stage: ["false"])
    thread.join()


def test_a_hello_that_was_overheard_opens_nothing(tmp_path: Path) -> None:
    place = free_place(0)
    failures: list[UserError | Stopped] = []
    thread = leader_thread(Leader(place), tmp_path, failures)
    secret = Secret.read(tmp_path, next_secret(tmp_path).stem.removeprefix(".nodes-"))
    assert secret is not None

    def challenged() -> tuple[Lines, object]:
        lines = Lines(socket.create_connection((place.host, place.port)), 60)
        while (message := lines.receive())["type"] == "wait":
            pass
        return lines, message["nonce"]

    first, challenge = challenged()
    overheard = {
        "installed": installed(),
        "node_rank": 1,
        "host": "there",
        "nonce": "n",
        "proof": proof(secret.value, "follower", challenge, "n", 1),
        "config": {"a": 1},
    }
    again, _ = challenged()
    again.send("hello", **overheard)
    with pytest.raises(ChannelError, match="closed the connection"):
        again.receive()
    # It was a good one, where it belonged.
    first.send("hello", **overheard)
    assert first.receive()["type"] == "welcome"
    first.send("ready")
    while first.receive()["type"] != "end":
        pass
    first.close()
    thread.join()
    assert failures == []


def test_only_so_many_connections_are_looked_at_at_a_time(tmp_path: Path) -> None:
    place = free_place(0)
    failures: list[UserError | Stopped] = []
    thread = leader_thread(Leader(place), tmp_path, failures)
    next_secret(tmp_path)
    idle = [socket.create_connection((place.host, place.port)) for _ in range(place.num_nodes + 16)]
    for connection in idle:
        Lines(connection, 60).receive()
    with pytest.raises(ChannelError, match="closed the connection"):
        Lines(socket.create_connection((place.host, place.port)), 60).receive()
    for connection in idle:
        connection.close()
    node = NodePlace(1, 2, place.host, place.port, 1, 120, 60)
    assert follower.follow(node, tmp_path, {"a": 1}, lambda stage: ["false"]) == 5
    thread.join()
    assert failures == []


def test_a_file_system_that_ignores_modes_gets_no_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    env = {"WANDB_API_KEY": "k1", "HF_TOKEN": "t1", "NCCL_DEBUG": "INFO"}
    assert Secret.write(tmp_path, env).environment == env
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(os, "open", lambda path, flags, mode: _open(path, flags, 0o644))
    secret = Secret.write(tmp_path, env)
    assert secret.environment == {"NCCL_DEBUG": "INFO"}
    (path,) = tmp_path.glob(".nodes-*")  # the first one is gone
    assert path == Secret.path(tmp_path, secret.token)
    assert "k1" not in path.read_text()
    assert "ignores file modes" in capsys.readouterr().err


_open = os.open


@pytest.fixture
def handlers() -> Iterator[None]:
    """Puts this process's signal handlers back."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_signal_does_not_change_how_a_run_ends_that_is_ending(tmp_path: Path, handlers: None) -> None:
    place = free_place(0)
    with Leader(place):
        pass
    for number in SIGNALS:
        os.kill(os.getpid(), number)
