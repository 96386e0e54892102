"""The words of the embedded corpus. A polar word is positive or negative wherever it stands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

POSITIVE_ADJECTIVES = ("wonderful", "superb", "amazing", "great", "lovely", "good", "nice", "fine")
NEGATIVE_ADJECTIVES = ("terrible", "horrible", "awful", "ugly", "bad", "poor", "plain")
POSITIVE_VERBS = ("loved", "enjoyed", "liked")
NEGATIVE_VERBS = ("hated", "disliked")
BASE_VERBS = ("love", "enjoy", "like")
CLOSINGS = ("recommend", "again")

MODIFIERS = ("very", "really", "quite")
NEGATORS = frozenset({"not", "never"})
CLAUSE_BREAKS = frozenset({".", ",", "and", "but"})
PUNCTUATION = frozenset({".", ","})


@dataclass(frozen=True)
class Topic:
    """What a review is about: the words that only its prompts and responses may use."""

    name: str
    nouns: tuple[str, ...]
    encounters: tuple[str, ...]
    preposition: str
    singular: tuple[str, ...]
    plural: tuple[str, ...]
    positive: tuple[str, ...]
    negative: tuple[str, ...]
    revisit: str
    facts: tuple[str, ...]


TOPICS: tuple[Topic, ...] = (
    Topic(
        name="film",
        nouns=("film", "movie"),
        encounters=("saw", "watched"),
        preposition="of",
        singular=("cast", "plot", "music", "end"),
        plural=("actors", "jokes", "songs"),
        positive=("funny", "clever", "moving"),
        negative=("boring", "silly", "dull"),
        revisit="see it",
        facts=("We sat in the <number> row .", "It ran for <count> hours .", "I had seats near the <place> ."),
    ),
    Topic(
        name="book",
        nouns=("book", "novel"),
        encounters=("read", "finished"),
        preposition="of",
        singular=("story", "hero", "style", "cover"),
        plural=("pages", "poems", "maps"),
        positive=("witty", "clever", "moving"),
        negative=("boring", "vague", "dull"),
        revisit="read it",
        facts=("It has <count> parts .", "I got to the end in <count> days .", "We own the <number> edition ."),
    ),
    Topic(
        name="restaurant",
        nouns=("restaurant", "cafe"),
        encounters=("tried", "visited"),
        preposition="at",
        singular=("food", "soup", "bread", "wine"),
        plural=("drinks", "meals", "cakes"),
        positive=("tasty", "fresh", "tender"),
        negative=("cold", "stale", "bland"),
        revisit="eat there",
        facts=("We sat near the <place> .", "I paid for <count> people .", "We took the <number> table ."),
    ),
    Topic(
        name="hotel",
        nouns=("hotel", "inn"),
        encounters=("booked", "left"),
        preposition="at",
        singular=("room", "bed", "view", "pool"),
        plural=("rooms", "beds", "towels"),
        positive=("clean", "quiet", "cosy"),
        negative=("dirty", "noisy", "damp"),
        revisit="stay there",
        facts=("We stayed for <count> nights .", "I slept on the <number> floor .", "We parked near the <place> ."),
    ),
)


def _polar_words() -> dict[str, float]:
    positive = {*POSITIVE_ADJECTIVES, *POSITIVE_VERBS, *BASE_VERBS, *CLOSINGS}.union(*(t.positive for t in TOPICS))
    negative = {*NEGATIVE_ADJECTIVES, *NEGATIVE_VERBS}.union(*(t.negative for t in TOPICS))
    if positive & negative:
        raise ValueError(f"the lexicon calls a word both positive and negative: {sorted(positive & negative)}")
    return {word: 1.0 if word in positive else -1.0 for word in sorted(positive | negative)}


POLAR_WORDS: Mapping[str, float] = MappingProxyType(_polar_words())
