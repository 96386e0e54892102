"""The socket, uvicorn, and signals: a stop finishes what has been asked."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn
from fastapi import FastAPI

from rlhf.config.serve import ServeConfig
from rlhf.errors import ConfigError

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def bind(config: ServeConfig) -> socket.socket:
    """A bound socket, before any model is loaded. Raises `ConfigError` where it cannot be had."""
    try:
        found = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        raise ConfigError(f"serve.host={config.host} is no address of this machine: {error}") from error
    family, kind, protocol, _, address = found[0]
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        # At once, so that nobody else can: two sockets may be bound to a port as long as neither listens.
        bound.listen(512)
    except OSError as error:
        bound.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"serve.port={config.port} is taken on {config.host}; choose another, or serve.port=0 for a free one"
            ) from error
        raise ConfigError(f"serve.host={config.host} serve.port={config.port}: {error.strerror}") from error
    return bound


def address_of(bound: socket.socket, config: ServeConfig) -> str:
    """The address for clients; of a server for all interfaces, by this machine's name."""
    host = socket.gethostname() if config.host in ("0.0.0.0", "::", "") else config.host
    return f"http://{f'[{host}]' if ':' in host else host}:{bound.getsockname()[1]}"


class Server(uvicorn.Server):
    """uvicorn with this package's way to stop: the first signal finishes what is under way, a second ends at once."""

    def __init__(self, app: FastAPI, config: ServeConfig, on_ready: Callable[[], None]) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_level="error",
                access_log=False,
                ws="none",
                server_header=False,
                proxy_headers=False,
                lifespan="off",
                timeout_graceful_shutdown=max(1, round(config.stop_seconds)),
            )
        )
        self._on_ready = on_ready
        self.stopped_by: int | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts and says so."""
        await super().startup(sockets)
        self._on_ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Takes the signals over while the server runs; one that the process was started to ignore stays ignored."""
        is_main = threading.current_thread() is threading.main_thread()  # Python has signals handled there alone
        before = {
            number: signal.signal(number, self._on_signal)
            for number in SIGNALS
            if is_main and signal.getsignal(number) is not signal.SIG_IGN
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.stopped_by is not None:
            os._exit(128 + number)
        self.stopped_by = number
        self.should_exit = True
