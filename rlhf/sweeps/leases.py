"""Who works on a trial, and whether they still do.

An agent that takes a trial writes `leases/<trial>.json` and touches it every few seconds. A trial whose lease has not
been touched for `seconds` is handed out again. Ages are differences of times that the file system itself gives, so that
the clocks of the hosts need not agree. On the host of the agent no time needs to pass: there its process is looked for.

Nobody else takes a trial while the old process may still write to its folder: on the same host the old process group
must be gone (it is told to end when its agent dies, and is killed when the lease has run out); on another host the
lease must have run out, and an agent that could not touch its lease for most of that time stops its own process first.
"""

from __future__ import annotations

import os
import secrets
import signal
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlhf.runs.files import write_json
from rlhf.runs.jsonable import read_json
from rlhf.runs.processes import group_lives, place, started

# An agent that could not touch its lease for this share of its time stops its trial, before anybody else may begin it.
SELF_STOP_SHARE = 0.6


@dataclass(frozen=True)
class Lease:
    """Who holds a trial: the agent with its process, and the process group of the trial once it runs.

    Processes go by their number and their start: numbers are given out again.
    """

    trial: int
    attempt: int
    agent: str
    host: str
    process: int
    process_start: int | None
    group: int | None = None
    group_start: int | None = None


class Leases:
    """The folder of leases of a sweep; `seconds` is the age at which a lease has run out."""

    def __init__(self, folder: Path, seconds: float) -> None:
        self.folder, self.seconds = folder, seconds
        self._clock = folder / f".clock-{os.getpid()}-{secrets.token_hex(4)}"

    def path(self, trial: int) -> Path:
        """The lease of a trial."""
        return self.folder / f"{trial}.json"

    def take(self, trial: int, attempt: int, agent: str, group: int | None = None) -> Lease:
        """Writes the lease of a trial that the journal gave to `agent`, or adds its process group."""
        own = os.getpid()
        group_start = None if group is None else started(group)
        lease = Lease(trial, attempt, agent, place(), own, started(own), group, group_start)
        write_json(self.path(trial), asdict(lease))
        return lease

    def touch(self, trial: int) -> None:
        """Says that the agent lives. Raises `OSError` when that cannot be said."""
        os.utime(self.path(trial))

    def drop(self, trial: int) -> None:
        """Removes the lease of a trial that has ended or was released."""
        self.path(trial).unlink(missing_ok=True)

    def close(self) -> None:
        """Removes what this process alone used."""
        self._clock.unlink(missing_ok=True)

    def is_lost(self, trial: int, attempt: int) -> str | None:
        """Why nobody works on this attempt any more, so that it can be handed out again; None while somebody may."""
        lease, age = self._read(trial), self._age(trial)
        if lease is None or lease.attempt != attempt:
            # Between the journal's line and the lease's: a moment, unless the agent died in it.
            return "its agent died before it began" if age is None or age > self.seconds else None
        expired = age is None or age > self.seconds
        if lease.host != place():
            return f"its agent on another host was not heard of for {self.seconds:g} s" if expired else None
        gone = started(lease.process) != lease.process_start
        if not gone and not expired:
            return None
        if lease.group is not None and group_lives(lease.group, lease.group_start):
            if not expired:
                return None  # it was told to end when its agent died, and is writing its checkpoint
            with suppress(ProcessLookupError):
                os.killpg(lease.group, signal.SIGKILL)
        return "its agent died" if gone else f"its agent was not heard of for {self.seconds:g} s"

    def seconds_since(self, trial: int, began: float | None) -> float:
        """From `began` until the trial's agent was last heard of: what an attempt that was lost has cost, about."""
        try:
            return max(0.0, self.path(trial).stat().st_mtime - began) if began is not None else 0.0
        except FileNotFoundError:
            return 0.0

    def _read(self, trial: int) -> Lease | None:
        body: Any = read_json(self.path(trial))
        return Lease(**body) if isinstance(body, dict) else None

    def _age(self, trial: int) -> float | None:
        """Seconds since the lease was touched, by the clock of the file system; None without a lease."""
        try:
            touched = self.path(trial).stat().st_mtime
        except FileNotFoundError:
            return None
        self._clock.touch()
        os.utime(self._clock)
        return self._clock.stat().st_mtime - touched
