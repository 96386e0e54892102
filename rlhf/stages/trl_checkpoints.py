"""Checkpoints of a TRL trainer that are known to be whole: a marker with hashes follows when all ranks have saved."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.distributed.checkpoints import hash_file
from rlhf.errors import ConfigError
from rlhf.runs.files import discard, disk_errors, sync_tree, write_json
from rlhf.runs.jsonable import read_json
from rlhf.stages.context import StageContext

MARKER = "rlhf_complete.json"
_PREFIX = "checkpoint-"


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint to go on from."""

    path: Path
    step: int


def complete_checkpoint(context: StageContext, step: int, keep: int) -> None:
    """Declares the trainer's checkpoint of `step` whole, then removes all but the newest `keep`. All ranks call it."""
    # The other ranks' shards must be on disk before anything says that they are.
    context.runtime.barrier()
    if not context.runtime.is_main:
        return
    folder = context.stage.checkpoints / f"{_PREFIX}{step}"
    with disk_errors(folder):
        sync_tree(folder)
        marker = {"step": step, "layout": _layout(context), "files": _hashes(folder)}
        write_json(folder / MARKER, marker)
    for old in _by_step(context.stage.checkpoints)[:-keep]:
        discard(old)


def find_checkpoint(context: StageContext) -> tuple[Checkpoint | None, str | None]:
    """The newest whole checkpoint of the stage, and a note for the user where a damaged one had to be left.

    Damaged and unfinished ones are removed. All ranks call it and get the same answer. Raises `ConfigError` for a
    checkpoint that this run cannot read: of another ZeRO stage or precision or, where state is sharded, of another
    number of ranks. Nothing is removed then.
    """
    found: tuple[Checkpoint | None, str | None] = (None, None)
    refusal: str | None = None
    if context.runtime.is_main:
        try:
            found = _search(context)
        except ConfigError as error:
            refusal = str(error)
    # Rank 0 alone looks: another rank may see the folder while it is being cleaned.
    found, refusal = context.runtime.broadcast_object((found, refusal))
    if refusal is not None:
        raise ConfigError(refusal)
    return found


def _search(context: StageContext) -> tuple[Checkpoint | None, str | None]:
    note = None
    for folder in reversed(_by_step(context.stage.checkpoints)):
        marker = _read_marker(folder)
        trouble = None if marker is None else _trouble(folder, marker)
        if marker is None or trouble is not None:
            if trouble is not None:
                note = f"{folder} is damaged and was removed: {trouble}; the stage goes on from the checkpoint before"
            discard(folder)
            continue
        if marker["layout"] != _layout(context):
            raise ConfigError(
                f"the checkpoint {folder} was saved with {marker['layout']}, and this run has {_layout(context)}: it "
                "cannot go on from there. Give the settings it was saved with, or remove the folder to start the stage "
                "over"
            )
        return Checkpoint(folder, marker["step"]), note
    return None, note if note is None else note.replace("goes on from the checkpoint before", "starts over")


def _layout(context: StageContext) -> str:
    """What has to be equal for a checkpoint to be readable. Without DeepSpeed the number of ranks does not matter."""
    zero = context.config.zero.stage
    ranks = f", processes={context.runtime.world_size}" if zero else ""
    return f"zero.stage={zero}{ranks}, precision={context.runtime.precision}"


def _read_marker(folder: Path) -> dict[str, Any] | None:
    """The marker; None in a folder that no save has finished."""
    marker = read_json(folder / MARKER)
    return marker if isinstance(marker, dict) and {"step", "layout", "files"} <= marker.keys() else None


def _trouble(folder: Path, marker: dict[str, Any]) -> str | None:
    """What of the files is not as the marker says; None when all is well."""
    expected, found = marker["files"], _hashes(folder)
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            return f"{name} is missing"
        if expected.get(name) != found[name]:
            return f"{name} was cut short or altered"
    return None


def _hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MARKER)
    return {path.relative_to(folder).as_posix(): hash_file(path) for path in files}


def _by_step(checkpoints: Path) -> list[Path]:
    """The trainer's checkpoint folders, oldest step first."""
    folders = [path for path in checkpoints.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdigit()]
    return sorted(folders, key=lambda path: int(path.name.removeprefix(_PREFIX)))
