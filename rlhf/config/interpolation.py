"""`${other.key}` in values, by OmegaConf's rules, also where the other key has only its default."""

from __future__ import annotations

from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlhf.config.errors import Problem
from rlhf.config.provenance import Draft
from rlhf.config.root import RLHFConfig
from rlhf.config.schema import Path
from rlhf.config.serialize import plain_values
from rlhf.config.validation import converted


def resolve(draft: Draft) -> list[Problem]:
    """Replaces each interpolation in the draft by its value; one that has none becomes a problem and is taken out."""
    marked = [(path, value) for path, value in draft.leaves() if _has_interpolation(value)]
    if not marked:
        return []
    plain = draft.copy()
    for path, _ in marked:
        plain.remove(path)
    known = Draft(plain_values(RLHFConfig()))
    known.merge((), converted(plain), {})
    problems, sound = [], []
    for path, value in marked:
        try:
            OmegaConf.create({"value": value})
        except OmegaConfBaseException as error:
            problems.append(_unresolved(path, draft, error))
        else:
            known.set(path, value, draft.origins[path])
            sound.append(path)
    tree = OmegaConf.create(known.values)
    for path in sound:
        try:
            value = _look_up(tree, path)
        except (OmegaConfBaseException, RecursionError) as error:
            problems.append(_unresolved(path, draft, error))
        else:
            origin = draft.origins[path]
            draft.set(path, str(value) if origin.form == "text" and value is not None else value, origin)
    return problems


def _has_interpolation(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(_has_interpolation(item) for item in value)
    return isinstance(value, str) and "${" in value


def _look_up(tree: Any, path: Path) -> Any:
    for name in path:
        tree = tree[name]
    return OmegaConf.to_container(tree, resolve=True) if OmegaConf.is_config(tree) else tree


def _unresolved(path: Path, draft: Draft, error: Exception) -> Problem:
    reason = str(error).partition("\n")[0]
    problem = Problem(".".join(path), f"cannot be resolved: {reason}", draft.shown(path), draft.source(path))
    draft.remove(path)
    return problem
