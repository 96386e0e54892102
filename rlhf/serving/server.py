"""uvicorn and its signals: a stop finishes what has been asked."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn
from fastapi import FastAPI

from rlhf.config.serve import ServeConfig

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


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
