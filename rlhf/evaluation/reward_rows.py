"""Comparisons with a reward model's scores as arrays, and intervals that know which of them share a prompt. numpy only.

Figures are `{"value", "low", "high"}`; what cannot be said is `{"not_defined": why}`, never NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf import statistics
from rlhf.errors import DataError
from rlhf.records import Comparison
from rlhf.statistics.annotations import Resampling
from rlhf.statistics.intervals import Interval

Floats = NDArray[np.float64]
Figure = dict[str, Any]
# Of weights (num_resamples, num_comparisons), how often each was drawn: values (num_resamples, num_statistics).
Statistic = Callable[[Floats], Floats]
# With fewer rows a share says little, and the report marks it.
FEW_ROWS = 20
# Resamples are worked on in blocks of about this many numbers, and there are fewer of them where prompts are many.
_BLOCK = 1_000_000
_DRAWS = 20_000_000
_FEWEST_RESAMPLES = 200


@dataclass(frozen=True, eq=False)
class ScoredRows:
    """N comparisons scored by M members of an ensemble (1 for a single model).

    `chosen_scores` and `rejected_scores` are raw, shape (M, N); `chosen_lengths` and `rejected_lengths` have shape (N,)
    and count `length_unit`. Raises `DataError` for a score that is no finite number.
    """

    comparisons: tuple[Comparison, ...]
    chosen_scores: Floats
    rejected_scores: Floats
    chosen_lengths: Floats
    rejected_lengths: Floats
    length_unit: str = "tokens"

    def __post_init__(self) -> None:
        count = len(self.comparisons)
        if not (
            count
            and self.chosen_scores.ndim == 2
            and self.chosen_scores.shape == self.rejected_scores.shape
            and self.chosen_scores.shape[1] == len(self.chosen_lengths) == len(self.rejected_lengths) == count
        ):
            raise ValueError(f"{count} comparisons do not go with scores {self.chosen_scores.shape}")
        bad = ~(np.isfinite(self.chosen_scores) & np.isfinite(self.rejected_scores)).all(axis=0)
        if bad.any():
            raise DataError(
                f"the reward model gave no finite score to {int(bad.sum())} of {count} comparisons (the first: number "
                f"{int(bad.argmax()) + 1}); its weights are broken, or the precision is too low for them"
            )

    def __len__(self) -> int:
        return len(self.comparisons)

    @property
    def num_members(self) -> int:
        """M."""
        return len(self.chosen_scores)

    @cached_property
    def member_differences(self) -> Floats:
        """Score of chosen less that of rejected by member, shape (M, N)."""
        return self.chosen_scores - self.rejected_scores

    @cached_property
    def differences(self) -> Floats:
        """The members' mean difference, shape (N,)."""
        mean: Floats = self.member_differences.mean(axis=0)
        return mean

    @cached_property
    def labels(self) -> Floats:
        """How likely chosen is the better one, by the annotators, shape (N,): 1 where nobody says, 0.5 for a tie."""
        return np.array([1.0 if row.probability is None else row.probability for row in self.comparisons])

    @cached_property
    def ties(self) -> NDArray[np.bool_]:
        """Where neither response is the better one, shape (N,)."""
        found: NDArray[np.bool_] = self.labels == 0.5
        return found

    @cached_property
    def right(self) -> Floats:
        """1 where chosen has the higher score, 0 where the lower one, 0.5 for equal scores, shape (N,)."""
        return 0.5 + 0.5 * np.sign(self.differences)

    @cached_property
    def gaps(self) -> Floats:
        """How much longer chosen is than rejected, shape (N,)."""
        return self.chosen_lengths - self.rejected_lengths

    @cached_property
    def prompts(self) -> NDArray[np.int64]:
        """The number of each comparison's prompt, from 0 in the order of appearance, shape (N,)."""
        numbers: dict[Any, int] = {}
        return np.array([numbers.setdefault(row.prompt, len(numbers)) for row in self.comparisons], dtype=np.int64)

    @property
    def num_prompts(self) -> int:
        """Distinct prompts."""
        return int(self.prompts.max()) + 1


def figure(interval: Interval, undefined: str = "it does not vary") -> Figure:
    """The interval as JSON; without a number, the reason."""
    if not np.isfinite(interval.value):
        return not_defined(undefined)
    body: Figure = {"value": interval.value, "low": interval.low, "high": interval.high}
    return {name: number if np.isfinite(number) else None for name, number in body.items()}


def not_defined(reason: str) -> Figure:
    """What stands in place of a number that there is not."""
    return {"not_defined": reason}


def share(successes: float, count: int, reason: str, confidence: float = 0.95) -> Figure:
    """A share with Wilson's interval, `few` set where it is of fewer than 20; without any, the reason."""
    if not count:
        return not_defined(reason)
    body: Figure = statistics.wilson(float(successes), count, confidence=confidence).to_json()
    return {**body, "few": True} if count < FEW_ROWS else body


def over_prompts(rows: ScoredRows, statistic: Statistic, resampling: Resampling) -> list[Interval]:
    """A percentile bootstrap interval for each column of `statistic`; prompts are drawn with all their comparisons.

    Comparisons of one prompt hang together, those of different prompts do not. For very many prompts there are fewer
    resamples than `resampling` asks for, at least 200.
    """
    size = max(1, _BLOCK // len(rows))

    def of_prompts(drawn: Floats) -> Floats:
        weights = (drawn[start : start + size][:, rows.prompts] for start in range(0, len(drawn), size))
        return np.concatenate([statistic(part) for part in weights])

    most = max(_FEWEST_RESAMPLES, _DRAWS // rows.num_prompts)
    affordable = Resampling(resampling.confidence, min(resampling.num_resamples, most), resampling.seed)
    return affordable.intervals(of_prompts, np.ones(rows.num_prompts))


def weighted_mean(weights: Floats, values: Floats) -> Floats:
    """Means of `values` (N,) under weights (R, N), shape (R,); NaN where all weights are 0."""
    totals = weights.sum(axis=1)
    mean: Floats = np.divide(weights @ values, totals, out=np.full(len(weights), np.nan), where=totals > 0)
    return mean
