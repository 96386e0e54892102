"""Nested plain values and tensors as files that cannot run code: a `.json` and, for the tensors, a `.safetensors`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from rlhf.errors import ArtifactError

_TENSOR = "__tensor__"


def write_state(folder: Path, name: str, state: Mapping[str, Any]) -> None:
    """Writes `state` as `name`.json and `name`.safetensors in `folder`; the latter only when there are tensors.

    `state`: dicts with text keys, lists, tuples (read as lists), text, numbers (NaN included), booleans, None, and
    tensors, which are read on the CPU. Raises `TypeError` for anything else.
    """
    tensors: dict[str, torch.Tensor] = {}
    body = _without_tensors(state, "", tensors)
    if tensors:
        save_file(tensors, folder / f"{name}.safetensors")
    # Python's own dialect: a NaN stays one, and a float is read as the same float.
    (folder / f"{name}.json").write_text(json.dumps(body), encoding="utf-8")


def read_state(folder: Path, name: str) -> dict[str, Any]:
    """What `write_state` wrote. Raises `ArtifactError` when it is not there or is something else."""
    try:
        body = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        if not isinstance(body, dict):
            raise ValueError(f"a {type(body).__name__} instead of an object")
        tensors = {}
        path = folder / f"{name}.safetensors"
        if path.exists():
            with safe_open(path, framework="pt") as file:
                # Copies: what is read stays a part of the file, which a network file system then cannot remove.
                tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 - it is no dict
        state: dict[str, Any] = _with_tensors(body, tensors)
    except (OSError, ValueError, KeyError) as error:
        raise ArtifactError(f"the state {folder / name}.json cannot be read: {error}") from error
    return state


def _without_tensors(value: Any, place: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        # A copy of its own: views of one storage do not go into one file.
        tensors[place] = value.detach().to("cpu", copy=True).contiguous()
        return {_TENSOR: place}
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) and key != _TENSOR for key in value):
            raise TypeError(f"the keys of a state must be text, at {place or 'the top'}: {list(value)[:3]}")
        return {key: _without_tensors(inner, f"{place}/{key}", tensors) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_tensors(inner, f"{place}/{number}", tensors) for number, inner in enumerate(value)]
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    raise TypeError(f"a {type(value).__name__} cannot be part of a state (at {place})")


def _with_tensors(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(value, dict):
        if value.keys() == {_TENSOR}:
            return tensors[value[_TENSOR]]
        return {key: _with_tensors(inner, tensors) for key, inner in value.items()}
    if isinstance(value, list):
        return [_with_tensors(inner, tensors) for inner in value]
    return value
