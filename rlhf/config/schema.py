"""The schema as a table of dotted keys, built once from the pydantic classes, for error texts and conversions.

A field of type `dict[str, <union of sections by type>]` holds sections under names of the user's choice. The table has
them once, under the name `ANY_NAME`; `candidates` and `find` give them under the name that was asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BeforeValidator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from rlhf.config.base import Section
from rlhf.config.root import RLHFConfig

Path = tuple[str, ...]
DISCRIMINATOR = "type"
ANY_NAME = "NAME"


@dataclass(frozen=True)
class ValueType:
    """A field's type with `Annotated` and `| None` taken off: what is left is `core`.

    `words` are what a list field takes besides lists (`tuple[str, ...] | Literal["all"]`).
    """

    core: Any
    constraints: tuple[Any, ...]
    nullable: bool
    words: tuple[str, ...] = ()

    @property
    def choices(self) -> tuple[Any, ...]:
        """The values of a Literal; empty for another type."""
        return get_args(self.core) if get_origin(self.core) is Literal else ()

    @property
    def element(self) -> ValueType | None:
        """The element type of a `tuple[X, ...]`; None for another type."""
        return value_type(get_args(self.core)[0]) if get_origin(self.core) is tuple else None

    @property
    def is_mapping(self) -> bool:
        """True for `dict[str, Any]`, inside which every key is allowed."""
        return self.core is dict or (get_origin(self.core) is dict and self.named_section is None)

    @property
    def named_section(self) -> FieldInfo | None:
        """What each value of a `dict[str, <union of sections>]` is; None for another type."""
        if get_origin(self.core) is not dict:
            return None
        field = FieldInfo.from_annotation(get_args(self.core)[1])
        return field if section_models(field) else None


@dataclass(frozen=True)
class Entry:
    """One dotted key. `union` is the key of the section whose `type` decides whether this key exists (None: always)."""

    path: Path
    field: FieldInfo
    models: tuple[type[Section], ...]
    union: Path | None = None
    variant: str | None = None

    @property
    def key(self) -> str:
        return ".".join(self.path)

    @property
    def is_section(self) -> bool:
        return bool(self.models) or self.holds_names

    @property
    def holds_names(self) -> bool:
        """True for a mapping of sections under names of the user's choice."""
        return self.type.named_section is not None

    @property
    def is_union(self) -> bool:
        return self.field.discriminator is not None

    @property
    def takes_name(self) -> bool:
        """True for a union section for which the name of a kind alone stands, as in `annotator: human`."""
        return self.is_union and any(isinstance(item, BeforeValidator) for item in self.field.metadata)

    @property
    def type(self) -> ValueType:
        return value_type(self.field.annotation, tuple(self.field.metadata))


def value_type(annotation: Any, constraints: tuple[Any, ...] = ()) -> ValueType:
    """Takes `Annotated` and `| None` off a type and collects the constraints on the way."""
    if get_origin(annotation) is Annotated:
        inner, *metadata = get_args(annotation)
        flat = [item for entry in metadata for item in (entry.metadata if isinstance(entry, FieldInfo) else (entry,))]
        return value_type(inner, (*constraints, *flat))
    if get_origin(annotation) in (Union, UnionType):
        members = [member for member in get_args(annotation) if member is not NoneType]
        words = tuple(word for member in members if get_origin(member) is Literal for word in get_args(member))
        others = [member for member in members if get_origin(member) is not Literal]
        nullable = len(members) < len(get_args(annotation))
        if len(members) == 1:
            inner = value_type(members[0], constraints)
            return ValueType(inner.core, inner.constraints, nullable)
        if len(others) == 1 and get_origin(others[0]) is tuple:
            return ValueType(others[0], constraints, nullable, words)
    return ValueType(annotation, constraints, nullable=False)


def section_models(field: FieldInfo) -> tuple[type[Section], ...]:
    """The section class of a field, all of them for a union by `type`, none for a plain value."""
    annotation = field.annotation
    members = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return tuple(member for member in members if isinstance(member, type) and issubclass(member, Section))


def variant_name(model: type[Section]) -> str:
    """The value of `type` that selects this class of a union."""
    name: str = get_args(model.model_fields[DISCRIMINATOR].annotation)[0]
    return name


def _walk(model: type[Section], prefix: Path, union: Path | None, variant: str | None) -> Iterator[Entry]:
    for name, field in model.model_fields.items():
        entry = Entry((*prefix, name), field, section_models(field), union, variant)
        yield entry
        if (inner := entry.type.named_section) is not None:
            entry = Entry((*entry.path, ANY_NAME), inner, section_models(inner))
            yield entry
        for member in entry.models:
            if entry.is_union:
                yield from _walk(member, entry.path, entry.path, variant_name(member))
            else:
                yield from _walk(member, entry.path, union, variant)


@cache
def entries() -> dict[Path, tuple[Entry, ...]]:
    """All keys of the schema, sections included; a key that several variants of a union have has an entry for each."""
    table: dict[Path, tuple[Entry, ...]] = {}
    for entry in _walk(RLHFConfig, (), None, None):
        table[entry.path] = (*table.get(entry.path, ()), entry)
    return table


@cache
def _mappings() -> tuple[Path, ...]:
    """The keys of all mappings of named sections."""
    return tuple(path for path, found in entries().items() if found[0].holds_names)


def _around(path: Path) -> Path | None:
    """The mapping of named sections that a path goes through; None when it goes through none."""
    return next((key for key in _mappings() if len(path) > len(key) and path[: len(key)] == key), None)


def candidates(path: Path) -> tuple[Entry, ...]:
    """The entries of a key, one for each variant that has it; none when the schema has no such key."""
    mapping = _around(path)
    if mapping is None:
        return entries().get(path, ())
    found = entries().get((*mapping, ANY_NAME, *path[len(mapping) + 1 :]), ())
    # A union at the name or below it lies under that name too; one around the mapping does not.
    return tuple(
        replace(entry, path=path, union=None if entry.union is None else path[: len(entry.union)]) for entry in found
    )


def find(path: Path, variant: str | None = None) -> Entry | None:
    """The entry of a key, of this variant where it has one; None when the schema has no such key."""
    found = candidates(path)
    return next((entry for entry in found if entry.variant == variant), found[0] if found else None)


def inside_mapping(path: Path) -> bool:
    """True when the key lies inside a `dict[str, Any]` field, where any name is allowed."""
    parents = (find(path[:end]) for end in range(1, len(path)))
    return any(parent is not None and parent.type.is_mapping for parent in parents)


def inside_named(path: Path) -> bool:
    """True when the key lies inside a section that has a name of the user's choice."""
    mapping = _around(path)
    return mapping is not None and len(path) > len(mapping) + 1


def leaf_keys(near: Path = ()) -> list[str]:
    """The dotted keys of all plain values, in schema order.

    A key inside a named section has the name that stands at its place in `near`, if something follows it there.
    """
    keys = []
    for path, found in entries().items():
        if found[0].is_section:
            continue
        place = path.index(ANY_NAME) if ANY_NAME in path else len(near)
        name = near[place] if len(near) > place + 1 else ANY_NAME
        keys.append(".".join(name if part == ANY_NAME else part for part in path))
    return keys


def children(path: Path, variant: str | None = None) -> list[str]:
    """The names directly below a section (of one variant, for a union), in schema order."""
    mapping = _around(path)
    if mapping is not None:
        path = (*mapping, ANY_NAME, *path[len(mapping) + 1 :])
    names = []
    for key, found in entries().items():
        if key[:-1] == path and (variant is None or any(entry.variant == variant for entry in found)):
            names.append(key[-1])
    return names


def variants_of(path: Path) -> tuple[str, ...]:
    """The `type` names of a union section; empty for another key."""
    entry = find(path)
    return tuple(variant_name(model) for model in entry.models) if entry is not None and entry.is_union else ()


def is_name_of_kind(path: Path, value: object) -> bool:
    """Whether a value in the place of a section is the name of one of its kinds, where that will do."""
    entry = find(path)
    return entry is not None and entry.takes_name and value in variants_of(path)


def default_variant(path: Path) -> str | None:
    """The `type` that a union section has when nothing sets it; None for one that must say it."""
    entry = find(path)
    assert entry is not None
    default = entry.field.default
    return None if default is PydanticUndefined else str(getattr(default, DISCRIMINATOR))


def describe(value: ValueType) -> str:
    """What a field takes, in words: "a whole number, at least 1", "one of auto, cpu, cuda, or null"."""
    if value.choices:
        text = "one of " + ", ".join(str(choice) for choice in value.choices)
    elif value.element is not None:
        text = f"a list such as [a, b], each {describe(value.element)}"
        text += f", or {' or '.join(value.words)}" if value.words else ""
    elif value.is_mapping:
        text = "a mapping such as {name: value}"
    else:
        text = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[value.core]
    text += _describe_constraints(value)
    return text + (", or null" if value.nullable else "")


def _describe_constraints(value: ValueType) -> str:
    def bounds(name: str) -> list[Any]:
        found = (getattr(constraint, name, None) for constraint in value.constraints)
        return [bound for bound in found if bound is not None]

    parts = []
    if bounds("ge"):
        parts.append(f"at least {max(bounds('ge'))}")
    if bounds("gt"):
        parts.append(f"above {max(bounds('gt'))}")
    if bounds("le"):
        parts.append(f"at most {min(bounds('le'))}")
    if bounds("lt"):
        parts.append(f"below {min(bounds('lt'))}")
    if bounds("min_length"):
        parts.append("not empty")
    if bounds("pattern"):
        parts.append(f"of the form {bounds('pattern')[0]}")
    return ", " + " and ".join(parts) if parts else ""
