"""The words of the embedded corpus. A polar word has one value in [-1, 1] wherever it stands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

POSITIVE_ADJECTIVES: Mapping[str, float] = MappingProxyType(
    {
        "wonderful": 1.0,
        "superb": 1.0,
        "amazing": 1.0,
        "great": 0.8,
        "lovely": 0.8,
        "good": 0.6,
        "nice": 0.6,
        "fine": 0.4,
    }
)
NEGATIVE_ADJECTIVES: Mapping[str, float] = MappingProxyType(
    {
        "terrible": -1.0,
        "horrible": -1.0,
        "awful": -1.0,
        "ugly": -0.8,
        "bad": -0.6,
        "poor": -0.6,
        "plain": -0.4,
    }
)
POSITIVE_VERBS: Mapping[str, float] = MappingProxyType({"loved": 1.0, "enjoyed": 0.8, "liked": 0.6})
NEGATIVE_VERBS: Mapping[str, float] = MappingProxyType({"hated": -1.0, "disliked": -0.6})
BASE_VERBS: Mapping[str, float] = MappingProxyType({"love": 1.0, "enjoy": 0.8, "like": 0.6})
CLOSINGS: Mapping[str, float] = MappingProxyType({"recommend": 0.8, "again": 0.8})

MODIFIERS: Mapping[str, float] = MappingProxyType({"very": 1.25, "really": 1.25, "quite": 0.75})
NEGATORS = frozenset({"not", "never"})
NEGATION = -0.5
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
    positive: Mapping[str, float]
    negative: Mapping[str, float]
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
        positive={"funny": 0.6, "clever": 0.8, "moving": 0.8},
        negative={"boring": -0.8, "silly": -0.6, "dull": -0.8},
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
        positive={"witty": 0.6, "clever": 0.8, "moving": 0.8},
        negative={"boring": -0.8, "vague": -0.6, "dull": -0.8},
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
        positive={"tasty": 0.8, "fresh": 0.6, "tender": 0.6},
        negative={"cold": -0.4, "stale": -0.8, "bland": -0.6},
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
        positive={"clean": 0.6, "quiet": 0.6, "cosy": 0.8},
        negative={"dirty": -0.8, "noisy": -0.6, "damp": -0.8},
        revisit="stay there",
        facts=("We stayed for <count> nights .", "I slept on the <number> floor .", "We parked near the <place> ."),
    ),
)


def _polar_words() -> dict[str, float]:
    groups = [POSITIVE_ADJECTIVES, NEGATIVE_ADJECTIVES, POSITIVE_VERBS, NEGATIVE_VERBS, BASE_VERBS, CLOSINGS]
    groups += [group for topic in TOPICS for group in (topic.positive, topic.negative)]
    words: dict[str, float] = {}
    for group in groups:
        for word, value in group.items():
            if words.setdefault(word, value) != value:
                raise ValueError(f"the lexicon gives {word!r} two values: {words[word]} and {value}")
    return words


POLAR_WORDS: Mapping[str, float] = MappingProxyType(_polar_words())
