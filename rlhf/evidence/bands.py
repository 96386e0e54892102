"""The band of a recorded number: where one more seed would be expected, computed by one rule for every baseline."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

RULE = (
    "mean of the seeds ± t(0.995, n-1)·s·sqrt(1 + 1/n), a 99 % prediction interval for one more seed, at least "
    "± 1e-6·max(1, |mean|), clipped to the metric's range"
)
_LEVEL = 0.995
# Another CPU rounds otherwise: seeds that agree in every bit have a band of their own width all the same.
_LEAST = 1e-6
MINIMUM_SEEDS = 3


def prediction_band(values: Sequence[float], bounds: tuple[float | None, float | None]) -> tuple[float, float]:
    """Low and high end of `RULE` for the values of n >= 2 seeds; `bounds` is the metric's range, None where open.

    Source of the interval: Hahn and Meeker, Statistical Intervals (1991), section 4.7, one future observation of a
    normal distribution. Raises `ValueError` for fewer than two values.
    """
    if len(values) < 2:
        raise ValueError(f"a band needs the values of at least two seeds, got {len(values)}")
    mean, spread = statistics.fmean(values), statistics.stdev(values)
    half = student_quantile(_LEVEL, len(values) - 1) * spread * math.sqrt(1 + 1 / len(values))
    half = max(half, _LEAST * max(1.0, abs(mean)))
    low, high = mean - half, mean + half
    return (low if bounds[0] is None else max(low, bounds[0])), (high if bounds[1] is None else min(high, bounds[1]))


def student_quantile(probability: float, degrees: int) -> float:
    """The t with P(T <= t) = probability for Student's distribution; `probability` in [0.5, 1)."""
    if not 0.5 <= probability < 1 or degrees < 1:
        raise ValueError(f"expected 0.5 <= probability < 1 and degrees >= 1, got {probability} and {degrees}")
    low, high = 0.0, 1.0
    while _student_cdf(high, degrees) < probability:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_cdf(middle, degrees) < probability else (low, middle)
    return (low + high) / 2


def _student_cdf(value: float, degrees: int) -> float:
    """P(T <= value) for value >= 0: the finite sums of Abramowitz and Stegun (1964), 26.7.3 and 26.7.4."""
    angle = math.atan(value / math.sqrt(degrees))
    cosine, sine = math.cos(angle), math.sin(angle)
    term = cosine if degrees % 2 else 1.0
    total = 0.0
    for number in range(degrees % 2 + 1, degrees, 2):
        total += term
        term *= cosine * cosine * number / (number + 1)
    within = (2 / math.pi) * (angle + sine * total) if degrees % 2 else sine * total
    return 0.5 + within / 2
