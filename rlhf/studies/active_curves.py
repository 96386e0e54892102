"""What the study `active_selection` found: a curve for each seed and strategy, its file, and what the curves say."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

from rlhf.config.active_selection import ActiveSelectionConfig, Strategy
from rlhf.runs.exhibits import Exhibits, Figure, Line, Panel, Table
from rlhf.runs.files import write_json
from rlhf.runs.jsonable import read_json
from rlhf.studies.seeds import Estimate, mean_of

RANDOM: Strategy = "random"
NAMES: dict[Strategy, str] = {
    "random": "random",
    "best_worst": "best against worst",
    "near_tie": "near ties",
    "disagreement": "disagreement",
    "diversity": "diversity",
}
NOT_REACHED = "not reached"


@dataclass(frozen=True)
class Point:
    """The reward model after a round: `labels` asked for, `comparisons` got, accuracy on the test pairs.

    `label_accuracy` is the share of the comparisons, ties left out, that the gold reward agrees with.
    """

    labels: int
    comparisons: int
    accuracy: float
    label_accuracy: float | None


@dataclass(frozen=True)
class Curve:
    """All rounds of one strategy with one seed."""

    seed: int
    strategy: Strategy
    points: tuple[Point, ...]
    seconds: float

    def write(self, path: Path) -> None:
        """Writes the curve as JSON, whole or not at all. Raises `DiskFullError`."""
        write_json(path, self)

    @classmethod
    def read(cls, path: Path) -> Curve | None:
        """The curve of a file; None when there is none."""
        body: Any = read_json(path)
        if not isinstance(body, dict):
            return None
        points = tuple(Point(**point) for point in body["points"])
        return cls(body["seed"], body["strategy"], points, body["seconds"])


@dataclass(frozen=True)
class Need:
    """How many labels a strategy needs for a target: seed by seed, None where it is not reached."""

    labels: tuple[float | None, ...]

    @property
    def num_reached(self) -> int:
        """Seeds that reach the target."""
        return sum(count is not None for count in self.labels)

    @property
    def mean(self) -> Estimate | None:
        """The geometric mean over the seeds with Student's interval of the logarithms; None unless all reach it."""
        logs = [math.log(count) for count in self.labels if count is not None]
        return _exp(mean_of(logs)) if len(logs) == len(self.labels) else None

    def ratio(self, other: Need) -> Estimate | None:
        """The geometric mean of this need over the other's, paired by seed; None unless both always reach it."""
        logs = [
            math.log(mine / theirs)
            for mine, theirs in zip(self.labels, other.labels, strict=True)
            if mine is not None and theirs is not None
        ]
        return _exp(mean_of(logs)) if len(logs) == len(self.labels) else None


def labels_to_reach(points: Sequence[Point], target: float) -> float | None:
    """Labels at which the curve first has the accuracy `target`: straight between points over the logarithm of labels.

    A curve that begins at or above the target needs the labels of its first point at most, and gets those; None where
    the target is above the whole curve.
    """
    before = points[0]
    if before.accuracy >= target:
        return float(before.labels)
    for point in points[1:]:
        if point.accuracy >= target:
            share = (target - before.accuracy) / (point.accuracy - before.accuracy)
            return before.labels * math.exp(share * math.log(point.labels / before.labels))
        before = point
    return None


def as_csv(curves: Sequence[Curve]) -> str:
    """All points as CSV, one a line."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["seed", "strategy", *(field.name for field in fields(Point))])
    for curve in curves:
        writer.writerows([curve.seed, curve.strategy, *astuple(point)] for point in curve.points)
    return out.getvalue()


def exhibits(section: ActiveSelectionConfig, curves: Sequence[Curve]) -> tuple[dict[str, Any], Exhibits]:
    """The summary's numbers, and figure, tables and remarks."""
    by_strategy = {
        strategy: sorted((one for one in curves if one.strategy == strategy), key=lambda one: one.seed)
        for strategy in section.strategies
    }
    summary: dict[str, Any] = {}
    for strategy, own in by_strategy.items():
        summary[f"accuracy_{strategy}"] = _cell(mean_of([one.points[-1].accuracy for one in own]))
    need_rows: list[tuple[Any, ...]] = []
    remarks: list[str] = []
    for target in (None, *section.target_accuracies):
        rows, said, numbers = _needs(section, by_strategy, target)
        need_rows += rows
        remarks += said
        summary |= numbers
    tables = (_need_table(section, need_rows), _accuracy_table(section, by_strategy))
    return summary, Exhibits(tables, (_figure(section, by_strategy),), tuple(remarks))


ByStrategy = dict[Strategy, list[Curve]]


def _exp(estimate: Estimate) -> Estimate:
    high = math.exp(estimate.high) if estimate.high < 700 else math.inf
    return Estimate(math.exp(estimate.value), math.exp(estimate.low), high, estimate.samples)


def _cell(estimate: Estimate) -> Any:
    """An interval that is all numbers, that of one seed, is none."""
    return estimate.to_json() if math.isfinite(estimate.high) else estimate.value


def _target_of(curve: Curve, by_strategy: ByStrategy, target: float | None) -> float:
    """The given accuracy, or that of random with all labels of the same seed."""
    if target is not None:
        return target
    return next(one for one in by_strategy[RANDOM] if one.seed == curve.seed).points[-1].accuracy


def _needs(
    section: ActiveSelectionConfig, by_strategy: ByStrategy, target: float | None
) -> tuple[list[tuple[Any, ...]], list[str], dict[str, Any]]:
    """The rows of one target, a strategy each, what is to be said about them, and the summary's numbers."""
    needs = {
        strategy: Need(tuple(labels_to_reach(one.points, _target_of(one, by_strategy, target)) for one in own))
        for strategy, own in by_strategy.items()
    }
    ends = [one.points[-1].accuracy for one in by_strategy[RANDOM]]
    shown = target if target is not None else mean_of(ends).value
    name = f"accuracy {shown:.3f}" + ("" if target is not None else " (random with all labels)")
    rows, said, numbers = [], [], {}
    for strategy, need in needs.items():
        mean, ratio = need.mean, None if strategy == RANDOM else need.ratio(needs[RANDOM])
        verdict = "" if ratio is None else _verdict(ratio)
        reached = f"{need.num_reached} of {len(need.labels)}"
        labels = NOT_REACHED if need.num_reached == 0 else None if mean is None else _cell(mean)
        rows.append((name, NAMES[strategy], labels, reached, None if ratio is None else _cell(ratio), verdict))
        key = strategy if target is None else f"{strategy}_{target:g}"
        if mean is not None:
            numbers[f"labels_{key}"] = _cell(mean)
        if ratio is not None:
            numbers[f"labels_ratio_{key}"] = _cell(ratio)
            said.append(
                f"{NAMES[strategy].capitalize()} reaches {name} with {ratio.value:.2f} times random's labels"
                f"{_interval(ratio)}: {verdict}."
            )
        elif strategy != RANDOM and need.num_reached < len(need.labels):
            said.append(f"{NAMES[strategy].capitalize()} reaches {name} with {reached} seeds: no ratio.")
    return rows, said, numbers


def _interval(estimate: Estimate) -> str:
    return f" [{estimate.low:.2f}, {estimate.high:.2f}]" if math.isfinite(estimate.high) else ""


def _verdict(ratio: Estimate) -> str:
    """Whether the interval of the ratio leaves out 1."""
    if ratio.high < 1:
        return "fewer, beyond chance"
    return "more, beyond chance" if ratio.low > 1 else "no difference beyond chance"


def _need_table(section: ActiveSelectionConfig, rows: Sequence[tuple[Any, ...]]) -> Table:
    columns = ("to reach", "strategy", "labels", "seeds that reach it", "times random's labels", "difference")
    note = (
        f"Geometric means over {section.num_seeds} seeds with 95 % intervals (Student's, of the logarithms), paired by "
        "seed; labels between two rounds are interpolated over their logarithm. Nothing where a seed does not reach it."
    )
    return Table("Labels needed", columns, tuple(rows), note=note)


def _accuracy_table(section: ActiveSelectionConfig, by_strategy: ByStrategy) -> Table:
    """Accuracy by round, and the mean over the chosen rounds of the difference to random, which nothing censors."""
    rows = []
    for strategy, own in by_strategy.items():
        rounds = [_cell(mean_of([one.points[place].accuracy for one in own])) for place in range(len(own[0].points))]
        # The first labels are the same for all.
        gains = [
            math.fsum(mine.accuracy - theirs.accuracy for mine, theirs in zip(a.points[1:], b.points[1:], strict=True))
            / (len(a.points) - 1)
            for a, b in zip(own, by_strategy[RANDOM], strict=True)
        ]
        right = [one.points[-1].label_accuracy for one in own]
        known = [share for share in right if share is not None]
        rows.append(
            (
                NAMES[strategy],
                *rounds,
                None if strategy == RANDOM else _cell(mean_of(gains)),
                _cell(mean_of(known)) if known else None,
            )
        )
    labels = [f"{count} labels" for count in section.num_labels]
    columns = ("strategy", *labels, "above random, mean of the rounds", "labels that are right")
    return Table("Accuracy", columns, tuple(rows), note="95 % intervals over the seeds; differences paired by seed.")


def _figure(section: ActiveSelectionConfig, by_strategy: ByStrategy) -> Figure:
    lines = []
    for strategy, own in by_strategy.items():
        means = [mean_of([one.points[place].accuracy for one in own]) for place in range(len(section.num_labels))]
        points = tuple((float(count), mean.value) for count, mean in zip(section.num_labels, means, strict=True))
        band = tuple((mean.low, mean.high) for mean in means) if len(own) > 1 else None
        lines.append(Line(NAMES[strategy], points, band))
    panel = Panel("", "labels", "accuracy on noiseless test pairs", tuple(lines), logarithmic_x=True)
    title = "Accuracy of the reward model by how its labels were chosen"
    note = f"Means over {section.num_seeds} seeds; bands: 95 % intervals."
    return Figure("active_selection", title, (panel,), note=note)
