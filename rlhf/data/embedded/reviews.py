"""The grammar of the reviews: an opening (the prompt) and its continuation (the response).

There are two sorts of openings. A complete one is a sentence; one to four sentences follow. An unfinished one ends
with what it talks about ("I thought the songs of the new film"); the response first ends that sentence, with a verb
of the right number, and up to three sentences follow. Everything in the response is about the opening's topic.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Literal

from rlhf.data.embedded import lexicon
from rlhf.data.embedded.grammar import Grammar, pick
from rlhf.data.embedded.lexicon import TOPICS, Topic
from rlhf.records import PromptContent

Kind = Literal["complete", "singular", "plural"]
Tone = Literal["positive", "negative", "mixed", "neutral"]
KINDS: tuple[Kind, ...] = ("complete", "singular", "plural")
TONES: tuple[Tone, ...] = ("positive", "negative", "mixed", "neutral")
CONTINUATION_TONES: tuple[Tone, ...] = ("positive", "negative", "mixed")
MAX_SENTENCES = 4

_RELATIVES = ("brother", "sister", "mother", "father", "cousin", "friend", "son", "aunt")
_TIMES = (
    "on Monday", "on Tuesday", "on Wednesday", "on Thursday", "on Friday", "on Saturday", "on Sunday", "last week",
    "last month", "last night", "last year", "today", "yesterday",
)  # fmt: skip


@dataclass(frozen=True)
class Opening:
    """What a prompt of the grammar asks of its response."""

    topic: str
    kind: Kind


def _signed_rules(topic: Topic, tone: Literal["positive", "negative"]) -> dict[str, tuple[str, ...]]:
    adjectives = lexicon.POSITIVE_ADJECTIVES if tone == "positive" else lexicon.NEGATIVE_ADJECTIVES
    own = topic.positive if tone == "positive" else topic.negative
    vowel = tuple(word for word in adjectives if word[0] in "aeiou")
    rules: dict[str, tuple[str, ...]] = {
        f"adjective_{tone}": (*adjectives, *own),
        f"general_{tone}": adjectives,
        f"vowel_{tone}": vowel,
        f"consonant_{tone}": tuple(word for word in adjectives if word not in vowel),
        f"verb_{tone}": lexicon.POSITIVE_VERBS if tone == "positive" else lexicon.NEGATIVE_VERBS,
        f"quality_{tone}": (
            f"<adjective_{tone}>",
            f"<adjective_{tone}>",
            f"<modifier> <adjective_{tone}>",
        ),
        f"clause_{tone}": (f"<singular> was <quality_{tone}>", f"<plural> were <quality_{tone}>"),
        f"verdict_{tone}": (
            f"It was a <consonant_{tone}> <noun> .",
            f"It was an <vowel_{tone}> <noun> .",
            f"It was a <modifier> <general_{tone}> <noun> .",
        ),
        f"continuation_singular_{tone}": (
            f"was <quality_{tone}> .",
            f"was <quality_{tone}> .",
            f"was <quality_{tone}> and the <clause_{tone}> .",
        ),
        f"continuation_plural_{tone}": (
            f"were <quality_{tone}> .",
            f"were <quality_{tone}> .",
            f"were <quality_{tone}> and the <clause_{tone}> .",
        ),
    }
    common = (
        f"The <clause_{tone}> .",
        f"The <clause_{tone}> .",
        f"The <clause_{tone}> and the <clause_{tone}> .",
        f"<verdict_{tone}>",
    )
    if tone == "positive":
        feeling: tuple[str, ...] = ("<speaker> <verb_positive> the <aspect> .",)
        closing = ("<speaker> would recommend it <audience> .", "<speaker> will <revisit> again .")
    else:
        feeling = ("<speaker> <verb_negative> the <aspect> .", "<speaker> did not <verb_base> the <aspect> .")
        closing = ("<speaker> would <negator> recommend it <audience> .", "<speaker> will <negator> <revisit> again .")
    rules[f"feeling_{tone}"] = feeling
    rules[f"closing_{tone}"] = closing
    rules[f"sentence_{tone}"] = (*common, f"<feeling_{tone}>", f"<closing_{tone}>")
    return rules


def _topic_rules(topic: Topic) -> dict[str, tuple[str, ...]]:
    rules = {
        **_signed_rules(topic, "positive"),
        **_signed_rules(topic, "negative"),
        "singular": topic.singular,
        "plural": topic.plural,
        "aspect": ("<singular>", "<plural>"),
        "noun": topic.nouns,
        "revisit": (topic.revisit,),
        "speaker": ("I", "We"),
        "modifier": lexicon.MODIFIERS,
        "negator": tuple(sorted(lexicon.NEGATORS)),
        "verb_base": lexicon.BASE_VERBS,
        "audience": ("to everyone", "to my friends"),
        "number": ("first", "second", "last"),
        "count": ("two", "three", "four"),
        "place": ("door", "window"),
        "sentence_neutral": topic.facts,
        "sentence_mixed": (
            "The <clause_positive> and the <clause_negative> .",
            "The <clause_negative> and the <clause_positive> .",
        ),
        "sentence": tuple(f"<sentence_{tone}>" for tone in TONES),
    }
    for kind, verb in (("singular", "was"), ("plural", "were")):
        rules[f"continuation_{kind}_mixed"] = (
            f"{verb} <quality_positive> and the <clause_negative> .",
            f"{verb} <quality_negative> and the <clause_positive> .",
        )
        rules[f"continuation_{kind}"] = tuple(f"<continuation_{kind}_{tone}>" for tone in CONTINUATION_TONES)
    return rules


def _opening_rules(topic: Topic) -> dict[str, tuple[str, ...]]:
    thought = f"<who> <thought> the <{{aspect}}> {topic.preposition} the <which> <noun>"
    return {
        "relative": _RELATIVES,
        "time": _TIMES,
        "who": ("I", "We", "My <relative>", "My <relative> and I"),
        "encounter": topic.encounters,
        "thought": ("thought", "felt", "said"),
        "which": ("new", "old", "first", "second", "small", "big"),
        "opening_complete": ("<who> <encounter> the <which> <noun> <time> .",),
        "opening_singular": (thought.format(aspect="singular"),),
        "opening_plural": (thought.format(aspect="plural"),),
    }


GRAMMARS = {topic.name: Grammar({**_topic_rules(topic), **_opening_rules(topic)}) for topic in TOPICS}


@cache
def num_openings() -> int:
    """How many distinct prompts the grammar has."""
    return sum(grammar.count(f"opening_{kind}") for grammar in GRAMMARS.values() for kind in KINDS)


@cache
def _opening_patterns() -> list[tuple[Opening, re.Pattern[str]]]:
    return [
        (Opening(topic, kind), re.compile(grammar.pattern(f"opening_{kind}")))
        for topic, grammar in GRAMMARS.items()
        for kind in KINDS
    ]


@cache
def _sentence_patterns(opening: Opening) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """What the first sentence of a response must be, and what any later one."""
    grammar = GRAMMARS[opening.topic]
    first = "sentence" if opening.kind == "complete" else f"continuation_{opening.kind}"
    return re.compile(grammar.pattern(first)), re.compile(grammar.pattern("sentence"))


def spaced(text: str) -> str:
    """The text's words with one space before each."""
    return "".join(f" {word}" for word in text.split())


@lru_cache(maxsize=100_000)
def parse_opening(prompt: str) -> Opening | None:
    """What kind of opening the prompt is; None when the grammar does not have it."""
    text = spaced(prompt)
    return next((opening for opening, pattern in _opening_patterns() if pattern.fullmatch(text)), None)


@dataclass(frozen=True)
class Verdict:
    """What the grammar says of a response: is it a text of the grammar, and which share of its words is in sentences
    that the grammar has in their place (0 for an empty response).
    """

    grammatical: bool
    well_formed: float


def recognise(prompt: PromptContent, response: str) -> Verdict:
    """Reads the response sentence by sentence, word for word; a full stop ends a sentence.

    Nothing is well formed when the prompt is not an opening of the grammar, as no conversation is.
    """
    opening = parse_opening(prompt) if isinstance(prompt, str) else None
    text = spaced(response)
    if opening is None or not text:
        return Verdict(grammatical=False, well_formed=0.0)
    first, later = _sentence_patterns(opening)
    # The last piece is what follows the last full stop: nothing, in a text of the grammar.
    *complete, rest = re.split(r"(?<= \.)(?= |$)", text)
    fits = [(later if index else first).fullmatch(sentence) is not None for index, sentence in enumerate(complete)]
    num_fitting = sum(sentence.count(" ") for sentence, fit in zip(complete, fits, strict=True) if fit)
    grammatical = not rest and 1 <= len(complete) <= MAX_SENTENCES and all(fits)
    return Verdict(grammatical=grammatical, well_formed=num_fitting / text.count(" "))


def is_grammatical(prompt: PromptContent, response: str) -> bool:
    """Whether the grammar has this response to this prompt, word for word."""
    return recognise(prompt, response).grammatical


def sample_opening(generator: random.Random) -> str:
    """A prompt: all topics are equally likely, half of the prompts are complete sentences."""
    topic = TOPICS[pick(generator, len(TOPICS))].name
    kinds: tuple[Kind, ...] = ("complete", "complete", "singular", "plural")
    kind = kinds[pick(generator, len(kinds))]
    return GRAMMARS[topic].sample(f"opening_{kind}", generator)[1:]


def _tone(generator: random.Random, positive: float, *, continuation: bool) -> Tone:
    draw = generator.random()
    if draw < 0.1:
        return "mixed"
    if draw < 0.25 and not continuation:
        return "neutral"
    return "positive" if generator.random() < positive else "negative"


def sample_sentences(generator: random.Random, opening: Opening, count: int, positive: float) -> list[str]:
    """`count` sentences that continue the opening; an opinion is favourable with probability `positive`."""
    grammar = GRAMMARS[opening.topic]
    sentences = []
    for index in range(count):
        continuation = index == 0 and opening.kind != "complete"
        tone = _tone(generator, positive, continuation=continuation)
        name = f"continuation_{opening.kind}_{tone}" if continuation else f"sentence_{tone}"
        sentences.append(grammar.sample(name, generator))
    return sentences
