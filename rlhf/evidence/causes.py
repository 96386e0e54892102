"""Why two runs differ: the likeliest causes first, from what the runs wrote down about themselves."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf.evidence.facts import Fact, Facts

_SHOWN = 6


def likely_causes(facts: Facts, labels: tuple[str, str]) -> list[str]:
    """One line a kind of cause, the likeliest first; empty when nothing that was written down differs.

    `labels` name the two sides in the text. What decides results excludes what only decides rounding: a run with
    another learning rate needs no other explanation.
    """
    seed = [f"another seed: {describe_facts(facts.seed, labels)}"] if facts.seed else []
    return [*strong_causes(facts, labels), *seed] or weak_causes(facts, labels)


def strong_causes(facts: Facts, labels: tuple[str, str]) -> list[str]:
    """What decides results, other than the seed."""
    kinds = [
        ("another experiment", facts.results),
        ("other data", facts.data),
        ("other files or input models", facts.content),
    ]
    return [f"{name}: {describe_facts(found, labels)}" for name, found in kinds if found]


def weak_causes(facts: Facts, labels: tuple[str, str]) -> list[str]:
    """What need not change anything: code, packages, and the order in which numbers are added."""
    kinds: list[tuple[str, Sequence[Fact]]] = [
        ("other code", facts.code),
        ("other package versions", facts.packages),
        ("computed otherwise", (*facts.rounding, *facts.compute)),
        ("another machine", facts.hardware),
    ]
    return [f"{name}: {describe_facts(found, labels)}" for name, found in kinds if found]


def describe_facts(found: Sequence[Fact], labels: tuple[str, str]) -> str:
    """The first few facts on one line."""
    prefixes = tuple(f"{label} " if label else "" for label in labels)
    shown = "; ".join(fact.describe(*prefixes) for fact in found[:_SHOWN])
    return shown + (f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else "")
