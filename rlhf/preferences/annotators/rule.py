"""A rule as an annotator: it prefers what a reward scores higher."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from rlhf.config.annotators import RuleAnnotator
from rlhf.preferences.annotators.pool import TaskScorer, rating_on_scale
from rlhf.preferences.annotators.protocol import Given, ShownTask
from rlhf.preferences.store import AnnotatorKind, Answer, Choice, Ranking, Rating, Tie


@dataclass(frozen=True)
class RuleBased:
    """Takes the response with the higher score; scores that differ by no more than `margin` are a tie.

    A ranking goes by score, and neighbours within the margin share a tier. A rating lies on the line from `rating_low`
    to `rating_high`. Where the reward does not apply to one of the responses, the rule abstains.
    """

    name: str
    config: RuleAnnotator
    score: TaskScorer
    reward_settings: Mapping[str, Any]
    kind: AnnotatorKind = "rule"

    @property
    def settings(self) -> Mapping[str, Any]:
        """The config, with the settings of the reward."""
        values = self.config.model_dump(mode="json", exclude={"name", "reward"})
        return values | {"reward": dict(self.reward_settings)}

    def prepare(self, tasks: Sequence[ShownTask]) -> str | None:
        """It costs nothing, unless its reward is a judge, who looks after that itself."""
        return None

    def figures(self) -> dict[str, Any]:
        """Nothing but what the store counts."""
        return {}

    def answer(self, tasks: Sequence[ShownTask]) -> list[Given]:
        """The answers by score, with the scores as the comment."""
        given = []
        for task, scores in zip(tasks, self.score(tasks), strict=True):
            if any(math.isnan(score) for score in scores):
                given.append(Given(None, "the rule does not apply"))
            else:
                listed = ", ".join(f"{score + 0.0:.6g}" for score in scores)
                given.append(Given(self._answer(task, scores), f"scores in the order shown: {listed}"))
        return given

    def _answer(self, task: ShownTask, scores: Sequence[float]) -> Answer:
        ids = [response.id for response in task.responses]
        if task.kind == "rating":
            assert task.scale is not None
            return Rating(rating_on_scale(scores[0], self.config.rating_low, self.config.rating_high, task.scale))
        # Equal scores in the order of the ids, so that the sides decide nothing.
        order = sorted(range(len(ids)), key=lambda index: (-scores[index], ids[index]))
        tiers = [[order[0]]]
        for before, index in pairwise(order):
            if scores[before] - scores[index] <= self.config.margin:
                tiers[-1].append(index)
            else:
                tiers.append([index])
        if task.kind == "ranking":
            return Ranking(tuple(tuple(ids[index] for index in tier) for tier in tiers))
        return Tie() if len(tiers) == 1 else Choice(ids[order[0]])
