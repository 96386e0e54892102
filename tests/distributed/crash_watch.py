"""Runs `rlhf` and kills it at a chosen moment: who is running, what is being written, who is left.

A moment is given by a stage, by what to wait for there, and by a share: of the stage's time, or of the changes to files
that an undisturbed run was seen to make. The folders are polled every millisecond and known by their names alone, so
nothing here depends on what checkpoints or models look like inside.
"""

from __future__ import annotations

import os
import random
import secrets
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Literal

from tests.command import command, environment

# In the order of the pipeline: `start` is the supervisor before its first rank, `report` what follows the last rank.
PLACES = ("start", "sft", "collect", "reward_model", "ppo", "evaluate", "report")
TRAINED = ("sft", "reward_model", "ppo")
Kind = Literal["time", "checkpoint", "publish", "files", "saved"]
Victim = Literal["supervisor", "rank", "tree"]
Damage = Literal["flip", "truncate"]
POLL_SECONDS = 0.001
PROCESS_POLL_SECONDS = 0.01
GONE_SECONDS = 15.0
ATTEMPT_SECONDS = 600.0
# Of what is half-written, half removed, or on its way to its place.
_UNFINISHED = (".partial", ".ready", ".old", ".removed")

Snapshot = dict[str, tuple[int, int, int]]


@dataclass(frozen=True)
class Moment:
    """When to kill whom. `share`, in [0, 1), is how far through the stage's time or through its changes to files.

    kind `time`: any moment; `checkpoint`: while one is being written or removed; `publish`: while a model or another
    result is being put in its place; `files`: while the files of the run folder (metrics, manifest, samples, report)
    are written; `saved`: when two checkpoints of the stage are whole and one of them is this attempt's. `damage` is
    done to the newest checkpoint afterwards.
    """

    place: str
    kind: Kind
    victim: Victim
    share: float = 0.0
    damage: Damage | None = None


@dataclass
class Measured:
    """What a run takes: seconds of each place, changes to files by place and kind, checkpoints by stage."""

    seconds: dict[str, float] = field(default_factory=dict)
    changes: dict[tuple[str, str], int] = field(default_factory=dict)
    checkpoints: dict[str, int] = field(default_factory=dict)

    def nth_change(self, moment: Moment) -> int:
        """The change at which to kill, from 1."""
        changes = self.changes.get((moment.place, moment.kind), 6)
        if moment.kind == "checkpoint":
            # Spread over about two of them: a resumed stage has not all of them before it.
            changes = 2 * changes // max(1, self.checkpoints.get(moment.place, 1))
        return 1 + int(moment.share * changes)

    def delay(self, moment: Moment) -> float:
        """Seconds after the place is entered."""
        return moment.share * self.seconds.get(moment.place, 2.0)


@dataclass(frozen=True)
class Hit:
    """A kill that was dealt: where the run was by then, and how long the last process outlived it.

    `damaged`: whether the newest checkpoint was damaged afterwards.
    """

    moment: Moment
    place: str
    kind: str
    victim: Victim
    seconds_to_gone: float
    exit_code: int
    half_written: tuple[str, ...]
    damaged: bool = False


class Attempt:
    """One start of `rlhf run` in `folder`/run; leaving the context ends every process of it."""

    def __init__(self, arguments: Sequence[str], folder: Path, log: Path) -> None:
        self.folder = folder / "run"
        self.log = log
        self.mark = {"RLHF_CRASH_ATTEMPT": secrets.token_hex(8)}
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                command("run", *arguments, "run.dir=run"),
                cwd=folder,
                env=environment(self.mark),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.started = time.monotonic()
        self.started_at = time.time()
        self.place = "start"
        self.entered = self.started
        self.ranks: list[int] = []
        self._looked = 0.0

    def __enter__(self) -> Attempt:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        kill(self.members())
        self.process.wait()

    def look(self) -> None:
        """Brings `place`, `entered` and `ranks` up to date; looks at most every `PROCESS_POLL_SECONDS`."""
        now = time.monotonic()
        if now - self._looked < PROCESS_POLL_SECONDS:
            return
        self._looked = now
        stages = {pid: stage for pid in _children(self.process.pid) if (stage := _stage_of(pid)) is not None}
        self.ranks = sorted(stages)
        current = next(iter(stages.values()), "report" if self.place == "evaluate" else self.place)
        if current != self.place:
            self.place, self.entered = current, now

    def members(self) -> list[int]:
        """Every process of this attempt that is alive, also one whose parent is gone: they carry its `mark`."""
        found = []
        mark = next(iter(self.mark.values())).encode()
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    variables = (entry / "environ").read_bytes()
                except OSError:  # it has ended, or is not ours to read
                    continue
                if mark in variables:
                    found.append(int(entry.name))
        return found

    def log_tail(self) -> str:
        """The end of what the attempt printed."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])


def undisturbed(arguments: Sequence[str], folder: Path, log: Path) -> Measured:
    """Runs to the end and returns what it took. Raises `RuntimeError` when it fails or does not end."""
    measured = Measured()
    with Attempt(arguments, folder, log) as attempt:
        place, entered = "start", attempt.started
        watches: dict[Kind, _Changes] = {}
        while attempt.process.poll() is None:
            _check_time(attempt)
            attempt.look()
            if attempt.place != place:
                measured.seconds[place] = time.monotonic() - entered
                place, entered = attempt.place, time.monotonic()
                watches = {kind: _Changes(kind, attempt.folder, place) for kind in ("checkpoint", "publish", "files")}
            for kind, watch in watches.items():
                watch.look()
                measured.changes[place, kind] = watch.count
            time.sleep(POLL_SECONDS)
        measured.seconds[place] = time.monotonic() - entered
        if attempt.process.returncode != 0:
            raise RuntimeError(f"exit code {attempt.process.returncode}; the end of {log}:\n{attempt.log_tail()}")
    for stage in PLACES:
        last = checkpoints(folder / "run", stage)[-1:]
        measured.checkpoints[stage] = int(last[0].name.removeprefix("checkpoint-")) if last else 0
    return measured


def disturb(attempt: Attempt, plan: list[Moment], measured: Measured, rng: random.Random) -> Hit | None:
    """Waits for the first moment of `plan` and kills. None when the run ended before, undisturbed.

    Takes off `plan` the moment dealt and those before it whose stage the run has passed already. A stage that ends
    while its moment is being waited for is a moment too: `stage end`.
    """
    watch: _Changes | None = None
    while attempt.process.poll() is None:
        _check_time(attempt)
        attempt.look()
        while plan and _is_behind(plan[0], attempt):
            plan.pop(0)
            watch = None
        if plan and _is_there(plan[0], attempt):
            moment = plan[0]
            passed = moment.place not in ("start", "report") and not attempt.ranks
            if watch is None and moment.kind not in ("time", "saved"):
                watch = _Changes(moment.kind, attempt.folder, moment.place)
            if passed or _is_due(moment, attempt, measured, watch):
                victim = _strike(attempt, moment.victim, rng)
                if victim is not None:
                    plan.pop(0)
                    return _aftermath(attempt, moment, "stage end" if passed else moment.kind, victim)
        time.sleep(POLL_SECONDS)
    return None


def _is_there(moment: Moment, attempt: Attempt) -> bool:
    """Whether the run is where the moment may come."""
    if moment.place == "report" and attempt.place == "start":
        # Every stage may have finished in an earlier attempt.
        return (attempt.folder / "stages/evaluate/result.json").exists()
    return attempt.place == moment.place


def _is_due(moment: Moment, attempt: Attempt, measured: Measured, watch: _Changes | None) -> bool:
    if watch is not None:
        watch.look()
        due = watch.count >= measured.nth_change(moment)
        return due and (moment.kind != "checkpoint" or _holds_half_written(attempt, moment.place))
    if moment.kind == "saved":
        return _num_saved(attempt, moment.place) >= 1 and len(checkpoints(attempt.folder, moment.place)) >= 2
    return time.monotonic() >= attempt.entered + measured.delay(moment)


def _holds_half_written(attempt: Attempt, stage: str) -> bool:
    """Whether a checkpoint lies there half-written; if so the ranks are stopped, so that it is still when they die."""
    folder = attempt.folder / "stages" / stage / "checkpoints"
    if not any(path.name.endswith(_UNFINISHED) for path in folder.glob("*")):
        return False
    kill(attempt.ranks, signal.SIGSTOP)
    if any(path.name.endswith(_UNFINISHED) for path in folder.glob("*")):
        return True
    kill(attempt.ranks, signal.SIGCONT)
    return False


def _num_saved(attempt: Attempt, stage: str) -> int:
    """Checkpoints there that this attempt has written."""
    count = 0
    for folder in checkpoints(attempt.folder, stage):
        with suppress(FileNotFoundError):  # pruned meanwhile
            count += folder.stat().st_mtime >= attempt.started_at
    return count


def _is_behind(moment: Moment, attempt: Attempt) -> bool:
    return PLACES.index(moment.place) < PLACES.index(attempt.place)


def _strike(attempt: Attempt, victim: Victim, rng: random.Random) -> Victim | None:
    """Kills: what was killed, the supervisor where no rank runs; None when the rank had ended since the last look."""
    if victim == "rank" and not attempt.ranks:
        victim = "supervisor"
    if victim == "rank":
        chosen = rng.choice(attempt.ranks)
        struck = _stop(chosen)
        kill([chosen] if struck else [])
        kill([rank for rank in attempt.ranks if rank != chosen], signal.SIGCONT)
        return victim if struck else None
    if victim == "supervisor":
        kill([attempt.process.pid])
    else:
        # A process that starts just now may not show its variables yet.
        members = sorted({attempt.process.pid, *attempt.ranks, *attempt.members()})
        rng.shuffle(members)
        kill(members)
    return victim


def _stop(process: int) -> bool:
    """Stops a process, so that it cannot end by itself any more; False when it has ended."""
    kill([process], signal.SIGSTOP)
    while True:
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return False
        if state in "TtXZ":
            return state in "Tt"
        time.sleep(POLL_SECONDS)


def _aftermath(attempt: Attempt, moment: Moment, kind: str, victim: Victim) -> Hit | None:
    """Waits until nothing is left, and looks at what lies there half-written.

    None when the supervisor had ended by itself. Raises `RuntimeError` for a process that outlives the kill by
    `GONE_SECONDS`, and for another exit code than the documented 137 after a rank was killed.
    """
    began = time.monotonic()
    while (left := attempt.members()) or attempt.process.poll() is None:
        if time.monotonic() - began > GONE_SECONDS:
            raise RuntimeError(f"{victim} killed in {attempt.place}: {len(left)} processes left after {GONE_SECONDS} s")
        time.sleep(POLL_SECONDS)
    code = attempt.process.returncode
    if code == 0:
        return None
    if code not in ((137,) if victim == "rank" else (-signal.SIGKILL,)):
        raise RuntimeError(f"{victim} killed in {attempt.place}: exit code {code}\n{attempt.log_tail()}")
    place = moment.place if moment.place == "report" else attempt.place
    return Hit(moment, place, kind, victim, time.monotonic() - began, code, _half_written(attempt.folder))


def kill(processes: Sequence[int], number: int = signal.SIGKILL) -> None:
    """Sends a signal to each that is still there."""
    for process in processes:
        try:
            os.kill(process, number)
        except ProcessLookupError:
            continue


def checkpoints(run: Path, stage: str) -> list[Path]:
    """The stage's checkpoint folders that have their final name, oldest step first."""
    folders = (run / "stages" / stage / "checkpoints").glob("checkpoint-*")
    numbered = [path for path in folders if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(numbered, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def leftovers(run: Path) -> list[str]:
    """Names, relative to the run folder, of what is half-written or on its way to its place."""
    return sorted(path.relative_to(run).as_posix() for path in run.rglob("*") if path.name.endswith(_UNFINISHED))


def _half_written(run: Path) -> tuple[str, ...]:
    """What kinds of things lie there half-written."""
    kinds = set()
    for name in leftovers(run):
        path = Path(name)
        if "checkpoints" in path.parts:
            kinds.add("checkpoint")
        else:
            kinds.add("file" if (run / path).is_file() else "folder")
    return tuple(sorted(kinds))


def _check_time(attempt: Attempt) -> None:
    if time.monotonic() - attempt.started > ATTEMPT_SECONDS:
        raise RuntimeError(f"hung: no end after {ATTEMPT_SECONDS} s in {attempt.place}\n{attempt.log_tail()}")


class _Changes:
    """Counts how often what a kind of moment looks at was found changed since this was made."""

    def __init__(self, kind: Kind, run: Path, place: str) -> None:
        self.count = 0
        stage = run / "stages" / place
        self._depth = 3 if kind == "checkpoint" else 1
        self._root = {"checkpoint": stage / "checkpoints", "publish": stage, "files": run}[kind]
        self._skip = {"checkpoint": (), "publish": ("checkpoints",), "files": ("stages", "logs")}[kind]
        self._last = self._snapshot()

    def look(self) -> None:
        """Compares with the last look."""
        now = self._snapshot()
        if now != self._last:
            self.count += 1
            self._last = now

    def _snapshot(self) -> Snapshot:
        found: Snapshot = {}
        _scan(self._root, self._depth, self._skip, found)
        return found


def _scan(folder: Path | str, depth: int, skip: Sequence[str], found: Snapshot) -> None:
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name in skip:
                    continue
                state = entry.stat(follow_symlinks=False)
                found[entry.path] = (state.st_ino, state.st_size, state.st_mtime_ns)
                if depth and entry.is_dir(follow_symlinks=False):
                    _scan(entry.path, depth - 1, (), found)
    except (FileNotFoundError, NotADirectoryError):  # gone between two looks, or not there yet
        return


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [int(child) for child in children.read_text().split()]
        except OSError:  # the thread or the process has just ended
            continue
    return found


def _stage_of(pid: int) -> str | None:
    """The stage a rank works on; None for another process and for one that has ended."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    except OSError:
        return None
    return words[words.index("rlhf.worker") + 2] if "rlhf.worker" in words else None
