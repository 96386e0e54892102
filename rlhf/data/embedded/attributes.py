"""Attributes of a text that are known exactly, and the gold reward made of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from rlhf.data.embedded import lexicon
from rlhf.data.embedded.reviews import is_grammatical
from rlhf.records import PromptContent

MIN_WORDS = 6
MAX_WORDS = 24
REWARD_BOUND = 2.0


@dataclass(frozen=True)
class GoldAttributes:
    """What the gold reward looks at. `sentiment` lies in [-1, 1], `repetition` in [0, 1], `length` counts words."""

    sentiment: float
    grammatical: bool
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
    scale = 1.0
    for word in sentence:
        if word in lexicon.MODIFIERS:
            scale *= lexicon.MODIFIERS[word]
            continue
        if word in lexicon.CLAUSE_BREAKS:
            negated = False
        elif word in lexicon.NEGATORS:
            negated = True
        elif word in lexicon.POLAR_WORDS:
            value = max(-1.0, min(1.0, lexicon.POLAR_WORDS[word] * scale))
            values.append(value * lexicon.NEGATION if negated else value)
            negated = False
        scale = 1.0
    return values


def sentiment(text: str) -> float:
    """The mean over sentences of the mean value of a sentence's polar words; 0 without any. In [-1, 1].

    A modifier right before a polar word scales it ("very" 1.25, "quite" 0.75, within [-1, 1]). "not" or "never"
    multiplies the next polar word of the same clause by -0.5; full stop, comma, "and" and "but" end a clause.
    """
    means = [sum(values) / len(values) if values else 0.0 for values in map(_polar_values, _sentences(text))]
    return sum(means) / len(means) if means else 0.0


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
    """All attributes of a response; `grammatical` depends on the prompt, the rest on the response alone."""
    return GoldAttributes(
        sentiment=sentiment(response),
        grammatical=is_grammatical(prompt, response),
        repetition=repetition(response),
        length=length(response),
    )


def gold_attributes(prompt: PromptContent, response: str) -> dict[str, float | bool | int]:
    """`sentiment`, `grammatical`, `repetition` and `length` by name."""
    return asdict(attributes_of(prompt, response))


def gold_reward(prompt: PromptContent, response: str) -> float:
    """What the simulated annotators want: positive and grammatical and non-repetitive. In [-2, 2].

    base - 2 * repetition - 0.5 * length penalty, clipped to [-2, 2], where
    base = 0.5 + 1.5 * sentiment for a grammatical response and -1.5 + 0.25 * sentiment for any other: a sentence
    out of the grammar scores below every grammatical one that does not repeat itself, however positive its words.
    """
    facts = attributes_of(prompt, response)
    base = 0.5 + 1.5 * facts.sentiment if facts.grammatical else -1.5 + 0.25 * facts.sentiment
    score = base - 2.0 * facts.repetition - 0.5 * _length_penalty(facts.length)
    return max(-REWARD_BOUND, min(REWARD_BOUND, score))
