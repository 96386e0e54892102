"""From a draft to an `RLHFConfig`: conversion by field type, validation by pydantic, its findings in plain words."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from rlhf.config import schema
from rlhf.config.errors import (
    Problem,
    close_names,
    config_error,
    describe_section,
    did_you_mean,
    unknown_key,
    wrong_variant,
)
from rlhf.config.provenance import DEFAULT, MISSING, Draft, Origin, flatten, show
from rlhf.config.root import RLHFConfig
from rlhf.config.values import from_argument_value, from_file_value, from_text, untyped_from_text

PLACEHOLDERS = {"model.path": "FOLDER", "data.path": "PATH"}
VALIDATOR_ERRORS = ("value_error", "assertion_error")


@dataclass
class Findings:
    """What is wrong so far. `incomplete`: files are missing from the draft, so what depends on them is not judged."""

    problems: list[Problem] = field(default_factory=list)
    groups: Sequence[str] = ()
    incomplete: bool = False


def validate(draft: Draft, findings: Findings, context: Mapping[str, Any] | None = None) -> RLHFConfig:
    """The config, or a `ConfigError` that names every mistake of the draft and those found before.

    pydantic runs a section's validators only when its fields are right, so each wrong value is taken out, its default
    stands in, and validation repeats; a validator's complaint that names such a stand-in is not reported.
    """
    draft = draft.copy()
    problems = findings.problems
    stand_ins: set[str] = set()
    problems.extend(_take_missing(draft, findings, stand_ins))
    problems.extend(_take_unencodable(draft))
    config: RLHFConfig | None = None
    while config is None:
        try:
            config = RLHFConfig.model_validate(converted(draft), context=context)
        except ValidationError as error:
            details = error.errors(include_url=False, include_input=False)
            problems.extend([problem for detail in details for problem in _explain(detail, draft, findings, stand_ins)])
            if any(not _key_path(detail) for detail in details):
                # The sections do not fit each other: there is nothing left to replace.
                break
            before = draft.copy()
            for detail in details:
                _stand_in(detail, draft, stand_ins)
            if draft == before:
                # Nothing more can be replaced, so the rest cannot be judged.
                break
    if problems or config is None:
        raise config_error(problems)
    return config


def _take_missing(draft: Draft, findings: Findings, stand_ins: set[str]) -> list[Problem]:
    """Removes values still `???` and returns a problem for each, unless a missing file explains it."""
    problems = []
    for path, value in draft.leaves():
        if isinstance(value, str) and value == MISSING:
            if not findings.incomplete:
                problems.append(_missing(path, draft.source(path)))
            draft.remove(path)
            _fill_required(path, draft, stand_ins)
    return problems


def _take_unencodable(draft: Draft) -> list[Problem]:
    """Removes texts that cannot be written as UTF-8 and returns a problem for each."""
    problems = []
    for path, value in draft.leaves():
        try:
            (value if isinstance(value, str) else show(value)).encode()
        except UnicodeEncodeError:
            message = "expected text that can be written as UTF-8"
            problems.append(Problem(".".join(path), message, draft.shown(path), draft.source(path)))
            draft.remove(path)
    return problems


def _fill_required(path: schema.Path, draft: Draft, stand_ins: set[str]) -> None:
    """Gives a required text, or list of texts, some value, so that the rest of its section can be judged."""
    variant = _variant(path[:-1], draft)
    entry = schema.find(path, variant)
    belongs = entry is not None and not entry.is_section and entry.variant in (None, variant)
    if entry is not None and belongs and entry.field.is_required():
        core = (entry.type.element or entry.type).core
        assert core is str, f"{entry.key} needs a stand-in of its own"
        draft.set(path, MISSING if entry.type.element is None else [MISSING], Origin(DEFAULT, "file"))
    stand_ins.add(path[-1])


def _stand_in(detail: ErrorDetails, draft: Draft, stand_ins: set[str]) -> None:
    """Takes out what an error is about, so that validation can go on without it."""
    path = _key_path(detail)
    if detail["type"] == "missing":
        _fill_required(path, draft, stand_ins)
        return
    if detail["type"].startswith("union_tag") and isinstance(draft.get(path), dict):
        default = schema.default_variant(path)
        if default is None:
            # Without a type there is nothing to judge the section by.
            _without(path, draft, stand_ins)
            return
        # The default `type` takes over; keys that only another type has were perhaps right for the one meant.
        for name in list(draft.get(path)):
            candidates = schema.candidates((*path, name))
            if candidates and all(entry.variant != default for entry in candidates):
                draft.remove((*path, name))
        path = (*path, schema.DISCRIMINATOR)
    _without(path, draft, stand_ins)


def _without(path: schema.Path, draft: Draft, stand_ins: set[str]) -> None:
    """Takes a value or section out of the draft; what it held, or its default, is a stand-in from now on."""
    stand_ins.update([path[-1], *(key[-1] for key in schema.entries() if key[: len(path)] == path)])
    stand_ins.update(known[-1] for known in flatten(draft.get(path), path))
    draft.remove(path)
    _fill_required(path, draft, stand_ins)


def _missing(path: schema.Path, source: str | None) -> Problem:
    key = ".".join(path)
    entry = schema.find(path)
    about = f" ({entry.field.description})" if entry is not None and entry.field.description else ""
    usual = "[VALUE]" if entry is not None and entry.type.element is not None else "VALUE"
    return Problem(key, f"has no value{about}: add {key}={PLACEHOLDERS.get(key, usual)}", source=source)


def converted(draft: Draft) -> dict[str, Any]:
    """The draft's values with each one converted by the type of its field; what does not fit stays as it is."""
    values = Draft()
    for path, value in draft.leaves():
        origin = draft.origins.get(path) or draft.origin(path) or Origin(DEFAULT, "file")
        values.set(path, _convert(path, value, origin, draft), origin)
    for path, candidates in schema.entries().items():
        section = values.get(path)
        default = schema.default_variant(path) if candidates[0].is_union else None
        if default is not None and isinstance(section, dict) and schema.DISCRIMINATOR not in section:
            section[schema.DISCRIMINATOR] = default
    return values.values


def _convert(path: schema.Path, value: Any, origin: Origin, draft: Draft) -> Any:
    entry = schema.find(path, _variant(path[:-1], draft))
    if entry is None or entry.is_section:
        return untyped_from_text(value) if origin.form == "text" and schema.inside_mapping(path) else value
    if origin.form == "text" and isinstance(value, str):
        # `type` is a different one-word Literal in each class of a union, so it is compared as it stands.
        return value if entry.path == (*(entry.union or ()), schema.DISCRIMINATOR) else from_text(value, entry.type)
    convert = from_argument_value if origin.form == "argument" else from_file_value
    return convert(value, entry.type)


def _variant(path: schema.Path, draft: Draft) -> str | None:
    """The `type` of the innermost union section around a path; None outside unions."""
    for end in range(len(path), 0, -1):
        if schema.variants_of(path[:end]):
            value = draft.get((*path[:end], schema.DISCRIMINATOR))
            return schema.default_variant(path[:end]) if value is None else str(value)
    return None


def _key_path(detail: ErrorDetails) -> schema.Path:
    """The key of an error: pydantic's location without the tag of a union and without what lies inside a value."""
    path: list[str] = []
    after_union = False
    for part in detail["loc"]:
        if after_union and part in schema.variants_of(tuple(path)):
            after_union = False
            continue
        entry = schema.find(tuple(path)) if path else None
        inside_value = entry is not None and not entry.is_section and not entry.type.is_mapping
        if not isinstance(part, str) or part == "[key]" or inside_value:
            break
        path.append(part)
        after_union = bool(schema.variants_of(tuple(path)))
    return tuple(path)


def _explain(detail: ErrorDetails, draft: Draft, findings: Findings, stand_ins: set[str]) -> Iterator[Problem]:
    path, kind = _key_path(detail), detail["type"]
    entry = schema.find(path, _variant(path[:-1], draft))
    if "[key]" in detail["loc"]:
        message = "a name is made of letters, digits, _ and -, and starts with a letter or _"
        yield Problem(".".join(path), message, source=draft.source(path))
    elif kind in VALIDATOR_ERRORS:
        text = str(detail.get("ctx", {}).get("error", detail["msg"]))
        if not findings.incomplete and not stand_ins & set(re.findall(r"\w+", text)):
            yield _relation(path, text, draft)
    elif kind == "missing":
        if not findings.incomplete:
            yield _missing(path, draft.source((*path[:-1], schema.DISCRIMINATOR)))
    elif kind.startswith("union_tag"):
        yield _wrong_type_name(path, draft)
    elif kind == "extra_forbidden" and entry is not None and entry.union is not None:
        if not findings.incomplete:
            variant = str(_variant(path[:-1], draft))
            for leaf in flatten(draft.get(path), path) or (path,):
                leaf_entry = schema.find(leaf) or entry
                yield wrong_variant(leaf_entry, variant, findings.groups, draft.shown(leaf), draft.source(leaf))
    elif kind == "extra_forbidden" or entry is None:
        yield unknown_key(path, draft.shown(path), draft.source(path))
    elif entry.is_section:
        yield Problem(entry.key, f"expected {describe_section(entry)}", draft.shown(path), draft.source(path))
    else:
        yield _wrong_value(entry, draft)


def _wrong_value(entry: schema.Entry, draft: Draft) -> Problem:
    origin = draft.origin(entry.path) or Origin(DEFAULT, "file")
    value, wanted = _convert(entry.path, draft.get(entry.path), origin, draft), entry.type
    if entry.path == ("experiment",) and isinstance(value, dict):
        message = "an experiment file needs `# @package _global_` as its first line"
        return Problem(entry.key, message, source=draft.source(entry.path))
    message = f"expected {schema.describe(wanted)}"
    choices = (wanted.element or wanted).choices
    words = list(value) if isinstance(value, list | tuple) else [value]
    if wanted.element is not None and isinstance(value, str):
        message += f"; write {entry.key}=[{value.strip('[]')}]"
    elif choices:
        wrong = [str(word) for word in words if word not in choices]
        names = [name for word in wrong[:3] for name in close_names(word, [str(choice) for choice in choices])[:1]]
        message += did_you_mean(list(dict.fromkeys(names)))
    elif wanted.core is str and isinstance(value, int | float):
        message += "; put it in quotes"
    return Problem(entry.key, message, draft.shown(entry.path), draft.source(entry.path))


def _wrong_type_name(path: schema.Path, draft: Draft) -> Problem:
    key = (*path, schema.DISCRIMINATOR)
    variants, entry = schema.variants_of(path), schema.find(path)
    if not isinstance(draft.get(path), dict):
        assert entry is not None
        return Problem(".".join(path), f"expected {describe_section(entry)}", draft.shown(path), draft.source(path))
    if draft.get(key) is None:
        message = f"has no value: add {'.'.join(key)}={variants[0]} (or {', '.join(variants[1:])})"
        return Problem(".".join(key), message, source=draft.source(path))
    message = f"expected one of {', '.join(variants)}" + did_you_mean(close_names(str(draft.get(key)), variants))
    return Problem(".".join(key), message, draft.shown(key), draft.source(key))


def _relation(path: schema.Path, text: str, draft: Draft) -> Problem:
    """The problem of values that do not fit together: the validator's words, then each value with its source."""
    mentioned = []
    for key in schema.leaf_keys((*path, "")):
        parts = tuple(key.split("."))
        names = {key, ".".join(parts[len(path) :])}
        if parts[: len(path)] == path and names & set(re.findall(r"\w+(?:\.\w+)*", text)):
            source = draft.source(parts)
            entry = schema.find(parts, _variant(parts[:-1], draft))
            shown = show(entry.field.default) if source == DEFAULT and entry is not None else draft.shown(parts)
            mentioned.append(f"{key}: {shown} ({source})")
    lines = "".join(f"\n      {line}" for line in mentioned)
    return Problem(".".join(path) or "the config", text + lines)
