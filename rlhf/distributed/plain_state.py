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
    _separate(tensors)
    if tensors:
        save_file(tensors, folder / f"{name}.safetensors")
    # Python's own dialect: a NaN stays one, and a float is read as the same float.
    (folder / f"{name}.json").write_text(json.dumps(body), encoding="utf-8")


def read_state(folder: Path, name: str, *, mapped: bool = False) -> dict[str, Any]:
    """What `write_state` wrote. Raises `ArtifactError` when it is not there or is something else.

    `mapped`: the tensors are parts of the file, which take no memory until they are looked at. What is kept of them is
    to be `copied`: a network file system cannot remove a file that is in use.
    """
    try:
        body = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        if not isinstance(body, dict):
            raise ValueError(f"a {type(body).__name__} instead of an object")
        tensors = {}
        path = folder / f"{name}.safetensors"
        if path.exists():
            with safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no dict
        state: dict[str, Any] = _with_tensors(body, tensors)
    except (OSError, ValueError, KeyError) as error:
        raise ArtifactError(f"the state {folder / name}.json cannot be read: {error}") from error
    return state if mapped else copied(state)


def copied(value: Any) -> Any:
    """A state, or a part of one, with tensors in memory of their own."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, Mapping):
        return {key: copied(inner) for key, inner in value.items()}
    return [copied(inner) for inner in value] if isinstance(value, list) else value


def _separate(tensors: dict[str, torch.Tensor]) -> None:
    """Brings the tensors to the CPU, each contiguous and in a storage of its own, which a file of them takes."""
    taken: set[int] = set()
    for place, value in tensors.items():
        own = value.detach().cpu().contiguous()
        storage = own.untyped_storage()
        if storage.data_ptr() in taken or storage.nbytes() != own.nbytes:
            own = own.clone()
        taken.add(own.untyped_storage().data_ptr())
        tensors[place] = own


def _without_tensors(value: Any, place: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        tensors[place] = value
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
