"""Prompts and demonstrations of the embedded corpus: the same on every machine for the same config."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable
from functools import lru_cache

from rlhf.config.data import EmbeddedData, SplitConfig
from rlhf.data.embedded import reviews
from rlhf.data.embedded.attributes import MAX_WORDS, MIN_WORDS, length, repetition
from rlhf.data.embedded.grammar import pick
from rlhf.data.embedded.reviews import Opening
from rlhf.data.splits import SPLITS, SplitName, Splits, split_of
from rlhf.errors import ConfigError
from rlhf.records import Demonstration, Prompt, prompt_key

# Part of every random stream and of the data's fingerprint: raise it when any text of the corpus changes.
CORPUS_VERSION = 1

REPETITIVE_SHARE = 0.15
BROKEN_SHARE = 0.03
SPLITTING = SplitConfig(validation=0.04, test=0.06, salt="rlhf-embedded")


def _generator(*key: object) -> random.Random:
    """A stream for a purpose. The seed is a hash of our own, so that it does not rest on Python's seeding of text."""
    digest = hashlib.sha256(repr(("embedded", CORPUS_VERSION, *key)).encode()).digest()
    return random.Random(int.from_bytes(digest, "big"))


def prompt_split(prompt: str) -> SplitName:
    """Decided by the prompt alone, for demonstrations and prompts alike, so that no prompt is in two splits."""
    return split_of(prompt_key(prompt), SPLITTING)


def prompts(config: EmbeddedData) -> Splits[Prompt]:
    """Distinct prompts, as many in each split as the config says.

    Raises `ConfigError` when a split wants more than half of the openings that the grammar has for it.
    """
    wanted: dict[SplitName, int] = {
        "train": config.num_prompts,
        "validation": config.num_validation_prompts,
        "test": config.num_test_prompts,
    }
    shares = {
        "train": 1 - SPLITTING.validation - SPLITTING.test,
        "validation": SPLITTING.validation,
        "test": SPLITTING.test,
    }
    fields = {"train": "num_prompts", "validation": "num_validation_prompts", "test": "num_test_prompts"}
    for split, count in wanted.items():
        limit = int(reviews.num_openings() * shares[split] / 2)
        if count > limit:
            raise ConfigError(
                f"data.{fields[split]} = {count}: the embedded corpus gives at most {limit} prompts in its {split} "
                f"split. Ask for fewer, or take data from files."
            )
    found: dict[SplitName, dict[str, None]] = {split: {} for split in wanted}
    generator = _generator(config.corpus_seed, "prompts")
    while any(len(found[split]) < wanted[split] for split in wanted):
        prompt = reviews.sample_opening(generator)
        split = prompt_split(prompt)
        if len(found[split]) < wanted[split]:
            found[split][prompt] = None
    records = {split: [Prompt(prompt) for prompt in texts] for split, texts in found.items()}
    return Splits(train=records["train"], validation=records["validation"], test=records["test"])


def demonstrations(config: EmbeddedData) -> Splits[Demonstration]:
    """`num_demonstrations` reviews of mixed quality over all splits; a prompt's split is the one that `prompts` uses.

    Opinions run from all bad to all good, most reviews being of one mind; `REPETITIVE_SHARE` repeat themselves;
    `BROKEN_SHARE` are not of the grammar: words swapped, dropped, moved or replaced, or an end that is missing.
    """
    records: dict[SplitName, list[Demonstration]] = {split: [] for split in SPLITS}
    for prompt, response in _demonstration_texts(config.corpus_seed, config.num_demonstrations):
        records[prompt_split(prompt)].append(Demonstration(prompt, response))
    return Splits(train=records["train"], validation=records["validation"], test=records["test"])


# Several callers ask for the corpus in one process (stage, tokenizer, fingerprint), and it takes a second.
@lru_cache(maxsize=2)
def _demonstration_texts(corpus_seed: int, count: int) -> tuple[tuple[str, str], ...]:
    generator = _generator(corpus_seed, "demonstrations")
    texts = []
    for _ in range(count):
        prompt = reviews.sample_opening(generator)
        opening = reviews.parse_opening(prompt)
        if opening is None:
            raise AssertionError(f"the grammar does not recognise its own opening {prompt!r}")
        draw = generator.random()
        if draw < BROKEN_SHARE:
            response = _broken(generator, prompt, opening)
        elif draw < BROKEN_SHARE + REPETITIVE_SHARE:
            response = _repetitive(generator, opening)
        else:
            response = _good(generator, opening)
        texts.append((prompt, response))
    return tuple(texts)


def _accept(draw: Callable[[], str], keep: Callable[[str], bool]) -> str:
    while True:
        text = draw()
        if keep(text):
            return text


def _has_usual_length(text: str) -> bool:
    return MIN_WORDS <= length(text) <= MAX_WORDS


def _mood(generator: random.Random) -> float:
    """A review's share of favourable opinions, arcsine distributed: most reviews are of one mind, half of them good."""
    return math.sin(0.5 * math.pi * generator.random()) ** 2


def _good(generator: random.Random, opening: Opening) -> str:
    positive = _mood(generator)

    def draw() -> str:
        return "".join(reviews.sample_sentences(generator, opening, 1 + pick(generator, 3), positive))

    return _accept(draw, lambda text: _has_usual_length(text) and repetition(text) < 0.1)


def _repetitive(generator: random.Random, opening: Opening) -> str:
    """Either a sentence said twice or more, or a polar word that comes back in other sentences."""
    positive = _mood(generator)
    repeats_sentence = generator.random() < 0.5

    def draw() -> str:
        sentences = reviews.sample_sentences(generator, opening, 2 + pick(generator, 2), positive)
        if repeats_sentence:
            # An unfinished opening's first sentence cannot stand later, so the last sentence is the one said again.
            sentences = sentences[-3:] + sentences[-1:]
        return "".join(sentences)

    return _accept(draw, lambda text: _has_usual_length(text) and repetition(text) >= 0.25)


def _broken(generator: random.Random, prompt: str, opening: Opening) -> str:
    def draw() -> str:
        words = _good(generator, opening).split()
        position = pick(generator, len(words) - 1)
        flaw = pick(generator, 5)
        if flaw == 0:
            words[position], words[position + 1] = words[position + 1], words[position]
        elif flaw == 1:
            del words[position]
        elif flaw == 2:
            words = words[: max(3, position)]
        elif flaw == 3:
            words.insert(pick(generator, len(words)), words.pop(position))
        else:
            other = _good(generator, Opening(opening.topic, "complete")).split()
            words[position] = other[pick(generator, len(other))]
        return reviews.spaced(" ".join(words))

    return _accept(draw, lambda text: not reviews.is_grammatical(prompt, text))
