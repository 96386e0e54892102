"""Repetitions of a study with several seeds, and their results as estimates with intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.config import RLHFConfig

# Two-sided 95 % quantiles of Student's t by degrees of freedom; beyond the table the normal one is near enough.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
_NORMAL95 = 1.96


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval. `samples` are the values behind it, one a seed, in the order of the seeds."""

    value: float
    low: float
    high: float
    samples: tuple[float, ...] = ()

    def to_json(self) -> dict[str, float]:
        """`{"value", "low", "high"}`."""
        return {"value": self.value, "low": self.low, "high": self.high}

    def minus(self, other: Estimate) -> Estimate:
        """The difference: paired by seed where both have the same number of several seeds.

        With one seed each the intervals are taken as independent normal ones.
        """
        if len(self.samples) == len(other.samples) > 1:
            return mean_of([mine - theirs for mine, theirs in zip(self.samples, other.samples, strict=True)])
        half = math.hypot((self.high - self.low) / 2, (other.high - other.low) / 2)
        value = self.value - other.value
        return Estimate(value, value - half, value + half)


def seeds_of(config: RLHFConfig, num_seeds: int) -> list[int]:
    """The run's seed and those that follow it."""
    return [config.seed + number for number in range(num_seeds)]


def mean_of(samples: Sequence[float]) -> Estimate:
    """The mean with Student's 95 % interval over the samples; of one sample the interval is all numbers.

    Raises `ValueError` without a sample.
    """
    if not samples:
        raise ValueError("a mean needs at least one sample")
    count = len(samples)
    mean = math.fsum(samples) / count
    if count == 1:
        return Estimate(mean, -math.inf, math.inf, tuple(samples))
    variance = math.fsum((sample - mean) ** 2 for sample in samples) / (count - 1)
    quantile = _T95[count - 2] if count - 2 < len(_T95) else _NORMAL95
    half = quantile * math.sqrt(variance / count)
    return Estimate(mean, mean - half, mean + half, tuple(samples))


def over_seeds(results: Sequence[Mapping[str, Any] | float | None]) -> Estimate:
    """A result of every seed as one estimate: Student's interval over seeds, or the only one's own interval.

    A result is a number or {"value", "low", "high"}; where one is missing the estimate is NaN.
    """
    if not results or any(result is None for result in results):
        return Estimate(math.nan, math.nan, math.nan)
    values = [
        float(result["value"] if isinstance(result, Mapping) else result) for result in results if result is not None
    ]
    only = results[0]
    if len(values) == 1 and isinstance(only, Mapping):
        low, high = only.get("low"), only.get("high")
        if low is not None and high is not None:
            return Estimate(values[0], float(low), float(high), (values[0],))
    return mean_of(values)
