"""W&B's offline folders: what a process that was killed left of one, and the command that uploads them.

The file of such a folder is a log in LevelDB's format (its `doc/log_format.md`): blocks of 32 KiB with records, whole
or in parts, each behind a checksum, its length and its kind. W&B writes block by block, so a killed process leaves a
file that lacks the newest lines and may end within a record; there `wandb sync` stops, and takes no later folder.
"""

from __future__ import annotations

import importlib
import struct
from collections.abc import Iterator
from pathlib import Path

from rlhf.runs.files import write_bytes
from rlhf.runs.folder import RunFolder

_MAGIC = b":W&B"
_FILE_HEADER_BYTES = 7
_BLOCK = 1 << 15
_RECORD_HEADER = struct.Struct("<IHB")
# A record in one piece, and the last piece of one.
_ENDS = (1, 4)


def mend(folder: RunFolder) -> int | None:
    """Takes cut off records from the run's offline files, and returns the step behind the last one that they hold.

    None where that is not known: there is no such file, or none with a step beside runs that were online. A file is
    replaced and not cut, so that a process which is still writing it does no harm.
    """
    ends = [_mend(path) for path in sorted(folder.path.glob("wandb/offline-run-*/*.wandb"))]
    end = max(ends, default=0)
    was_online = any(folder.path.glob("wandb/run-*"))
    return None if not ends or (end == 0 and was_online) else end


def _mend(path: Path) -> int:
    content = path.read_bytes()
    if not content.startswith(_MAGIC):
        return 0
    end, whole = 0, _FILE_HEADER_BYTES
    for record, place in _records(content):
        end, whole = max(end, _step(record) + 1), place
    if whole < len(content):
        write_bytes(path, content[:whole])
    return end


def _records(content: bytes) -> Iterator[tuple[bytes, int]]:
    """The whole records of a file, each with the place where it ends."""
    place, pieces = _FILE_HEADER_BYTES, []
    while place + _RECORD_HEADER.size <= len(content):
        left = _BLOCK - place % _BLOCK
        if left < _RECORD_HEADER.size:
            # No header fits: the rest of the block is empty.
            place += left
            continue
        _, length, kind = _RECORD_HEADER.unpack_from(content, place)
        begin = place + _RECORD_HEADER.size
        place = begin + length
        if place > len(content):
            return
        pieces.append(content[begin:place])
        if kind in _ENDS:
            yield b"".join(pieces), place
            pieces = []


def _step(record: bytes) -> int:
    """The step of a line of history; -1 for any other record, and for what is none."""
    message = importlib.import_module("wandb.proto.wandb_internal_pb2").Record()
    try:
        message.ParseFromString(record)
    except importlib.import_module("google.protobuf.message").DecodeError:
        return -1
    return int(message.history.step.num) if message.HasField("history") else -1


def offline_folders(folder: RunFolder) -> list[Path]:
    """The folders of offline runs of this run folder, and of a study's arms, that `wandb sync` has not uploaded."""
    found = (*folder.path.glob("wandb/offline-run-*"), *folder.path.glob("arms/**/wandb/offline-run-*"))
    return sorted(path for path in found if not list(path.glob("*.wandb.synced")))


def sync_command(folder: RunFolder) -> str | None:
    """The command that uploads what this run logged offline; None where there is nothing of it."""
    places = dict.fromkeys(path.parent.relative_to(folder.path).parts for path in offline_folders(folder))
    # One pattern for all arms of a study; their names may have several parts.
    patterns = dict.fromkeys((parts[0], *("*" for _ in parts[1:-1]), parts[-1])[-len(parts) :] for parts in places)
    found = [str(folder.path.joinpath(*parts, "offline-run-*")) for parts in patterns]
    return " ".join(["wandb sync", *found]) if found else None
