"""Starts one process for each rank on this host and sees to it that all of them end together. Needs no torch.

Every rank is a child in its own session, so a terminal's Ctrl-C reaches only the supervisor, which then asks the ranks
to end. A rank calls `die_with_parent` when it starts, so that none outlives a supervisor that was killed outright.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Any

from rlhf.errors import EXIT_SUCCESS

SUPERVISOR_PID = "RLHF_SUPERVISOR_PID"
_POLL_SECONDS = 0.02
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class LaunchResult:
    """How a group of ranks ended.

    `exit_code`: 0 when every rank succeeded; else the first failing rank's (128 + n for one ended by signal n, so 137
    for `kill -9`); 128 + n when the supervisor itself was told to end by signal n (130 for Ctrl-C).
    `rank`: the rank that failed first, None on success and after an interruption. `interrupted_by`: the signal the
    supervisor got, if any. `log_tail`: the last lines that rank wrote, empty for rank 0, whose output was inherited.
    """

    exit_code: int
    rank: int | None = None
    interrupted_by: int | None = None
    log_tail: str = ""

    def describe(self) -> str:
        """One line for the user."""
        if self.interrupted_by is not None:
            return f"stopped by {signal.Signals(self.interrupted_by).name}"
        if self.rank is None:
            return "all ranks succeeded"
        if self.exit_code <= 128:
            return f"rank {self.rank} ended with exit code {self.exit_code}"
        number = self.exit_code - 128
        names = {member.value: member.name for member in signal.Signals}
        hint = "; often this means that memory ran out" if number == signal.SIGKILL else ""
        return f"rank {self.rank} was ended by signal {number} ({names.get(number, 'unknown')}){hint}"


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


def under_launcher(env: Mapping[str, str]) -> bool:
    """Whether torchrun, accelerate, deepspeed, srun or `launch` started this process as one rank of a group."""
    return ("RANK" in env and "WORLD_SIZE" in env) or _slurm_tasks(env) > 1


def adopt_slurm(env: MutableMapping[str, str]) -> None:
    """Fills in what torch expects from srun's variables; what is already set stays. A no-op outside srun.

    Every task derives the same port from the job's and step's numbers, below the range the kernel hands out.
    """
    tasks = _slurm_tasks(env)
    if tasks <= 1 or ("RANK" in env and "WORLD_SIZE" in env):
        return
    nodes = int(env.get("SLURM_STEP_NUM_NODES") or env.get("SLURM_NNODES") or 1)
    first_host = _first_host(env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or "")
    job, step = env.get("SLURM_JOB_ID", "0"), env.get("SLURM_STEP_ID", "0")
    number = (int(job) if job.isdigit() else 0) * 31 + (int(step) if step.isdigit() else 0)
    values = {
        "RANK": env["SLURM_PROCID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": env.get("SLURM_LOCALID", env["SLURM_PROCID"]),
        "LOCAL_WORLD_SIZE": str(_slurm_local_tasks(env, tasks, nodes)),
        "MASTER_ADDR": first_host if nodes > 1 and first_host else "127.0.0.1",
        "MASTER_PORT": str(15000 + number % 15000),
    }
    for name, value in values.items():
        env.setdefault(name, value)


def _slurm_tasks(env: Mapping[str, str]) -> int:
    """Tasks of the srun step this process belongs to; 0 outside of one.

    A batch script sees the job's SLURM_NTASKS too, but it is no task of a step: srun alone sets SLURM_STEP_NUM_TASKS.
    """
    if "SLURM_PROCID" not in env:
        return 0
    step_tasks = env.get("SLURM_STEP_NUM_TASKS")
    if step_tasks is None and env.get("ENVIRONMENT") == "BATCH":
        return 0
    tasks = step_tasks or env.get("SLURM_NTASKS", "0")
    return int(tasks) if tasks.isdigit() else 0


def _slurm_local_tasks(env: Mapping[str, str], tasks: int, nodes: int) -> int:
    """Tasks on this node, from a list like `4(x2),3` indexed by the node's number."""
    counts: list[int] = []
    listing = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE") or ""
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", listing):
        counts.extend([int(count)] * int(times or 1))
    node = int(env.get("SLURM_NODEID", "0"))
    return counts[node] if node < len(counts) else max(1, tasks // nodes)


def _first_host(hosts: str) -> str:
    """The first name of a Slurm host list: `gpu[03-05,9],login` gives `gpu03`."""
    found = re.match(r"([^,\[]*)(?:\[(\d+)[^\]]*\])?", hosts)
    return (found.group(1) + (found.group(2) or "")) if found else ""


def die_with_parent() -> None:
    """Called by a rank when it starts: the kernel kills it when its supervisor dies. A no-op in other processes."""
    supervisor = os.environ.pop(SUPERVISOR_PID, None)
    if supervisor is None:
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != int(supervisor):  # it may have died before the line above, or a wrapper sits in between
        try:
            os.kill(int(supervisor), 0)
        except ProcessLookupError:
            os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """A free TCP port that stays ours: the bound socket is kept open, without listening, while the ranks run.

    With SO_REUSEADDR on both sides rank 0 can listen on it, while the kernel hands it out to nobody else, so that
    launches at the same time on one host never meet.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


def launch(
    command: Sequence[str],
    num_processes: int,
    *,
    env_extra: Mapping[str, str] | None = None,
    num_threads: int | None = None,
    log_folder: Path | None = None,
    grace_seconds: float = 25.0,
    failure_grace_seconds: float = 3.0,
    tail_lines: int = 20,
) -> LaunchResult:
    """Runs `command` once for each rank and waits until all have ended; no process of theirs is left.

    Rank 0 inherits standard output and error; the others write to `log_folder/rank<n>.log` (appended; a temporary
    folder when None). When a rank fails, the others get SIGTERM and `failure_grace_seconds` later SIGKILL; unless it is
    rank 0, the result carries the last `tail_lines` of its log for the caller to show. SIGINT, SIGTERM and SIGHUP to
    this process are passed on once, as SIGTERM, with `grace_seconds` to end in; a second Ctrl-C kills at once. Must be
    called from the main thread for the signals to be seen.
    """
    with contextlib.ExitStack() as stack:
        if log_folder is None:
            log_folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rlhf-ranks-")))
        log_folder.mkdir(parents=True, exist_ok=True)
        port = stack.enter_context(reserved_port())
        watch = stack.enter_context(_SignalWatch())
        ranks = stack.enter_context(_Ranks())
        env = {**os.environ, **(env_extra or {})}
        env.update(_shared_env(num_processes, port, threads_per_rank(num_processes, num_threads, env)))
        # A thread that spins while it waits takes the core from the thread it waits for as soon as anything else runs
        # on the machine: small models were seen to take seventy times as long.
        env.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        if os.path.exists("/sys/class/net/lo"):
            env.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a host name that does not resolve must not matter
        for rank in range(num_processes):
            ranks.start(command, {**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}, log_folder)
        return _supervise(ranks, watch, grace_seconds, failure_grace_seconds, tail_lines)


def _shared_env(num_processes: int, port: int, threads: int) -> dict[str, str]:
    return {
        "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": str(threads),
        "PYTHONUNBUFFERED": "1",
        SUPERVISOR_PID: str(os.getpid()),
    }


def _supervise(
    ranks: _Ranks, watch: _SignalWatch, grace_seconds: float, failure_grace_seconds: float, tail_lines: int
) -> LaunchResult:
    """Waits for the ranks; ends all of them after the first failure or when this process is told to end."""
    failed: int | None = None
    interrupted_by: int | None = None
    deadline = float("inf")
    while ranks.poll():
        if watch.received and interrupted_by is None:
            interrupted_by = watch.received[0]
            ranks.terminate()
            deadline = time.monotonic() + grace_seconds
        if failed is None and interrupted_by is None and (failed := ranks.first_failure()) is not None:
            ranks.terminate()
            deadline = time.monotonic() + failure_grace_seconds
        if time.monotonic() > deadline or watch.received.count(signal.SIGINT) > 1:
            ranks.kill()
            deadline = float("inf")
        time.sleep(_POLL_SECONDS)
    if interrupted_by is not None:
        return LaunchResult(128 + interrupted_by, interrupted_by=interrupted_by)
    if failed is None:
        failed = ranks.first_failure()
    if failed is None:
        return LaunchResult(EXIT_SUCCESS)
    return LaunchResult(ranks.exit_code(failed), rank=failed, log_tail=ranks.log_tail(failed, tail_lines))


class _SignalWatch:
    """Collects the signals that ask this process to end, instead of dying of them, while the context is open."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> _SignalWatch:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, and jobs of a shell without job control
                    self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.received.append(number)


@dataclass
class _Rank:
    process: subprocess.Popen[bytes]
    log: Path | None
    log_start: int
    reaped: bool = False


@dataclass
class _Ranks:
    """The rank processes; leaving the context kills what is left of them."""

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
        rank = len(self.members)
        log = None if rank == 0 else log_folder / f"rank{rank}.log"
        with contextlib.ExitStack() as stack:
            output: IO[bytes] | None = None if log is None else stack.enter_context(log.open("ab"))
            process = subprocess.Popen(
                list(command),
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=None if output is None else subprocess.STDOUT,
                start_new_session=True,
            )
            self.members.append(_Rank(process, log, 0 if output is None else output.tell()))

    def poll(self) -> bool:
        """Collects ranks that ended and kills what they left in their groups. True while one is running."""
        ended = []
        for number, member in enumerate(self.members):
            if not member.reaped and member.process.poll() is not None:
                member.reaped = True
                _signal_group(member.process.pid, signal.SIGKILL)
                if member.process.returncode:
                    ended.append(number)
        # Of ranks found dead at once, one that a signal ended is the cause, the others' broken connections its effect.
        self._failures += sorted(ended, key=lambda number: self.members[number].process.returncode > 0)
        return not all(member.reaped for member in self.members)

    def first_failure(self) -> int | None:
        """The rank that failed first."""
        return self._failures[0] if self._failures else None

    def exit_code(self, rank: int) -> int:
        """What a shell would call the rank's end: its exit status, or 128 + n for one that signal n ended."""
        code = self.members[rank].process.returncode
        return 128 - code if code < 0 else code

    def terminate(self) -> None:
        """Asks every running rank to end; its own helpers are left to it."""
        for member in self.members:
            if not member.reaped:
                member.process.terminate()

    def kill(self) -> None:
        """Ends the running ranks with their process groups."""
        for member in self.members:
            if not member.reaped:
                _signal_group(member.process.pid, signal.SIGKILL)

    def log_tail(self, rank: int, lines: int) -> str:
        """The last lines a rank wrote since it started; empty for rank 0."""
        member = self.members[rank]
        if member.log is None or not member.log.exists():
            return ""
        with member.log.open("rb") as file:
            file.seek(max(member.log_start, member.log.stat().st_size - 65536))
            text = file.read().decode(errors="replace")
        return "\n".join(text.splitlines()[-lines:])


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)
