"""Agreement numbers for a card or a status table: `rlhf.statistics`, with a reason wherever one is not defined."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from rlhf.errors import DataError
from rlhf.preferences.exchange.selection import Selection, pairs_of, side_of
from rlhf.preferences.store import Rating, Task
from rlhf.statistics import Interval
from rlhf.statistics.agreement import (
    fleiss_kappa,
    krippendorff_alpha,
    pairwise_cohen_kappa,
    percent_agreement,
    self_consistency,
)
from rlhf.statistics.annotations import DEFAULT_RESAMPLING, Annotations, Resampling, Value, table_of_labels

# (what was labelled, who, what they said)
Said = tuple[str, str, Value]
_MANY_ANNOTATORS = 12


def comparisons_said(selection: Selection, tasks: Sequence[Task]) -> list[Said]:
    """What annotators said of the pairs of these tasks: first, second, tie or both_bad; skips say nothing."""
    said: list[Said] = []
    for task in tasks:
        for pair in pairs_of(selection, task):
            for label in selection.labels_of(task):
                side = side_of(label.answer, pair.first, pair.second)
                if side is not None and side[0] != "skip":
                    said.append((pair.key, label.annotator, side[0]))
    return said


def ratings_said(selection: Selection, tasks: Sequence[Task]) -> list[Said]:
    """The ratings of these tasks."""
    return [
        (task.id, label.annotator, label.answer.value)
        for task in tasks
        for label in selection.labels_of(task)
        if isinstance(label.answer, Rating)
    ]


def repeated(selection: Selection) -> dict[str, tuple[list[Said], list[Said]]]:
    """The answers to tasks and their blind repeats under the original's name, comparisons and ratings apart."""
    tasks = {task.id: task for task in (*selection.tasks, *selection.checks)}
    repeats = [task for task in tasks.values() if task.plan.repeat_of in tasks]
    originals = {_original(task, tasks) for task in repeats}
    chosen = [*(tasks[one] for one in originals), *repeats]
    found: dict[str, tuple[list[Said], list[Said]]] = {}
    for place, say in enumerate((comparisons_said, ratings_said)):
        for task in chosen:
            original = _original(task, tasks)
            for key, annotator, value in say(selection, [task]):
                name = original + key.removeprefix(task.id)
                found.setdefault(annotator, ([], []))[place].append((name, annotator, value))
    return found


def _original(task: Task, tasks: dict[str, Task]) -> str:
    while task.plan.repeat_of in tasks:
        task = tasks[task.plan.repeat_of]
    return task.id


def agreement_figures(
    said: Sequence[Said], *, numbers: bool = False, resampling: Resampling = DEFAULT_RESAMPLING
) -> dict[str, Any]:
    """Percent agreement, Cohen's, Fleiss' and Krippendorff's coefficients with intervals; each a figure or a reason.

    Nominal, or with `numbers` Krippendorff's interval level. What is not defined is `{"not_defined": why}`.
    """
    annotators = dict.fromkeys(annotator for _, annotator, _ in said)
    if not said:
        return _undefined("no labels")
    if len(annotators) == 1:
        return _undefined("one annotator")
    table = table_of_labels(said)
    if not table.num_comparable_items:
        return _undefined("no item has labels of two annotators")
    figures: dict[str, Any] = {
        "num_annotators": len(annotators),
        "num_items": table.num_items,
        "num_comparable_items": table.num_comparable_items,
        "percent_agreement": _figure(lambda: percent_agreement(table, resampling=resampling)),
        "cohen_kappa_mean": {"not_defined": f"more than {_MANY_ANNOTATORS} annotators"},
        "cohen_kappa_pairs": {},
        "fleiss_kappa": _figure(lambda: fleiss_kappa(table, resampling=resampling)),
        "krippendorff_alpha": _figure(
            lambda: krippendorff_alpha(table, "interval" if numbers else "nominal", resampling=resampling)
        ),
    }
    if len(annotators) <= _MANY_ANNOTATORS:
        figures |= _cohen(table, resampling)
    return figures


def _cohen(table: Annotations, resampling: Resampling) -> dict[str, Any]:
    kappas = pairwise_cohen_kappa(table, resampling=resampling)
    pairs = {f"{first} / {second}": _interval(one) for (first, second), one in kappas.pairs.items()}
    return {"cohen_kappa_mean": _interval(kappas.mean), "cohen_kappa_pairs": pairs}


def consistency_figures(selection: Selection, *, resampling: Resampling = DEFAULT_RESAMPLING) -> dict[str, Any]:
    """By annotator: how comparisons agree with their blind repeats, and ratings (alpha of the interval level)."""
    found: dict[str, Any] = {}
    for annotator, (comparisons, ratings) in repeated(selection).items():
        for said, level in ((comparisons, "nominal"), (ratings, "interval")):
            made = self_consistency(said, level, resampling=resampling).get(annotator)  # type: ignore[arg-type]
            if made is not None:
                found.setdefault(annotator, {})["ratings" if level == "interval" else "comparisons"] = {
                    "num_items": made.num_items,
                    "agreement": made.agreement.to_json(),
                    "krippendorff_alpha": _interval(made.alpha),
                }
    return found


def _undefined(why: str) -> dict[str, Any]:
    return {"not_defined": why}


def _figure(make: Callable[[], Interval]) -> dict[str, Any]:
    """An interval as JSON, or why there is none."""
    try:
        return _interval(make())
    except DataError as error:
        return _undefined(str(error).partition(". ")[0])


def _interval(interval: Interval) -> dict[str, Any]:
    if math.isnan(interval.value):
        return _undefined("all labels are one value")
    return {name: None if math.isnan(value) else value for name, value in interval.to_json().items()}
