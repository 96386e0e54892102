"""Several annotators' labels of one pair of responses, resolved into one by a stated rule. Pure Python.

Of every task, `first` and `second` are the two responses as the task names them, not the sides on which they were
shown: whoever makes the labels undoes a random order.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from rlhf.errors import ConfigError, DataError

Choice = Literal["first", "second", "tie", "both_bad", "skip"]
Outcome = Literal["first", "second", "tie"]
CHOICES: tuple[Choice, ...] = get_args(Choice)
MAX_STRENGTH = 3
# PandaLM's layout: what the columns annotator1, annotator2, ... hold.
RATED_CHOICES: dict[float, Choice] = {0: "tie", 1: "first", 2: "second"}
_ANNOTATOR_COLUMN = re.compile(r"annotator_?\d+")


@dataclass(frozen=True)
class PairwiseLabel:
    """One annotator's answer to one task.

    `strength` is how much better the chosen response is, 1 (slightly) to 3 (much), None where nobody asked. `weight`
    is how much the annotator counts. Raises `DataError` for anything else.
    """

    task: str
    annotator: str
    choice: Choice
    strength: int | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        where = f"task {self.task!r}, annotator {self.annotator!r}"
        if self.choice not in CHOICES:
            raise DataError(f"{where}: the choice is one of {', '.join(CHOICES)}, not {self.choice!r}")
        if self.strength is not None:
            if self.choice not in ("first", "second"):
                raise DataError(
                    f"{where}: the choice {self.choice} has no strength, got {self.strength!r}; leave it out"
                )
            if self.strength not in range(1, MAX_STRENGTH + 1):
                raise DataError(f"{where}: a strength is 1, 2 or {MAX_STRENGTH}, not {self.strength!r}")
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise DataError(f"{where}: a weight is a finite number of at least 0, not {self.weight!r}")


@dataclass(frozen=True)
class ResolutionRule:
    """How the labels of a task become one; `str(rule)` states it in a sentence for a dataset card.

    - `majority`: the choice with the largest weight, which need not be more than half. Where two or three choices
      share the largest, `on_tied_vote` drops the task or keeps it as a tie.
    - `mean`: the weighted mean of the labels' probabilities that the first response is better.
    - `all`: every label by itself.

    A label's probability is 1 for the first response, 0 for the second, 0.5 for a tie; with `use_strength` (mean and
    all) 0.5 + strength / 6 for the first and 0.5 - strength / 6 for the second. Labels of both bad count as ties, as
    Chatbot Arena's ratings have them, or are left out.
    """

    kind: Literal["majority", "mean", "all"] = "majority"
    on_tied_vote: Literal["drop", "tie"] = "drop"
    both_bad: Literal["tie", "leave_out"] = "tie"
    use_strength: bool = False

    def __post_init__(self) -> None:
        for name, known in (
            ("kind", ("majority", "mean", "all")),
            ("on_tied_vote", ("drop", "tie")),
            ("both_bad", ("tie", "leave_out")),
        ):
            if getattr(self, name) not in known:
                raise ConfigError(f"the rule's {name} is one of {', '.join(known)}, not {getattr(self, name)!r}")
        if self.use_strength and self.kind == "majority":
            raise ConfigError("a majority counts choices and has no use for their strength; use kind=mean or kind=all")

    def __str__(self) -> str:
        both_bad = "both bad counts as a tie" if self.both_bad == "tie" else "both bad is left out"
        if self.kind == "majority":
            tied = "is left out" if self.on_tied_vote == "drop" else "becomes a tie"
            return f"majority: the choice with the largest weight; a tied vote {tied}; {both_bad}"
        strength = " moved by the strength" if self.use_strength else ""
        what = "the labels' weighted mean of" if self.kind == "mean" else "every label by itself;"
        return f"{self.kind}: {what} first 1, tie 0.5, second 0{strength}; {both_bad}"


@dataclass(frozen=True)
class Resolution:
    """What the labels of one task say; with the rule `all`, what one label says.

    `probability` is that the first response is better, in 0..1: 1, 0 or 0.5 by majority. `outcome` is the side that it
    favours, a tie at 0.5. `agreement` is the share of the labels' weight on this very outcome, so it is 0 for a tie
    that is the mean of opposite choices. `num_annotators` counts the labels that were used.
    """

    task: str
    outcome: Outcome
    probability: float
    agreement: float
    num_annotators: int
    annotators: tuple[str, ...]


@dataclass(frozen=True)
class LeftOut:
    """A label that was not used, or with `annotator` None a task that has no resolution, and why."""

    task: str
    annotator: str | None
    reason: str


@dataclass(frozen=True)
class Resolved:
    """All tasks in the order of their first label. `str(resolved)` is one line for a log or a card."""

    rule: ResolutionRule
    resolutions: tuple[Resolution, ...]
    left_out: tuple[LeftOut, ...]
    num_tasks: int
    num_labels: int

    def reasons(self, *, tasks: bool) -> dict[str, int]:
        """How many tasks, or how many labels, were left out for each reason."""
        return dict(Counter(item.reason for item in self.left_out if (item.annotator is None) == tasks))

    def __str__(self) -> str:
        parts = [f"{self.rule}; {self.num_labels:,} labels of {self.num_tasks:,} tasks gave {len(self.resolutions):,}"]
        for noun, reasons in (("tasks", self.reasons(tasks=True)), ("labels", self.reasons(tasks=False))):
            if reasons:
                listed = ", ".join(f"{count:,} x {reason}" for reason, count in reasons.items())
                parts.append(f"{noun} left out: {listed}")
        return "; ".join(parts)


def resolve(labels: Iterable[PairwiseLabel], rule: ResolutionRule) -> Resolved:
    """Resolves the labels task by task, whatever their order.

    Left out are labels that were skipped, of weight 0, of both bad where the rule says so, and all but the first of an
    annotator's labels of a task; then tasks without a label that counts, and those with a tied vote where the rule
    drops them. Raises `DataError` for a choice without a strength when the rule uses it.
    """
    tasks: dict[str, list[PairwiseLabel]] = {}
    for label in labels:
        tasks.setdefault(label.task, []).append(label)
    resolutions: list[Resolution] = []
    left_out: list[LeftOut] = []
    for task, given in tasks.items():
        used = _usable(given, rule, left_out)
        if not used:
            left_out.append(LeftOut(task, None, "no label that counts"))
        elif rule.kind == "all":
            resolutions += [_by_mean(task, [label], rule) for label in used]
        elif rule.kind == "mean":
            resolutions.append(_by_mean(task, used, rule))
        else:
            resolution = _by_majority(task, used, rule)
            if resolution is None:
                left_out.append(LeftOut(task, None, "tied vote"))
            else:
                resolutions.append(resolution)
    num_labels = sum(map(len, tasks.values()))
    return Resolved(rule, tuple(resolutions), tuple(left_out), len(tasks), num_labels)


def rated_labels(row: Mapping[str, Any], task: str) -> list[PairwiseLabel]:
    """The labels of a row in PandaLM's layout: `annotator1`, `annotator2`, ... with 0 tie, 1 first, 2 second.

    First and second are `response1` and `response2`. Numbers may be written as text or as 1.0, as CSV and Parquet
    with gaps have them; an empty or null field is a missing label. Raises `DataError` for another value, or a row
    without such a column.
    """
    columns = [name for name in row if _ANNOTATOR_COLUMN.fullmatch(name)]
    if not columns:
        raise DataError(f"task {task!r}: expected the columns annotator1, annotator2, ...; got {', '.join(row)}")
    labels = []
    for name in columns:
        value = row[name]
        if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
            continue
        try:
            choice = RATED_CHOICES[float(value)]
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"task {task!r}, {name}: expected 0 (tie), 1 (first) or 2 (second), got {value!r}"
            ) from error
        labels.append(PairwiseLabel(task, name, choice))
    return labels


def _usable(labels: Sequence[PairwiseLabel], rule: ResolutionRule, left_out: list[LeftOut]) -> list[PairwiseLabel]:
    """The labels of one task that count; the others are added to `left_out`."""
    used: dict[str, PairwiseLabel] = {}
    for label in labels:
        if label.choice == "skip":
            reason = "skipped"
        elif label.choice == "both_bad" and rule.both_bad == "leave_out":
            reason = "both bad"
        elif label.weight == 0:
            reason = "weight 0"
        elif label.annotator in used:
            reason = "repeat by the same annotator"
        else:
            used[label.annotator] = label
            continue
        left_out.append(LeftOut(label.task, label.annotator, reason))
    return list(used.values())


def _outcome(label: PairwiseLabel) -> Outcome:
    return label.choice if label.choice in ("first", "second") else "tie"


def _probability(label: PairwiseLabel, rule: ResolutionRule) -> float:
    """How likely this label makes it that the first response is better."""
    sign = {"first": 1, "second": -1, "tie": 0}[_outcome(label)]
    if sign == 0 or not rule.use_strength:
        return 0.5 + sign / 2
    if label.strength is None:
        raise DataError(
            f"task {label.task!r}, annotator {label.annotator!r}: the rule uses strengths and this choice has none; "
            "give every choice a strength or set use_strength to false"
        )
    # One division, so that opposite choices of one strength are exactly as far from 0.5.
    return (MAX_STRENGTH + sign * label.strength) / (2 * MAX_STRENGTH)


def _by_mean(task: str, labels: Sequence[PairwiseLabel], rule: ResolutionRule) -> Resolution:
    weight = math.fsum(label.weight for label in labels)
    probability = math.fsum(label.weight * _probability(label, rule) for label in labels) / weight
    if math.isclose(probability, 0.5, rel_tol=1e-9):
        probability = 0.5
    outcome: Outcome = "tie" if probability == 0.5 else "first" if probability > 0.5 else "second"
    return _resolution(task, labels, outcome, probability)


def _by_majority(task: str, labels: Sequence[PairwiseLabel], rule: ResolutionRule) -> Resolution | None:
    """None for a tied vote that the rule drops."""
    votes = {outcome: _weight(labels, outcome) for outcome in get_args(Outcome)}
    most = max(votes.values())
    # Weights such as 0.1 + 0.2 against 0.3 are equal but for rounding.
    winners: list[Outcome] = [outcome for outcome, vote in votes.items() if math.isclose(vote, most, rel_tol=1e-9)]
    if len(winners) > 1 and rule.on_tied_vote == "drop":
        return None
    outcome: Outcome = winners[0] if len(winners) == 1 else "tie"
    return _resolution(task, labels, outcome, {"first": 1.0, "second": 0.0, "tie": 0.5}[outcome])


def _weight(labels: Sequence[PairwiseLabel], outcome: Outcome) -> float:
    return math.fsum(label.weight for label in labels if _outcome(label) == outcome)


def _resolution(task: str, labels: Sequence[PairwiseLabel], outcome: Outcome, probability: float) -> Resolution:
    agreement = _weight(labels, outcome) / math.fsum(label.weight for label in labels)
    return Resolution(task, outcome, probability, agreement, len(labels), tuple(label.annotator for label in labels))
