"""What has happened in a sweep: a file of events that all agents append to under one lock, and the state it adds up to.

`events.jsonl` is only ever appended to, each event with one write, while the writer holds a lock on the file itself:
the kernel drops the lock of a killed process, and network file systems that have locks (NFS 4, Lustre, GPFS, CephFS)
make appended data visible to whoever gets the lock next. A line that a killed process cut off is removed by the next
writer.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rlhf.errors import UserError
from rlhf.runs.files import disk_errors
from rlhf.runs.jsonable import dump_json, parse_line

TrialState = Literal["waiting", "running", "finished", "failed", "pruned", "skipped"]
# A trial in one of these is handed out no more.
ENDED: tuple[TrialState, ...] = ("finished", "failed", "pruned", "skipped")
_HELD_BACK = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass
class Trial:
    """One run of a setting with one seed. `attempt` counts how often it was handed out; older ones have no say.

    `began` is when the latest did, in seconds since 1970; `seconds` what all of them took.
    """

    number: int
    setting: int
    seed: Any = None
    state: TrialState = "waiting"
    attempt: int = 0
    agent: str | None = None
    began: float | None = None
    seconds: float = 0.0
    value: float | None = None
    exit_code: int | None = None
    note: str = ""
    tail: tuple[str, ...] = ()
    code: str | None = None
    resumed: int = 0


@dataclass
class SettingRecord:
    """A setting with its trials by number. `value` is the mean over the seeds once all have ended."""

    number: int
    values: dict[str, Any]
    trials: list[int] = field(default_factory=list)
    state: Literal["open", "finished", "failed", "pruned"] = "open"
    value: float | None = None


@dataclass
class State:
    """What the events add up to."""

    settings: dict[int, SettingRecord] = field(default_factory=dict)
    trials: dict[int, Trial] = field(default_factory=dict)

    def apply(self, event: Mapping[str, Any]) -> None:
        """Takes one event in. Events of an attempt that is not the trial's latest change nothing."""
        kind = event.get("event")
        if kind == "setting":
            record = SettingRecord(event["setting"], dict(event["values"]))
            for number, seed in event["trials"]:
                self.trials[number] = Trial(number, record.number, seed)
                record.trials.append(number)
            self.settings[record.number] = record
        elif kind == "setting_end":
            record = self.settings[event["setting"]]
            record.state, record.value = event["state"], event.get("value")
        elif kind == "reopen":
            record = self.settings[event["setting"]]
            record.state, record.value = "open", None
        elif kind in ("start", "release", "end", "skip", "retry"):
            self._apply_trial(self.trials[event["trial"]], kind, event)

    def _apply_trial(self, trial: Trial, kind: str, event: Mapping[str, Any]) -> None:
        if kind == "start":
            trial.state, trial.attempt, trial.agent = "running", event["attempt"], event["agent"]
            trial.began = event.get("time")
            return
        if kind == "skip":
            trial.state, trial.note = "skipped", event.get("note", "")
            return
        if kind == "retry":
            trial.state, trial.agent, trial.exit_code, trial.tail = "waiting", None, None, ()
            return
        if event["attempt"] != trial.attempt or trial.state != "running":
            return
        trial.seconds += float(event.get("seconds", 0.0))
        trial.agent, trial.note = None, event.get("note", "")
        if kind == "release":
            trial.state = "waiting"
            trial.resumed += 1
            return
        trial.state, trial.value, trial.exit_code = event["state"], event.get("value"), event.get("exit_code")
        trial.tail, trial.code = tuple(event.get("tail", ())), event.get("code")

    def holds(self, trial: int, attempt: int) -> bool:
        """Whether this attempt is still the trial's latest and under way."""
        found = self.trials[trial]
        return found.state == "running" and found.attempt == attempt

    def by_state(self, state: TrialState) -> list[Trial]:
        """The trials in a state, in the order of their numbers."""
        return [trial for trial in self.trials.values() if trial.state == state]

    @property
    def num_counted(self) -> int:
        """Trials that count towards run_cap: all but those that never began and never will."""
        return sum(trial.state != "skipped" for trial in self.trials.values())


@contextmanager
def held_back() -> Iterator[None]:
    """Signals that ask the process to end are delivered when the block is over.

    They are noted, not blocked: blocked in this thread they would reach another one, such as a numerical library's.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # no handler runs in this thread
        return
    noted: list[int] = []
    # Those that are ignored (nohup) stay so: a trial that is started in the block inherits that.
    wanted = [number for number in _HELD_BACK if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, lambda number, _: noted.append(number)) for number in wanted}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        for held in noted:
            signal.raise_signal(held)


class Journal:
    """The events of a sweep. `state` is what this process has read; `locked` brings it up to date."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state = State()
        self._read_to = 0
        self._descriptor: int | None = None

    @contextmanager
    def locked(self) -> Iterator[State]:
        """Keeps other agents out while the block reads the state, decides and appends. Signals wait until then."""
        with held_back():
            descriptor = self._open(os.O_RDWR | os.O_APPEND)
            try:
                self._lock(descriptor)
                self._descriptor = descriptor
                self._catch_up(descriptor, repair=True)
                yield self.state
            finally:
                self._descriptor = None
                os.close(descriptor)

    def look(self) -> State:
        """The state without taking the lock: for those who decide nothing."""
        descriptor = self._open(os.O_RDONLY)
        try:
            self._catch_up(descriptor, repair=False)
        finally:
            os.close(descriptor)
        return self.state

    def append(self, kind: str, **fields: Any) -> None:
        """Writes an event and takes it in. Only inside `locked`."""
        assert self._descriptor is not None, "an event is appended inside `locked`"
        event = {"event": kind, "time": round(time.time(), 3), **fields}
        line = (dump_json(event) + "\n").encode("utf-8", errors="backslashreplace")
        with disk_errors(self.path):
            written = 0
            while written < len(line):
                written += os.write(self._descriptor, line[written:])
            os.fsync(self._descriptor)
        self._read_to += len(line)
        self.state.apply(event)

    def events(self) -> list[dict[str, Any]]:
        """All events in order."""
        lines = self.path.read_bytes().split(b"\n")
        return [event for event in map(parse_line, lines) if event is not None]

    def _open(self, how: int) -> int:
        try:
            with disk_errors(self.path):
                return os.open(self.path, how)
        except FileNotFoundError as error:
            raise UserError(f"{self.path} is gone: the sweep was deleted") from error

    def _lock(self, descriptor: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
            raise UserError(
                f"the file system of {self.path} has no locks, and agents on it could take the same trial twice: put "
                "the sweep on another one with root=FOLDER (NFS 4, Lustre with -o flock, GPFS, CephFS, a local disk)"
            ) from error

    def _catch_up(self, descriptor: int, *, repair: bool) -> None:
        size = os.fstat(descriptor).st_size
        content = os.pread(descriptor, size - self._read_to, self._read_to)
        whole, newline, torn = content.rpartition(b"\n")
        if torn and repair:
            os.ftruncate(descriptor, self._read_to + len(whole) + len(newline))
        for line in whole.split(b"\n") if newline else ():
            event = parse_line(line)
            if event is not None:
                self.state.apply(event)
        self._read_to += len(whole) + len(newline)
