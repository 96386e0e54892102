"""Which process a number means: numbers are given out again, and mean nothing on another host. Needs Linux's /proc."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from functools import cache
from pathlib import Path


@cache
def place() -> str:
    """Where process numbers mean the same: this boot of this host, this container of it."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def started(process: int) -> int | None:
    """When a process was started, in the kernel's ticks, which tells it from a later one of its number; None: gone.

    One that has ended and whose parent has not asked how (a zombie) is gone.
    """
    fields = _status(Path(f"/proc/{process}"))
    return None if fields is None else int(fields[19])


def group_lives(group: int, leader_started: int | None = None) -> bool:
    """Whether a process of the group is still there.

    `leader_started` is when the process began whose number the group has: where that number is another process's by
    now, so is the group.
    """
    if leader_started is not None and started(group) not in (None, leader_started):
        return False
    statuses = (_status(entry) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    return any(fields is not None and int(fields[2]) == group for fields in statuses)


def _status(entry: Path) -> list[str] | None:
    """The fields of /proc/PID/stat behind the name, the state first; None for a process that is gone or a zombie."""
    try:
        fields = (entry / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return fields if fields and fields[0] not in "ZX" else None
