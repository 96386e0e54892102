"""How far the labelling is, and how each annotator works: counts, from which others make shares and intervals."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from statistics import median

from rlhf.preferences.store.answers import Answer, Skip, agrees
from rlhf.preferences.store.content import AnnotatorKind, Task
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


class Figures(Recording):
    """The methods that count."""

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
