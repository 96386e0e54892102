"""Student's t distribution and the interval of a mean over a few runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from rlhf.statistics.intervals import Interval

_TINY = 1e-300


def student_p_value(t: float, degrees_of_freedom: float) -> float:
    """The two-sided p-value of a t statistic: the probability of one at least as far from 0.

    `degrees_of_freedom` may be fractional. Raises `ValueError` unless they are above 0.
    """
    if not degrees_of_freedom > 0:
        raise ValueError(f"Student's t needs degrees of freedom above 0, not {degrees_of_freedom}")
    if math.isinf(t):
        return 0.0
    return _incomplete_beta(degrees_of_freedom / (degrees_of_freedom + t * t), degrees_of_freedom / 2, 0.5)


@lru_cache(maxsize=1024)
def student_quantile(confidence: float, degrees_of_freedom: float) -> float:
    """The t that holds `confidence` of the distribution between -t and t. Raises `ValueError` outside (0, 1)."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence lies between 0 and 1, both excluded; got {confidence}")
    low, high = 0.0, 1.0
    while student_p_value(high, degrees_of_freedom) > 1 - confidence:
        low, high = high, high * 2
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if student_p_value(middle, degrees_of_freedom) > 1 - confidence:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def t_interval(values: Sequence[float], *, confidence: float = 0.95) -> Interval:
    """The mean of independent `values`, one a seed, with Student's interval.

    Raises `ValueError` for fewer than two values: one tells nothing of how much another would differ.
    """
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1 or sample.size < 2 or not np.isfinite(sample).all():
        raise ValueError(f"an interval over seeds needs at least two finite values; got {values!r:.80}")
    mean = float(sample.mean())
    half = student_quantile(confidence, sample.size - 1) * float(sample.std(ddof=1)) / math.sqrt(sample.size)
    return Interval(mean, mean - half, mean + half)


def _incomplete_beta(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function, by its continued fraction (DLMF 8.17.22)."""
    if x <= 0 or x >= 1:
        return 0.0 if x <= 0 else 1.0
    if x > (a + 1) / (a + b + 2):
        # The fraction converges fast on this side of the mean only.
        return 1.0 - _incomplete_beta(1 - x, b, a)
    logarithm = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    return math.exp(logarithm) * _fraction(x, a, b) / a


def _fraction(x: float, a: float, b: float) -> float:
    """1 / (1 + d1 / (1 + d2 / ...)), evaluated from the front (Lentz 1976)."""
    value, numerator, denominator = 1.0, 1.0, 0.0
    for index in range(1000):
        half = index // 2
        if index == 0:
            term = 1.0
        elif index % 2 == 0:
            term = half * (b - half) * x / ((a + 2 * half - 1) * (a + 2 * half))
        else:
            term = -(a + half) * (a + b + half) * x / ((a + 2 * half) * (a + 2 * half + 1))
        denominator = 1.0 / _away_from_zero(1.0 + term * denominator)
        numerator = _away_from_zero(1.0 + term / numerator)
        change = numerator * denominator
        value *= change
        if abs(change - 1.0) < 1e-15:
            break
    # Lentz's recurrence began with 1 in front of the fraction.
    return value - 1.0


def _away_from_zero(value: float) -> float:
    return value if abs(value) > _TINY else _TINY
