"""A pool of simulated annotators who differ: noise, taste, flips, position bias, ties and abstention. Pure Python."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from rlhf.config.annotators import SimulatedAnnotators
from rlhf.errors import DataError
from rlhf.preferences.annotators.protocol import Given, ShownResponse, ShownTask
from rlhf.preferences.annotators.simulated import (
    keyed_gumbel,
    keyed_normal,
    keyed_uniform,
    preference_probability,
)
from rlhf.preferences.store import AnnotatorKind, Answer, BothBad, Choice, Ranking, Rating, Tie

# The scores of each task's responses, in the order shown. NaN where the reward does not apply.
TaskScorer = Callable[[Sequence[ShownTask]], list[list[float]]]
_EULER = 0.5772156649015329


@dataclass(frozen=True)
class PoolAnnotator:
    """One annotator of a pool. What it thinks of a response is the reward plus its own taste.

    Of a pair: it abstains, finds both bad, or sees a tie where the config says so; else it chooses with the
    probability of `preference_probability`, and the choice is turned round with `flip_share`. A ranking has the order
    of reward / temperature + Gumbel noise (Plackett 1975, Luce 1959), whose pairs have the same probabilities; the
    bias of the response shown first falls in a straight line to 0 at the last. A rating rounds the reward with
    Gumbel noise of mean 0, on the line from `rating_low` to `rating_high`.

    A draw belongs to the responses in their fixed order, so that without a bias the sides change nothing.
    """

    name: str
    config: SimulatedAnnotators
    score: TaskScorer
    seed: int
    reward_settings: Mapping[str, Any]
    kind: AnnotatorKind = "simulated"

    @property
    def settings(self) -> Mapping[str, Any]:
        """The config but for what only the pool as a whole has, and the seed."""
        values = self.config.model_dump(mode="json", exclude={"name", "num_annotators", "weights", "reward"})
        return values | {"reward": dict(self.reward_settings), "seed": self.seed}

    @property
    def temperature(self) -> float:
        """The annotator's own temperature: log-normal over the pool."""
        config = self.config
        if not config.temperature_spread:
            return config.temperature
        return config.temperature * math.exp(
            config.temperature_spread * keyed_normal(self.seed, self.name, "temperature", "", "")
        )

    def prepare(self, tasks: Sequence[ShownTask]) -> str | None:
        """It costs nothing."""
        return None

    def figures(self) -> dict[str, Any]:
        """Nothing but what the store counts."""
        return {}

    def answer(self, tasks: Sequence[ShownTask]) -> list[Given]:
        """Raises `DataError` for a reward that is not finite."""
        return [self._one(task, scores) for task, scores in zip(tasks, self.score(tasks), strict=True)]

    def _one(self, task: ShownTask, scores: Sequence[float]) -> Given:
        opinions: dict[str, float] = {}
        for response, score in zip(task.responses, scores, strict=True):
            if not math.isfinite(score):
                raise DataError(
                    f"the annotator {self.name} needs a finite reward of every response, and got {score} for "
                    f"{response.text!r:.200}; give it a reward that always applies"
                )
            opinions[response.id] = score + self._taste(task, response)
        if self._abstains(task, opinions):
            return Given(None)
        if task.kind == "pairwise":
            return Given(self._pair(task, opinions))
        return Given(self._ranking(task, opinions) if task.kind == "ranking" else self._rating(task, opinions))

    def _taste(self, task: ShownTask, response: ShownResponse) -> float:
        spread = self.config.taste_spread
        return spread and spread * keyed_normal(self.seed, self.name, "taste", task.prompt.prompt, response.text)

    def _abstains(self, task: ShownTask, opinions: Mapping[str, float]) -> bool:
        config = self.config
        if not config.abstain_share:
            return False
        difference = max(opinions.values()) - min(opinions.values())
        close = config.abstain_margin is None or difference <= config.abstain_margin
        return close and self._uniform("abstain", task) < config.abstain_share

    def _pair(self, task: ShownTask, opinions: Mapping[str, float]) -> Answer:
        config = self.config
        if config.both_bad_below is not None and max(opinions.values()) < config.both_bad_below:
            return BothBad()
        first, second = (response.id for response in task.in_fixed_order)
        difference = opinions[first] - opinions[second]
        if config.tie_margin is not None and abs(difference) <= config.tie_margin:
            return Tie()
        bias = config.position_bias if task.responses[0].id == first else -config.position_bias
        takes_first = self._uniform("choice", task) < preference_probability(difference, self.temperature, bias)
        return Choice(first if takes_first != self._flips(task) else second, self._strength(abs(difference)))

    def _strength(self, difference: float) -> int:
        return 1 + sum(difference >= margin for margin in self.config.strength_margins)

    def _ranking(self, task: ShownTask, opinions: Mapping[str, float]) -> Ranking:
        numbers = {response.id: number for number, response in enumerate(task.in_fixed_order)}
        last = len(task.responses) - 1
        appeal = {}
        for position, response in enumerate(task.responses):
            key = f"{task.key}:{numbers[response.id]}"
            noise = keyed_gumbel(self.seed, self.name, "ranking", task.prompt.prompt, key)
            noise += self.config.position_bias * (1 - position / last)
            scaled = opinions[response.id] / self.temperature if self.temperature else 0.0
            # At temperature 0 the opinion decides and the noise breaks ties.
            appeal[response.id] = (0.0 if self.temperature else opinions[response.id], scaled + noise)
        order = sorted(appeal, key=lambda one: appeal[one], reverse=True)
        margin = self.config.tie_margin
        tiers = [[order[0]]]
        for before, response_id in pairwise(order):
            if margin is not None and abs(opinions[before] - opinions[response_id]) <= margin:
                tiers[-1].append(response_id)
            else:
                tiers.append([response_id])
        if self._flips(task):
            tiers.reverse()
        return Ranking(tuple(tuple(tier) for tier in tiers))

    def _rating(self, task: ShownTask, opinions: Mapping[str, float]) -> Rating:
        (opinion,) = opinions.values()
        noise = keyed_gumbel(self.seed, self.name, "rating", task.prompt.prompt, task.key) - _EULER
        assert task.scale is not None
        value = rating_on_scale(
            opinion + self.temperature * noise, self.config.rating_low, self.config.rating_high, task.scale
        )
        return Rating(task.scale + 1 - value if self._flips(task) else value)

    def _flips(self, task: ShownTask) -> bool:
        return bool(self.config.flip_share) and self._uniform("flip", task) < self.config.flip_share

    def _uniform(self, purpose: str, task: ShownTask) -> float:
        return keyed_uniform(self.seed, self.name, purpose, task.prompt.prompt, task.key)


def rating_on_scale(score: float, low: float, high: float, scale: int) -> int:
    """The whole rating from 1 (a score of `low` or less) to `scale` (`high` or more) that is nearest to the line."""
    share = min(max((score - low) / (high - low), 0.0), 1.0)
    return 1 + math.floor((scale - 1) * share + 0.5)
