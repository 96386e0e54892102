"""Anything a run records, as strict JSON: no NaN, no types that another reader would not know."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path, PurePath
from typing import Any

from pydantic import BaseModel


def to_jsonable(value: Any, *, keep_non_finite: bool = False) -> Any:
    """`value` made of None, bool, int, float, str, list and dict with string keys.

    NaN and infinities become None, or with `keep_non_finite` the strings "nan", "inf", "-inf". Takes dataclasses,
    pydantic models, paths, sets (sorted), and whatever has `tolist()` or `item()` like numpy's arrays and torch's
    tensors. Raises `TypeError` for anything else.
    """

    def convert(item: Any) -> Any:
        if item is None or isinstance(item, bool):
            return item
        if isinstance(item, (int, str)):
            # Subclasses such as enums and numpy's str_ become the plain type.
            return int(item) if isinstance(item, int) else str.__str__(item)
        if isinstance(item, float):
            number = float(item)
            if math.isfinite(number):
                return number
            return str(number) if keep_non_finite else None
        if isinstance(item, Mapping):
            return {key if isinstance(key, str) else str(key): convert(entry) for key, entry in item.items()}
        if isinstance(item, (list, tuple)):
            return [convert(entry) for entry in item]
        if isinstance(item, AbstractSet):
            return sorted((convert(entry) for entry in item), key=repr)
        if isinstance(item, BaseModel):
            return convert(item.model_dump(mode="python"))
        if dataclasses.is_dataclass(item) and not isinstance(item, type):
            return {field.name: convert(getattr(item, field.name)) for field in dataclasses.fields(item)}
        if isinstance(item, PurePath):
            return str(item)
        if hasattr(item, "tolist"):
            return convert(item.tolist())
        if hasattr(item, "item"):
            return convert(item.item())
        raise TypeError(f"cannot write a {type(item).__name__} as JSON: {item!r}")

    return convert(value)


def dump_json(value: Any, *, indent: int | None = None, canonical: bool = False) -> str:
    """Strict JSON text. `canonical`: sorted keys, no spaces, and NaN and infinities kept apart, for hashing."""
    return json.dumps(
        to_jsonable(value, keep_non_finite=canonical),
        ensure_ascii=False,
        allow_nan=False,
        indent=indent,
        sort_keys=canonical,
        separators=(",", ":") if canonical else None,
    )


def read_json(path: Path) -> Any:
    """The content of a JSON file, or None when it is missing, unreadable as JSON, or not UTF-8."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON Lines file; a missing file has none, torn or foreign lines are left out."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return
    for line in content.split(b"\n"):
        entry = parse_line(line)
        if entry is not None:
            yield entry


def parse_line(line: bytes) -> dict[str, Any] | None:
    """One JSON object, or None when the line is not one (empty, cut off, not UTF-8)."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None
