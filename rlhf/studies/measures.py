"""What is read from a finished arm: a stage's key result, or a number that sums up a metric along the stage."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.runs.folder import RunFolder
from rlhf.runs.jsonable import read_lines

KL = "ppo/kl_to_reference"


@dataclass(frozen=True)
class Series:
    """A metric along a stage: `steps` as they were logged, `values`, and `distances`, the square roots of the KL.

    A KL estimated below 0 counts as 0; a stage that logs none has no distances.
    """

    steps: tuple[int, ...]
    values: tuple[float, ...]
    distances: tuple[float, ...] = ()

    def smoothed(self, width: int) -> Series:
        """Means over windows of `width` entries that do not overlap; the last one ends with the last entry.

        What does not fill a window at the beginning is left out; a series that is shorter is one window.
        """
        count = len(self.steps)
        width = min(width, count)
        starts = range(count % width, count, width) if width else ()

        def means(values: Sequence[float]) -> tuple[float, ...]:
            return tuple(math.fsum(values[start : start + width]) / width for start in starts) if values else ()

        steps = tuple(self.steps[start + width - 1] for start in starts)
        return Series(steps, means(self.values), means(self.distances))


def series_of(arm: RunFolder, metric: str) -> Series | None:
    """The metric's series in an arm's metrics; None when the arm logged none."""
    stage = metric.partition("/")[0]
    lines = [line for line in read_lines(arm.metrics) if line.get("stage") == stage and _is_number(line.get(metric))]
    if not lines:
        return None
    distances: tuple[float, ...] = ()
    if all(_is_number(line.get(KL)) for line in lines):
        distances = tuple(math.sqrt(max(float(line[KL]), 0.0)) for line in lines)
    return Series(tuple(int(line["step"]) for line in lines), tuple(float(line[metric]) for line in lines), distances)


def result_of(arm: RunFolder, result: str, window: int) -> Mapping[str, Any] | float | None:
    """A result as section `compare_arms` names it: a number or an estimate; None where the arm has none."""
    metric, _, reduction = result.partition("@")
    if not reduction:
        return _key_result(arm, metric)
    series = series_of(arm, metric)
    return None if series is None else reduce(series, reduction, window)


def _key_result(arm: RunFolder, metric: str) -> Mapping[str, Any] | float | None:
    """Of the stage's summary, whose names may begin with the stage or leave it out."""
    stage, _, name = metric.partition("/")
    result = arm.stage(stage).read_result()
    if result is None:
        return None
    found: Any = result.summary.get(metric, result.summary.get(name))
    if isinstance(found, Mapping):
        return found if _is_number(found.get("value")) else None
    return float(found) if _is_number(found) else None


def reduce(series: Series, reduction: str, window: int) -> float | None:
    """One number of a series: of its windows of `window` entries, but for the linear fits, which take every entry.

    `first`, `last`, `max`, `min` are means of a window; `rise` is last - first, `fall` max - last, `peak_step` the step
    at which the largest window ends. `linear_slope` and `linear_r_squared` are of the least-squares line over the
    square root of the KL (a unit of the metric for each root of a nat); None without a KL, or where it does not vary.
    """
    if reduction.startswith("linear"):
        slope, r_squared = line_fit(series.distances, series.values)
        found = slope if reduction == "linear_slope" else r_squared
        return found if math.isfinite(found) else None
    smooth = series.smoothed(window)
    values = smooth.values
    peak = max(range(len(values)), key=values.__getitem__)
    numbers = {
        "first": values[0],
        "last": values[-1],
        "max": values[peak],
        "min": min(values),
        "rise": values[-1] - values[0],
        "fall": values[peak] - values[-1],
        "peak_step": float(smooth.steps[peak]),
    }
    return numbers[reduction]


def line_fit(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Slope and R squared of the least-squares line y = a + b x; NaN where x or y does not vary, or x is missing."""
    if len(x) != len(y) or len(x) < 2:
        return math.nan, math.nan
    mean_x, mean_y = math.fsum(x) / len(x), math.fsum(y) / len(y)
    xx = math.fsum((one - mean_x) ** 2 for one in x)
    yy = math.fsum((one - mean_y) ** 2 for one in y)
    xy = math.fsum((one - mean_x) * (other - mean_y) for one, other in zip(x, y, strict=True))
    if xx == 0 or yy == 0:
        return math.nan, math.nan
    return xy / xx, xy * xy / (xx * yy)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
