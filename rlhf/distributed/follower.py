"""Nodes 1 and up: they join node 0, start their ranks when told to, and end with node 0's exit code."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rlhf.distributed.channel import Channel, ChannelError, Lines, Message, interface_of, proof, proves
from rlhf.distributed.launch import SignalWatch, launch
from rlhf.distributed.nodes import NodePlace, Secret, exit_of, installed, notice
from rlhf.distributed.peers import LaunchResult, Placement, Word
from rlhf.errors import EXIT_FAILURE, EXIT_SUCCESS, ConfigError, Stopped, UserError

# How long a file that node 0 has written may take to be seen here.
SHARED_SECONDS = 10.0
# How long node 0 may refuse connections once it was there; it may be started again.
REFUSED_SECONDS = 15.0
_ANSWER_SECONDS = 5.0
_POLL_SECONDS = 0.02


def follow(
    place: NodePlace,
    run_folder: Path,
    values: Mapping[str, Any],
    command: Callable[[str], Sequence[str]],
    *,
    prepare: Callable[[], object] | None = None,
    num_threads: int | None = None,
    grace_seconds: float = 25.0,
) -> int:
    """Does what node 0 says until it says how the run ended. Returns the exit code, the same on all nodes.

    `values` is the config as plain values; `command(stage)` is what a rank of a stage runs; `prepare` sees that this
    node can work, after it has joined, so that its error ends all nodes. Raises that error, `ConfigError` when node 0
    refuses this node or the run folder is not shared, and `UserError` when node 0 does not come or goes. `num_threads`
    and `grace_seconds` are what `launch` takes.
    """
    try:
        channel, environment = _Joining(place, run_folder, values).join()
    except _EndedEarlyError as ended:
        return _end(place, ended.message)
    missing = {name: value for name, value in environment.items() if name not in os.environ}
    run_stage = partial(launch, env_extra=missing, num_threads=num_threads, grace_seconds=grace_seconds)

    def run_ranks(stage: str, peers: _LeaderPeers) -> LaunchResult:
        logs = run_folder / "logs" / stage
        _announce(place, stage, logs)
        return run_stage(command(stage), place.num_processes, log_folder=logs, peers=peers)

    try:
        if prepare is not None:
            prepare()
        channel.send("ready")
        return _obey(place, channel, values, run_ranks)
    except Stopped as stopped:
        channel.send("signal", number=stopped.number, at_once=False)
        channel.finish()
        raise
    except Exception as error:  # whatever it is, node 0 waits for this node and its user looks there
        code, problem = exit_of(error)
        channel.send("failed", rank=None, exit_code=code, problem=problem)
        channel.finish()
        raise
    finally:
        channel.close()


def _obey(
    place: NodePlace,
    channel: Channel,
    values: Mapping[str, Any],
    run_ranks: Callable[[str, _LeaderPeers], LaunchResult],
) -> int:
    told: int | None = None
    with SignalWatch() as watch:
        while True:
            if watch.received and told is None:
                told = watch.received[0]
                channel.send("signal", number=told, at_once=False)
            if watch.received.count(signal.SIGINT) > 1:
                return 128 + watch.received[0]
            message = channel.poll()
            if message is None:
                if channel.lost is not None:
                    return _lost(place, channel.lost, told)
                time.sleep(_POLL_SECONDS)
            elif message["type"] == "end":
                return _end(place, message)
            elif message["type"] == "stage":
                name = _stage_of(message, values)
                if told is None:  # else node 0 has not read yet that the run is to end
                    peers = _LeaderPeers(channel, _placement(place, channel, int(message["port"])))
                    result = run_ranks(name, peers)
                    if peers.ended is not None:
                        return _end(place, peers.ended)
                    told = result.interrupted_by
                channel.send("done")


def _stage_of(message: Message, values: Mapping[str, Any]) -> str:
    """The stage that node 0 names, which becomes part of paths and commands here. Raises `UserError`."""
    name, stages = message.get("name"), values.get("stages") or ()
    if not isinstance(name, str) or name not in stages:
        raise UserError(f"node 0 asked for the stage {name!r}, but this run's stages are {', '.join(stages)}.")
    return name


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
        # How node 0 ended the run meanwhile.
        self.ended: Message | None = None

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
            elif message["type"] == "end":
                self.ended = message
                words.append(Word())
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
    code = message.get("exit_code")
    if not isinstance(code, int) or not 0 <= code < 256:
        code = EXIT_FAILURE
    if code != EXIT_SUCCESS:
        reason = f": {message['message']}" if message.get("message") else ""
        notice(f"node {place.rank}: node 0 ended the run with exit code {code}{reason}")
    return code


def _lost(place: NodePlace, reason: str, told: int | None) -> int:
    if told is not None:
        return 128 + told
    raise UserError(f"node 0 at {place.address} is gone: {reason}. Look for the cause there; its ranks here are ended.")


class _EndedEarlyError(Exception):
    """Node 0 ended before this node was let in."""

    def __init__(self, message: Message) -> None:
        super().__init__()
        # Nothing proves that it comes from node 0, so that it must not pass for a success.
        self.message = {**message, "exit_code": message.get("exit_code") or EXIT_FAILURE}


@dataclass
class _Joining:
    """Reaches node 0, however long before it this node was started, and is admitted."""

    place: NodePlace
    run_folder: Path
    values: Mapping[str, Any]
    announced: bool = False
    started: float = 0.0
    seen_at: float | None = None

    def join(self) -> tuple[Channel, Mapping[str, str]]:
        """Raises `ConfigError` when node 0 refuses this node, `UserError` when there is none, `_EndedEarlyError`."""
        self.started = time.monotonic()
        while True:
            try:
                connection = socket.create_connection((self.place.host, self.place.port), timeout=_ANSWER_SECONDS)
                self.seen_at = time.monotonic()
                try:
                    return self._introduce(Lines(connection, _ANSWER_SECONDS))
                except BaseException:  # a signal as well: whatever it is rises, with the socket closed
                    connection.close()
                    raise
            except (OSError, ChannelError) as error:
                problem = str(error)
            self._look_at_the_clock(problem)
            time.sleep(0.2)

    def _look_at_the_clock(self, problem: str) -> None:
        """Says once why this node waits. Raises `UserError` when that was long enough."""
        place, now = self.place, time.monotonic()
        if now > self.started + place.timeout_seconds:
            raise UserError(
                f"node {place.rank} found no node 0 at {place.address} within {place.timeout_seconds} s "
                f"(distributed.timeout_seconds): {problem}. Start the same command there with distributed.node_rank=0."
            )
        if self.seen_at is not None and now > self.seen_at + REFUSED_SECONDS:
            raise UserError(
                f"node 0 was at {place.address} and is gone before node {place.rank} had joined: {problem}. Look for "
                "the cause there and start all nodes again."
            )
        if not self.announced and now > self.started + 1:
            self.announced = True
            notice(
                f"node {place.rank} waits for node 0 at {place.address}, {place.timeout_seconds} s at most "
                f"(distributed.timeout_seconds): {problem}"
            )

    def _introduce(self, lines: Lines) -> tuple[Channel, Mapping[str, str]]:
        """Proves that this node reads the run folder and has node 0 prove the same. Raises `ConfigError` and others."""
        challenge = self._receive(lines)
        token = str(challenge.get("token"))
        if challenge["type"] != "challenge" or not token.isalnum():
            raise ChannelError("what answers there is not node 0 of a run")
        secret = self._read_secret(token, lines)
        nonce = secrets.token_hex(16)
        facts = [challenge.get("nonce"), nonce, self.place.rank]
        lines.send(
            "hello",
            installed=installed(),
            node_rank=self.place.rank,
            host=socket.gethostname(),
            nonce=nonce,
            proof=proof(secret.value, "follower", *facts),
            config=self.values,
        )
        answer = self._receive(lines)
        if not proves(answer.get("proof"), secret.value, "leader", *facts):
            raise ChannelError("what answers there is not node 0 of this run")
        if answer["type"] == "refused":
            raise ConfigError(str(answer["message"]))
        return Channel(lines, self.place.silent_seconds), secret.environment

    def _receive(self, lines: Lines) -> Message:
        """The next message but for those by which node 0 asks for patience."""
        while (message := lines.receive())["type"] == "wait":
            self._look_at_the_clock("it is there but not ready yet")
            self.seen_at = time.monotonic()
        if message["type"] == "end":
            raise _EndedEarlyError(message)
        if message["type"] == "full":
            place = self.place
            raise ConfigError(
                f"node 0 at {place.address} has all its {place.num_nodes} nodes already, and this one wants to be "
                f"distributed.node_rank={place.rank}. Give each node a number of its own, start each once, and all of "
                "them again when one has to be replaced."
            )
        return message

    def _read_secret(self, token: str, lines: Lines) -> Secret:
        deadline = time.monotonic() + SHARED_SECONDS
        while (secret := Secret.read(self.run_folder, token)) is None:
            if time.monotonic() > deadline:
                path = Secret.path(self.run_folder.absolute(), token)
                lines.send("unreadable", path=str(path))
                self._receive(lines)
                raise ConfigError(
                    f"this node cannot read {path}, which node 0 has written. All nodes need one run folder: set "
                    "run.dir (or run.root, and the working folder) to the same folder of a file system that all nodes "
                    "share, and start all as the same user."
                )
            time.sleep(0.1)
        return secret
