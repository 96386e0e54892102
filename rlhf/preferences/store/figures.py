"""How far the labelling is, and how each annotator works: counts, from which others make shares and intervals."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from statistics import median

from rlhf.preferences.store.answers import Answer, Skip, agrees
from rlhf.preferences.store.content import AnnotatorKind, Task
from rlhf.preferences.store.database import time_text
from rlhf.preferences.store.labels import Label
from rlhf.preferences.store.recording import Recording


@dataclass(frozen=True)
class RoundProgress:
    """The tasks of one round, each in one state, and their labels.

    A task is done when it has the answers it wants; else in work when somebody holds it; else started when it has an
    answer; else waiting. `num_missing` counts the answers that are still wanted of ordinary tasks; those of gold
    questions and blind repeats, which a round need not wait for, are `num_missing_checks`. `num_declined` counts skips
    and flags without an answer.
    """

    round: int
    num_tasks: int
    num_done: int
    num_in_work: int
    num_started: int
    num_waiting: int
    num_answered: int
    num_declined: int
    num_leased: int
    num_missing: int
    num_missing_checks: int


@dataclass(frozen=True)
class AnnotatorFigures:
    """Counts of an annotator's current labels.

    Position bias: `num_first` of `num_choices`, those whose order is known, took the response shown first. Pace: the
    median and the sum of the seconds taken, over the answers of which they are known (`num_timed`). Attention:
    `num_gold_right` of `num_gold` gold questions. Consistency: `num_repeats_same` of `num_repeats` answers to blind
    repeats equal the first answer; the strength of a choice does not count.
    """

    name: str
    kind: AnnotatorKind
    num_answered: int
    num_declined: int
    num_choices: int
    num_first: int
    num_timed: int
    median_seconds: float | None
    total_seconds: float
    num_gold: int
    num_gold_right: int
    num_repeats: int
    num_repeats_same: int


_LABELLED = "a.annotator = :annotator AND a.state IN ('answered', 'declined')"
_STANDING = f"""
    SELECT
      (SELECT COUNT(*) FROM assignments a WHERE {_LABELLED}),
      (SELECT COUNT(*) FROM assignments a WHERE {_LABELLED} AND a.lease_ends >= :since AND EXISTS (
        SELECT 1 FROM labels l WHERE l.assignment = a.id AND l.made_at >= :since AND l.kind <> 'retract')),
      (SELECT COUNT(*) FROM assignments a
        WHERE a.annotator = :annotator AND a.state = 'leased' AND a.lease_ends > :now)
"""
_OPEN_OWN = """
    SELECT COUNT(*) FROM assignments a CROSS JOIN tasks t ON t.id = a.task
    WHERE a.annotator = :annotator AND a.state IN ('leased', 'answered', 'declined')
      AND t.num_taken < t.num_labels AND t.repeat_of IS NULL
"""
_REPEATS = """
    SELECT COUNT(*) FROM tasks t WHERE t.num_taken < t.num_labels AND t.repeat_of IS NOT NULL
      AND (t.audience IS NULL OR t.audience = (SELECT kind FROM annotators WHERE name = :annotator))
      AND NOT EXISTS (SELECT 1 FROM assignments a WHERE a.task = t.id AND a.annotator = :annotator
        AND a.state IN ('leased', 'answered', 'declined'))
      AND COALESCE(
        (SELECT a.state <> 'declined' FROM assignments a WHERE a.task = t.repeat_of AND a.annotator = :annotator
          AND a.state IN ('leased', 'answered', 'declined')),
        (SELECT o.num_taken < o.num_labels FROM tasks o WHERE o.id = t.repeat_of))
"""
_OTHERS_HOLD = """
    SELECT EXISTS (
      SELECT 1 FROM assignments o JOIN tasks t ON t.id = o.task
      WHERE o.state = 'leased' AND o.lease_ends > :now AND o.annotator <> :annotator
        AND (t.audience IS NULL OR t.audience = (SELECT kind FROM annotators WHERE name = :annotator))
        AND NOT EXISTS (SELECT 1 FROM assignments a WHERE a.task = t.id AND a.annotator = :annotator
          AND a.state IN ('leased', 'answered', 'declined'))
        AND (t.repeat_of IS NULL OR EXISTS (SELECT 1 FROM assignments a
          WHERE a.task = t.repeat_of AND a.annotator = :annotator AND a.state = 'answered')))
"""
_NUM_STUCK = """
    SELECT COUNT(*) FROM tasks t
    WHERE t.num_taken < t.num_labels AND t.repeat_of IS NULL AND (t.audience IS NULL OR t.audience = :kind)
      AND EXISTS (SELECT 1 FROM annotators WHERE kind = :kind)
      AND NOT EXISTS (SELECT 1 FROM annotators n WHERE n.kind = :kind AND NOT EXISTS (
        SELECT 1 FROM assignments a WHERE a.task = t.id AND a.annotator = n.name
          AND a.state IN ('leased', 'answered', 'declined')))
"""
_RECENT = f"""
    SELECT l.made_at, l.seconds FROM assignments a CROSS JOIN labels l ON l.assignment = a.id
    WHERE {_LABELLED} AND NOT EXISTS (SELECT 1 FROM labels later WHERE later.supersedes = l.id)
    ORDER BY a.id DESC LIMIT :recent
"""


@dataclass(frozen=True)
class Totals:
    """The tasks that annotators of one kind may be given, and the labels that the plan wants of them.

    `num_wanted` labels are wanted, `num_there` of them are there. `num_open` tasks have a place left, of which
    `num_open_repeats` are blind repeats.
    """

    num_wanted: int
    num_there: int
    num_open: int
    num_open_repeats: int


@dataclass(frozen=True)
class Standing:
    """Where an annotator is: the tasks labelled (answered or declined), in all and since a time; the tasks held.

    Of those since a time, ones whose lease had ended before it are not counted. `recent` are the newest labels, the
    newest first: when each was made, and the seconds it took.
    """

    num_labelled: int
    num_labelled_since: int
    num_held: int
    recent: tuple[tuple[datetime, float | None], ...]


@dataclass(frozen=True)
class TaskCounts:
    """The labels that a task wants, and of whom; how many annotators answered it, and how many declined."""

    audience: AnnotatorKind | None
    num_labels: int
    num_answered: int
    num_declined: int


class Figures(Recording):
    """The methods that count."""

    def counts(self, tasks: Iterable[str]) -> dict[str, TaskCounts]:
        """How far each of these tasks (ids) is; those that the store does not have are left out."""
        query = """
            SELECT t.id, t.audience, t.num_labels,
              COALESCE(SUM(a.state = 'answered'), 0), COALESCE(SUM(a.state = 'declined'), 0)
            FROM tasks t LEFT JOIN assignments a ON a.task = t.id
            WHERE t.id IN (SELECT value FROM json_each(?)) GROUP BY t.id
        """
        with self._read() as connection:
            rows = connection.execute(query, (json.dumps(list(tasks)),))
            return {row[0]: TaskCounts(*tuple(row)[1:]) for row in rows}

    def totals(self, kind: AnnotatorKind) -> Totals:
        """What is left to do for annotators of a kind: one walk over the tasks."""
        query = """
            SELECT COALESCE(SUM(num_labels), 0), COALESCE(SUM(MIN(num_taken, num_labels)), 0),
              COALESCE(SUM(num_taken < num_labels), 0),
              COALESCE(SUM(num_taken < num_labels AND repeat_of IS NOT NULL), 0)
            FROM tasks WHERE audience IS NULL OR audience = ?
        """
        leased = """
            SELECT COUNT(*) FROM assignments a JOIN tasks t ON t.id = a.task
            WHERE a.state = 'leased' AND (t.audience IS NULL OR t.audience = ?)
        """
        with self._read() as connection:
            wanted, taken, num_open, repeats = connection.execute(query, (kind,)).fetchone()
            (held,) = connection.execute(leased, (kind,)).fetchone()
        return Totals(wanted, max(0, taken - held), num_open, repeats)

    def standing(self, annotator: str, *, since: datetime, num_recent: int) -> Standing:
        """Where an annotator is, from their own assignments alone."""
        values = {"annotator": annotator, "since": time_text(since), "recent": num_recent, "now": self._now()}
        with self._read() as connection:
            labelled, labelled_since, held = connection.execute(_STANDING, values).fetchone()
            recent = [(datetime.fromisoformat(made), seconds) for made, seconds in connection.execute(_RECENT, values)]
        return Standing(labelled, labelled_since, held, tuple(recent))

    def num_open_for(self, annotator: str, totals: Totals) -> int:
        """How many open tasks an annotator could still be given; `totals` are those for their kind.

        A blind repeat counts from the start, together with its original: if it did so only once that is answered, the
        number would tell which tasks are repeated. Takes a look at each task that they labelled, and at each open
        blind repeat.
        """
        values = {"annotator": annotator}
        with self._read() as connection:
            (own,) = connection.execute(_OPEN_OWN, values).fetchone()
            repeats = connection.execute(_REPEATS, values).fetchone()[0] if totals.num_open_repeats else 0
        return max(0, totals.num_open - totals.num_open_repeats - int(own)) + int(repeats)

    def progress(self) -> list[RoundProgress]:
        """The state of each round that has tasks, by round."""
        query = """
            SELECT t.round, t.num_labels, (t.gold IS NOT NULL OR t.repeat_of IS NOT NULL) AS is_check,
              COALESCE(SUM(a.state = 'answered'), 0) AS answered,
              COALESCE(SUM(a.state = 'declined'), 0) AS declined,
              COALESCE(SUM(a.state = 'leased' AND a.lease_ends > ?), 0) AS leased
            FROM tasks t LEFT JOIN assignments a ON a.task = t.id GROUP BY t.id
        """
        rounds: dict[int, Counter[str]] = {}
        with self._read() as connection:
            for row in connection.execute(query, (self._now(),)):
                counts = rounds.setdefault(row["round"], Counter())
                missing = max(0, row["num_labels"] - row["answered"])
                counts["num_missing_checks" if row["is_check"] else "num_missing"] += missing
                for name in ("answered", "declined", "leased"):
                    counts[f"num_{name}"] += row[name]
                if not missing:
                    state = "done"
                elif row["leased"]:
                    state = "in_work"
                else:
                    state = "started" if row["answered"] else "waiting"
                counts[f"num_{state}"] += 1
                counts["num_tasks"] += 1
        names = [name for name in RoundProgress.__dataclass_fields__ if name != "round"]
        return [RoundProgress(number, **{name: rounds[number][name] for name in names}) for number in sorted(rounds)]

    def others_hold(self, annotator: str) -> bool:
        """Whether somebody else holds a task that the annotator could get if it came back."""
        with self._read() as connection:
            values = {"annotator": annotator, "now": self._now()}
            return bool(connection.execute(_OTHERS_HOLD, values).fetchone()[0])

    def num_stuck(self, kind: AnnotatorKind) -> int:
        """How many ordinary tasks have a place left that no known annotator of a kind can fill: all of them had it."""
        with self._read() as connection:
            row = connection.execute(_NUM_STUCK, {"kind": kind}).fetchone()
        return int(row[0])

    def annotator_figures(self) -> list[AnnotatorFigures]:
        """How each annotator works, by name; those without a label too."""
        labels: dict[str, list[Label]] = {name: [] for name in self.annotators()}
        for label in self.current_labels():
            labels.setdefault(label.annotator, []).append(label)
        tasks = self.tasks(label.task for held in labels.values() for label in held)
        kinds = {name: annotator.kind for name, annotator in self.annotators().items()}
        return [_figures(name, kinds[name], held, tasks) for name, held in sorted(labels.items())]


def _figures(name: str, kind: AnnotatorKind, labels: list[Label], tasks: dict[str, Task]) -> AnnotatorFigures:
    answers: dict[str, Answer] = {
        label.task: label.answer for label in labels if label.answer is not None and not isinstance(label.answer, Skip)
    }
    seconds = [label.seconds for label in labels if label.task in answers and label.seconds is not None]
    clicked = [label.clicked for label in labels if label.clicked is not None]
    gold = [agrees(answer, right) for task, answer in answers.items() if (right := tasks[task].plan.gold) is not None]
    repeats = [
        agrees(answer, answers[original])
        for task, answer in answers.items()
        if (original := tasks[task].plan.repeat_of) is not None and original in answers
    ]
    return AnnotatorFigures(
        name=name,
        kind=kind,
        num_answered=len(answers),
        num_declined=len(labels) - len(answers),
        num_choices=len(clicked),
        num_first=clicked.count(0),
        num_timed=len(seconds),
        median_seconds=median(seconds) if seconds else None,
        total_seconds=sum(seconds),
        num_gold=len(gold),
        num_gold_right=sum(gold),
        num_repeats=len(repeats),
        num_repeats_same=sum(repeats),
    )
