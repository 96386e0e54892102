"""The embedded corpus: short reviews from a grammar of ours, with attributes whose truth is known. Pure Python."""

from rlhf.data.embedded.attributes import (
    GOLD_REWARDS,
    GoldAttributes,
    attributes_of,
    gold_attributes,
    gold_reward,
    length,
    num_opinions,
    repetition,
    reserved_reward,
    sentiment,
)
from rlhf.data.embedded.corpus import CORPUS_VERSION, demonstrations, prompt_split, prompts
from rlhf.data.embedded.reviews import is_grammatical

__all__ = [
    "CORPUS_VERSION",
    "GOLD_REWARDS",
    "GoldAttributes",
    "attributes_of",
    "demonstrations",
    "gold_attributes",
    "gold_reward",
    "is_grammatical",
    "length",
    "num_opinions",
    "prompt_split",
    "prompts",
    "repetition",
    "reserved_reward",
    "sentiment",
]
