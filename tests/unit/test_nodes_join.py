"""How nodes come together: missing and mistaken ones are named, strangers stay out, Slurm's variables are read."""

from __future__ import annotations

import json
import socket
import stat
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlhf.config import load_config
from rlhf.config.distributed import DistributedConfig, split_address
from rlhf.config.zero import ZeroConfig
from rlhf.distributed import follower
from rlhf.distributed.channel import Channel, ChannelError, Lines, interface_of, proof, proves
from rlhf.distributed.leader import Leader
from rlhf.distributed.nodes import NodePlace, Secret, _code_hash, differences, installed, mistake_in, place_of
from rlhf.distributed.runtime import Runtime
from rlhf.errors import ConfigError, Stopped, UserError
from tests.node_example import READY, SLEEP, held_port, outputs, start_node, values_of, write_settings
from tests.unit.test_launch import mark, wait_for

__all__ = ["mark"]  # the fixture

TWO = DistributedConfig(num_nodes=2, num_processes=4)
SLURM = {
    "SLURM_JOB_ID": "1000",
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
}


def test_missing_nodes_are_named_and_an_early_one_waits(tmp_path: Path, mark: str) -> None:
    settings = write_settings(tmp_path, READY, num_nodes=4)
    node = start_node(settings, 2)
    read, failures = json.loads(settings.read_text()), list[UserError | Stopped]()
    leader = Leader(NodePlace(0, 4, "127.0.0.1", read["port"], 1, 300, 60))
    thread = leader_thread(leader, tmp_path, failures, values_of(read, 0))
    deadline = time.monotonic() + 120
    while not any(joined.ready for joined in leader._nodes.values()) and time.monotonic() < deadline:
        time.sleep(0.02)
    time_is_up(leader)
    thread.join()
    printed = outputs(node)[0]
    assert [failure.exit_code for failure in failures] == [node.returncode] == [1]
    assert "of 4 nodes these did not come to 127.0.0.1:" in str(failures[0])
    assert "within 1 s (distributed.timeout_seconds): 1, 3." in str(failures[0])
    assert "these did not come" in printed
    assert not list(tmp_path.glob(".nodes-*"))


def test_a_node_without_node_0_says_so(tmp_path: Path, mark: str) -> None:
    settings = write_settings(tmp_path, READY, timeout=5)
    node = start_node(settings, 1)
    printed = outputs(node)[0]
    assert node.returncode == 1
    assert "node 1 waits for node 0 at 127.0.0.1:" in printed
    assert "found no node 0" in printed
    assert "Connection refused" in printed


def test_another_config_is_refused_by_its_keys(tmp_path: Path, mark: str) -> None:
    settings = write_settings(tmp_path, READY)
    nodes = [start_node(settings, 0), start_node(settings, 1, "seed=2")]
    printed = outputs(*nodes)
    assert [node.returncode for node in nodes] == [2, 2]
    for text in printed:
        assert 'is not that of node 0: seed (absent on node 0, "2" there). Give all' in text
    assert not (tmp_path / "ready0").exists()


def test_two_nodes_of_one_rank_are_told_apart(tmp_path: Path, mark: str) -> None:
    settings = write_settings(tmp_path, SLEEP, num_nodes=3)
    nodes = [start_node(settings, 0), start_node(settings, 1)]
    wait_for(tmp_path / "1.joined")
    second = start_node(settings, 1)
    assert "two nodes have distributed.node_rank=1: node 1 (" in outputs(second)[0]
    assert second.returncode == 2
    third = start_node(settings, 2)
    wait_for(*(tmp_path / f"ready{rank}" for rank in range(3)))
    # One that comes when the run goes on already hears so, and disturbs nothing.
    late = start_node(settings, 2)
    assert "has all its 3 nodes already, and this one wants to be distributed.node_rank=2" in outputs(late)[0]
    assert late.returncode == 2
    assert not list(tmp_path.glob(".nodes-*"))
    nodes[0].terminate()
    outputs(*nodes, third)
    assert [node.returncode for node in (*nodes, third)] == [143, 143, 143]
    again = start_node(settings, 0)
    wait_for(next_secret(tmp_path))
    twin = start_node(settings, 0)
    assert "the port is in use. Is another node 0 running here" in outputs(twin)[0]
    assert twin.returncode == 2
    again.terminate()
    outputs(again)


def next_secret(folder: Path) -> Path:
    """The secret in the folder, once it is there."""
    deadline = time.monotonic() + 120
    while not (found := list(folder.glob(".nodes-*.json"))):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert stat.S_IMODE(found[0].stat().st_mode) == 0o600
    return found[0]


def test_an_address_of_another_host_is_refused(mark: str) -> None:
    # 192.0.2.0/24 is for documentation: no host has it.
    place = NodePlace(0, 2, "192.0.2.7", 29400, 1, 5, 6)
    with pytest.raises(ConfigError, match="this host does not have that address"), Leader(place):
        pass


def free_place(rank: int, timeout: int = 120) -> NodePlace:
    return NodePlace(rank, 2, "127.0.0.1", held_port(), 1, timeout, 60)


def leader_thread(
    leader: Leader, folder: Path, failures: list[UserError | Stopped], values: Mapping[str, Any] | None = None
) -> threading.Thread:
    """Node 0 in a thread: it ends with exit code 5 once all nodes have come; what it raises goes into `failures`."""

    def lead() -> None:
        try:
            with leader:
                leader.meet(folder, {"a": 1} if values is None else values)
                leader.end(5, "the end")
        except (UserError, Stopped) as error:
            failures.append(error)

    thread = threading.Thread(target=lead)
    thread.start()
    return thread


def time_is_up(leader: Leader) -> None:
    """From now on node 0, which was to wait for minutes, has waited long enough."""
    leader._place = replace(leader._place, timeout_seconds=1)


def test_a_folder_that_is_not_shared_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follower, "SHARED_SECONDS", 0.3)
    place = free_place(0)
    leader = Leader(place)
    (tmp_path / "other").mkdir()
    failures: list[UserError | Stopped] = []
    thread = leader_thread(leader, tmp_path, failures)
    other = NodePlace(1, 2, place.host, place.port, 1, 120, 60)
    with pytest.raises(ConfigError, match=r"other/\.nodes-\w+\.json, which node 0 has written.*set run\.dir"):
        follower.follow(other, tmp_path / "other", {"a": 1}, lambda stage: ["false"])
    time_is_up(leader)
    thread.join()
    assert "these did not come" in str(failures[0])


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_strangers_are_not_let_in_and_disturb_nothing(tmp_path: Path) -> None:
    place = free_place(0)
    failures: list[UserError | Stopped] = []
    thread = leader_thread(Leader(place), tmp_path, failures)
    token = next_secret(tmp_path).stem.removeprefix(".nodes-")
    secret = Secret.read(tmp_path, token)
    assert secret is not None
    for claim in ("", "0" * 64, "\ud800", proof(secret.value, "leader", "their challenge", "n", 1), 5):
        connection = socket.create_connection((place.host, place.port))
        lines = Lines(connection, 60)
        while (challenge := lines.receive())["type"] == "wait":
            pass  # the secret is in the folder a moment before node 0 asks for proofs of it
        assert secret.value not in json.dumps(challenge)
        lines.send("hello", node_rank=1, nonce="n", proof=claim, config={"a": 1}, installed=installed())
        with pytest.raises(ChannelError, match="closed the connection"):
            lines.receive()
    for rubbish in (b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b"\xff\n", b"[" * 200_000 + b"\n", b"x" * (1 << 21)):
        with socket.create_connection((place.host, place.port)) as connection, suppress(OSError):
            connection.sendall(rubbish)  # which node 0 need not take to its end
    # A leader that cannot prove itself is not obeyed, and the real node still gets in.
    node = NodePlace(1, 2, place.host, place.port, 1, 120, 60)
    assert follower.follow(node, tmp_path, {"a": 1}, lambda stage: ["false"]) == 5
    thread.join()
    assert failures == []


def test_a_node_0_without_the_secret_is_not_obeyed(tmp_path: Path) -> None:
    secret = Secret.write(tmp_path, {})
    place = free_place(1, timeout=1)
    listener = socket.create_server((place.host, place.port))

    def pretend() -> None:
        connection, _ = listener.accept()
        lines = Lines(connection, 60)
        lines.send("challenge", token=secret.token, nonce="n")
        lines.receive()
        lines.send("welcome", proof="0" * 64)
        lines.send("end", exit_code=0)
        listener.close()

    thread = threading.Thread(target=pretend)
    thread.start()
    with pytest.raises(UserError, match="found no node 0"):
        follower.follow(place, tmp_path, {}, lambda stage: ["false"])
    thread.join()


def test_a_proof_holds_for_one_side_and_one_challenge() -> None:
    made = proof("ab" * 32, "follower", "challenge", "nonce", 1)
    assert proves(made, "ab" * 32, "follower", "challenge", "nonce", 1)
    assert not proves(made, "ab" * 32, "leader", "challenge", "nonce", 1)
    assert not proves(made, "ab" * 32, "follower", "another", "nonce", 1)
    assert not proves(made, "ab" * 32, "follower", "challenge", "nonce", 2)
    assert not proves(made, "cd" * 32, "follower", "challenge", "nonce", 1)


def test_brackets_without_end_are_no_message() -> None:
    one, other = socket.socketpair()
    with one, other:
        other.settimeout(60)
        sender = threading.Thread(target=other.sendall, args=(b"[" * 200_000 + b"\n",))
        sender.start()
        with pytest.raises(ChannelError, match="no message"):
            Lines(one, 60).receive()
        sender.join()


def test_the_last_message_before_the_end_arrives(tmp_path: Path) -> None:
    one, other = (Channel(Lines(end, 60), 60) for end in socket.socketpair())
    one.send("first", value="ü")
    one.send("last")
    finisher = threading.Thread(target=one.finish)
    finisher.start()
    while (message := other.poll()) is None:
        time.sleep(0.01)
    assert message == {"type": "first", "value": "ü"}
    while (message := other.poll()) is None:
        time.sleep(0.01)
    assert message == {"type": "last"}
    deadline = time.monotonic() + 60
    while other.lost is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert other.lost == "it closed the connection"
    other.close()
    finisher.join()


def test_differences_name_keys_and_leave_out_what_may_differ() -> None:
    leader = {"distributed": {"node_rank": 0, "num_nodes": 2}, "ppo": {"batch_size": 8, "extra": {}}, "stages": ["sft"]}
    follower_ = {"distributed": {"node_rank": 1, "num_nodes": 2}, "ppo": {"batch_size": 16}, "stages": ["sft"]}
    assert differences(leader, follower_) == [
        "ppo.batch_size (8 on node 0, 16 there)",
        "ppo.extra ({} on node 0, absent there)",
    ]
    assert differences(leader, leader) == []


def test_what_is_installed_has_to_be_the_same() -> None:
    hello = {"node_rank": 1, "host": "there", "config": {}}
    assert mistake_in({**hello, "installed": installed()}, {}) is None
    wrong = mistake_in({**hello, "installed": {**installed(), "torch": "1.0"}}, {})
    assert wrong is not None
    assert wrong.startswith('node 1 (there) has not installed what node 0 has: torch ("')
    assert wrong.endswith('" on node 0, "1.0" there). Install the same on all nodes.')
    assert "code of rlhf (" in str(mistake_in(hello, {}))


def test_other_code_of_the_same_version_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "part").mkdir()
    (tmp_path / "part/one.py").write_text("a = 1")
    hashes = [_code_hash(tmp_path)]
    (tmp_path / "part/one.pyc").write_text("what Python writes there does not count")
    assert _code_hash(tmp_path) == hashes[0]
    (tmp_path / "part/one.py").write_text("a = 2")
    hashes.append(_code_hash(tmp_path))
    (tmp_path / "part/one.py").rename(tmp_path / "one.py")
    hashes.append(_code_hash(tmp_path))
    assert len(set(hashes)) == 3


def test_the_place_comes_from_the_config_or_from_srun() -> None:
    assert place_of(DistributedConfig(num_processes=2), SLURM) is None
    assert place_of(TWO, {"RANK": "0", "WORLD_SIZE": "8"}) is None
    config = DistributedConfig(num_nodes=2, node_rank=1, rendezvous="[::1]:29400", timeout_seconds=7, silent_seconds=8)
    assert place_of(config, {}) == NodePlace(1, 2, "::1", 29400, 1, 7, 8)
    place = place_of(TWO, SLURM)
    assert place is not None
    assert place == NodePlace(1, 2, "gpu03", 15000 + (1000 * 31 + 2) % 15000, 4, 600, 6)
    assert place_of(TWO, {**SLURM, "SLURM_NODEID": "0", "SLURM_PROCID": "0"}) == replace(place, rank=0)
    named = DistributedConfig(num_nodes=2, rendezvous="10.0.0.1:4")
    assert place_of(named, SLURM) == NodePlace(1, 2, "10.0.0.1", 4, 1, 600, 6)
    # Eight tasks on these two nodes are the ranks themselves; three are a mistake.
    assert place_of(TWO, {**SLURM, "SLURM_STEP_NUM_TASKS": "8"}) is None
    with pytest.raises(ConfigError, match=r"srun started 3 tasks on 2 nodes.*--ntasks=2 --ntasks-per-node=1"):
        place_of(TWO, {**SLURM, "SLURM_STEP_NUM_TASKS": "3"})
    # Two tasks on one node: with one process a node they are ranks, with four a mistake.
    assert place_of(DistributedConfig(num_nodes=2), {**SLURM, "SLURM_STEP_NUM_NODES": "1"}) is None
    with pytest.raises(ConfigError, match="srun started 2 tasks on 1 node,"):
        place_of(TWO, {**SLURM, "SLURM_STEP_NUM_NODES": "1"})


@pytest.mark.parametrize(
    ("arguments", "env", "words"),
    [
        (["distributed.num_nodes=2"], {}, "distributed.node_rank and distributed.rendezvous are not set"),
        (["distributed.num_nodes=2", "distributed.node_rank=1"], {}, "but distributed.rendezvous is not set"),
        (["distributed.num_nodes=2"], {"SLURM_JOB_ID": "7"}, "srun --nodes=2 --ntasks=2 --ntasks-per-node=1 instead"),
        (
            ["distributed.num_nodes=2", "distributed.node_rank=2"],
            {},
            r"node_rank \(2\) must be below .*num_nodes \(2\)",
        ),
        (["distributed.node_rank=1"], {}, r"node_rank \(1\) must be below .*num_nodes \(1\)"),
        (["distributed.num_nodes=2", "distributed.rendezvous=gpu01"], {}, "expected HOST:PORT with a port from 1"),
        (["distributed.num_nodes=3", "distributed.num_processes=2"], {}, "multiple of .*num_nodes .* num_processes"),
    ],
)
def test_mistakes_in_the_keys_are_named(arguments: list[str], env: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        place_of(load_config(arguments).config.distributed, env)
    assert caught.value.exit_code == 2
    words = words.replace("multiple of .*num_nodes .* num_processes", "a multiple of distributed.num_nodes")
    assert caught.match(words)


def test_ranks_that_are_not_as_many_as_the_nodes_have_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"num_nodes \(2\) .*num_processes \(1\) is 2, but the process group has 3"):
        Runtime.start(DistributedConfig(num_nodes=2), ZeroConfig(), seed=1)


def test_the_rendezvous_is_a_host_and_a_port() -> None:
    assert split_address("gpu01.cluster:29400") == ("gpu01.cluster", 29400)
    assert split_address("[::1]:1") == ("::1", 1)
    for wrong in ("gpu01", "gpu01:", ":29400", "gpu01:0", "gpu01:65536", "::1:5", "gpu 01:5", "gpu01:x", "gpu01:٣"):
        with pytest.raises(ValueError, match="expected HOST:PORT"):
            split_address(wrong)
    assert load_config(["distributed.rendezvous=127.0.0.1:29400"]).config.distributed.rendezvous == "127.0.0.1:29400"


def test_the_interface_of_an_address() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("192.0.2.7") is None
    assert interface_of("::1") is None
