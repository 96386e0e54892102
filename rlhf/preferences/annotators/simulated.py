"""Simulated annotators: they see a reward and choose with Bradley-Terry noise. Pure Python.

Every random number is keyed by (seed, annotator, purpose, prompt, key): a label depends on nothing else that was
labelled, and is the same on every machine.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

from rlhf.records import Comparison, PromptContent, prompt_hash

GoldReward = Callable[[PromptContent, str], float]


@dataclass(frozen=True)
class Judgement:
    """A choice between two responses; `probability` is how likely the annotator was to choose the first one."""

    chosen_first: bool
    probability: float


@dataclass(frozen=True)
class SimulatedAnnotator:
    """Chooses the first of two responses with P = sigmoid((gold(first) - gold(second)) / temperature).

    Bradley and Terry (1952). At temperature 0 the better response always wins and only equal ones are left to chance.
    Every random number is keyed by (seed, name, prompt, key): a label depends on nothing else that was labelled, and
    annotators of different names err independently. Raises `ValueError` for a negative or non-finite temperature.
    """

    name: str
    gold: GoldReward
    temperature: float
    seed: int

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"an annotator's temperature is a finite number of at least 0, not {self.temperature}")

    def compare(self, prompt: PromptContent, first: str, second: str, key: str) -> Judgement:
        """Which of two responses is preferred; `key` tells comparisons of one prompt apart.

        Raises `ValueError` when the gold reward of a response is not finite.
        """
        difference = self._score(prompt, first) - self._score(prompt, second)
        probability = preference_probability(difference, self.temperature)
        return Judgement(self._uniform("choice", prompt, key) < probability, probability)

    def label(self, prompt: PromptContent, response: str, other: str, key: str) -> Comparison:
        """A comparison of the two responses, shown in random order; the record keeps which side was chosen."""
        first, second = (response, other) if self._uniform("order", prompt, key) < 0.5 else (other, response)
        judgement = self.compare(prompt, first, second, key)
        chosen, rejected = (first, second) if judgement.chosen_first else (second, first)
        return Comparison(
            prompt=prompt,
            chosen=chosen,
            rejected=rejected,
            annotator=self.name,
            chosen_shown_first=judgement.chosen_first,
        )

    def _score(self, prompt: PromptContent, response: str) -> float:
        score = self.gold(prompt, response)
        if not math.isfinite(score):
            raise ValueError(f"the gold reward gave {score} for the response {response!r}")
        return score

    def _uniform(self, purpose: str, prompt: PromptContent, key: str) -> float:
        return keyed_uniform(self.seed, self.name, purpose, prompt, key)


def preference_probability(difference: float, temperature: float, bias: float = 0.0) -> float:
    """How likely the first of two responses is preferred: sigmoid(difference / temperature + bias).

    `difference` is how much better the first one is. At temperature 0 it decides alone, unless it is 0.
    """
    if temperature == 0 and difference != 0:
        return float(difference > 0)
    exponent = 0.0 if difference == 0 else 0.5 * difference / temperature
    # tanh does not overflow, however small the temperature.
    return 0.5 * (1.0 + math.tanh(exponent + 0.5 * bias))


def keyed_uniform(seed: int, name: str, purpose: str, prompt: PromptContent, key: str) -> float:
    """A number in [0, 1) that is the same on every machine."""
    text = repr((seed, name, purpose, prompt_hash(prompt), key))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def keyed_normal(seed: int, name: str, purpose: str, prompt: PromptContent, key: str) -> float:
    """A standard normal number, by inverting the distribution at `keyed_uniform`."""
    return NormalDist().inv_cdf(_inside(keyed_uniform(seed, name, purpose, prompt, key)))


def keyed_gumbel(seed: int, name: str, purpose: str, prompt: PromptContent, key: str) -> float:
    """A standard Gumbel number: the differences of two have the logistic distribution of Bradley and Terry."""
    return -math.log(-math.log(_inside(keyed_uniform(seed, name, purpose, prompt, key))))


def _inside(uniform: float) -> float:
    """A number in (0, 1): the middle of the interval of 2**-53 that the number in [0, 1) stands for."""
    return min(uniform + 2**-54, 1 - 2**-53)
