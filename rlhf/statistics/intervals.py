"""Estimates with intervals: shares, win rates, means. numpy only; every resample is drawn from a given seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

# Resamples are drawn in blocks of about this many numbers, so that memory does not grow with their count.
_BLOCK = 2_000_000


@dataclass(frozen=True)
class Interval:
    """An estimate between the two ends of its interval."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        """`{"value", "low", "high"}`."""
        return {"value": self.value, "low": self.low, "high": self.high}


def wilson(successes: float, count: int, *, confidence: float = 0.95) -> Interval:
    """The share successes / count with Wilson's score interval, no continuity correction.

    Wilson (1927); Newcombe (1998), method 3. `successes` may be fractional, for ties counted as half. Raises
    `ValueError` without any trial or for successes outside 0..count.
    """
    _check_confidence(confidence)
    if count < 1 or not 0 <= successes <= count:
        raise ValueError(f"a share needs 0 <= successes <= count and count >= 1; got {successes} of {count}")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = successes / count
    shrink = 1 + z * z / count
    center = (share + z * z / (2 * count)) / shrink
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / shrink
    # At 0 and at 1 the end equals the share; rounding must not push it past.
    return Interval(share, min(share, max(0.0, center - half)), max(share, min(1.0, center + half)))


def win_rate(scores: Sequence[float], baseline_scores: Sequence[float], *, confidence: float = 0.95) -> Interval:
    """The share of prompts on which `scores` beats `baseline_scores`, a tie counting half a win.

    Both are in the order of the prompts, shape (num_prompts,). The interval is Wilson's on wins + ties / 2 of all
    prompts. A tie varies less than a coin, so with ties the interval is at least as wide as it need be.
    """
    first, second = _values(scores), _values(baseline_scores)
    if first.shape != second.shape:
        raise ValueError(f"win_rate needs one score of each side a prompt; got {first.size} and {second.size}")
    wins = float(np.count_nonzero(first > second)) + 0.5 * float(np.count_nonzero(first == second))
    return wilson(wins, first.size, confidence=confidence)


def bootstrap_mean(
    values: Sequence[float], *, confidence: float = 0.95, num_resamples: int = 2000, seed: int = 0
) -> Interval:
    """The mean with a percentile bootstrap interval (Efron 1979) over independent `values`, shape (num_prompts,)."""
    _check_confidence(confidence)
    sample = _values(values)
    if num_resamples < 1:
        raise ValueError(f"num_resamples must be at least 1, not {num_resamples}")
    value = float(sample.mean())
    if np.all(sample == sample[0]):
        return Interval(float(sample[0]), float(sample[0]), float(sample[0]))
    generator = np.random.Generator(np.random.PCG64(seed))
    rows = max(1, _BLOCK // sample.size)
    means = np.concatenate(
        [
            sample[generator.integers(sample.size, size=(min(rows, num_resamples - start), sample.size))].mean(axis=1)
            for start in range(0, num_resamples, rows)
        ]
    )
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(value, float(low), float(high))


def bootstrap_difference(
    values: Sequence[float],
    baseline_values: Sequence[float],
    *,
    confidence: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """The mean of values - baseline_values over the same prompts; prompts are resampled, so pairs stay together."""
    first, second = _values(values), _values(baseline_values)
    if first.shape != second.shape:
        raise ValueError(f"a paired difference needs equal numbers of values; got {first.size} and {second.size}")
    differences: list[float] = (first - second).tolist()
    return bootstrap_mean(differences, confidence=confidence, num_resamples=num_resamples, seed=seed)


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence lies between 0 and 1, both excluded; got {confidence}")


def _values(values: Sequence[float]) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0 or not np.isfinite(array).all():
        raise ValueError(
            f"expected at least one finite number in one dimension; got shape {array.shape}: {values!r:.80}"
        )
    return array
