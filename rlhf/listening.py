"""The socket of a server, and its address for people: what `rlhf label` and `rlhf serve` have in common."""

from __future__ import annotations

import errno
import ipaddress
import socket

from rlhf.errors import ConfigError

# Connections that wait to be accepted; the system may allow fewer.
_BACKLOG = 2048


def listen(host: str, port: int, section: str = "") -> socket.socket:
    """A listening socket; port 0 takes a free one.

    It listens at once, so that nobody else can: two sockets may be bound to a port as long as neither listens. Raises
    `ConfigError`, which names the keys `host` and `port` of `section` (such as "serve."), where it cannot be had.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        raise _no_address(host, section, str(error)) from error
    family, kind, protocol, _, place = found[0]
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listening.bind(place)
        listening.listen(_BACKLOG)
    except OSError as error:
        listening.close()
        raise _cannot_listen(error, host, port, section) from error
    return listening


def _no_address(host: str, section: str, why: str) -> ConfigError:
    return ConfigError(
        f"{section}host={host} is no address of this machine ({why}); use 127.0.0.1, or 0.0.0.0 for all of them"
    )


def _cannot_listen(error: OSError, host: str, port: int, section: str) -> ConfigError:
    if error.errno == errno.EADDRINUSE:
        return ConfigError(
            f"{section}port={port} is taken on {host}, perhaps by a server that runs already; choose another, or "
            f"{section}port=0 for a free one"
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return ConfigError(
            f"{section}port={port} may not be used by this user: {error.strerror}; choose one above 1023"
        )
    if error.errno == errno.EADDRNOTAVAIL:
        return _no_address(host, section, str(error.strerror))
    return ConfigError(f"{section}host={host} {section}port={port} cannot be used: {error.strerror}")


def is_local(host: str) -> bool:
    """Whether only programs of this machine reach a server that listens on this host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_wildcard(host: str) -> bool:
    """Whether the host stands for all addresses of this machine."""
    return host in ("0.0.0.0", "::", "")


def address(host: str, port: int) -> str:
    """The address of a server for its clients: of a wildcard, by the name of this machine."""
    name = socket.gethostname() if is_wildcard(host) else host
    return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"
