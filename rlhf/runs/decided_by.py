"""What decides a stage's result, as its `decided_by.json` has it, compared for the user."""

from __future__ import annotations

import json
from typing import Any

from rlhf.config import StageName
from rlhf.config.provenance import flatten

_NUM_SHOWN = 4


def changes(before: dict[str, Any], now: dict[str, Any], stage: StageName) -> str:
    """`seed 1 → 2; ppo.gamma 1.0 → 0.99 and 3 more`: both as JSON gives them, by the config's keys where there are."""
    old, new = flatten(_with_data_apart(before)), flatten(_with_data_apart(now))
    changed = sorted(path for path in old.keys() | new.keys() if old.get(path) != new.get(path))
    shown = [
        f"{_key_name(path, stage)} {_value(old.get(path))} → {_value(new.get(path))}" for path in changed[:_NUM_SHOWN]
    ]
    return "; ".join(shown) + (f" and {len(changed) - _NUM_SHOWN} more" if len(changed) > _NUM_SHOWN else "")


def _with_data_apart(decided_by: dict[str, Any]) -> dict[str, Any]:
    """The data's settings and the hash of its content by name, so that only what differs is shown."""
    match decided_by.get("data"):
        case [settings, content]:
            return {**decided_by, "data": {"settings": settings, "content": content}}
    return decided_by


def _key_name(path: tuple[str, ...], stage: StageName) -> str:
    """The config's key where there is one, else what the part of a fingerprint is called."""
    if path[0] == "section" and path[1:2] == ("preferences",):
        return ".".join(path[1:])
    if path[0] == "section":
        return ".".join((stage, *path[1:]))
    if path[0] == "data":
        return ".".join(("data", *path[2:])) if path[1:2] == ("settings",) else "the data's hash"
    if path[0] == "inputs":
        return f"the input {'.'.join(path[1:])}"
    return {"precision": "distributed.precision", "version": "the stage's code, version"}.get(path[0], ".".join(path))


def _value(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:37]}..."
