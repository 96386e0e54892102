"""Learning curves of methods: the mean over seeds with its band, over steps, episodes or tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rlhf import statistics
from rlhf.runs import results
from rlhf.runs.comparison.methods import Method
from rlhf.runs.comparison.records import EVALUATE, Run
from rlhf.runs.exhibits import Figure, Line, Panel
from rlhf.runs.report_sections import CHARTS, MIN_POINTS

MOST_POINTS = 150
# What a stage's steps count besides, by axis: a name, and from a run and its entries the place of each step.
Entries = Sequence[tuple[int, Mapping[str, float]]]
Axis = Callable[[Run, str, Entries], list[float] | None]
STEP = "step"


def _steps(run: Run, stage: str, entries: Entries) -> list[float] | None:
    return [float(step) for step, _ in entries]


def _examples(run: Run, stage: str, entries: Entries) -> list[float] | None:
    """Steps times the batch: responses for PPO, examples for the other trainings."""
    section = run.config.get(stage)
    size = section.get("batch_size") if isinstance(section, Mapping) else None
    return [float(step * size) for step, _ in entries] if isinstance(size, int) else None


def _tokens(run: Run, stage: str, entries: Entries) -> list[float] | None:
    """The response tokens sampled so far; None unless every update's mean length was logged."""
    section = run.config.get(stage)
    size = section.get("batch_size") if isinstance(section, Mapping) else None
    lengths = [numbers.get("ppo/response_length") for _, numbers in entries]
    numbered = [step for step, _ in entries] == list(range(1, len(entries) + 1))
    if not isinstance(size, int) or not numbered or any(length is None for length in lengths):
        return None
    return [float(total) * size for total in np.cumsum([length for length in lengths if length is not None])]


AXES: dict[str, tuple[str, Axis]] = {
    STEP: ("step", _steps),
    "examples": ("examples (PPO: sampled responses)", _examples),
    "tokens": ("sampled response tokens (PPO)", _tokens),
}


def charts(methods: Sequence[Method], confidence: float) -> dict[str, dict[str, tuple[list[Figure], list[Figure]]]]:
    """Of each stage and axis the main charts and all others, one metric each. Empty where nothing was logged."""
    found: dict[str, dict[str, tuple[list[Figure], list[Figure]]]] = {}
    stages = dict.fromkeys(stage for method in methods for run in method.runs for stage in run.metrics)
    for stage in stages:
        main, others = _metric_names(methods, stage)
        for axis in AXES:
            drawn = [
                [one for name in names if (one := _chart(methods, stage, name, axis, confidence)) is not None]
                for names in (main, others)
            ]
            if drawn[0] or drawn[1]:
                found.setdefault(stage, {})[axis] = (drawn[0], drawn[1])
    return found


def _metric_names(methods: Sequence[Method], stage: str) -> tuple[list[str], list[str]]:
    """The stage's metrics that are curves in some run: those that the report has charts of, and the others."""
    counts: dict[str, int] = {}
    for run in (run for method in methods for run in method.runs):
        own: dict[str, int] = {}
        for _, numbers in run.metrics.get(stage, ()):
            for name in numbers:
                own[name] = own.get(name, 0) + 1
        counts = {name: max(count, counts.get(name, 0)) for name, count in {**counts, **own}.items()}
    curves = {name for name, count in counts.items() if count >= MIN_POINTS}
    charted = [name for chart in CHARTS.get(stage, ()) for _, name in chart.lines]
    rewards = sorted(name for name in curves if name.startswith(f"{stage}/reward/"))
    main = [name for name in [*charted[:2], *rewards, *charted[2:]] if counts.get(name, 0) >= 2]
    return main, sorted(curves - set(main))


def _chart(methods: Sequence[Method], stage: str, name: str, axis: str, confidence: float) -> Figure | None:
    lines = [line for method in methods if (line := _line(method, stage, name, axis, confidence)) is not None]
    if not lines:
        return None
    panel = Panel(_title(stage, name), AXES[axis][0], _unit(stage, name), tuple(lines))
    return Figure(name.replace("/", "_"), panel.title, (panel,))


def _title(stage: str, name: str) -> str:
    for chart in CHARTS.get(stage, ()):
        for legend, metric in chart.lines:
            if metric == name:
                return chart.title if len(chart.lines) == 1 else f"{chart.title}, {legend.lower()}"
    if name.startswith("ppo/reward/"):
        return f"Reward {name.removeprefix('ppo/reward/')}"
    return results.label(name)


def _unit(stage: str, name: str) -> str:
    units = [chart.unit for chart in CHARTS.get(stage, ()) for _, metric in chart.lines if metric == name]
    return units[0] if units else "mean" if name.startswith("ppo/reward/") else name


def _line(method: Method, stage: str, name: str, axis: str, confidence: float) -> Line | None:
    """The mean over the method's runs that logged the number, on places that all of these reached."""
    curves = []
    for run in method.runs:
        entries = run.metrics.get(stage, [])
        places = AXES[axis][1](run, stage, entries)
        points = [
            (place, numbers[name])
            for place, (_, numbers) in zip(places or (), entries, strict=places is not None)
            if name in numbers
        ]
        if points:
            curves.append((np.array([x for x, _ in points]), np.array([y for _, y in points])))
    return mean_line(method.name, curves, confidence) if curves else None


def mean_line(name: str, curves: Sequence[tuple[Any, Any]], confidence: float) -> Line | None:
    """The mean of curves (x, y), each ascending in x, with Student's band where there are several.

    Where the curves have other places, each is interpolated between its neighbours; beyond the shortest is nothing.
    """
    first, last = max(float(x[0]) for x, _ in curves), min(float(x[-1]) for x, _ in curves)
    grid = np.unique(np.concatenate([x for x, _ in curves]))
    grid = grid[(grid >= first) & (grid <= last)]
    if grid.size == 0:
        return None
    if grid.size > MOST_POINTS:
        grid = grid[np.unique(np.round(np.linspace(0, grid.size - 1, MOST_POINTS)).astype(int))]
    values = np.array([np.interp(grid, x, y) for x, y in curves])
    means = values.mean(axis=0)
    points = tuple((float(x), float(y)) for x, y in zip(grid, means, strict=True))
    if len(curves) < 2:
        return Line(name, points)
    half = (
        statistics.student_quantile(confidence, len(curves) - 1) * values.std(axis=0, ddof=1) / math.sqrt(len(curves))
    )
    band = tuple((float(low), float(high)) for low, high in zip(means - half, means + half, strict=True))
    return Line(name, points, band)


_FRONTIERS = (
    ("ppo/raw_score_mean", "Proxy reward while PPO trained", "mean reward, raw"),
    ("ppo/score_mean", "Score while PPO trained", "mean score"),
    ("ppo/reward/gold", "Gold reward while PPO trained", "mean gold reward"),
)


def frontiers(methods: Sequence[Method], found: Mapping[str, Mapping[str, Any]]) -> list[Figure]:
    """Reward against the KL to the reference: a path a run while PPO trained, and the ends as evaluated."""
    figures = []
    seen = {
        name
        for method in methods
        for run in method.runs
        for _, numbers in run.metrics.get("ppo", ())
        for name in numbers
    }
    for metric, title, unit in _FRONTIERS:
        if metric == "ppo/score_mean" and "ppo/raw_score_mean" in seen:
            continue
        lines = []
        for method in methods:
            for run in method.runs:
                points = [
                    (numbers["ppo/kl_to_reference"], numbers[metric])
                    for _, numbers in run.metrics.get("ppo", ())
                    if metric in numbers and "ppo/kl_to_reference" in numbers
                ]
                if len(points) > 1:
                    name = method.name if len(method.runs) == 1 else f"{method.name}, seed {run.seed}"
                    lines.append(Line(name, tuple(points), group=method.name))
        if lines:
            figures.append(_frontier(title, unit, lines))
    for result, title in (
        ("gold_score", "Gold reward"),
        ("judge_score", "Judge's score"),
        ("reward_model_score", "Reward model's score"),
        ("win_rate", "Win rate against the baseline"),
    ):
        lines = _ends(methods, found, result)
        if lines:
            figures.append(_frontier(f"{title}, as evaluated", title.lower(), lines))
    return figures


def _frontier(title: str, unit: str, lines: Sequence[Line]) -> Figure:
    panel = Panel(title, "KL to the reference, nats a response", unit, tuple(lines))
    return Figure("frontier", title, (panel,))


def _ends(methods: Sequence[Method], found: Mapping[str, Mapping[str, Any]], name: str) -> list[Line]:
    lines = []
    for method in methods:
        kl = found.get(f"{EVALUATE}/kl_to_reference", {}).get(method.name)
        reward = found.get(f"{EVALUATE}/{name}", {}).get(method.name)
        if kl is None or reward is None:
            continue
        one = reward.estimate
        band = None if one.low is None or one.high is None else ((one.low, one.high),)
        lines.append(Line(method.name, ((kl.estimate.value, one.value),), band, "dots"))
    return lines
