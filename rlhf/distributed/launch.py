"""Starts one process for each rank on this host and sees to it that all of them end together. Needs no torch.

Every rank is a child in its own session, so a terminal's Ctrl-C reaches only the supervisor, which then asks the ranks
to end. A rank calls `die_with_parent` when it starts, so that none outlives a supervisor that was killed outright; what
a rank has started itself is ended by a `Watchdog` then.
With several nodes the supervisor of each starts its own ranks; `Peers` is how it hears of the others.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Any

from rlhf.distributed.peers import LaunchResult, Peers, Placement, Word
from rlhf.distributed.watchdog import Watchdog
from rlhf.errors import EXIT_SUCCESS, Stopped

SUPERVISOR_PID = "RLHF_SUPERVISOR_PID"
_POLL_SECONDS = 0.02
# How much longer than its own ranks a node waits for those of the others.
_PEERS_SECONDS = 2.0
_PR_SET_PDEATHSIG = 1


def available_cores() -> int:
    """CPU cores this process may use, by its affinity and by its container's quota (control group version 2)."""
    cores = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def threads_per_rank(num_processes: int, num_threads: int | None, env: Mapping[str, str]) -> int:
    """CPU threads of one rank: as configured, else as OMP_NUM_THREADS says, else an equal share of the cores."""
    if num_threads is not None:
        return num_threads
    if env.get("OMP_NUM_THREADS", "").isdigit():
        return max(1, int(env["OMP_NUM_THREADS"]))
    return max(1, available_cores() // num_processes)


def die_with_parent() -> None:
    """Called by a rank when it starts: the kernel kills it when its supervisor dies. A no-op in other processes."""
    supervisor = os.environ.pop(SUPERVISOR_PID, None)
    if supervisor is None:
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    # It may have died before the line above, or a wrapper sits in between.
    if os.getppid() != int(supervisor) and not _alive(int(supervisor)):
        os.kill(os.getpid(), signal.SIGKILL)


def _alive(process: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has asked about yet does not."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


@contextlib.contextmanager
def reserved_port(address: str = "127.0.0.1") -> Iterator[int]:
    """A free TCP port that stays ours: the bound socket is kept open, without listening, while the ranks run.

    With SO_REUSEADDR on both sides rank 0 can listen on it, while the kernel hands it out to nobody else, so that
    launches at the same time on one host never meet.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind((address, 0))
        yield holder.getsockname()[1]


def launch(
    command: Sequence[str],
    num_processes: int,
    *,
    env_extra: Mapping[str, str] | None = None,
    num_threads: int | None = None,
    log_folder: Path | None = None,
    peers: Peers | None = None,
    grace_seconds: float = 25.0,
    failure_grace_seconds: float = 3.0,
    tail_lines: int = 20,
) -> LaunchResult:
    """Runs `command` once for each rank of this node and waits until all have ended; no process of theirs is left.

    Rank 0 inherits standard output and error; the others write to `log_folder/rank<n>.log` (appended; a temporary
    folder when None). When a rank fails, the others get SIGTERM and `failure_grace_seconds` later SIGKILL; unless it is
    rank 0, the result carries the last `tail_lines` of its log for the caller to show. SIGINT, SIGTERM and SIGHUP to
    this process are passed on once, as SIGTERM, with `grace_seconds` to end in; a second Ctrl-C kills at once. Must be
    called from the main thread for the signals to be seen.

    With `peers` the ranks are numbered after those of the nodes before this one, a failure or signal on any node ends
    the ranks of all, and the first failure of all is the result.

    Raises `Stopped` when a signal comes after all ranks have succeeded, unless a watch around this call gets it.
    """
    with contextlib.ExitStack() as stack:
        if log_folder is None:
            log_folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rlhf-ranks-")))
        log_folder.mkdir(parents=True, exist_ok=True)
        placement = _on_this_host(stack.enter_context(reserved_port())) if peers is None else peers.placement
        watch = stack.enter_context(SignalWatch())
        watchdog = stack.enter_context(Watchdog())
        ranks = stack.enter_context(_Ranks(placement.node_rank * num_processes, watchdog))
        env = {**os.environ, **(env_extra or {})}
        env.update(_shared_env(num_processes, placement, threads_per_rank(num_processes, num_threads, env)))
        # A thread that spins while it waits takes the core from the thread it waits for as soon as anything else runs
        # on the machine: small models were seen to take seventy times as long.
        env.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        # Where this process has told W&B something itself, its service is not to outlive or hold up the ranks' own.
        env.pop("WANDB_SERVICE", None)
        # No order of a set of strings decides anything here; in a library or a reward function of the user's it might.
        env.setdefault("PYTHONHASHSEED", "0")
        if placement.interface is not None:
            env.setdefault("GLOO_SOCKET_IFNAME", placement.interface)  # else it asks what the host's name resolves to
        for _ in range(num_processes):
            ranks.start(command, env, log_folder)
        course = _Course(ranks, peers, grace_seconds, failure_grace_seconds, tail_lines)
        while True:
            running = ranks.poll()
            course.look([*watch.earlier, *watch.received])
            if not running and (peers is None or not peers.busy()):
                break
            time.sleep(_POLL_SECONDS)
    result, unanswered = course.result(), [*watch.earlier, *watch.received][course.num_signals :]
    if result.exit_code == EXIT_SUCCESS and unanswered and watch.outer is None:
        raise Stopped(unanswered[0])
    return result


def _on_this_host(port: int) -> Placement:
    return Placement(0, 1, "127.0.0.1", port, "lo" if os.path.exists("/sys/class/net/lo") else None)


def _shared_env(num_processes: int, placement: Placement, threads: int) -> dict[str, str]:
    return {
        "WORLD_SIZE": str(num_processes * placement.num_nodes),
        "LOCAL_WORLD_SIZE": str(num_processes),
        "MASTER_ADDR": placement.address,
        "MASTER_PORT": str(placement.port),
        "OMP_NUM_THREADS": str(threads),
        "PYTHONUNBUFFERED": "1",
        SUPERVISOR_PID: str(os.getpid()),
    }


@dataclass
class _Course:
    """How the ranks come to their end: what has been seen of it, and what was done about it."""

    ranks: _Ranks
    peers: Peers | None
    grace_seconds: float
    failure_grace_seconds: float
    tail_lines: int
    failures: list[LaunchResult] = field(default_factory=list)
    interrupted_by: int | None = None
    ending: bool = False
    deadline: float = float("inf")
    num_signals: int = 0
    killed: bool = False
    while_stopping: list[LaunchResult] = field(default_factory=list)

    def look(self, received: Sequence[int]) -> None:
        """Ends all ranks after the first failure anywhere, or when any node is told to end; `received` are all signals.

        Those that came before the ranks were started, which nobody has answered, count like the others.
        """
        # What fails after it was asked to end is no cause.
        failed = None if self.ending else self.ranks.first_failure()
        for number in received[self.num_signals :]:
            at_once = received.count(signal.SIGINT) > 1
            if self.peers is not None:
                self.peers.tell_signal(number, at_once)
            self._hear(Word(signal=number, at_once=at_once))
        self.num_signals = len(received)
        # A signal that another node got comes before what its ranks' leaving does to the ranks here.
        for word in self.peers.poll() if self.peers is not None else ():
            self._hear(word)
        if failed is not None and self.interrupted_by is None:
            failure = self.ranks.failure(failed, self.tail_lines)
            self.failures.append(failure)
            if self.peers is not None:
                self.peers.tell_failure(failure)
            self._end(self.failure_grace_seconds)
        if self.interrupted_by is not None and not self.failures:
            self._keep(self.ranks.failures_while_stopping(self.tail_lines))
        if time.monotonic() > self.deadline:
            self._kill()
        if self.peers is not None and time.monotonic() > self.deadline + _PEERS_SECONDS:
            self.peers.give_up()

    def result(self) -> LaunchResult:
        """How it ended. Of several failures the first is the cause, but before all one by a signal or a lost node."""
        if self.interrupted_by is not None:
            return LaunchResult(
                128 + self.interrupted_by,
                interrupted_by=self.interrupted_by,
                while_stopping=tuple(self.while_stopping),
                killed=self.killed,
            )
        if not self.failures:
            return LaunchResult(EXIT_SUCCESS)
        return min(self.failures, key=lambda failure: failure.exit_code <= 128 and not failure.problem)

    def _hear(self, word: Word) -> None:
        if word.failure is not None:
            (self.failures if self.interrupted_by is None else self.while_stopping).append(word.failure)
        if word.signal is None:
            self._end(self.failure_grace_seconds)
        elif self.interrupted_by is None:
            self.interrupted_by = word.signal
            self._end(self.grace_seconds)
        if word.at_once:
            self._kill()

    def _keep(self, failures: Sequence[LaunchResult]) -> None:
        for failure in failures:
            if failure not in self.while_stopping:
                self.while_stopping.append(failure)
                if self.peers is not None:
                    self.peers.tell_failure(failure)

    def _kill(self) -> None:
        self.killed = self.ranks.kill() or self.killed

    def _end(self, seconds: float) -> None:
        """Asks the ranks to end, once, and gives them `seconds`."""
        if not self.ending:
            self.ranks.terminate()
            self.deadline = time.monotonic() + seconds
        self.ending = True


class SignalWatch:
    """Collects the signals that ask this process to end, instead of dying of them, while the context is open.

    Within another watch, `outer`, it starts with what that one has got, `earlier`, and hands on to it what it gets.
    """

    def __init__(self) -> None:
        self.received: list[int] = []
        self.outer: SignalWatch | None = None
        self.earlier: list[int] = []
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> SignalWatch:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, and jobs of a shell without job control
                    self._previous[number] = signal.signal(number, self._on_signal)
            around = {getattr(handler, "__self__", None) for handler in self._previous.values()}
            self.outer = next((watch for watch in around if isinstance(watch, SignalWatch)), None)
            self.earlier = [] if self.outer is None else list(self.outer.received)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self.outer is not None:
            self.outer.received += self.received

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.received.append(number)


@dataclass
class _Rank:
    process: subprocess.Popen[bytes]
    log: Path | None
    log_start: int
    reaped: bool = False
    killed: bool = False


@dataclass
class _Ranks:
    """This node's rank processes; leaving the context kills what is left of them."""

    first_rank: int
    watchdog: Watchdog
    members: list[_Rank] = field(default_factory=list)
    _failures: list[int] = field(default_factory=list)

    def __enter__(self) -> _Ranks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        for member in self.members:
            member.process.wait()

    def start(self, command: Sequence[str], env: Mapping[str, str], log_folder: Path) -> None:
        """Starts the next rank in a new session."""
        local_rank = len(self.members)
        rank = self.first_rank + local_rank
        log = None if rank == 0 else log_folder / f"rank{rank}.log"
        with contextlib.ExitStack() as stack:
            output: IO[bytes] | None = None if log is None else stack.enter_context(log.open("ab"))
            process = subprocess.Popen(
                list(command),
                env={**env, "RANK": str(rank), "LOCAL_RANK": str(local_rank)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=None if output is None else subprocess.STDOUT,
                start_new_session=True,
            )
            self.members.append(_Rank(process, log, 0 if output is None else output.tell()))
            self.watchdog.guard(process.pid)

    def poll(self) -> bool:
        """Collects ranks that ended and kills what they left in their groups. True while one is running."""
        ended = []
        for number, member in enumerate(self.members):
            if not member.reaped and member.process.poll() is not None:
                member.reaped = True
                _signal_group(member.process.pid, signal.SIGKILL)
                self.watchdog.release(member.process.pid)
                if member.process.returncode:
                    ended.append(number)
        # Of ranks found dead at once, one that a signal ended is the cause, the others' broken connections its effect.
        self._failures += sorted(ended, key=lambda number: self.members[number].process.returncode > 0)
        return not all(member.reaped for member in self.members)

    def first_failure(self) -> int | None:
        """The local number of the rank that failed first."""
        return self._failures[0] if self._failures else None

    def failure(self, number: int, tail_lines: int) -> LaunchResult:
        """The failed rank's end. The exit code is what a shell would call it: 128 + n for one that signal n ended."""
        code = self.members[number].process.returncode
        return LaunchResult(
            128 - code if code < 0 else code,
            rank=self.first_rank + number,
            log_tail=self._log_tail(self.members[number], tail_lines),
        )

    def failures_while_stopping(self, tail_lines: int) -> list[LaunchResult]:
        """Ranks that have ended by something else than the request to end."""
        found = []
        for number in self._failures:
            member = self.members[number]
            asked = member.process.returncode > 128 or member.process.returncode == -signal.SIGTERM
            if not member.killed and not asked:
                found.append(self.failure(number, tail_lines))
        return found

    def terminate(self) -> None:
        """Asks every running rank to end; its own helpers are left to it."""
        for member in self.members:
            if not member.reaped:
                member.process.terminate()

    def kill(self) -> bool:
        """Ends the running ranks with their process groups. Whether there were any."""
        running = [member for member in self.members if not member.reaped]
        for member in running:
            # One that has just ended by itself is not to be taken for one that was killed.
            member.killed = member.killed or member.process.poll() is None
            _signal_group(member.process.pid, signal.SIGKILL)
        return any(member.killed for member in running)

    def _log_tail(self, member: _Rank, lines: int) -> str:
        """The last lines a rank wrote since it started; empty for rank 0."""
        if member.log is None or not member.log.exists():
            return ""
        with member.log.open("rb") as file:
            file.seek(max(member.log_start, member.log.stat().st_size - 65536))
            text = file.read().decode(errors="replace")
        return "\n".join(text.splitlines()[-lines:])


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)
