"""Where each value of a config came from: a file and line, an argument, or the default of the class."""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from rlhf.config.schema import Path as KeyPath

DEFAULT = "default"
COMMENT_COLUMN = 56
MISSING = "???"
MERGE_TAG = "tag:yaml.org,2002:merge"


@dataclass(frozen=True)
class Origin:
    """What set a value. `form` tells how to read it: YAML and lists have types, the text of an argument has none.

    `shown` is the value as it was written, for error texts; None shows the value itself.
    """

    source: str
    form: Literal["file", "text", "argument"]
    shown: str | None = None


@dataclass
class Draft:
    """A config under construction: plain nested values, and the origin of each of them by its path."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[KeyPath, Origin] = field(default_factory=dict)

    def set(self, path: KeyPath, value: Any, origin: Origin) -> None:
        """Sets one value; what was there, sections included, goes."""
        self.remove(path)
        node = self.values
        for end, name in enumerate(path[:-1], start=1):
            # A section that was said to be empty, or a value in its place, is neither any more.
            self.origins.pop(path[:end], None)
            if not isinstance(node.get(name), dict):
                node[name] = {}
            node = node[name]
        node[path[-1]] = value
        self.origins[path] = origin

    def merge(self, path: KeyPath, value: Any, origins: Mapping[KeyPath, Origin]) -> None:
        """Merges nested values below `path`, as Hydra does: mappings into each other, everything else replaced."""
        if isinstance(value, dict) and (value or isinstance(self.get(path), dict)):
            for name, item in value.items():
                self.merge((*path, name), item, origins)
        elif path:
            self.set(path, value, nearest_origin(origins, path) or Origin(DEFAULT, "file"))

    def choose_kind(self, path: KeyPath, kind: str, origin: Origin) -> None:
        """Makes a section one of this `type` with its defaults; what was there goes."""
        self.remove(path)
        self.set((*path, "type"), kind, origin)

    def get(self, path: KeyPath) -> Any:
        """The value at a path; None when nothing is there."""
        node: Any = self.values
        for name in path:
            node = node.get(name) if isinstance(node, dict) else None
        return node

    def remove(self, path: KeyPath) -> None:
        """Takes a value or section away, so that its default holds. Nothing happens when it is not there."""
        parent = self.get(path[:-1])
        if isinstance(parent, dict):
            parent.pop(path[-1], None)
        for known in [known for known in self.origins if known[: len(path)] == path]:
            del self.origins[known]

    def source(self, path: KeyPath) -> str:
        """Where the value at a path came from."""
        origin = self.origin(path)
        return DEFAULT if origin is None else origin.source

    def origin(self, path: KeyPath) -> Origin | None:
        """The origin of a value, or of the section that was set as a whole or of its first value."""
        below = (origin for known, origin in self.origins.items() if known[: len(path)] == path)
        return nearest_origin(self.origins, path) or next(below, None)

    def leaf_source(self, path: KeyPath) -> str:
        """Where a single value came from; a value set by nothing is a default, whatever was set beside it."""
        origin = nearest_origin(self.origins, path)
        return DEFAULT if origin is None else origin.source

    def shown(self, path: KeyPath) -> str:
        """The value at a path as it was written."""
        origin = self.origins.get(path)
        return show(self.get(path)) if origin is None or origin.shown is None else origin.shown

    def leaves(self) -> list[tuple[KeyPath, Any]]:
        """Every value with its path; an empty mapping is a value."""
        return list(flatten(self.values).items())

    def copy(self) -> Draft:
        return Draft(copy.deepcopy(self.values), dict(self.origins))


def nearest_origin(origins: Mapping[KeyPath, Origin], path: KeyPath) -> Origin | None:
    """The origin of the path or of the nearest section around it."""
    return next((origins[path[:end]] for end in range(len(path), 0, -1) if path[:end] in origins), None)


def flatten(value: Any, path: KeyPath = ()) -> dict[KeyPath, Any]:
    """The leaves of nested mappings by their path; lists and empty mappings are leaves."""
    if not isinstance(value, dict) or not value:
        return {path: value} if path else {}
    leaves = {}
    for name, item in value.items():
        leaves.update(flatten(item, (*path, name)))
    return leaves


def show(value: Any) -> str:
    """A value on one line, as YAML would read it."""
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z_./~][\w./ ~-]*", value) and _reads_as_text(value):
        return value
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(show(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{show(str(name))}: {show(item)}" for name, item in value.items()) + "}"
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10**9) if value is not None else "null"
    return text.removesuffix("...\n").strip()


def _reads_as_text(value: str) -> bool:
    return value == value.strip() and isinstance(yaml.load(value, YAMLLoader), str)


def display_path(path: Path, packaged: Path | None = None) -> str:
    """A config file's name for people: `configs/...` for ours, `./configs/...` for the working folder's."""
    resolved = path.resolve()
    if packaged is not None and resolved.is_relative_to(packaged.resolve()):
        return (Path("configs") / resolved.relative_to(packaged.resolve())).as_posix()
    try:
        relative = os.path.relpath(path)
    except OSError:
        # The working folder is gone.
        return str(path)
    if relative.startswith(".."):
        return str(path)
    return f"./{relative}" if relative.startswith("configs/") else relative


def render(values: Mapping[str, Any], sources: Mapping[str, str]) -> str:
    """The nested values as YAML, each line ending in a comment that says where its value came from."""
    rows: list[tuple[str, str]] = []
    _rows(values, (), sources, rows)
    width = min(max((len(text) for text, source in rows if source), default=0), COMMENT_COLUMN)
    return "".join(f"{text:<{width}}  # {source}\n" if source else f"{text}\n" for text, source in rows)


def _rows(values: Mapping[str, Any], path: KeyPath, sources: Mapping[str, str], rows: list[tuple[str, str]]) -> None:
    for name, value in values.items():
        here = (*path, name)
        label = "  " * len(path) + show(name) + ":"
        if isinstance(value, dict) and value:
            rows.append((label, ""))
            _rows(value, here, sources, rows)
        else:
            # A source may quote an argument with any characters, so it is cut to one line.
            rows.append((f"{label} {show(value)}", " ".join(sources.get(".".join(here), DEFAULT).split())))


class YAMLLoader(yaml.SafeLoader):
    """YAML as OmegaConf reads it: `5e-7` is a number, a date is text, and the same key twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.tag != MERGE_TAG]
        for key in keys:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value} appears twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


YAMLLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class YAMLDumper(yaml.SafeDumper):
    """YAML that `YAMLLoader` and PyYAML's own loaders read alike: text such as `1e3` is put in quotes."""


for _yaml_class in (YAMLLoader, YAMLDumper):
    _yaml_class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$"),
        list("-+0123456789."),
    )


def read_yaml(path: Path) -> tuple[Any, dict[tuple[str | int, ...], int]]:
    """The content of a YAML file and the line of each value (list items by their index), the first line being 1.

    Raises `yaml.YAMLError` (with the line, where it has one), `OSError` or `UnicodeDecodeError`.
    """
    loader = YAMLLoader(path.read_text(encoding="utf-8"))
    loader.name = str(path)
    try:
        node = loader.get_single_node()
        if node is None:
            return None, {}
        lines: dict[tuple[str | int, ...], int] = {}
        _collect_lines(node, (), lines, frozenset())
        return loader.construct_document(node), lines
    finally:
        loader.dispose()


def _collect_lines(
    node: yaml.Node, path: tuple[str | int, ...], lines: dict[tuple[str | int, ...], int], around: frozenset[int]
) -> None:
    if id(node) in around:
        # An alias to something that contains it.
        return
    around |= {id(node)}
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            here = (*path, str(key_node.value))
            lines[here] = key_node.start_mark.line + 1
            _collect_lines(value_node, here, lines, around)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[(*path, index)] = item.start_mark.line + 1
            _collect_lines(item, (*path, index), lines, around)
