"""From a store to a running server: its socket, its addresses, uvicorn."""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager

import anyio.to_thread
import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp

from rlhf.errors import ConfigError

# Threads that wait for SQLite. One writes at a time, so more of them would only queue for it and for Python's own lock.
NUM_THREADS = 4
# Whoever sits at the page longer than this between two requests opens a new connection, which costs nothing.
KEEP_ALIVE_SECONDS = 75
_SHUTDOWN_SECONDS = 10


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises `ConfigError` where that cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError) as error:
        raise ConfigError(f"host={host}: no such host ({error}); name an address of this machine") from error
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listening.bind(address)
        listening.listen(2048)
    except OSError as error:
        listening.close()
        raise _cannot_bind(error, host, port) from error
    listening.set_inheritable(False)
    return listening


def _cannot_bind(error: OSError, host: str, port: int) -> ConfigError:
    if error.errno == errno.EADDRINUSE:
        return ConfigError(
            f"port={port} of {host} is taken, perhaps by a page that runs already; choose another, or port=0 for any"
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return ConfigError(f"port={port} may not be used by this user: {error.strerror}; choose one above 1023")
    if error.errno == errno.EADDRNOTAVAIL:
        return ConfigError(f"host={host} is no address of this machine; use 127.0.0.1, or 0.0.0.0 for all of them")
    return ConfigError(f"host={host} port={port} cannot be used: {error.strerror}")


def is_local(host: str) -> bool:
    """Whether only programs of this machine reach a page that is bound to this host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_wildcard(host: str) -> bool:
    """Whether the host stands for all addresses of this machine."""
    return host in ("0.0.0.0", "::", "")


def address(host: str, port: int) -> str:
    """The address of a page for people: of a wildcard, by the name of this machine."""
    name = socket.gethostname() if is_wildcard(host) else host
    return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"


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
