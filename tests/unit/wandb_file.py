"""Reads what W&B wrote offline, and writes the like: a `.wandb` file has the format of LevelDB's log."""

from __future__ import annotations

import importlib
import json
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

_BLOCK = 32768
_FILE_HEADER = 7


def records(path: Path) -> Iterator[Any]:
    """The protocol buffer messages `Record`, in order."""
    proto = importlib.import_module("wandb.proto.wandb_internal_pb2")
    content, place, parts = path.read_bytes(), _FILE_HEADER, []
    while place + 7 <= len(content):
        left = _BLOCK - place % _BLOCK
        if left < 7:  # what is too short for a header is padding
            place += left
            continue
        length, kind = struct.unpack("<HB", content[place + 4 : place + 7])
        parts.append(content[place + 7 : place + 7 + length])
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            message = proto.Record()
            message.ParseFromString(b"".join(parts))
            parts = []
            yield message


def write(path: Path, steps: Iterable[int], *, text: str = "") -> bytes:
    """An offline file with a line of history for each step, each with `text` in it; returns what was written."""
    proto = importlib.import_module("wandb.proto.wandb_internal_pb2")
    content = b":W&B" + bytes(_FILE_HEADER - 4)
    for step in steps:
        record = proto.Record()
        record.history.step.num = step
        record.history.item.add(key="text", value_json=json.dumps(text))
        rest, first = record.SerializeToString(), True
        while rest or first:
            left = _BLOCK - len(content) % _BLOCK
            if left < 7:
                content += bytes(left)
                continue
            part, rest = rest[: left - 7], rest[left - 7 :]
            kind = (1 if first else 4) if not rest else (2 if first else 3)
            content += struct.pack("<IHB", 0, len(part), kind) + part
            first = False
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return content


def items(entries: Any) -> dict[str, Any]:
    """Keys, or the parts of nested keys joined by dots, with the values of their JSON."""
    return {entry.key or ".".join(entry.nested_key): json.loads(entry.value_json) for entry in entries}


def history(folder: Path) -> list[dict[str, Any]]:
    """The rows of an offline run's folder."""
    return [items(record.history.item) for record in records(*_files(folder)) if record.HasField("history")]


def config(folder: Path) -> dict[str, Any]:
    """The config with every update of it; nested keys joined by dots."""
    found: dict[str, Any] = {}
    for record in records(*_files(folder)):
        for update in (record.run.config.update, record.config.update):
            found |= items(update)
    return found


def summary(folder: Path) -> dict[str, Any]:
    """What was put into the summary by itself."""
    found: dict[str, Any] = {}
    for record in records(*_files(folder)):
        found |= items(record.summary.update)
    return found


def artifacts(folder: Path) -> list[Any]:
    """The artifacts, made and used."""
    return [record.artifact for record in records(*_files(folder)) if record.HasField("artifact")]


def _files(folder: Path) -> list[Path]:
    return list(folder.glob("*.wandb"))
