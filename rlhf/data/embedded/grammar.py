"""A grammar without recursion, written once and used to sample, to count and to recognise.

A rule is a tuple of alternatives; an alternative is a line of words and `<names>` of other rules. Every word of a
text has one space before it, the first one included, so that texts concatenate.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property


def pick(generator: random.Random, count: int) -> int:
    """A number in 0..count-1. It uses `random()` alone, the one method whose stream Python promises to keep."""
    return int(generator.random() * count)


@dataclass(frozen=True)
class Grammar:
    """`rules[name]` is a tuple of alternatives; a repeated alternative is sampled more often and means nothing else.

    A rule that reaches itself raises `RecursionError`, a name without a rule `KeyError`.
    """

    rules: Mapping[str, tuple[str, ...]]

    @cached_property
    def _parsed(self) -> dict[str, list[list[tuple[bool, str]]]]:
        """rule -> alternatives -> (is a reference, name or word) for each part."""
        return {
            name: [
                [(part.startswith("<"), part.strip("<>")) for part in alternative.split()]
                for alternative in alternatives
            ]
            for name, alternatives in self.rules.items()
        }

    def sample(self, name: str, generator: random.Random) -> str:
        """A text of rule `name`; at every rule each alternative is equally likely."""
        alternatives = self._parsed[name]
        parts = alternatives[pick(generator, len(alternatives))]
        return "".join(self.sample(part, generator) if is_reference else f" {part}" for is_reference, part in parts)

    def pattern(self, name: str) -> str:
        """A regular expression that matches exactly the texts of rule `name`."""
        alternatives = dict.fromkeys(
            "".join(self.pattern(part) if is_reference else re.escape(f" {part}") for is_reference, part in parts)
            for parts in self._parsed[name]
        )
        return f"(?:{'|'.join(alternatives)})"

    def count(self, name: str) -> int:
        """Derivations of rule `name`: the number of its texts when no text has two derivations."""
        total = 0
        for parts in self._parsed[name]:
            product = 1
            for is_reference, part in parts:
                product *= self.count(part) if is_reference else 1
            total += product
        return total
