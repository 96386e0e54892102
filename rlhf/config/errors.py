"""Mistakes in a configuration: collected, each with its value, its source and what is right, and raised together."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from rlhf.config import schema
from rlhf.errors import ConfigError

MAX_SHOWN = 100
MAX_SUGGESTIONS = 6
MAX_LISTED = 12
# Keys that configs of other versions have, and what they are called here.
OTHER_NAMES = {
    "collect.annotator_temperature": "preferences.annotator.temperature",
    "collect.num_annotators": "preferences.annotator.num_annotators",
}


@dataclass(frozen=True)
class Problem:
    """One mistake. `subject` is a dotted key, a group, an argument or a file; `source` says where it was set."""

    subject: str
    message: str
    value: str | None = None
    source: str | None = None

    def __str__(self) -> str:
        head = self.subject if self.value is None else f"{self.subject} = {shorten(self.value)}"
        where = f"  ({self.source})" if self.source else ""
        return printable(f"  {head}{where}\n      {self.message}")


def config_error(problems: Sequence[Problem]) -> ConfigError:
    """One error that names all problems, in the order in which they were found, none of them twice."""
    unique = list(dict.fromkeys(problems))
    title = "a mistake in the configuration" if len(unique) == 1 else f"{len(unique)} mistakes in the configuration"
    return ConfigError("\n".join([f"{title}:", *(str(problem) for problem in unique)]))


def shorten(text: str) -> str:
    """The text on one line, cut in the middle when it is long."""
    text = " ".join(text.split())
    half = MAX_SHOWN // 2
    return text if len(text) <= MAX_SHOWN else f"{text[:half]} ... {text[-half:]}"


def printable(text: str) -> str:
    """The text without characters that a terminal cannot show: arguments may hold any bytes."""
    return "".join(
        character if character.isprintable() or character == "\n" else ascii(character)[1:-1] for character in text
    )


def listing(names: Sequence[str]) -> str:
    """The names, or the first of many."""
    shown = ", ".join(names[:MAX_LISTED])
    return shown if len(names) <= MAX_LISTED else f"{shown}, ... (`rlhf config` prints all keys)"


def did_you_mean(names: Sequence[str]) -> str:
    """A clause for the end of a message; empty without a name."""
    return f"; did you mean {' or '.join(names)}?" if names else ""


def close_names(name: str, candidates: Sequence[str], cutoff: float = 0.6) -> list[str]:
    """The candidates most like a mistyped name, best first; spelling with `-` or capitals counts as equal."""
    folded = {_fold(candidate): candidate for candidate in candidates}
    matches = difflib.get_close_matches(_fold(name), list(folded), n=2, cutoff=cutoff)
    best = _similarity(matches[0], _fold(name)) if matches else 0.0
    return [folded[match] for match in matches if _similarity(match, _fold(name)) > best - 0.1]


def suggest_keys(key: str) -> list[str]:
    """The schema's keys that a wrong key most likely means, best first.

    A right name in the wrong section comes first, then a close name in the right section, then a close dotted key,
    then a close name in any section, then an abbreviation (`lr`, `kl_coef`).
    """
    if key in OTHER_NAMES:
        return [OTHER_NAMES[key]]
    path = tuple(key.split("."))
    keys = schema.leaf_keys(path)
    section, _, name = _fold(key).rpartition(".")
    if schema.inside_named(path):
        # The name in the middle is the user's own, spelt as it is.
        section = key.rpartition(".")[0]
    siblings = schema.children(tuple(section.split("."))) if section else schema.children(())
    elsewhere = [candidate for candidate in keys if candidate.rpartition(".")[2] == name]
    if elsewhere and section:
        elsewhere.sort(key=lambda candidate: -_similarity(candidate, key))
        return elsewhere[:1] if _similarity(elsewhere[0], key) > 0.85 else _outermost(elsewhere)
    if elsewhere:
        return _outermost(elsewhere)
    abbreviated = [sibling for sibling in siblings if _initials(sibling) == name]
    if nearby := abbreviated or close_names(name, siblings):
        return [f"{section}.{match}" if section else match for match in nearby]
    if similar := close_names(key, keys, cutoff=0.75):
        return similar
    last_names = list(dict.fromkeys(candidate.rpartition(".")[2] for candidate in keys))
    abbreviated = [word for word in last_names if _initials(word) == name or (len(name) > 2 and word.startswith(name))]
    matches = close_names(name, last_names, cutoff=0.7)[:1] or abbreviated
    return _outermost([candidate for candidate in keys if candidate.rpartition(".")[2] in matches])


def _outermost(keys: Sequence[str]) -> list[str]:
    """The keys that lie least deep, in order: the stage's own `ppo.gamma` not a study's."""
    depth = min((key.count(".") for key in keys), default=0)
    return [key for key in keys if key.count(".") == depth][:MAX_SUGGESTIONS]


def unknown_key(path: schema.Path, value: str | None, source: str | None) -> Problem:
    """The problem of a key that the schema does not have in any variant."""
    key = ".".join(path)
    parent = schema.find(path[:-1])
    message = "unknown key"
    if names := suggest_keys(key):
        message += did_you_mean(names)
        if parent is not None and parent.is_section and not any(name.startswith(f"{parent.key}.") for name in names):
            message += f" {parent.key} has {listing(schema.children(parent.path))}"
    elif parent is not None and not parent.is_section:
        message += f"; {parent.key} is {schema.describe(parent.type)}, without keys of its own"
    else:
        owner, known = parent.key if parent else "the config", schema.children(path[:-1] if parent else ())
        message += f"; {owner} has {listing(known)}"
    return Problem(key, message, value, source)


def describe_section(entry: schema.Entry) -> str:
    """What a section takes, in words."""
    if entry.holds_names:
        variants = schema.variants_of((*entry.path, schema.ANY_NAME))
        return f"named sections such as {{{schema.ANY_NAME}: {{{schema.DISCRIMINATOR}: {variants[0]}}}}}"
    return f"a section with {listing(schema.children(entry.path))}"


def wrong_variant(entry: schema.Entry, variant: str, groups: Sequence[str], value: str, source: str) -> Problem:
    """The problem of a key that exists, but not with the `type` that its section has."""
    assert entry.union is not None
    union = ".".join(entry.union)
    names = [candidate.variant for candidate in schema.candidates(entry.path) if candidate.variant]
    choose = f"{union}={names[0]}" if union in groups else f"{union}.{schema.DISCRIMINATOR}={names[0]}"
    kinds = f"type {names[0]}" if len(names) == 1 else f"types {', '.join(names)}"
    remove = "" if source.startswith("argument") else f", or remove it with ~{entry.key}"
    return Problem(
        entry.key, f"exists for {union} of {kinds}, here it is {variant}: choose {choose}{remove}", value, source
    )


def _fold(name: str) -> str:
    return name.lower().replace("-", "_")


def _similarity(first: str, second: str) -> float:
    return difflib.SequenceMatcher(None, first, second).ratio()


def _initials(name: str) -> str:
    return "".join(word[0] for word in name.split("_") if word)
