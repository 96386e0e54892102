"""The host: compiler, memory, limits, threads, and the names and addresses that ranks on it need."""

from __future__ import annotations

import os
import resource
import shlex
import shutil
import socket
import threading
import time
from pathlib import Path

from rlhf.config import RLHFConfig
from rlhf.distributed.launch import available_cores, threads_per_rank
from rlhf.doctor.finding import Finding, green, red, yellow
from rlhf.runs import machine

_GIB = 2**30
LOW_MEMORY_BYTES = 2 * _GIB
LOW_SHARED_MEMORY_BYTES = _GIB
LOW_OPEN_FILES = 1024
RESOLVE_SECONDS = 3.0
OLD_BUILD_SECONDS = 15 * 60
_COMPILERS = ("c++", "g++", "clang++")


def check_compiler() -> Finding:
    """A C++ compiler and ninja, with which DeepSpeed builds its own optimisers when they are asked for."""
    chosen = os.environ.get("CXX")
    compiler = next(filter(None, map(shutil.which, [chosen] if chosen else _COMPILERS)), None)
    ninja = shutil.which("ninja")
    if compiler and ninja:
        return green("compiler", f"{compiler}, {ninja}")
    missing = " and ".join(
        name for name, there in ((chosen or "a C++ compiler", compiler), ("ninja", ninja)) if not there
    )
    return yellow(
        "compiler",
        f"no {missing.removeprefix('a ')} on the path; only DeepSpeed's own optimisers (its CPUAdam) and torch.compile "
        "need one",
        "apt-get install g++ (or your system's like) and pip install ninja; with the defaults nothing is compiled",
    )


def check_builds() -> Finding:
    """Locks that killed builds of C++ extensions left: torch waits for them without a word and without end."""
    left = [
        lock
        for pattern in ("*/lock", "*/*/lock")
        for lock in sorted(_builds_folder().glob(pattern))
        if time.time() - _modified(lock) > OLD_BUILD_SECONDS
    ]
    if not left:
        return green("builds", f"no lock is left in {_builds_folder()}")
    return yellow(
        "builds",
        f"a build of {', '.join(lock.parent.name for lock in left)} has not ended for more than "
        f"{OLD_BUILD_SECONDS // 60} minutes; if it was killed, whoever needs it next waits for ever",
        f"unless one runs (pgrep ninja): rm {shlex.join(map(str, left))}",
    )


def _builds_folder() -> Path:
    """Where torch.utils.cpp_extension builds, one folder for each extension, in one for each Python unless set."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path(cache, "torch_extensions"))


def _modified(path: Path) -> float:
    """Seconds since the epoch; now for what has just gone."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return time.time()


def check_memory() -> Finding:
    """Memory, and what of it is free now."""
    total = machine.memory_bytes()
    free = available_memory_bytes()
    if total is None or free is None:
        return green("memory", "not known on this system")
    found = f"{free / _GIB:.1f} of {total / _GIB:.1f} GiB free"
    if free < LOW_MEMORY_BYTES:
        return yellow("memory", found, "end other programs, or take a smaller model: a rank alone takes about 1 GiB")
    return green("memory", found)


def available_memory_bytes() -> int | None:
    """Memory that new processes can have, within the limit of the container; None where the kernel does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, StopIteration):
        return None
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
        used = Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii").strip()
    except OSError:
        return free
    return min(free, int(limit) - int(used)) if limit.isdigit() and used.isdigit() else free


def check_shared_memory(folder: Path = Path("/dev/shm")) -> Finding:
    """/dev/shm, through which ranks on GPUs of one host talk; ranks on CPU do not use it."""
    name = "shared memory"
    try:
        total = shutil.disk_usage(folder).total
        writable = os.access(folder, os.W_OK)
    except OSError as error:
        total, writable = 0, False
        found = f"{folder}: {error.strerror}"
    else:
        found = f"{folder} has {total / _GIB:.2f} GiB" + ("" if writable else " and may not be written")
    if (writable and total >= LOW_SHARED_MEMORY_BYTES) or len(machine.gpus()) < 2:
        return green(name, found)
    return yellow(name, found, "NCCL between GPUs wants more: in a container docker run --shm-size=8g (or --ipc=host)")


def check_open_files() -> Finding:
    """How many files a process may have open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return green("open files", "no limit")
    if soft < LOW_OPEN_FILES:
        most = "unlimited" if hard == resource.RLIM_INFINITY else str(hard)
        return yellow("open files", f"a process may open {soft}", f"ulimit -n 65536 (at most {most} here)")
    return green("open files", f"a process may open {soft}")


def check_threads(config: RLHFConfig) -> Finding:
    """Threads of all ranks against cores: more threads than cores make small models many times slower."""
    cores = available_cores()
    ranks = config.distributed.num_processes
    threads = threads_per_rank(ranks, config.distributed.fixed_threads, os.environ)
    setting = os.environ.get("OMP_NUM_THREADS")
    origin = "distributed.num_threads" if config.distributed.num_threads is not None else "OMP_NUM_THREADS"
    found = f"{ranks} rank{'s' if ranks > 1 else ''} of {threads} thread{'s' if threads > 1 else ''} on {cores} cores"
    if setting is not None and origin == "OMP_NUM_THREADS":
        found += f" (OMP_NUM_THREADS={setting})"
    if ranks * threads <= cores:
        return green("threads", found)
    if ranks > cores:
        return yellow("threads", found, f"ranks share cores and wait for each other: at most {cores} processes on CPU")
    return yellow("threads", found, f"set {origin} to {max(1, cores // ranks)}, or leave it unset")


def check_loopback() -> Finding:
    """127.0.0.1, over which the ranks of one host meet."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            address = server.getsockname()
            with socket.create_connection(address, timeout=RESOLVE_SECONDS):
                pass
    except OSError as error:
        return red(
            "loopback",
            f"127.0.0.1 cannot be connected to: {error}",
            "bring the interface up (ip link set lo up), and let no firewall stand before 127.0.0.1",
        )
    return green("loopback", "127.0.0.1 answers")


def check_host_name() -> Finding:
    """The host's own name; ranks on several hosts find each other by names."""
    name = socket.gethostname()
    answer: list[str] = []

    def resolve() -> None:
        try:
            answer.append(str(socket.getaddrinfo(name, None)[0][4][0]))
        except OSError as error:
            answer.append(f"? {error}")

    thread = threading.Thread(target=resolve, daemon=True)  # a name server may keep it waiting for long
    thread.start()
    thread.join(RESOLVE_SECONDS)
    if answer and not answer[0].startswith("?"):
        return green("host name", f"{name} is {answer[0]}")
    reason = answer[0].removeprefix("? ") if answer else f"no answer within {RESOLVE_SECONDS:g} s"
    return yellow(
        "host name",
        f"{name} does not resolve ({reason}); ranks on one host do not need it, those on several do",
        f"add a line '127.0.0.1 {name}' (or the host's address) to /etc/hosts",
    )
