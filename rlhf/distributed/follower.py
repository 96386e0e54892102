"""Nodes 1 and up: they join node 0, start their ranks when told to, and end with node 0's exit code."""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import rlhf
from rlhf.distributed.channel import Channel, ChannelError, Lines, Message, interface_of, proof, proves
from rlhf.distributed.launch import SignalWatch, launch
from rlhf.distributed.nodes import PROTOCOL, NodePlace, Secret, notice
from rlhf.distributed.peers import LaunchResult, Placement, Word
from rlhf.errors import EXIT_SUCCESS, ConfigError, UserError

# How long a file that node 0 has written may take to be seen here.
SHARED_SECONDS = 10.0
_ANSWER_SECONDS = 5.0
_POLL_SECONDS = 0.02


def follow(
    place: NodePlace,
    run_folder: Path,
    values: Mapping[str, Any],
    command: Callable[[str], Sequence[str]],
    *,
    num_threads: int | None = None,
    grace_seconds: float = 25.0,
) -> int:
    """Does what node 0 says until it says how the run ended. Returns the exit code, the same on all nodes.

    `values` is the config as plain values; `command(stage)` is what a rank of a stage runs. Raises `ConfigError` when
    node 0 refuses this node or the run folder is not shared, and `UserError` when node 0 does not come or goes.
    `num_threads` and `grace_seconds` are what `launch` takes.
    """
    channel, environment = _join(place, run_folder, values)
    missing = {name: value for name, value in environment.items() if name not in os.environ}
    run_stage = partial(launch, env_extra=missing, num_threads=num_threads, grace_seconds=grace_seconds)
    told: int | None = None
    try:
        with SignalWatch() as watch:
            while True:
                if watch.received and told is None:
                    told = watch.received[0]
                    channel.send("signal", number=told, at_once=False)
                if len(watch.received) > 1:
                    return 128 + watch.received[0]
                message = channel.poll()
                if message is None:
                    if channel.lost is not None:
                        return _lost(place, channel.lost, told)
                    time.sleep(_POLL_SECONDS)
                elif message["type"] == "end":
                    return _end(place, message)
                elif message["type"] == "stage":
                    name = str(message["name"])
                    logs = run_folder / "logs" / name
                    peers = _LeaderPeers(channel, _placement(place, channel, int(message["port"])))
                    _announce(place, name, logs)
                    result = run_stage(command(name), place.num_processes, log_folder=logs, peers=peers)
                    told = result.interrupted_by or told
                    channel.send("done")
    finally:
        channel.close()


def _placement(place: NodePlace, channel: Channel, port: int) -> Placement:
    return Placement(place.rank, place.num_nodes, place.host, port, interface_of(channel.local_address))


def _announce(place: NodePlace, stage: str, logs: Path) -> None:
    first = place.rank * place.num_processes
    ranks = f"rank {first}" if place.num_processes == 1 else f"ranks {first} to {first + place.num_processes - 1}"
    notice(f"node {place.rank} of {place.num_nodes}: stage {stage}, {ranks}, output in {logs}")


class _LeaderPeers:
    """Node 0 while a stage runs here; see `rlhf.distributed.peers.Peers`."""

    def __init__(self, channel: Channel, placement: Placement) -> None:
        self.placement = placement
        self._channel = channel
        self._told_of_loss = False

    def tell_failure(self, failure: LaunchResult) -> None:
        """Reports the rank and the end of its log to node 0."""
        self._channel.send("failed", rank=failure.rank, exit_code=failure.exit_code, log_tail=failure.log_tail)

    def tell_signal(self, number: int, at_once: bool) -> None:
        """Reports the signal to node 0, which tells the others."""
        self._channel.send("signal", number=number, at_once=at_once)

    def poll(self) -> list[Word]:
        """What node 0 wants; that it is gone is a failure elsewhere."""
        words = []
        while (message := self._channel.poll()) is not None:
            if message["type"] == "stop":
                words.append(Word(signal=message["signal"], at_once=bool(message["at_once"])))
        if self._channel.lost is not None and not self._told_of_loss:
            self._told_of_loss = True
            words.append(Word())
        return words

    def busy(self) -> bool:
        """Node 0 alone waits for others."""
        return False

    def give_up(self) -> None:
        """There is nothing to give up."""


def _end(place: NodePlace, message: Message) -> int:
    code = int(message["exit_code"])
    if code != EXIT_SUCCESS:
        reason = f": {message['message']}" if message.get("message") else ""
        notice(f"node {place.rank}: node 0 ended the run with exit code {code}{reason}")
    return code


def _lost(place: NodePlace, reason: str, told: int | None) -> int:
    if told is not None:
        return 128 + told
    raise UserError(f"node 0 at {place.address} is gone: {reason}. Look for the cause there; its ranks here are ended.")


def _join(place: NodePlace, run_folder: Path, values: Mapping[str, Any]) -> tuple[Channel, Mapping[str, str]]:
    """Reaches node 0, however long before it this node was started, and is admitted."""
    deadline = time.monotonic() + place.timeout_seconds
    announced = time.monotonic() + 1
    while True:
        try:
            connection = socket.create_connection((place.host, place.port), timeout=_ANSWER_SECONDS)
            try:
                return _introduce(place, Lines(connection, _ANSWER_SECONDS), run_folder, values)
            except BaseException:
                connection.close()
                raise
        except (OSError, ChannelError) as error:
            problem = str(error)
        if time.monotonic() > deadline:
            raise UserError(
                f"node {place.rank} found no node 0 at {place.address} within {place.timeout_seconds} s "
                f"(distributed.timeout_seconds): {problem}. Start the same command there with distributed.node_rank=0."
            )
        if announced is not None and time.monotonic() > announced:
            announced = float("inf")
            notice(
                f"node {place.rank} waits for node 0 at {place.address}, {place.timeout_seconds} s at most "
                f"(distributed.timeout_seconds): {problem}"
            )
        time.sleep(0.2)


def _introduce(
    place: NodePlace, lines: Lines, run_folder: Path, values: Mapping[str, Any]
) -> tuple[Channel, Mapping[str, str]]:
    """Proves that this node reads the run folder and has node 0 prove the same. Raises `ConfigError` and others."""
    challenge = lines.receive()
    token = str(challenge.get("token"))
    if challenge["type"] != "challenge" or not token.isalnum():
        raise ChannelError("what answers there is not node 0 of a run")
    secret = _read_secret(run_folder, token, lines)
    nonce = secrets.token_hex(16)
    facts = [challenge.get("nonce"), nonce, place.rank]
    lines.send(
        "hello",
        protocol=PROTOCOL,
        version=rlhf.__version__,
        node_rank=place.rank,
        host=socket.gethostname(),
        nonce=nonce,
        proof=proof(secret.value, "follower", *facts),
        config=values,
    )
    answer = lines.receive()
    if not proves(answer.get("proof"), secret.value, "leader", *facts):
        raise ChannelError("what answers there is not node 0 of this run")
    if answer["type"] == "refused":
        raise ConfigError(str(answer["message"]))
    return Channel(lines), secret.environment


def _read_secret(run_folder: Path, token: str, lines: Lines) -> Secret:
    deadline = time.monotonic() + SHARED_SECONDS
    while (secret := Secret.read(run_folder, token)) is None:
        if time.monotonic() > deadline:
            path = Secret.path(run_folder.absolute(), token)
            lines.send("unreadable", path=str(path))
            raise ConfigError(
                f"this node cannot read {path}, which node 0 has written. All nodes need one run folder: set run.dir "
                "(or run.root, and the working folder) to the same folder of a file system that all nodes share, and "
                "start all as the same user."
            )
        time.sleep(0.1)
    return secret
