"""Checkpoint folders that are whole or not there: a marker lists every file with its size and hash.

A checkpoint `checkpoint-<step>` is written under the name `checkpoint-<step>.partial` and renamed when the marker is on
disk, so a killed run leaves either a whole checkpoint or one that no later run takes for whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypedDict

from rlhf.errors import ArtifactError

MARKER = "checkpoint.json"
_FORMAT = 2
_NAME = re.compile(r"checkpoint-(\d+)")


class FileEntry(TypedDict):
    """A file as the marker has it: bytes, and SHA-256 in hexadecimal digits."""

    size: int
    sha256: str


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
    """Where the checkpoint after `step` steps lies; `latest_checkpoint` goes by this name."""
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


def verify(folder: Path) -> CheckpointShape:
    """The shape that wrote the checkpoint. Raises `ArtifactError` when it is missing, cut short or altered."""
    shape, files = _read_marker(folder)
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
        raise ArtifactError(f"{folder} is not a whole checkpoint: {name} {trouble}")
    return shape


def read_shape(folder: Path) -> CheckpointShape:
    """Who wrote the checkpoint, by its marker alone. Raises `ArtifactError`."""
    return _read_marker(folder)[0]


def _read_marker(folder: Path) -> tuple[CheckpointShape, dict[str, tuple[int, str]]]:
    """Who wrote the checkpoint, and size and hash of each file. Raises `ArtifactError`."""
    try:
        marker = json.loads((folder / MARKER).read_text())
        shape = CheckpointShape(**marker["shape"])
        files = {str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in marker["files"].items()}
        known, digest = marker["format"] == _FORMAT, marker.pop("sha256", None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"{folder} is not a whole checkpoint: its marker {MARKER} cannot be read ({error})"
        ) from error
    if not known:
        raise ArtifactError(f"{folder} was written in format {marker['format']}, this version reads format {_FORMAT}")
    if digest != _digest(marker):
        raise ArtifactError(f"{folder} is not a whole checkpoint: its marker {MARKER} was altered: its hash differs")
    return shape, files


def _digest(body: Mapping[str, object]) -> str:
    """The marker's hash of itself."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _looks_whole(folder: Path) -> bool:
    """Whether all files are there in their size; what is in them is not read."""
    try:
        _, files = _read_marker(folder)
    except ArtifactError:
        return False
    return all(
        (folder / name).is_file() and (folder / name).stat().st_size == size for name, (size, _) in files.items()
    )


def latest_checkpoint(parent: Path) -> tuple[Path | None, list[str]]:
    """The whole checkpoint of the highest step, None when there is none, and a note on each broken one passed over.

    Every file is read and hashed: on several ranks let rank 0 call it and broadcast the answer.
    """
    notes = []
    for folder in reversed(_checkpoints(parent)):
        try:
            verify(folder)
        except ArtifactError as error:
            notes.append(f"passed over a damaged checkpoint: {error}")
        else:
            return folder, notes
    return None, notes


def prune_checkpoints(parent: Path, keep: int) -> None:
    """Removes all but the `keep` newest checkpoints, and what an unfinished save left. For one rank to call.

    Ones that are known to be damaged (their marker or a file is missing, or has another size) go first.
    """
    whole = []
    for folder in _checkpoints(parent):
        if _looks_whole(folder):
            whole.append(folder)
        else:
            _remove(folder)
    for folder in whole[:-keep]:
        _remove(folder)
    for left_over in [*parent.glob("checkpoint-*.partial"), *parent.glob("checkpoint-*.removed")]:
        shutil.rmtree(left_over)


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


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
