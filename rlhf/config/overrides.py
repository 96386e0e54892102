"""Arguments of the command line and of sweep agents: what they say, and how they change a draft of the config.

Accepted spellings, all meaning the same: `a.b=c`, `--a.b=c`, `+a.b=c`, `++a.b=c` (W&B's `args_append_hydra` and
`args_override_hydra`) and `--a.b c`. `~a.b` takes a value away, so that its default holds. `model=gpt2` chooses a file
of a group, `model={'path': 'x'}` and `ppo={...}` merge a mapping. The path of a `.json` file (W&B's `args_json_file`)
stands for the keys of the object in it, each meaning what `key=value` means. Of two arguments for one key the last one
wins; the order of arguments for different keys does not matter.
W&B's own keys (`_wandb...`) and the `--local_rank=N` of launchers are no part of a config and are left out.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.config import schema
from rlhf.config.errors import Problem, did_you_mean, listing, shorten, suggest_keys, unknown_key
from rlhf.config.provenance import DEFAULT, Draft, Origin
from rlhf.config.values import container_from_text

KEY = re.compile(r"[A-Za-z_][\w-]*(\.[\w-]+)*")
IGNORED_KEYS = re.compile(r"_wandb.*|local[_-]rank", re.DOTALL)
# What may follow a key of its own although it starts with a hyphen.
NEGATIVE_NUMBER = re.compile(r"-(\d|\.\d|inf)\S*")
SHAPE = "expected key=value, such as ppo.learning_rate=3e-6, or group=choice, such as model=gpt2"
FILE_SHAPE = 'expected a JSON object of overrides, such as {"ppo.learning_rate": 3e-6, "model": "gpt2"}'


@dataclass(frozen=True)
class Argument:
    """One argument: `original` as it was typed, `text` everything after the first `=`; None for a removal `~key`.

    `file` is the JSON file that it stands in, None for one of the command line.
    """

    original: str
    key: str
    text: str | None
    file: str | None = None

    @property
    def path(self) -> schema.Path:
        return tuple(self.key.split("."))

    @property
    def source(self) -> str:
        return f"argument {shorten(self.original)}" if self.file is None else f"{shorten(self.file)}: {self.key}"


@dataclass
class Arguments:
    """Parsed arguments: `choices` by group, the rest in order, and what could not be understood."""

    choices: dict[str, Argument] = field(default_factory=dict)
    values: list[Argument] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def parse_arguments(arguments: Sequence[str], groups: Collection[str]) -> Arguments:
    """Sorts arguments into group choices and values. Never raises: a malformed argument becomes a problem."""
    parsed = Arguments()
    for argument in _split(join_spaced(arguments), parsed.problems):
        if argument.key in groups and argument.text is not None and not argument.text.strip().startswith("{"):
            parsed.choices[argument.key] = argument
        elif argument.key in groups and argument.text is None:
            parsed.choices.pop(argument.key, None)
            parsed.values.append(argument)
        else:
            parsed.values.append(argument)
    if all(argument.text is not None for argument in parsed.values):
        # As a group's choice comes before the keys in it: the name of a kind would take away what was set of it. Only a
        # removal means something at its place.
        parsed.values.sort(key=lambda argument: not schema.is_name_of_kind(argument.path, argument.text))
    return parsed


def join_spaced(arguments: Sequence[str]) -> list[str]:
    """`--a.b c` becomes `--a.b=c`, when `c` cannot be an argument of its own."""
    joined: list[str] = []
    for argument in arguments:
        before = joined[-1] if joined else ""
        waiting = before.startswith("--") and "=" not in before and KEY.fullmatch(before[2:]) is not None
        hyphen = argument.startswith("-") and not NEGATIVE_NUMBER.fullmatch(argument)
        if waiting and not hyphen and "=" not in argument:
            joined[-1] = f"{before}={argument}"
        else:
            joined.append(argument)
    return joined


def _split(arguments: Sequence[str], problems: list[Problem]) -> list[Argument]:
    found: list[Argument] = []
    for original in arguments:
        if _names_file(original):
            found.extend(_from_file(original, problems))
            continue
        key, equals, text = original.removeprefix("--").partition("=")
        if key.startswith("~"):
            key, removal = key[1:], True
        else:
            key, removal = key.removeprefix("+").removeprefix("+"), False
        key = key.strip()
        if IGNORED_KEYS.fullmatch(key):
            continue
        if KEY.fullmatch(key) and bool(equals) != removal:
            found.append(Argument(original, key, text if equals else None))
            continue
        message = SHAPE
        if removal and equals:
            message = f"~{key} removes a value and takes none; to set it, write {key}={text}"
        elif KEY.fullmatch(key):
            message += did_you_mean([f"{name}=..." for name in suggest_keys(key)])
        elif equals:
            message += "; a key is made of names joined by single dots"
        problems.append(Problem(shorten(original) or "''", message, source="argument"))
    return found


def _names_file(argument: str) -> bool:
    """Whether an argument is the path of a JSON file; `data.path=x.json` is not, `/data/a=b/x.json` is."""
    key, equals, _ = argument.lstrip("+").partition("=")
    return argument.endswith(".json") and not argument.startswith("-") and not (equals and KEY.fullmatch(key))


def _from_file(name: str, problems: list[Problem]) -> Iterator[Argument]:
    """The arguments that a file stands for, as text: what is written by hand and what an agent writes mean the same."""
    try:
        values = json.loads(Path(os.path.expanduser(name)).read_text(encoding="utf-8"))
    except FileNotFoundError:
        problems.append(Problem(shorten(name), f"there is no such file; {FILE_SHAPE}", source="argument"))
        return
    except (OSError, ValueError, RecursionError) as error:
        problems.append(Problem(shorten(name), f"cannot be read ({error}); {FILE_SHAPE}", source="argument"))
        return
    if not isinstance(values, dict):
        problems.append(Problem(shorten(name), f"{FILE_SHAPE}, found a {type(values).__name__}", source="argument"))
        return
    for key, value in values.items():
        if IGNORED_KEYS.fullmatch(key):
            continue
        text = value if isinstance(value, str) else json.dumps(value)
        if KEY.fullmatch(key):
            yield Argument(f"{key}={text}", key, text, name)
        else:
            message = "expected a key such as ppo.learning_rate: names joined by single dots"
            problems.append(Problem(shorten(key) or "''", message, source=shorten(name)))


def apply(argument: Argument, draft: Draft, groups: Collection[str]) -> list[Problem]:
    """Changes the draft as the argument says; returns what is wrong with it, in which case nothing changes."""
    entry = schema.find(argument.path)
    if entry is None and not schema.inside_mapping(argument.path):
        return [unknown_key(argument.path, argument.text, argument.source)]
    if argument.text is None:
        draft.remove(argument.path)
        return []
    if entry is None or not (entry.is_section or entry.type.is_mapping):
        draft.set(argument.path, argument.text, Origin(argument.source, "text", argument.text))
        return []
    if schema.is_name_of_kind(argument.path, argument.text):
        draft.choose_kind(argument.path, argument.text, Origin(argument.source, "text", argument.text))
        return []
    value = container_from_text(argument.text)
    if not isinstance(value, dict):
        return [_not_a_section(entry, argument, groups)]
    return _merge(value, argument.path, argument, draft)


def expand_kinds(draft: Draft) -> None:
    """Where a file has the name of a kind in the place of a section (`annotator: human`), its defaults are meant."""
    for path, value in draft.leaves():
        if schema.is_name_of_kind(path, value):
            draft.choose_kind(path, value, draft.origin(path) or Origin(DEFAULT, "file"))


def _merge(value: dict[str, Any], path: schema.Path, argument: Argument, draft: Draft) -> list[Problem]:
    if not value and schema.variants_of(path) and draft.get(path) is None:
        # Said to be there, with nothing in it: whether that will do is for validation to say.
        draft.set(path, {}, Origin(argument.source, "argument", "{}"))
    problems = []
    for name, item in value.items():
        # A sweep may nest dotted names: ppo={'sampling.temperature': 1}.
        here = (*path, *str(name).split("."))
        entry = schema.find(here)
        if entry is None and not schema.inside_mapping(here):
            problems.append(unknown_key(here, str(item), argument.source))
        elif isinstance(item, dict) and (entry is None or entry.is_section or entry.type.is_mapping):
            problems.extend(_merge(item, here, argument, draft))
        else:
            draft.set(here, item, Origin(argument.source, "argument", str(item)))
    return problems


def _not_a_section(entry: schema.Entry, argument: Argument, groups: Collection[str]) -> Problem:
    if not entry.is_section:
        return Problem(entry.key, f"expected {schema.describe(entry.type)}", argument.text, argument.source)
    if entry.holds_names:
        variants = schema.variants_of((*entry.path, schema.ANY_NAME))
        message = f"holds sections under names of yours: set {entry.key}.NAME.type={variants[0]}, NAME being any word"
        return Problem(entry.key, message, argument.text, argument.source)
    message = f"is a section: set {entry.key}.NAME=VALUE, NAME being one of {listing(schema.children(entry.path))}"
    if entry.is_union and entry.key not in groups:
        variants = schema.variants_of(entry.path)
        message = f"is a section: choose its kind with {entry.key}.type={variants[0]} (or {', '.join(variants[1:])})"
    return Problem(entry.key, message, argument.text, argument.source)
