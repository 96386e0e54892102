"""Attributes of a text that are known exactly, and the gold reward made of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType

from rlhf.data.embedded import lexicon
from rlhf.data.embedded.reviews import recognise
from rlhf.records import PromptContent

MIN_WORDS = 6
MAX_WORDS = 24
REWARD_BOUND = 2.0


@dataclass(frozen=True)
class GoldAttributes:
    """What the gold reward looks at.

    `sentiment` lies in [-1, 1], `repetition` in [0, 1), `length` counts words; `well_formed` is the share of words,
    punctuation included, in sentences that the grammar has in their place.
    """

    sentiment: float
    grammatical: bool
    well_formed: float
    repetition: float
    length: int


def _sentences(text: str) -> list[list[str]]:
    """Lower-case words of each sentence; words after the last full stop are a sentence too."""
    sentences: list[list[str]] = [[]]
    for word in text.lower().split():
        if word == ".":
            sentences.append([])
        else:
            sentences[-1].append(word)
    return [sentence for sentence in sentences if sentence]


def _polar_values(sentence: list[str]) -> list[float]:
    values: list[float] = []
    negated = False
    for word in sentence:
        if word in lexicon.CLAUSE_BREAKS:
            negated = False
        elif word in lexicon.NEGATORS:
            negated = True
        elif word in lexicon.POLAR_WORDS:
            value = lexicon.POLAR_WORDS[word]
            values.append(-value if negated else value)
            negated = False
    return values


def sentiment(text: str) -> float:
    """The mean over the text's opinions, 0 without any sentence. In [-1, 1].

    Every polar word is an opinion of value 1 or -1, and a sentence without a polar word is one of value 0. "not" and
    "never" turn the next polar word of the same clause around; full stop, comma, "and" and "but" end a clause. Words
    such as "very" change nothing.
    """
    values = [value for sentence in _sentences(text) for value in _polar_values(sentence) or [0.0]]
    return sum(values) / len(values) if values else 0.0


def _repeated_share(items: list[tuple[str, ...]]) -> float:
    return (len(items) - len(set(items))) / len(items) if items else 0.0


def repetition(text: str) -> float:
    """The largest share of sentences, polar words or word triples that occurred before in the text. In [0, 1)."""
    words = text.lower().split()
    return max(
        _repeated_share([tuple(sentence) for sentence in _sentences(text)]),
        _repeated_share([(word,) for word in words if word in lexicon.POLAR_WORDS]),
        _repeated_share(list(zip(words, words[1:], words[2:], strict=False))),
    )


def length(text: str) -> int:
    """Words, punctuation not counted."""
    return sum(word not in lexicon.PUNCTUATION for word in text.split())


def _length_penalty(words: int) -> float:
    """0 from MIN_WORDS to MAX_WORDS; 1 for an empty text and for twice MAX_WORDS or more; linear between."""
    if words < MIN_WORDS:
        return (MIN_WORDS - words) / MIN_WORDS
    return min(1.0, max(0, words - MAX_WORDS) / MAX_WORDS)


def attributes_of(prompt: PromptContent, response: str) -> GoldAttributes:
    """All attributes of a response; whether it is grammatical depends on the prompt too."""
    verdict = recognise(prompt, response)
    return GoldAttributes(
        sentiment=sentiment(response),
        grammatical=verdict.grammatical,
        well_formed=verdict.well_formed,
        repetition=repetition(response),
        length=length(response),
    )


def gold_attributes(prompt: PromptContent, response: str) -> dict[str, float | bool | int]:
    """`sentiment`, `grammatical`, `well_formed`, `repetition` and `length` by name."""
    return asdict(attributes_of(prompt, response))


def num_opinions(text: str) -> int:
    """Polar words, with repetitions, whatever they say."""
    return sum(word in lexicon.POLAR_WORDS for word in text.lower().split())


def gold_reward(prompt: PromptContent, response: str) -> float:
    """What the simulated annotators want: positive and grammatical and non-repetitive. In [-2, 2].

    share * (0.5 + 1.5 * sentiment) - 1.5 * (1 - share) - 2 * repetition - 0.5 * length penalty, clipped to [-2, 2];
    share is `well_formed`. Words out of the grammar earn nothing, however positive they are, and each of them costs:
    gibberish scores at most -1.5, a grammatical text without repetition at least -1 (within the usual length).
    """
    facts = attributes_of(prompt, response)
    return _composed(facts, facts.sentiment)


def reserved_reward(prompt: PromptContent, response: str) -> float:
    """What annotators want who would rather have no opinion than any: few polar words, grammatical. In [-2, 2].

    As `gold_reward`, with 1 - min(polar words, 2) in the place of the sentiment: a review of facts alone scores 2, one
    opinion 0.5, two and more -1. The two agree on form and differ on favourable opinions.
    """
    return _composed(attributes_of(prompt, response), 1.0 - min(num_opinions(response), 2))


def _composed(facts: GoldAttributes, wanted: float) -> float:
    """The reward of a text that has what is wanted to the degree `wanted` in [-1, 1]; form counts whatever that is."""
    share = facts.well_formed
    score = share * (0.5 + 1.5 * wanted) - 1.5 * (1 - share)
    score -= 2.0 * facts.repetition + 0.5 * _length_penalty(facts.length)
    return max(-REWARD_BOUND, min(REWARD_BOUND, score))


# What a gold reward may want, and the function that says how far a response has it.
GOLD_REWARDS: Mapping[str, Callable[[PromptContent, str], float]] = MappingProxyType(
    {"favourable": gold_reward, "reserved": reserved_reward}
)
