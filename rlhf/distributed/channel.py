"""Messages between the supervisors of a run's nodes: one JSON object a line over TCP, and a heart-beat. Needs no torch.

Nothing received is ever executed or unpickled, and nobody is listened to before `proof` has shown that they can read
the run folder (see `rlhf.distributed.nodes`). Messages are neither secret nor signed: like torch's own traffic between
ranks they belong on a network whose hosts are trusted.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import json
import queue
import socket
import struct
import threading
from typing import Any

BEAT_SECONDS = 1.0
_MAX_BYTES = 1 << 20
_SIOCGIFADDR = 0x8915

Message = dict[str, Any]


class ChannelError(Exception):
    """The other side is gone or does not speak our language; `str(error)` says what it did."""


class Lines:
    """A connection on which both sides send JSON objects with a `type`, one a line, before they trust each other."""

    def __init__(self, connection: socket.socket, timeout: float) -> None:
        self.connection = connection
        self._received = b""
        self._sending = threading.Lock()
        connection.settimeout(timeout)
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, kind: str, **values: Any) -> None:
        """Sends a message. Raises `ChannelError`."""
        data = json.dumps({"type": kind, **values}).encode() + b"\n"
        try:
            with self._sending:
                self.connection.sendall(data)
        except OSError as error:
            raise ChannelError(_what_happened(error)) from error

    def receive(self) -> Message:
        """Waits for the next message. Raises `ChannelError` when it does not come in time or is none."""
        while b"\n" not in self._received:
            try:
                data = self.connection.recv(65536)
            except OSError as error:
                raise ChannelError(_what_happened(error)) from error
            if not data:
                raise ChannelError("it closed the connection")
            self._received += data
            if len(self._received) > _MAX_BYTES:
                raise ChannelError("it sent a message without end")
        line, _, self._received = self._received.partition(b"\n")
        try:
            message = json.loads(line)
        # Brackets within brackets within brackets exhaust the parser's stack.
        except (ValueError, RecursionError) as error:
            raise ChannelError("it sent something that is no message") from error
        if not isinstance(message, dict) or not isinstance(message.get("type"), str):
            raise ChannelError("it sent something that is no message")
        return message

    def close(self) -> None:
        """Closes the connection."""
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()


class Channel:
    """A connection to a node that is trusted: threads of its own receive and keep the heart-beat going.

    So a supervisor that is busy for minutes, hashing a model say, is heard all the while. The other side is lost when
    nothing was heard of it for `silent_seconds`.
    """

    def __init__(self, lines: Lines, silent_seconds: float) -> None:
        self._lines = lines
        self._messages: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._lost: str | None = None
        lines.connection.settimeout(silent_seconds)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        threading.Thread(target=self._beat, daemon=True).start()

    @property
    def local_address(self) -> str:
        """This host's address on the connection."""
        return str(self._lines.connection.getsockname()[0])

    @property
    def lost(self) -> str | None:
        """Why nothing more will come, once all that came has been polled; None while the other side lives."""
        return self._lost if self._messages.empty() else None

    def send(self, kind: str, **values: Any) -> None:
        """Sends a message; to a node that is gone it goes nowhere, and `lost` will say so."""
        with contextlib.suppress(ChannelError):
            self._lines.send(kind, **values)

    def poll(self) -> Message | None:
        """The next message that came, None when there is none."""
        with contextlib.suppress(queue.Empty):
            return self._messages.get_nowait()
        return None

    def finish(self, seconds: float = 2.0) -> None:
        """Sends no more and waits until the other side has taken everything and closes, `seconds` at most."""
        self._closing.set()
        # To close while heart-beats lie unread would reset the connection, and the last message might be lost with it.
        with contextlib.suppress(OSError):
            self._lines.connection.shutdown(socket.SHUT_WR)
        self._reader.join(seconds)
        self._lines.close()

    def close(self) -> None:
        """Closes the connection at once."""
        self._closing.set()
        self._lines.close()

    def _read(self) -> None:
        try:
            while True:
                message = self._lines.receive()
                if message["type"] != "beat":
                    self._messages.put(message)
        except ChannelError as error:
            self._lost = str(error)

    def _beat(self) -> None:
        while not self._closing.wait(BEAT_SECONDS) and self._lost is None:
            self.send("beat")


def proof(secret: str, side: str, *facts: object) -> str:
    """What only a holder of the secret can say about these facts: both sides' random challenges, and who speaks."""
    return hmac.new(bytes.fromhex(secret), json.dumps([side, *facts]).encode(), hashlib.sha256).hexdigest()


def proves(claim: object, secret: str, side: str, *facts: object) -> bool:
    """Whether `claim` is that proof."""
    # JSON can spell strings that no encoding takes, such as half of a surrogate pair.
    return isinstance(claim, str) and claim.isascii() and hmac.compare_digest(claim, proof(secret, side, *facts))


def interface_of(address: str) -> str | None:
    """The network interface with this IPv4 address; None for an IPv6 one and where none has it."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        wanted = socket.inet_aton(address)
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                if fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))[20:24] == wanted:
                    return name
    return None


def _what_happened(error: OSError) -> str:
    if isinstance(error, TimeoutError):
        return "nothing was heard of it"
    if isinstance(error, ConnectionResetError | BrokenPipeError):
        return "it closed the connection"
    return f"the connection failed ({error.strerror or error})"
