"""Node 0: it waits for the other nodes, has them start their ranks, and ends the run on all of them."""

from __future__ import annotations

import errno
import ipaddress
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from rlhf.distributed.channel import Channel, ChannelError, Lines, Message, interface_of, proof, proves
from rlhf.distributed.launch import reserved_port
from rlhf.distributed.nodes import NodePlace, Secret, exit_of, mistake_in, notice
from rlhf.distributed.peers import LaunchResult, Placement, Word
from rlhf.distributed.stopping import SIGNALS
from rlhf.errors import EXIT_FAILURE, ConfigError, Stopped, UserError

_HANDSHAKE_SECONDS = 20.0
# How often a node that came early hears that node 0 is there, and how long all nodes together may take to hang up.
_WAIT_SECONDS = 1.0
_FINISH_SECONDS = 2.0
# Nodes that wait try again several times a second: so long they can still hear that node 0 ended before they had met.
_LINGER_SECONDS = 1.0
# So many connections besides those of the run's nodes are looked at at a time.
_STRANGERS = 16


@dataclass
class _Node:
    """A node that joined."""

    rank: int
    host: str
    channel: Channel
    ready: bool = False
    busy: bool = False
    given_up: bool = False

    @property
    def name(self) -> str:
        return f"node {self.rank} ({self.host})"


class Leader:
    """Node 0's side of the run, as a context; leaving it ends the other nodes with the exit code of what was raised.

    Entering takes the rendezvous's port. Raises `ConfigError` when that is not possible. Nodes that come before `meet`
    are kept waiting, so that they hear of an end that comes before it too. After leaving it the process should end: it
    ignores signals from then on, since a launcher that sees the other nodes end may send some before this one has.
    """

    def __init__(self, place: NodePlace) -> None:
        self._place = place
        self._bound = ""
        self._listener: socket.socket | None = None
        self._nodes: dict[int, _Node] = {}
        self._greeted: set[Lines] = set()
        self._greetings = threading.BoundedSemaphore(place.num_nodes + _STRANGERS)
        self._complete = False
        self._ended = False
        self._changed = threading.Condition()
        self._wrong: str | None = None
        self._run_folder: Path | None = None
        self._secret: Secret | None = None
        self._values: Mapping[str, Any] = {}
        self._end: tuple[int, str] = (EXIT_FAILURE, "")

    def __enter__(self) -> Leader:
        self._bound, self._listener = _listen(self._place)
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN)
        self._forget_secret()
        with self._changed:
            self._end = code, message = self._end if error is None else exit_of(error)
            self._ended = True
            for lines in self._greeted:
                with suppress(ChannelError):
                    lines.send("end", exit_code=code, message=message)
            self._changed.notify_all()
        for node in self._nodes.values():
            node.channel.send("end", exit_code=code, message=message)
        if not self._complete:
            time.sleep(_LINGER_SECONDS)
        if self._listener is not None:
            # shutdown wakes the thread that accepts, which close alone does not.
            with suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
        deadline = time.monotonic() + _FINISH_SECONDS
        for node in self._nodes.values():
            node.channel.finish(max(0.0, deadline - time.monotonic()))

    def meet(self, run_folder: Path, values: Mapping[str, Any]) -> None:
        """Waits until all nodes have joined and can work; call it while holding the run folder's lock.

        `values` is the config as plain values: a node with another one is refused. Raises `ConfigError` then,
        `UserError` when nodes are missing after `distributed.timeout_seconds` or one that has joined cannot work, and
        `Stopped` when one is told to end. The secret is in the folder only meanwhile.
        """
        self._run_folder, self._values = run_folder, values
        secret = Secret.write(run_folder, os.environ)
        with self._changed:
            self._secret = secret
            self._changed.notify_all()
        started, announced = time.monotonic(), False
        while missing := self._missing():
            if self._wrong is not None:
                raise ConfigError(self._wrong)
            waited = time.monotonic() - started
            names = ", ".join(f"{rank} (not ready yet)" if rank in self._nodes else str(rank) for rank in missing)
            if waited > self._place.timeout_seconds:
                raise UserError(
                    f"of {self._place.num_nodes} nodes these did not come to {self._place.address} within "
                    f"{self._place.timeout_seconds} s (distributed.timeout_seconds): {names}. Give the same command "
                    f"there with distributed.node_rank={missing[0]}, and see that they reach this address."
                )
            if waited > 1 and not announced:
                announced = True
                notice(
                    f"node 0 waits at {self._place.address} for node {names}, "
                    f"{self._place.timeout_seconds} s at most (distributed.timeout_seconds)"
                )
            with self._changed:
                self._changed.wait(0.1)
        self._forget_secret()
        hosts = ", ".join(self._nodes[rank].name for rank in sorted(self._nodes))
        notice(f"{self._place.num_nodes} nodes: this one and {hosts}")

    def end(self, exit_code: int, message: str = "") -> None:
        """What the other nodes are to end with when the context is left without an error."""
        self._end = (exit_code, message)

    @contextmanager
    def stage(self, name: str) -> Iterator[_StagePeers]:
        """Has the other nodes start their ranks of a stage; yields what `launch` needs to start and watch its own.

        Raises `Stopped` or `UserError` when a node was told to end or failed since the last stage.
        """
        for node in self._nodes.values():
            self._heed(node)
        with reserved_port(self._bound) as port:
            for node in self._nodes.values():
                node.busy = True
                node.channel.send("stage", name=name, port=port)
            yield _StagePeers(list(self._nodes.values()), self._placement(port))

    def _placement(self, port: int) -> Placement:
        # The address at which another node reached this one tells the interface; there is at least one other.
        reached = next(iter(self._nodes.values())).channel.local_address
        return Placement(0, self._place.num_nodes, self._place.host, port, interface_of(reached))

    def _missing(self) -> list[int]:
        with self._changed:
            for rank, node in list(self._nodes.items()):
                self._heed(node)
                if node.channel.lost is not None:
                    notice(f"{node.name} is gone again: {node.channel.lost}")
                    del self._nodes[rank]
            ready = [rank for rank, node in self._nodes.items() if node.ready]
            missing = [rank for rank in range(1, self._place.num_nodes) if rank not in ready]
            self._complete = not missing
            return missing

    def _heed(self, node: _Node) -> None:
        """Hears a node while no stage runs."""
        while (message := node.channel.poll()) is not None:
            if message["type"] == "ready":
                node.ready = True
            elif message["type"] == "signal":
                notice(f"{node.name} was told to end")
                raise Stopped(int(message["number"]))
            elif message["type"] == "failed":
                error = UserError(f"{node.name}: {message['problem']}")
                error.exit_code = int(message["exit_code"])
                raise error

    def _forget_secret(self) -> None:
        if self._secret is not None and self._run_folder is not None:
            self._secret.remove(self._run_folder)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, address = listener.accept()
            except OSError:  # closed: the run ends
                return
            if not self._greetings.acquire(blocking=False):
                connection.close()
                continue
            threading.Thread(target=self._greet, args=(connection, str(address[0])), daemon=True).start()

    def _greet(self, connection: socket.socket, address: str) -> None:
        lines, joined = Lines(connection, _HANDSHAKE_SECONDS), False
        try:
            with self._changed:
                if self._ended:
                    lines.send("end", exit_code=self._end[0], message=self._end[1])
                    return
                self._greeted.add(lines)
            secret = self._wait_for_secret(lines)
            joined = secret is not None and self._admit(lines, secret, address)
        except ChannelError:
            pass  # a stranger, or a node that will try again
        finally:
            with self._changed:
                self._greeted.discard(lines)
            if not joined:
                lines.close()
            self._greetings.release()

    def _wait_for_secret(self, lines: Lines) -> Secret | None:
        """Keeps a node that came early waiting; None when the run ends before, or has all its nodes already."""
        with self._changed:
            while self._secret is None and not self._ended:
                lines.send("wait")
                self._changed.wait(_WAIT_SECONDS)
            if self._complete and not self._ended:
                lines.send("full")
            return None if self._ended or self._complete else self._secret

    def _admit(self, lines: Lines, secret: Secret, address: str) -> bool:
        """Lets a node in, refuses it with a reason, or turns away one that cannot prove anything."""
        challenge = secrets.token_hex(16)
        lines.send("challenge", token=secret.token, nonce=challenge)
        message = lines.receive()
        if message["type"] == "unreadable":
            if self._complete:  # the secret went while this node looked for it
                lines.send("full")
                return False
            path = str(message.get("path"))[:300]
            notice(f"{address} says that it cannot read {path}, which node 0 wrote; see its message")
            lines.send("noted")
        facts = [challenge, message.get("nonce"), message.get("node_rank")]
        if message["type"] != "hello" or not proves(message.get("proof"), secret.value, "follower", *facts):
            return False
        if type(message.get("node_rank")) is not int or not isinstance(message.get("config"), dict):
            return False
        answer = proof(secret.value, "leader", *facts)
        with self._changed:
            if self._ended:
                return False
            taken = self._taken(message)
            mistake = mistake_in(message, self._values)
            refusal = mistake or taken
            if refusal is None:
                lines.send("welcome", proof=answer)
                node = _Node(message["node_rank"], str(message.get("host")), Channel(lines, self._place.silent_seconds))
                self._nodes[node.rank] = node
            else:
                lines.send("refused", proof=answer, message=refusal)
                # The other node may mend its number, but two that differ will not come together by waiting.
                self._wrong = self._wrong or mistake
                if mistake is None:
                    notice(refusal)
            self._changed.notify_all()
            return refusal is None

    def _taken(self, hello: Message) -> str | None:
        rank, host = hello["node_rank"], hello.get("host")
        if rank != 0 and rank not in self._nodes:
            return None
        taken = "this is node 0" if rank == 0 else f"{self._nodes[rank].name} has joined already"
        return f"two nodes have distributed.node_rank={rank}: {taken}, and {host} wants to. Give each its own."


class _StagePeers:
    """The other nodes while a stage runs; see `rlhf.distributed.peers.Peers`."""

    def __init__(self, nodes: Sequence[_Node], placement: Placement) -> None:
        self.placement = placement
        self._nodes = nodes

    def tell_failure(self, failure: LaunchResult) -> None:
        """Has all nodes end their ranks."""
        self._stop(Word())

    def tell_signal(self, number: int, at_once: bool) -> None:
        """Has all nodes end their ranks as if the signal had reached them."""
        self._stop(Word(signal=number, at_once=at_once))

    def poll(self) -> list[Word]:
        """What the nodes said; what one says the others are told."""
        words = []
        for node in self._nodes:
            while (message := node.channel.poll()) is not None:
                word = self._understand(node, message)
                if word is not None:
                    words.append(word)
                    self._stop(word, besides=node)
            lost = node.channel.lost
            if node.busy and lost is not None:
                node.busy = False
                if not node.given_up:
                    words.append(Word(LaunchResult(EXIT_FAILURE, problem=f"{node.name} is gone: {lost}")))
                    self._stop(Word(), besides=node)
        return words

    def busy(self) -> bool:
        """Whether a node's ranks of this stage still run."""
        return any(node.busy for node in self._nodes)

    def give_up(self) -> None:
        """Hangs up on nodes that do not say that their ranks ended."""
        for node in self._nodes:
            if node.busy and not node.given_up:
                node.given_up = True
                node.channel.close()
                notice(f"{node.name} does not say that its ranks have ended: node 0 waits no longer")

    def _understand(self, node: _Node, message: Message) -> Word | None:
        if message["type"] == "done":
            node.busy = False
        elif message["type"] == "signal":
            return Word(signal=int(message["number"]), at_once=bool(message["at_once"]))
        elif message["type"] == "failed":
            if message["rank"] is None:
                return Word(LaunchResult(int(message["exit_code"]), problem=f"{node.name}: {message['problem']}"))
            tail = str(message["log_tail"])
            return Word(LaunchResult(int(message["exit_code"]), int(message["rank"]), log_tail=tail, where=node.name))
        return None

    def _stop(self, word: Word, besides: _Node | None = None) -> None:
        for node in self._nodes:
            if node is not besides:
                node.channel.send("stop", signal=word.signal, at_once=word.at_once)


def _listen(place: NodePlace) -> tuple[str, socket.socket]:
    """The address node 0 serves and the socket that listens there. Raises `ConfigError`."""
    key = f"distributed.rendezvous={place.address}"
    try:
        family, _, _, _, address = socket.getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ConfigError(f"{key}: the host's address cannot be found ({error.strerror or error}).") from error
    bound = str(address[0])
    if _is_loopback(bound) and not _is_loopback(place.host):
        # Many hosts resolve their own name to 127.0.1.1, where no other node would reach them.
        bound = "::" if ":" in bound else "0.0.0.0"
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((bound, place.port))
        listener.listen(place.num_nodes + 16)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            reason = "the port is in use. Is another node 0 running here, with distributed.node_rank=0 too? Else choose"
            raise ConfigError(f"{key}: {reason} another port, the same on all nodes.") from error
        if error.errno == errno.EADDRNOTAVAIL:
            reason = "this host does not have that address, but it is node 0. The rendezvous is an address of node 0;"
            raise ConfigError(f"{key}: {reason} is distributed.node_rank=0 right here?") from error
        raise ConfigError(f"{key}: node 0 cannot listen there ({error.strerror or error}).") from error
    return bound, listener


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
