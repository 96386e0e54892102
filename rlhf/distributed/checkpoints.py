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
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypedDict

from rlhf.errors import ArtifactError, UserError

MARKER = "checkpoint.json"
_FORMAT = 3
_NAME = re.compile(r"checkpoint-(\d+)")
# In a damaged checkpoint that was set aside: what is wrong with it.
_DAMAGE = "damage.txt"
# Files a reader looks for by their kind.
_INDEXES = ("pieces-*.json", "rank-*.json")
# Network and user-space file systems that cannot sync a folder.
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES)


class FileEntry(TypedDict):
    """A file as the marker has it: bytes, and SHA-256 in hexadecimal digits."""

    size: int
    sha256: str


class ForeignCheckpointError(UserError):
    """A checkpoint that another version of this package can read."""


@dataclass(frozen=True)
class CheckpointShape:
    """Who wrote a checkpoint. Where all of it is equal a continuation is bit-identical, else equal but for rounding."""

    world_size: int
    zero_stage: int
    precision: str

    def describe(self) -> str:
        """For messages."""
        ranks = "1 rank" if self.world_size == 1 else f"{self.world_size} ranks"
        return f"{ranks}, zero.stage={self.zero_stage}, {self.precision}"


def checkpoint_folder(parent: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps lies; readers go by this name."""
    return parent / f"checkpoint-{step}"


def partial_folder(folder: Path) -> Path:
    """Where a checkpoint lies while it is being written."""
    return folder.with_name(folder.name + ".partial")


def commit(folder: Path, shape: CheckpointShape, files: Mapping[str, FileEntry]) -> None:
    """Turns the partial folder of `folder` into `folder`: writes the marker, syncs the folder, renames.

    Called by one rank when all have written. `files`: every file's `hash_and_sync`, by its path in the folder. A folder
    of that name that is there already is replaced.
    """
    partial = partial_folder(folder)
    marker = partial / MARKER
    body = {"format": _FORMAT, "shape": asdict(shape), "files": dict(sorted(files.items()))}
    marker.write_text(json.dumps({**body, "sha256": _digest(body)}, indent=1) + "\n")
    hash_and_sync(marker)
    _sync_folder(partial)
    if folder.exists():
        _remove(folder)
    partial.rename(folder)
    _sync_folder(folder.parent)


def size_trouble(folder: Path, files: Mapping[str, FileEntry]) -> str | None:
    """The first file that is missing or has another size; None when there is none. No file is read.

    Raises `UserError` where the file system does not tell.
    """
    for name, entry in files.items():
        try:
            size = (folder / name).stat().st_size
        except FileNotFoundError:
            return f"{folder} is not a whole checkpoint: {name} is missing"
        except OSError as error:
            raise _unreadable(folder / name, error) from error
        if size != entry["size"]:
            return f"{folder} is not a whole checkpoint: {name} has {size} bytes instead of {entry['size']}"
    return None


def hash_trouble(folder: Path, name: str, entry: FileEntry) -> str | None:
    """Reads and hashes a file that is there; None when it is as it was written.

    Raises `UserError` when it cannot be read: a stale handle or too many open files pass, so that is no damage.
    """
    try:
        whole = hash_file(folder / name) == entry["sha256"]
    except OSError as error:
        raise _unreadable(folder / name, error) from error
    return None if whole else f"{folder} is not a whole checkpoint: {name} was altered: its hash differs"


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"{path} cannot be read ({error.strerror or error}) on {socket.gethostname()}. Whether the checkpoint is whole "
        "cannot be told, so it was left as it is. Run the same command again when the file system answers; if it never "
        f"does, move {path.parent} away, and the training goes on from the checkpoint before"
    )


def read_marker(folder: Path) -> tuple[CheckpointShape, dict[str, FileEntry]]:
    """Who wrote the checkpoint, and its files by their names in the folder.

    Raises `ArtifactError` when the marker is missing or damaged, or a file of a kind that is read is not in it,
    `ForeignCheckpointError` for another format, and `UserError` when the marker cannot be read.
    """
    try:
        text = (folder / MARKER).read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ArtifactError(f"{folder} is not a whole checkpoint: its marker {MARKER} is missing") from error
    except OSError as error:
        raise _unreadable(folder / MARKER, error) from error
    try:
        marker = json.loads(text)
        digest, version = marker.pop("sha256", None), marker["format"]
        if version != _FORMAT and digest in (None, _digest(marker)):
            raise ForeignCheckpointError(
                f"{folder} was written in format {version} by another version of rlhf, and this one reads format "
                f"{_FORMAT}. Go on with the version that wrote it, or remove the folder to go on without it."
            )
        shape = CheckpointShape(**marker["shape"])
        files = {
            str(name): FileEntry(size=int(entry["size"]), sha256=str(entry["sha256"]))
            for name, entry in marker["files"].items()
        }
        unlisted = {path.name for kind in _INDEXES for path in folder.glob(kind)} - files.keys()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"{folder} is not a whole checkpoint: its marker {MARKER} cannot be read ({error})"
        ) from error
    if digest != _digest(marker):
        raise ArtifactError(f"{folder} is not a whole checkpoint: its marker {MARKER} was altered: its hash differs")
    if unlisted:
        raise ArtifactError(f"{folder} is not a whole checkpoint: {min(unlisted)} is no file of it")
    return shape, files


def _digest(body: Mapping[str, object]) -> str:
    """The marker's hash of itself."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def checkpoints_in(parent: Path) -> list[Path]:
    """Folders named like checkpoints, lowest step first. What is in them is not looked at."""
    if not parent.is_dir():
        return []
    numbered = [(int(found.group(1)), path) for path in parent.iterdir() if (found := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(numbered)]


def set_aside(folder: Path, trouble: str) -> None:
    """Gives a damaged checkpoint a name under which nobody takes it for one, or keeps it instead of a whole one.

    `trouble` is what is wrong with it, which `damaged_ones` tells. Where that cannot be done, it stays.
    """
    with suppress(OSError):
        (folder / _DAMAGE).write_text(trouble, encoding="utf-8")
    with suppress(OSError):
        aside = folder.with_name(folder.name + ".damaged")
        _delete(aside)
        folder.rename(aside)


def damaged_ones(parent: Path) -> list[str]:
    """What is wrong with each checkpoint that was set aside and is still there."""
    found = []
    for folder in sorted(parent.glob("checkpoint-*.damaged")):
        try:
            found.append((folder / _DAMAGE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found.append(f"{folder} is not a whole checkpoint")
    return found


def prune_checkpoints(parent: Path, keep: int) -> None:
    """Removes all but the `keep` newest checkpoints, and what unfinished saves left. For one rank to call.

    Damaged ones go when there are `keep` others. What cannot be removed (a network file system keeps files that are
    open) is left for the next time: that is no reason to end a training.
    """
    checkpoints = checkpoints_in(parent)
    for folder in checkpoints[:-keep]:
        with suppress(OSError):
            _remove(folder)
    _sweep(parent, "partial", "removed", *(["damaged"] if len(checkpoints) >= keep else []))


def sweep_removed(parent: Path) -> None:
    """Removes what is left of checkpoints whose removal was cut short. For one rank to call."""
    _sweep(parent, "removed")


def _sweep(parent: Path, *kinds: str) -> None:
    for left_over in [path for kind in kinds for path in parent.glob(f"checkpoint-*.{kind}")]:
        with suppress(OSError):
            _delete(left_over)


def hash_and_sync(path: Path) -> FileEntry:
    """Brings a file to the disk; its size and SHA-256, for the marker."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    return {"size": path.stat().st_size, "sha256": digest}


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove(folder: Path) -> None:
    """Renames first, so that a checkpoint that is half removed is not taken for one."""
    aside = folder.with_name(folder.name + ".removed")
    _delete(aside)
    folder.rename(aside)
    _delete(aside)


def _delete(folder: Path) -> None:
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


def _sync_folder(folder: Path) -> None:
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
