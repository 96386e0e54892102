"""The names that the page goes by, and uvicorn."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager

import anyio.to_thread
import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp

from rlhf.listening import is_local, is_wildcard

# Threads that wait for SQLite. One writes at a time, so more of them would only queue for it and for Python's own lock.
NUM_THREADS = 4
# Whoever sits at the page longer than this between two requests opens a new connection, which costs nothing.
KEEP_ALIVE_SECONDS = 75
_SHUTDOWN_SECONDS = 10


def host_names(host: str, more: Collection[str] = ()) -> frozenset[str]:
    """The names by which browsers may address the page, without ports."""
    names = {host, *more}
    if is_local(host) or is_wildcard(host):
        names |= {"localhost", "127.0.0.1", "::1"}
    if not is_local(host):
        names.add(socket.gethostname())
    return frozenset(name.lower() for name in names if name)


@asynccontextmanager
async def limited_threads(app: FastAPI) -> AsyncIterator[None]:
    """The lifespan of the application: sets the number of threads."""
    anyio.to_thread.current_default_thread_limiter().total_tokens = NUM_THREADS
    yield


def make_server(app: ASGIApp) -> uvicorn.Server:
    """A server; `run(sockets=[...])` serves until a signal comes, and answers what was asked before it ends.

    Nothing is believed that a proxy says of the client, and nothing is logged: addresses of links hold tokens.
    """
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        loop="asyncio",
        log_level="error",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=_SHUTDOWN_SECONDS,
    )
    return uvicorn.Server(config)
