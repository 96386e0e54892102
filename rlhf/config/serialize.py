"""A config as text: YAML that loads again, its listing with sources, and its hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from rlhf.config.errors import Problem, config_error
from rlhf.config.provenance import Draft, Origin, YAMLDumper, display_path, flatten, read_yaml
from rlhf.config.root import RLHFConfig
from rlhf.config.validation import Findings, validate
from rlhf.config.values import text_keys


def plain_values(config: RLHFConfig) -> dict[str, Any]:
    """The config as nested mappings, lists and scalars."""
    values: dict[str, Any] = _plain(config.model_dump())
    return values


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def config_to_yaml(config: RLHFConfig) -> str:
    """Every value of the config as YAML; `config_from_file` reads it back to an equal config."""
    text: str = yaml.dump(plain_values(config), Dumper=YAMLDumper, sort_keys=False, allow_unicode=True)
    return text


def config_from_file(path: Path | str) -> RLHFConfig:
    """The config in a file that `config_to_yaml` wrote, as in a run folder; values left out are the defaults.

    Nothing is composed or interpolated. Raises `ConfigError` for a file that is missing, broken or not a config.
    """
    path = Path(path)
    try:
        values, lines = read_yaml(path)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise config_error([broken_file(path, error)]) from error
    name = display_path(path)
    if not isinstance(values, dict):
        raise config_error([Problem(name, "expected a mapping of sections, as `config.yaml` of a run folder holds it")])
    draft = Draft()
    origins = {tuple(str(part) for part in key): Origin(f"{name}:{line}", "file") for key, line in lines.items()}
    draft.merge((), text_keys(values), origins)
    return validate(draft, Findings())


def config_from_values(values: Mapping[str, Any], source: str) -> RLHFConfig:
    """The config of values as `model_dump(mode="json")` gives them; `source` names who set them in errors.

    Raises `ConfigError` that names every mistake.
    """
    draft = Draft()
    plain = _plain(values)
    draft.merge((), plain, {path: Origin(source, "file") for path in flatten(plain)})
    return validate(draft, Findings())


def config_hash(config: RLHFConfig, exclude: Sequence[str] = ()) -> str:
    """SHA-256 of the config's values, less the dotted keys in `exclude` (sections too): the same on every machine."""
    draft = Draft(plain_values(config))
    for key in exclude:
        draft.remove(tuple(key.split(".")))
    text = json.dumps(draft.values, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def broken_file(
    path: Path, error: OSError | UnicodeDecodeError | yaml.YAMLError | RecursionError, packaged: Path | None = None
) -> Problem:
    """The problem of a config file that cannot be read, with the line where the reader stumbled."""
    name = display_path(path, packaged)
    if isinstance(error, FileNotFoundError):
        return Problem(name, "there is no such file")
    if isinstance(error, OSError):
        return Problem(name, f"cannot be read: {error.strerror or error}")
    if isinstance(error, UnicodeDecodeError):
        return Problem(name, f"is not UTF-8 text: {error.reason} at byte {error.start}")
    if isinstance(error, RecursionError):
        return Problem(name, "is nested too deeply")
    mark = getattr(error, "problem_mark", None)
    where = name if mark is None else f"{name}:{mark.line + 1}"
    reason = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
    return Problem(where, f"is not valid YAML: {reason}")
