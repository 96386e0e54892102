"""Checkpoints of a TRL trainer that are known to be whole: a marker is written after all ranks have saved."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.runs.files import discard, disk_errors, sync_tree, write_json
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
        marker = {"step": step, "layout": _layout(context), "files": _sizes(folder)}
        write_json(folder / MARKER, marker)
    for old in _by_step(context.stage.checkpoints)[:-keep]:
        discard(old)


def find_checkpoint(context: StageContext) -> tuple[Checkpoint | None, str | None]:
    """The newest whole checkpoint of the stage, and a note for the user where others had to be left.

    Incomplete ones are removed, and so are those of another ZeRO stage or, where state is sharded, of another number of
    ranks: the trainer cannot read them. All ranks call it and get the same answer.
    """
    found: tuple[Checkpoint | None, str | None] = (None, None)
    if context.runtime.is_main:
        found = _search(context)
    # Rank 0 alone looks: another rank may see the folder while it is being cleaned.
    answer: tuple[Checkpoint | None, str | None] = context.runtime.broadcast_object(found)
    return answer


def _search(context: StageContext) -> tuple[Checkpoint | None, str | None]:
    note = None
    for folder in reversed(_by_step(context.stage.checkpoints)):
        marker = _read_marker(folder)
        if marker is not None and marker["layout"] == _layout(context):
            return Checkpoint(folder, marker["step"]), note
        if marker is not None:
            note = (
                f"the checkpoint of step {marker['step']} was saved with {marker['layout']} and this run has "
                f"{_layout(context)}: it cannot be resumed, the stage starts over"
            )
        discard(folder)
    return None, note


def _layout(context: StageContext) -> str:
    """What has to be equal for a checkpoint to be readable. Without DeepSpeed the number of ranks does not matter."""
    zero = context.config.zero.stage
    ranks = f", processes={context.runtime.world_size}" if zero else ""
    return f"zero.stage={zero}{ranks}, precision={context.runtime.precision}"


def _read_marker(folder: Path) -> dict[str, Any] | None:
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(marker, dict) or marker.get("files") != _sizes(folder):
        return None
    return marker


def _sizes(folder: Path) -> dict[str, int]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MARKER)
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def _by_step(checkpoints: Path) -> list[Path]:
    """The trainer's checkpoint folders, oldest step first."""
    folders = [path for path in checkpoints.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdigit()]
    return sorted(folders, key=lambda path: int(path.name.removeprefix(_PREFIX)))
