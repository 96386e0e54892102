"""What a run ran on: packages, code, hardware. Standard library only, so that a manifest costs milliseconds."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "accelerate",
    "deepspeed",
    "peft",
    "datasets",
    "wandb",
    "hydra-core",
    "pydantic",
    "numpy",
)
_NVIDIA_QUERY = ("--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits")


def package_versions() -> dict[str, str | None]:
    """Version of Python, of this package and of the libraries that decide numbers; None for one not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("rlhf", *PACKAGES):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def code_content(package: Path | None = None) -> dict[str, str]:
    """A hash of the Python files of each folder of the package, by its path: `rlhf/rewards`. Needs no git."""
    root = (package or Path(__file__).resolve().parents[1]).resolve()
    folders: dict[str, Any] = {}
    for path in sorted(root.rglob("*.py")):
        digest = folders.setdefault(path.parent.relative_to(root.parent).as_posix(), hashlib.sha256())
        digest.update(path.name.encode() + b"\0" + _content(path))
    return {folder: digest.hexdigest()[:12] for folder, digest in folders.items()}


def code_state(package: Path | None = None) -> dict[str, Any]:
    """`commit` of the checkout the package runs from and `diff_hash` of what is not committed of it.

    Both None when the package is installed rather than run from its checkout; `diff_hash` None when there is nothing
    uncommitted, else `changed` lists the files. The hash covers the tracked changes and the content of new files in the
    code and config folders.
    """
    root = (package or Path(__file__).resolve().parents[1]).resolve().parent
    nothing: dict[str, Any] = {"commit": None, "diff_hash": None}
    # An installed package may lie inside a checkout of something else; only the checkout's own root counts.
    if not (root / ".git").exists():
        return nothing
    folders = [name for name in ("rlhf", "configs") if (root / name).is_dir()]
    status = _git(root, "status", "--porcelain=v2", "--branch", "--untracked-files=all", "-z", "--", *folders)
    if status is None:
        return nothing
    entries = [entry for entry in status.split(b"\0") if entry]
    commits = [entry.split()[-1].decode() for entry in entries if entry.startswith(b"# branch.oid ")]
    commit = commits[0] if commits and commits[0] != "(initial)" else None
    changes = sorted(entry for entry in entries if not entry.startswith(b"#"))
    if not changes:
        return {"commit": commit, "diff_hash": None}
    digest = hashlib.sha256()
    if commit is not None:
        digest.update(_git(root, "diff", "HEAD", "--binary", "--no-ext-diff", "--no-color", "--", *folders) or b"")
    for change in changes:
        digest.update(change + b"\n")
        if change.startswith(b"? "):
            digest.update(_content(root / os.fsdecode(change[2:])))
    # Of a rename the new name is what comes before the old one's own entry.
    files = sorted({os.fsdecode(_changed_file(change)) for change in changes} - {""})
    return {"commit": commit, "diff_hash": digest.hexdigest(), "changed": files}


def _changed_file(entry: bytes) -> bytes:
    """The path in an entry of `git status --porcelain=v2 -z`, which begins with `?` or with 8, 9 or 10 other fields."""
    fields = {b"? ": 1, b"1 ": 8, b"2 ": 9, b"u ": 10}.get(entry[:2], 0)
    return entry.split(b" ", fields)[fields] if fields else b""


def hardware() -> dict[str, Any]:
    """CPU model, cores, memory in bytes and GPUs; neither host nor user names."""
    return {
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": memory_bytes(),
        "gpus": gpus(),
    }


def cpu_model() -> str | None:
    """The processor's name."""
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or None


def memory_bytes() -> int | None:
    """Physical memory, or the container's limit where that is lower."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total


def gpus() -> list[dict[str, Any]]:
    """Name, memory in bytes and driver of each NVIDIA GPU, asked from nvidia-smi; empty where there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    try:
        answer = subprocess.run([program, *_NVIDIA_QUERY], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    found = []
    for line in answer.stdout.splitlines() if answer.returncode == 0 else []:
        parts = [part.strip() for part in line.split(",")]
        if len(parts) == 3:
            mebibytes = int(parts[1]) if parts[1].isdigit() else None
            found.append({"name": parts[0], "memory_bytes": mebibytes and mebibytes * 2**20, "driver": parts[2]})
    return found


def peak_memory_bytes() -> int:
    """Largest resident memory that this process has had so far."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _git(root: Path, *arguments: str) -> bytes | None:
    """What git prints, or None when there is no git or it refuses."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    # Without it `git status` would write to the index of a checkout that others may be working in.
    environment["GIT_OPTIONAL_LOCKS"] = "0"
    try:
        answer = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, timeout=20, check=False, env=environment
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout if answer.returncode == 0 else None


def _content(path: Path) -> bytes:
    try:
        return hashlib.sha256(path.read_bytes()).digest()
    except OSError:
        return b""
