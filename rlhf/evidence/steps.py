"""Compares the logged numbers of two runs step by step: where they part, by how much, and whether that is rounding."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

Row = Mapping[str, Any]
Verdict = Literal["identical", "rounding", "different"]

# What counts as rounding: a difference below this share of the largest value that the metric has in the stage, or below
# this number, since metrics such as an approximate KL of equal policies consist of nothing but rounding.
RELATIVE_ROUNDING = 1e-4
ABSOLUTE_ROUNDING = 1e-6
# Steps at which the growth of the difference is shown.
_NUM_GROWTH = 6


@dataclass(frozen=True)
class Divergence:
    """Two numbers that differ: at a step of a stage, or in its result (`step` None).

    `relative` is the difference as a share of the largest size that the metric has in the stage, in either run;
    infinite where one of them is no finite number. `num_others` more metrics differ at this step. `alone`: one run has
    no such metric there.
    """

    stage: str
    step: int | None
    metric: str
    first: Any
    second: Any
    relative: float
    num_others: int = 0
    alone: bool = False

    @property
    def place(self) -> tuple[str, int | None]:
        """Stage and step."""
        return self.stage, self.step

    def describe(self) -> str:
        """`ppo step 3: ppo/score_mean 1.25 against 1.3 (relative 0.038)`."""
        where = f"{self.stage} result" if self.step is None else f"{self.stage} step {self.step}"
        # As many digits as tell the two apart.
        digits = next((n for n in (6, 9, 12, 17) if _digits(self.first, n) != _digits(self.second, n)), 17)
        others = f"; {self.num_others} more at this step" if self.num_others else ""
        return (
            f"{where}: {self.metric} {_digits(self.first, digits)} against {_digits(self.second, digits)} "
            f"(relative {_short(self.relative)}{others})"
        )


@dataclass(frozen=True)
class StageSteps:
    """How the lines of one stage compare.

    `first` is the first step at which anything differs, `beyond` the first at which more than rounding does, `largest`
    the largest relative difference, `growth` the largest one at some of the steps. `unmatched` has the steps that one
    run alone logged, within the part that both were to reach.
    """

    num_compared: int
    num_first: int
    num_second: int
    first: Divergence | None
    beyond: Divergence | None
    largest: float
    growth: tuple[tuple[int, float], ...]
    unmatched: tuple[int, ...]


def compare_steps(
    stage: str,
    first: Sequence[Row],
    second: Sequence[Row],
    *,
    finished: bool = False,
    thinned: tuple[bool, bool] = (False, False),
) -> StageSteps:
    """Compares the lines of a stage by their step; several lines of a step in their order.

    `finished`: both came to the stage's end, so that a step which one alone has is a difference wherever it is; else
    only up to the last step that both reached. `thinned`: which of the two is a record from which steps were left out,
    so that a step which it has not means nothing.
    """
    ours, theirs = _by_step(first), _by_step(second)
    both = [key for key in ours if key in theirs]
    scales = _scales([*first, *second])
    found: list[tuple[int, list[Divergence]]] = []
    for key in both:
        differing = list(_row_differences(stage, key[0], ours[key], theirs[key], scales))
        found.append((key[0], differing))
    differing_steps = [(step, parts) for step, parts in found if parts]
    beyond = [(step, [part for part in parts if not is_rounding(part)]) for step, parts in differing_steps]
    reached = math.inf if finished else min(max((key[0] for key in side), default=-1) for side in (ours, theirs))
    alone = (set() if thinned[1] else ours.keys() - theirs.keys()) | (
        set() if thinned[0] else theirs.keys() - ours.keys()
    )
    unmatched = sorted({key[0] for key in alone if key[0] <= reached})
    return StageSteps(
        num_compared=len(both),
        num_first=len(ours),
        num_second=len(theirs),
        first=_worst(differing_steps[0][1]) if differing_steps else None,
        beyond=next((_worst(parts) for _, parts in beyond if parts), None),
        largest=max((part.relative for _, parts in found for part in parts), default=0.0),
        growth=_growth(found),
        unmatched=tuple(unmatched),
    )


def compare_results(stage: str, first: Mapping[str, Any], second: Mapping[str, Any]) -> list[Divergence]:
    """The numbers and texts of two results that differ, in the order of the first."""
    ours, theirs = _leaves(first), _leaves(second)
    return [
        Divergence(stage, None, name, ours.get(name), theirs.get(name), _relative(ours.get(name), theirs.get(name)))
        for name in [*ours, *(name for name in theirs if name not in ours)]
        if not _equal(ours.get(name), theirs.get(name)) or (name in ours) != (name in theirs)
    ]


def is_rounding(part: Divergence) -> bool:
    """Whether a difference may come from another order of additions alone."""
    if part.relative <= RELATIVE_ROUNDING:
        return True
    numbers = (part.first, part.second)
    return all(_is_number(value) for value in numbers) and abs(part.first - part.second) <= ABSOLUTE_ROUNDING


def _by_step(rows: Sequence[Row]) -> dict[tuple[int, int], Row]:
    """The lines by their step and, of several at a step, their number."""
    counts: dict[int, int] = {}
    found = {}
    for row in rows:
        step = row.get("step")
        step = step if isinstance(step, int) else -1
        found[step, counts.get(step, 0)] = row
        counts[step] = counts.get(step, 0) + 1
    return found


def _scales(rows: Sequence[Row]) -> dict[str, float]:
    """The largest size that each metric has."""
    scales: dict[str, float] = {}
    for row in rows:
        for name, value in row.items():
            if _is_number(value):
                scales[name] = max(abs(value), scales.get(name, 0.0))
    return scales


def _row_differences(
    stage: str, step: int, first: Row, second: Row, scales: Mapping[str, float]
) -> Iterator[Divergence]:
    names = [name for name in first if name not in ("stage", "step")]
    names += [name for name in second if name not in first]
    for name in names:
        ours, theirs = first.get(name), second.get(name)
        alone = (name in first) != (name in second)
        if not _equal(ours, theirs) or alone:
            yield Divergence(stage, step, name, ours, theirs, _relative(ours, theirs, scales.get(name)), alone=alone)


def _worst(parts: Sequence[Divergence]) -> Divergence:
    """The largest difference; a metric that one run alone has says less than one whose values differ."""
    return replace(max(parts, key=lambda part: (not part.alone, part.relative)), num_others=len(parts) - 1)


def _growth(found: Sequence[tuple[int, list[Divergence]]]) -> tuple[tuple[int, float], ...]:
    """The largest relative difference up to some of the steps: the first that differs, the last, and between them."""
    steps = [(step, max((part.relative for part in parts), default=0.0)) for step, parts in found]
    start = next((number for number, (_, largest) in enumerate(steps) if largest > 0), None)
    if start is None:
        return ()
    steps = steps[start:]
    last = len(steps) - 1
    chosen = sorted({round(number * last / (_NUM_GROWTH - 1)) for number in range(_NUM_GROWTH)})
    so_far, largest = [], 0.0
    for _, value in steps:
        largest = max(largest, value)
        so_far.append(largest)
    return tuple((steps[number][0], so_far[number]) for number in chosen)


def _leaves(value: Any, name: str = "") -> dict[str, Any]:
    """Every number and text in nested values, by its dotted path."""
    if isinstance(value, Mapping):
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, list | tuple):
        items = [(str(number), item) for number, item in enumerate(value)]
    else:
        return {name: value}
    leaves: dict[str, Any] = {}
    for key, item in items:
        leaves.update(_leaves(item, f"{name}.{key}" if name else key))
    return leaves


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _equal(first: Any, second: Any) -> bool:
    """Equality in which NaN equals NaN; a file of metrics has None for both."""
    if isinstance(first, float) and isinstance(second, float) and math.isnan(first) and math.isnan(second):
        return True
    return bool(first == second)


def _relative(first: Any, second: Any, scale: float | None = None) -> float:
    if not (_is_number(first) and _is_number(second)):
        return math.inf
    largest = max(abs(first), abs(second), scale or 0.0)
    return abs(first - second) / largest if largest else 0.0


def _digits(value: Any, digits: int) -> str:
    if value is None:
        return "nothing"
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)


def _short(value: float) -> str:
    return "infinite" if math.isinf(value) else f"{value:.2g}"
