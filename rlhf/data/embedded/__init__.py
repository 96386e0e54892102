"""The embedded corpus: short reviews from a grammar of ours, with attributes whose truth is known. Pure Python."""

from rlhf.data.embedded.attributes import (
    GoldAttributes,
    attributes_of,
    gold_attributes,
    gold_reward,
    length,
    repetition,
    sentiment,
)
from rlhf.data.embedded.corpus import CORPUS_VERSION, demonstrations, prompt_split, prompts
from rlhf.data.embedded.reviews import is_grammatical

__all__ = [
    "CORPUS_VERSION",
    "GoldAttributes",
    "attributes_of",
    "demonstrations",
    "gold_attributes",
    "gold_reward",
    "is_grammatical",
    "length",
    "prompt_split",
    "prompts",
    "repetition",
    "sentiment",
]
