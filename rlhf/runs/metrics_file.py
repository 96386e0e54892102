"""JSON Lines files that several stages append to and that a resumed stage continues exactly where it was."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rlhf.runs.files import disk_errors, write_bytes
from rlhf.runs.jsonable import dump_json, parse_line


def count_lines(path: Path) -> int:
    """Whole lines of a file; 0 where there is none."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def rewind(path: Path, stage: str, resume_step: int) -> None:
    """Takes back what `stage` wrote after the checkpoint of `resume_step`, and any line a killed process cut off.

    `resume_step` 0 means that the stage begins anew: all its lines go, one of step 0 too. Lines of other stages stay
    as they are. The file is replaced atomically, and only when something changes.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return
    lines = content.split(b"\n")
    # What follows the last newline is empty in a whole file, else a line that was being written.
    kept = [line for line in lines[:-1] if _stays(line, stage, resume_step)]
    rewound = b"".join(line + b"\n" for line in kept)
    if rewound != content:
        write_bytes(path, rewound)


def _stays(line: bytes, stage: str, resume_step: int) -> bool:
    entry = parse_line(line)
    if entry is None:
        return False
    if entry.get("stage") != stage:
        return True
    step = entry.get("step")
    return resume_step > 0 and isinstance(step, int) and step <= resume_step


class LineWriter:
    """Appends JSON objects, each with a single write, so that `kill -9` loses at most the line being written.

    `num_lines` counts all lines of the file. Raises `DiskFullError`; the cut-off line that may then be left is
    removed by `rewind` at the next start.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_lines = count_lines(path)
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor: int | None = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def append(self, entry: Mapping[str, Any]) -> None:
        """Writes one line; see `to_jsonable` for what it may hold."""
        if self._descriptor is None:
            raise ValueError(f"{self.path} is closed")
        rest = memoryview((dump_json(entry) + "\n").encode("utf-8", errors="backslashreplace"))
        with disk_errors(self.path):
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        self.num_lines += 1

    def close(self) -> None:
        """Makes the lines durable and closes the file; closing again does nothing."""
        if self._descriptor is None:
            return
        descriptor, self._descriptor = self._descriptor, None
        try:
            with disk_errors(self.path):
                os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def __enter__(self) -> LineWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
