"""Where runs and the hub's cache are written: is it writable, and is there space?"""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from rlhf.config import RLHFConfig
from rlhf.doctor.finding import Finding, Level, green, red, yellow
from rlhf.runs.files import free_bytes, storage_error

_GIB = 2**30
FULL_BYTES = 200 * 2**20
LOW_BYTES = 10 * _GIB


def check_run_folder(config: RLHFConfig) -> Finding:
    """The folder that run folders go to, or the run folder itself where the config names one."""
    key, text = ("run.root", config.run.root) if config.run.dir is None else ("run.dir", config.run.dir)
    folder = Path(text).expanduser()
    trouble = why_not_writable(folder)
    if trouble is not None:
        return red("run folder", f"{folder.absolute()}: {trouble}", f"set {key} to a folder that you may write")
    return _space("run folder", folder, f"free some space, or set {key} to another disk", "red")


def check_cache() -> Finding:
    """The hub's cache; a run with local models and data does not need it."""
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE)
    trouble = why_not_writable(folder)
    if trouble is not None:
        return yellow("hub cache", f"{folder}: {trouble}", "set HF_HOME to a folder that you may write")
    return _space("hub cache", folder, "free some space (hf cache rm), or set HF_HOME to another disk", "yellow")


def why_not_writable(folder: Path) -> str | None:
    """None when something can be written into `folder` or, where it is not there, where it would be made. Tries it."""
    place = folder.absolute()
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        return f"{place} is not a folder" if os.path.exists(place) else f"{place} is a link to nothing"
    try:
        # A folder: what a run makes first, and it needs no more space than it has to.
        with tempfile.TemporaryDirectory(prefix=".rlhf-doctor-", dir=place) as name:
            Path(name, "file").write_bytes(b"x" * 4096)
    except OSError as error:
        found = storage_error(error, place)
        return error.strerror or str(error) if found is None else str(found).splitlines()[0]
    return None


def _space(name: str, folder: Path, remedy: str, when_full: Level) -> Finding:
    free = free_bytes(folder)
    place = folder.absolute()
    if free is None:
        return green(name, f"{place}, writable")
    inodes = _free_inodes(place)
    found = f"{place}, writable, {free / _GIB:.1f} GiB free"
    if inodes is not None and inodes < 1000:
        return Finding(name, when_full, f"{found}, but only {inodes} more files may be made", remedy)
    if free < FULL_BYTES:
        found = f"{place}, writable, but only {free / 2**20:.0f} MiB free"
        return Finding(name, when_full, found, remedy)
    return yellow(name, found, remedy) if free < LOW_BYTES else green(name, found)


def _free_inodes(place: Path) -> int | None:
    """How many more files the file system takes; None when it does not say, or has no such limit."""
    for candidate in (place, *place.parents):
        with contextlib.suppress(OSError):
            status = os.statvfs(candidate)
            return status.f_favail if status.f_files else None
    return None
