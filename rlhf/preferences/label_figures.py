"""What the labels of a collection say about whoever made them: ties, sides, agreement, and the right answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

from rlhf.preferences.store import BothBad, Choice, Label, PreferenceStore, Rating, Skip, Task, Tie, agrees
from rlhf.records import PromptContent
from rlhf.statistics.agreement import Level, krippendorff_alpha
from rlhf.statistics.annotations import Resampling, table_of_labels
from rlhf.statistics.intervals import wilson

Gold = Callable[[PromptContent, str], float]


def label_figures(
    store: PreferenceStore,
    tasks: Sequence[str],
    checks: Sequence[str] = (),
    *,
    gold: Gold | None = None,
    confidence: float = 0.95,
) -> dict[str, Any]:
    """Figures of the current labels of these tasks (ids), as JSON values; what there is nothing to say of is left out.

    `labels` and `declined` count. Shares come as `{"value", "low", "high"}` by Wilson: `tie_share` of the pairwise
    answers (both bad included), `left_share` of the choices that took the response shown first, `gold_accuracy` of the
    choices between responses that `gold` tells apart. `krippendorff_alpha` is the agreement of pairwise answers, or of
    ratings as an interval scale, with a bootstrap interval. Of the `checks`, `attention` is the share of gold questions
    answered rightly, and `self_consistency` that of blind repeats answered as before.
    """
    labels = store.current_labels(tasks=tasks)
    answers = [label for label in labels if label.answer is not None and not isinstance(label.answer, Skip)]
    found: dict[str, Any] = {"labels": len(answers), "declined": len(labels) - len(answers)}
    pairwise = [label for label in answers if isinstance(label.answer, Choice | Tie | BothBad)]
    clicked = [label.clicked for label in pairwise if label.clicked is not None]
    shares = {
        "tie_share": [not isinstance(label.answer, Choice) for label in pairwise],
        "left_share": [place == 0 for place in clicked],
        "gold_accuracy": [] if gold is None else _right_choices(store, pairwise, gold),
        **_checks(store, answers, checks),
    }
    found |= {
        name: wilson(sum(cases), len(cases), confidence=confidence).to_json() for name, cases in shares.items() if cases
    }
    return found | _agreement(store, answers, confidence)


def _right_choices(store: PreferenceStore, labels: Iterable[Label], gold: Gold) -> list[bool]:
    """Of every choice between responses that the gold reward tells apart, whether it is the gold reward's."""
    chosen = {label: label.answer for label in labels if isinstance(label.answer, Choice)}
    tasks = store.tasks({label.task for label in chosen})
    scores = _gold_scores(store, tasks, gold)
    right = []
    for label, answer in chosen.items():
        given = {one: scores[one] for one in tasks[label.task].plan.responses}
        best = max(given.values())
        if best != min(given.values()):
            right.append(given[answer.preferred] == best)
    return right


def _gold_scores(store: PreferenceStore, tasks: Mapping[str, Task], gold: Gold) -> dict[str, float]:
    responses = store.responses({one for task in tasks.values() for one in task.plan.responses})
    prompts = store.prompts({task.prompt for task in tasks.values()})
    return {key: gold(prompts[one.prompt].prompt, one.text) for key, one in responses.items()}


def _checks(store: PreferenceStore, answers: Iterable[Label], checks: Sequence[str]) -> dict[str, list[bool]]:
    given = {(label.task, label.annotator): label.answer for label in answers}
    tasks = store.tasks(checks)
    attention, same = [], []
    for label in store.current_labels(tasks=checks):
        if label.answer is None or isinstance(label.answer, Skip):
            continue
        plan = tasks[label.task].plan
        if plan.gold is not None:
            attention.append(agrees(label.answer, plan.gold))
        before = given.get((plan.repeat_of or "", label.annotator))
        if before is not None:
            same.append(agrees(label.answer, before))
    return {"attention": attention, "self_consistency": same}


def _agreement(store: PreferenceStore, answers: Sequence[Label], confidence: float) -> dict[str, Any]:
    """Krippendorff's alpha where a task has several labels and there is something to disagree about."""
    tasks = store.tasks({label.task for label in answers})
    sides: list[tuple[Hashable, str, str | float | None]] = []
    ratings: list[tuple[Hashable, str, str | float | None]] = []
    for label in answers:
        if isinstance(label.answer, Rating):
            ratings.append((label.task, label.annotator, label.answer.value))
        elif isinstance(label.answer, Choice):
            # In terms of the task's own order, so that all tasks have the same two values.
            place = tasks[label.task].plan.responses.index(label.answer.preferred)
            sides.append((label.task, label.annotator, ("first", "second")[place]))
        elif isinstance(label.answer, Tie | BothBad):
            sides.append((label.task, label.annotator, "tie"))
    levels: tuple[tuple[list[tuple[Hashable, str, str | float | None]], Level], ...]
    levels = ((sides, "nominal"), (ratings, "interval"))
    for given, level in levels:
        if len({item for item, _, _ in given}) == len(given):
            continue
        alpha = krippendorff_alpha(table_of_labels(given), level, resampling=Resampling(confidence=confidence))
        if math.isfinite(alpha.value):
            return {"krippendorff_alpha": alpha.to_json()}
    return {}
