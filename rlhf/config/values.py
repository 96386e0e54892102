"""Values as people and sweep agents write them, converted by the type of the field they are meant for.

The text of an argument has no type of its own: `123` is a number for `seed` and a name for `run.dir`. So nothing is
parsed before the field is known. What does not fit its field is returned unchanged, and validation names it.
"""

from __future__ import annotations

import ast
import json
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from rlhf.config.schema import ValueType

NULL_WORDS = ("null", "None")
LARGEST_EXACT_FLOAT = 2.0**53


def from_text(text: str, target: ValueType) -> Any:
    """The value that an argument's text means for a field of this type.

    `null` and `None` are null where the field allows it; a text field takes everything else as it stands, less one
    pair of quotes; a whole-number field takes `64.0` and `1e2`, which W&B's q-distributions send, when exactly whole.
    """
    if target.nullable and text in NULL_WORDS:
        return None
    if target.choices:
        number = _number(text, int) if isinstance(target.choices[0], int) else text
        return next((choice for choice in target.choices if str(choice) in (str(number), _unquote(text))), text)
    if _unquote(text) in target.words:
        return _unquote(text)
    if target.element is not None or target.is_mapping:
        container = container_from_text(text)
        return text if container is None else from_argument_value(container, target)
    if target.core is str:
        return _unquote(text)
    if target.core is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    if target.core in (int, float):
        return _number(text, target.core)
    return untyped_from_text(text)


def from_argument_value(value: Any, target: ValueType) -> Any:
    """An element of a list or mapping given as an argument: as in a file, but text fields take numbers as text.

    And the others take text as numbers: a sweep's file, which PyYAML reads, has `3e-6` as text, and so has what W&B
    makes of a nested parameter, `{'learning_rate': '3e-6'}`.
    """
    if isinstance(value, str) and target.core is not str:
        return from_text(value, target)
    if target.core is str and isinstance(value, int | float) and not target.choices:
        return str(value)
    if target.element is not None and isinstance(value, list | tuple):
        return tuple(from_argument_value(item, target.element) for item in value)
    return from_file_value(value, target)


def from_file_value(value: Any, target: ValueType) -> Any:
    """A value read from YAML: lists become tuples, and a whole-number field takes `1e4` when exactly whole."""
    if target.choices and isinstance(value, bool):
        # To Python, and so to pydantic, True is among the choices 0 and 1.
        return str(value).lower()
    if target.core is int and isinstance(value, float) and value.is_integer() and abs(value) <= LARGEST_EXACT_FLOAT:
        return int(value)
    if target.element is not None and isinstance(value, list | tuple):
        return tuple(from_file_value(item, target.element) for item in value)
    return value


def untyped_from_text(text: str) -> Any:
    """The value of a text where any type is allowed: null, true, numbers, lists and mappings, else the text itself."""
    if text in NULL_WORDS:
        return None
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    number = _number(text, int if text.strip().lstrip("+-").isdigit() else float)
    if not isinstance(number, str):
        return number
    container = container_from_text(text)
    return _unquote(text) if container is None else container


def container_from_text(text: str) -> list[Any] | dict[str, Any] | None:
    """A list or mapping in the spelling of Python, JSON or Hydra; None when the text is none of them."""
    text = text.strip()
    if text[:1] not in ("[", "{", "("):
        return None
    value: Any = None
    for parse in (json.loads, ast.literal_eval, _parse_with_hydra):
        try:
            value = parse(text)
        # literal_eval raises the last four on hostile nesting and on keys that cannot be hashed.
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
        if _is_plain(value):
            break
        value = None
    if isinstance(value, list | tuple):
        return list(value)
    return text_keys(value) if isinstance(value, dict) else None


def text_keys(value: Any) -> Any:
    """The same mapping with every key as text, at every depth."""
    if isinstance(value, dict):
        return {str(key): text_keys(item) for key, item in value.items()}
    return [text_keys(item) for item in value] if isinstance(value, list) else value


def _is_plain(value: Any) -> bool:
    """False for what Python's spelling allows beyond YAML: sets, bytes, complex numbers."""
    if isinstance(value, dict):
        return all(_is_plain(item) for item in value.values())
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, str | int | float)


def _parse_with_hydra(text: str) -> Any:
    try:
        override = OverridesParser.create().parse_override(f"key={text}")
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(str(error)) from error
    return _without_quotes(override.value())


def _without_quotes(value: Any) -> Any:
    """Hydra keeps quoted strings as objects of its own, whose text is `.text`; Python's None it takes for text."""
    if value == "None" and isinstance(value, str):
        return None
    if isinstance(value, dict):
        return {_without_quotes(key): _without_quotes(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_quotes(item) for item in value]
    return getattr(value, "text", value)


def _number(text: str, kind: type[int] | type[float]) -> int | float | str:
    """The number, or the text itself when it is not one of this kind."""
    try:
        if kind is int and text.strip().lstrip("+-").isdigit():
            return int(text)
        number = float(text)
    except ValueError:
        return text
    if kind is float:
        return number
    return int(number) if number.is_integer() and abs(number) <= LARGEST_EXACT_FLOAT else text


def _unquote(text: str) -> str:
    r"""Takes one pair of quotes off, `\'` inside being a quote; a text that only starts with a quote stays as it is."""
    if len(text) < 2 or text[0] not in "'\"" or text[-1] != text[0]:
        return text
    quote, inner = text[0], text[1:-1]
    if quote in inner.replace("\\" + quote, ""):
        return text
    return inner.replace("\\" + quote, quote)
