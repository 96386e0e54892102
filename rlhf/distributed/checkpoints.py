"""Checkpoint folders that are whole or not there: a marker lists every file with its size and hash.

A checkpoint `checkpoint-<step>` is written under the name `checkpoint-<step>.partial` and renamed when the marker is on
disk, so a killed run leaves either a whole checkpoint or one that no later run takes for whole.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from rlhf.errors import ArtifactError, DiskFullError

MARKER = "checkpoint.json"
_FORMAT = 1
_NAME = re.compile(r"checkpoint-(\d+)")
_LOW_SPACE_BYTES = 1 << 20


@dataclass(frozen=True)
class CheckpointShape:
    """What must be equal for a checkpoint to continue bit for bit."""

    world_size: int
    zero_stage: int
    precision: str

    def describe(self) -> str:
        """For messages."""
        ranks = "1 rank" if self.world_size == 1 else f"{self.world_size} ranks"
        return f"{ranks}, zero.stage={self.zero_stage}, {self.precision}"


def checkpoint_folder(parent: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps lies; `latest_checkpoint` goes by this name."""
    return parent / f"checkpoint-{step}"


def partial_folder(folder: Path) -> Path:
    """Where a checkpoint lies while it is being written."""
    return folder.with_name(folder.name + ".partial")


def commit(folder: Path, shape: CheckpointShape) -> None:
    """Turns the partial folder of `folder` into `folder`: hashes and syncs its files, writes the marker, renames.

    Called by one rank when all have written. A folder of that name that is there already is replaced.
    """
    partial = partial_folder(folder)
    files = {
        path.relative_to(partial).as_posix(): {"size": path.stat().st_size, "sha256": _hash_and_sync(path)}
        for path in sorted(partial.rglob("*"))
        if path.is_file()
    }
    marker = partial / MARKER
    marker.write_text(json.dumps({"format": _FORMAT, "shape": asdict(shape), "files": files}, indent=1) + "\n")
    _hash_and_sync(marker)
    for inner in [path for path in partial.rglob("*") if path.is_dir()] + [partial]:
        _sync_folder(inner)
    if folder.exists():
        _remove(folder)
    partial.rename(folder)
    _sync_folder(folder.parent)


def verify(folder: Path) -> CheckpointShape:
    """The shape that wrote the checkpoint. Raises `ArtifactError` when it is missing, cut short or altered."""
    try:
        marker = json.loads((folder / MARKER).read_text())
        shape = CheckpointShape(**marker["shape"])
        files = {str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in marker["files"].items()}
        known = marker["format"] == _FORMAT
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"{folder} is not a whole checkpoint: its marker {MARKER} cannot be read ({error}). "
            "Remove the folder; the run then goes on from the checkpoint before, or from the start."
        ) from error
    if not known:
        raise ArtifactError(f"{folder} was written in format {marker['format']}, this version reads format {_FORMAT}.")
    for name, (size, digest) in files.items():
        path = folder / name
        if not path.is_file():
            trouble = "is missing"
        elif path.stat().st_size != size:
            trouble = f"has {path.stat().st_size} bytes instead of {size}"
        elif hash_file(path) != digest:
            trouble = "was altered: its hash differs"
        else:
            continue
        raise ArtifactError(
            f"{folder} is not a whole checkpoint: {name} {trouble}. "
            "Remove the folder; the run then goes on from the checkpoint before, or from the start."
        )
    return shape


def latest_checkpoint(parent: Path) -> Path | None:
    """The whole checkpoint of the highest step, None when there is none; a broken one is passed over with a warning.

    Every file is read and hashed: on several ranks let rank 0 call it and broadcast the answer.
    """
    for folder in reversed(_checkpoints(parent)):
        try:
            verify(folder)
        except ArtifactError as error:
            warnings.warn(f"passing over a broken checkpoint: {error}", stacklevel=2)
        else:
            return folder
    return None


def prune_checkpoints(parent: Path, keep: int) -> None:
    """Removes all but the `keep` newest checkpoints, and what an unfinished save left. For one rank to call."""
    for folder in _checkpoints(parent)[:-keep]:
        _remove(folder)
    for left_over in [*parent.glob("checkpoint-*.partial"), *parent.glob("checkpoint-*.removed")]:
        shutil.rmtree(left_over)


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turns a full disk into `DiskFullError`.

    torch's and DeepSpeed's writers raise a `RuntimeError` without an error number, so free space decides for those.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        if not full and (isinstance(error, OSError) or shutil.disk_usage(existing).free > _LOW_SPACE_BYTES):
            raise
        raise DiskFullError(
            f"no space is left on the disk of {folder}; the checkpoint before is still whole. "
            "Free some space, or keep fewer checkpoints, and give the same command again."
        ) from error


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checkpoints(parent: Path) -> list[Path]:
    """Folders named like checkpoints, lowest step first."""
    if not parent.is_dir():
        return []
    numbered = [(int(found.group(1)), path) for path in parent.iterdir() if (found := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(numbered)]


def _remove(folder: Path) -> None:
    """Renames first, so that a checkpoint that is half removed is not taken for one."""
    aside = folder.with_name(folder.name + ".removed")
    if aside.exists():
        shutil.rmtree(aside)
    folder.rename(aside)
    shutil.rmtree(aside)


def _hash_and_sync(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    return digest


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
