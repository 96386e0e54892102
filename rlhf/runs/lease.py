"""A lease: of the processes on all hosts that share a folder, one at a time does a piece of work.

The lease is a file that says who holds it; its holder touches it every `BEAT_SECONDS`. A holder that has died blocks
nobody: on the same host its process is looked for, elsewhere a file that nobody has touched for `DEAD_SECONDS`, by the
clock of the one who waits, is taken over. File locks would end with their process by themselves, but not all shared
file systems have them between hosts.

Two may hold it at once where one was stopped for longer than that, or where two take over at the same instant. So what
is made under a lease must come out the same, and be published atomically: the lease saves work, nothing else.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.runs.files import partial_path
from rlhf.runs.jsonable import read_json
from rlhf.runs.processes import place, started

BEAT_SECONDS = 15.0
# A network file system may show a file's time as it was a minute ago.
DEAD_SECONDS = 150.0


@dataclass(frozen=True)
class Holder:
    """Who holds a lease. `place` says on which host, and in which container of it, the process number counts."""

    token: str
    host: str
    place: str
    process: int
    started: int
    about: Mapping[str, Any]

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}"


class Lease:
    """A lease that this process holds until `release`; a context manager that releases it."""

    def __init__(self, path: Path, descriptor: int, token: str) -> None:
        self.path = path
        self._descriptor = descriptor
        self._token = token
        self._released = threading.Event()
        self._beats = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._beats.start()

    @classmethod
    def acquire(cls, path: Path, about: Mapping[str, Any]) -> Lease | None:
        """One attempt, which makes missing folders; None when somebody holds it. `about` is told to who waits.

        Raises `OSError` where the folder cannot be written.
        """
        if path.exists():
            return None
        path.parent.mkdir(parents=True, exist_ok=True)
        own = os.getpid()
        body = Holder(secrets.token_hex(8), socket.gethostname(), place(), own, started(own) or 0, dict(about))
        descriptor = _create(path, json.dumps(vars(body)).encode())
        return None if descriptor is None else cls(path, descriptor, body.token)

    def release(self) -> None:
        """Gives it back; again does nothing. One that somebody has taken over is theirs."""
        if self._released.is_set():
            return
        self._released.set()
        self._beats.join()
        holder = read_holder(self.path)
        if holder is not None and holder.token == self._token:
            with suppress(OSError):  # a folder that can no longer be written: it runs out by itself
                self.path.unlink()
        os.close(self._descriptor)

    def _beat(self) -> None:
        while not self._released.wait(BEAT_SECONDS):
            with suppress(OSError):
                # The open file, not whatever has its name by now.
                os.utime(self._descriptor)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()


class Waiting:
    """Looks at a lease that somebody else holds, again and again, and knows when they are dead."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen: tuple[str, int] | None = None
        self._since = time.monotonic()

    def holder(self) -> Holder | None:
        """Who holds it, None when nobody does; the lease of one who is dead is taken away.

        A file that says nothing is that of a writer who has died over it, or is being written: it has no name.
        """
        try:
            changed = self.path.stat().st_mtime_ns
        except OSError:
            return None
        holder = read_holder(self.path) or Holder("", "an unknown host", "", 0, 0, {})
        if (holder.token, changed) != self._seen:
            self._seen, self._since = (holder.token, changed), time.monotonic()
        if _has_died(holder) or time.monotonic() - self._since > DEAD_SECONDS:
            _take_away(self.path, holder.token)
            return None
        return holder


def _create(path: Path, content: bytes) -> int | None:
    """Makes the file with its content at once, and returns it open; None when there is one."""
    temporary = partial_path(path)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        os.write(descriptor, content)
        os.link(temporary, path)
        return descriptor
    except FileExistsError:
        os.close(descriptor)
        return None
    except OSError:
        os.close(descriptor)
        # A file system without hard links: who looks at the wrong moment finds an empty file.
        with suppress(FileExistsError):
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            os.write(descriptor, content)
            return descriptor
        return None
    finally:
        temporary.unlink(missing_ok=True)


def read_holder(path: Path) -> Holder | None:
    """Who holds a lease; None when there is no file, or none that says it."""
    body = read_json(path)
    try:
        return Holder(**body)
    except TypeError:
        return None


def _has_died(holder: Holder) -> bool:
    """Whether the holder ran here and does not any more; of another place nothing is known."""
    return holder.place == place() and started(holder.process) != holder.started


def _take_away(path: Path, token: str) -> None:
    """Removes a dead holder's lease, unless it is somebody else's by now."""
    aside = partial_path(path)
    with suppress(OSError):  # somebody else was quicker
        path.rename(aside)
        found = read_holder(aside)
        if found is not None and found.token != token:
            os.link(aside, path)
        aside.unlink()
