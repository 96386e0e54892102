"""What a dataset card says, as numbers: `card.json`. `card_text` makes the page from it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from rlhf.data.splits import SPLITS
from rlhf.preferences.exchange.agreement import (
    agreement_figures,
    comparisons_said,
    consistency_figures,
    ratings_said,
)
from rlhf.preferences.exchange.export import ExportedLabels
from rlhf.preferences.exchange.selection import Selection
from rlhf.preferences.store import Answer, Choice, Label, Skip, Task, Tie, agrees
from rlhf.records import content_hash
from rlhf.statistics import wilson

CARD_SCHEMA = "preference_export/1"


def make_card(exported: ExportedLabels) -> dict[str, Any]:
    """Everything that the card says; plain JSON values, no NaN."""
    selection = exported.selection
    by_kind = {kind: [task for task in selection.tasks if task.plan.kind == kind] for kind in _KINDS}
    compared = [*by_kind["pairwise"], *by_kind["ranking"]]
    return {
        "schema": CARD_SCHEMA,
        "splits": {name: _split(exported, name) for name in SPLITS},
        "split_rule": exported.split_rule if isinstance(exported.split_rule, str) else None,
        "split_settings": None if isinstance(exported.split_rule, str) else exported.split_rule.model_dump(mode="json"),
        "store_seed": selection.seed,
        "tasks": {kind: len(tasks) for kind, tasks in by_kind.items() if tasks},
        "rounds": dict(sorted(Counter(str(task.plan.round) for task in selection.tasks).items())),
        "labels": _label_counts(selection),
        "flags": _flag_counts(selection),
        "annotators": _annotators(selection),
        "agreement": {
            "comparisons": agreement_figures(comparisons_said(selection, compared)),
            "ratings": agreement_figures(ratings_said(selection, by_kind["rating"]), numbers=True),
        },
        "self_consistency": consistency_figures(selection),
        "position_bias": position_bias(selection, by_kind["pairwise"]),
        "length_bias": length_bias(selection, by_kind["pairwise"]),
        "resolution": {
            "rule": str(exported.resolved.rule),
            **asdict(exported.resolved.rule),
            "num_labels": exported.resolved.num_labels,
            "num_pairs": exported.resolved.num_tasks,
            "num_comparisons": len(exported.resolved.resolutions),
            "pairs_left_out": exported.resolved.reasons(tasks=True),
            "labels_left_out": exported.resolved.reasons(tasks=False),
        },
        "options": asdict(exported.options),
        "left_out": dict(exported.left_out),
        "responses": _policies(selection),
    }


_KINDS = ("pairwise", "ranking", "rating")


def _split(exported: ExportedLabels, name: Any) -> dict[str, Any]:
    comparisons, ratings = exported.comparisons.named(name), exported.ratings.named(name)
    return {
        "num_comparisons": len(comparisons),
        "num_ties": sum(record.probability == 0.5 for record in comparisons),
        "num_ratings": len(ratings),
        "num_prompts": len({one.prompt for one in comparisons} | {one.prompt for one in ratings}),
        "comparisons_sha256": content_hash(comparisons),
        "ratings_sha256": content_hash(ratings),
    }


def _label_counts(selection: Selection) -> dict[str, int]:
    """Current labels by kind, in a fixed order."""
    counts = Counter[str](label.kind for task in selection.tasks for label in selection.labels_of(task))
    order = ("choice", "tie", "both_bad", "skip", "ranking", "rating", "flag")
    return {kind: counts[kind] for kind in order if counts[kind]}


def _flag_counts(selection: Selection) -> dict[str, int]:
    counts = Counter(
        flag.kind for task in selection.tasks for label in selection.labels_of(task) for flag in label.flags
    )
    return dict(sorted(counts.items()))


def _annotators(selection: Selection) -> dict[str, dict[str, Any]]:
    """How each annotator labelled: counts, pace, position bias, and the right answers to gold questions."""
    given: dict[str, list[Label]] = {}
    gold: dict[str, list[bool]] = {}
    for task in (*selection.tasks, *selection.checks):
        for label in selection.labels_of(task):
            given.setdefault(label.annotator, []).append(label)
            if task.plan.gold is not None and label.answer is not None and not isinstance(label.answer, Skip):
                gold.setdefault(label.annotator, []).append(agrees(label.answer, task.plan.gold))
    return {name: _annotator(selection, name, labels, gold.get(name, [])) for name, labels in sorted(given.items())}


def _annotator(selection: Selection, name: str, labels: Sequence[Label], gold: Sequence[bool]) -> dict[str, Any]:
    answers: list[Answer] = [label.answer for label in labels if label.answer is not None]
    sides = [label.clicked for label in labels if label.clicked is not None]
    seconds = [label.seconds for label in labels if label.seconds is not None]
    return {
        "kind": selection.annotators[name].kind,
        "num_labels": len(labels),
        "num_ties": sum(isinstance(answer, Tie) for answer in answers),
        "num_skips": sum(isinstance(answer, Skip) for answer in answers),
        "median_seconds": median(seconds) if seconds else None,
        "first_side_chosen": _share(sides.count(0), len(sides)),
        "gold_right": _share(sum(gold), len(gold)),
    }


def _share(count: int, of: int) -> dict[str, Any]:
    """A share with Wilson's interval, or that there is nothing to count."""
    if not of:
        return {"num": 0, "not_defined": "none"}
    return {"num": of, **wilson(count, of).to_json()}


def length_bias(selection: Selection, tasks: Sequence[Task]) -> dict[str, Any]:
    """How often the chosen response was the longer one, by characters, over the choices between unequal lengths."""
    longer = []
    for task in tasks:
        for label in selection.labels_of(task):
            if isinstance(label.answer, Choice):
                sizes = {one: len(selection.responses[one].text) for one in task.plan.responses}
                chosen = sizes.pop(label.answer.preferred)
                (other,) = sizes.values()
                if chosen != other:
                    longer.append(chosen > other)
    return _share(sum(longer), len(longer))


def position_bias(selection: Selection, tasks: Sequence[Task]) -> dict[str, Any]:
    """How often the response shown first was chosen, over the choices whose sides are known."""
    sides = [label.clicked for task in tasks for label in selection.labels_of(task) if label.clicked is not None]
    return _share(sides.count(0), len(sides))


def _policies(selection: Selection) -> list[dict[str, Any]]:
    """What made the responses: policy and sampling settings, with the number of responses."""
    used = dict.fromkeys(one for task in selection.tasks for one in task.plan.responses)
    groups: Counter[tuple[str | None, str]] = Counter()
    settings: dict[str, dict[str, Any]] = {}
    for one in used:
        response = selection.responses[one]
        text = repr(sorted(response.sampling.items()))
        settings[text] = dict(response.sampling)
        groups[response.policy, text] += 1
    return [
        {
            "policy": policy,
            "description": dict(selection.policies[policy].description) if policy is not None else {},
            "sampling": settings[text],
            "num_responses": count,
        }
        for (policy, text), count in groups.most_common()
    ]
