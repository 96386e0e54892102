"""Labelling without people: annotators that are programs answer the open tasks of a store, a chunk at a time."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf.errors import DataError
from rlhf.preferences.annotators.mixture import Annotators
from rlhf.preferences.annotators.protocol import Given, ShownResponse, ShownTask, TaskAnnotator
from rlhf.preferences.store import (
    Annotator,
    Assignment,
    BothBad,
    MadeLabel,
    PreferenceStore,
    RefusedError,
    Skip,
    Task,
    Tie,
)
from rlhf.preferences.store.content import identity

CHUNK_SIZE = 256
PAGE = "program"
# Somebody else was quicker: another run, or a person.
_TAKEN = ("no_room", "already_labelled", "asked_again", "token_reused")


@dataclass(frozen=True)
class LabellingSummary:
    """What a call of `label_tasks` did.

    `num_labels` answers were recorded, `num_ties` and `num_both_bad` of them; annotators abstained `num_abstentions`
    times. `num_missing` answers are still wanted of programs and `num_for_people` of people. `num_taken` answers came
    too late: the task had got its labels meanwhile. `cost` is in the unit of the config's prices, None where none are
    given. `figures` are those of each annotator that has any.
    """

    num_tasks: int
    num_labels: int
    num_ties: int
    num_both_bad: int
    num_abstentions: int
    num_missing: int
    num_for_people: int
    num_taken: int
    labels_by_annotator: Mapping[str, int]
    cost: float | None
    figures: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON values."""
        plain = {name: dict(value) if isinstance(value, Mapping) else value for name, value in vars(self).items()}
        return plain | {"figures": {name: dict(value) for name, value in self.figures.items()}}

    def __str__(self) -> str:
        parts = [f"{self.num_labels:,} labels of {self.num_tasks:,} tasks"]
        for count, noun in (
            (self.num_ties, "ties"),
            (self.num_both_bad, "both bad"),
            (self.num_abstentions, "abstentions"),
            (self.num_taken, "answered by others meanwhile"),
            (self.num_missing, "still missing"),
            (self.num_for_people, "for people"),
        ):
            if count:
                parts.append(f"{count:,} {noun}")
        if self.cost is not None:
            parts.append(f"cost {self.cost:.4g}")
        return ", ".join(parts)


def label_tasks(
    store: PreferenceStore,
    annotators: Annotators,
    tasks: Iterable[str],
    *,
    numbers: Mapping[str, int] | None = None,
    chunk_size: int = CHUNK_SIZE,
    report: Callable[[str], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LabellingSummary:
    """Lets the annotators answer tasks (ids) of the store until each has the labels that its plan wants.

    An annotator answers a task of its part of a mixture, if the plan's audience is its kind or nobody in particular;
    a blind repeat goes to those alone who answered the original, after everything else.
    The labels of a chunk are in the store before the next is asked: a run that was killed goes on where it was, and
    nobody is asked twice. Each annotator sees the responses in an order of its own, as the store draws it. One that
    abstains is recorded as a skip, and the next of its pool is asked.

    `numbers` gives tasks the number by which a pool takes turns and random numbers are keyed, in place of the task's
    id. `report` gets lines for people, the cost before anything is asked among them; `progress` the number of labels
    recorded and wanted. Raises `ConfigError` before anybody is asked when the cost is over the config's limit, and
    whatever an annotator raises; labels recorded before stay.
    """
    work = _Work(store, annotators, list(dict.fromkeys(tasks)), dict(numbers or {}), chunk_size, report, progress)
    return work.run()


@dataclass
class _Open:
    """A task with the places that it has, and who is still to be asked."""

    task: Task
    places: int
    waiting: list[TaskAnnotator]


@dataclass
class _Work:
    """The state of one call of `label_tasks`."""

    store: PreferenceStore
    annotators: Annotators
    ids: list[str]
    numbers: dict[str, int]
    chunk_size: int
    report: Callable[[str], None] | None
    progress: Callable[[int, int], None] | None
    counts: Counter[str] = field(default_factory=Counter)
    by_annotator: Counter[str] = field(default_factory=Counter)
    wanted: int = 0

    def run(self) -> LabellingSummary:
        for member in self.annotators.members:
            self.store.add_annotator(Annotator(member.name, member.kind, dict(member.settings)))
        plans = self.store.tasks(self.ids)
        unknown = [task for task in self.ids if task not in plans]
        if unknown:
            raise DataError(f"{self.store.path} has no task {unknown[0]!r}; add it before it is labelled")
        repeats = [task for task in self.ids if plans[task].plan.repeat_of is not None]
        ordinary = [task for task in self.ids if plans[task].plan.repeat_of is None]
        # What a repeat costs, and who is asked, is known once the originals are answered.
        for ids in (ordinary, repeats):
            chunks = [ids[start : start + self.chunk_size] for start in range(0, len(ids), self.chunk_size)]
            self._prepare(chunks)
            for chunk in chunks:
                self._label(self._open(chunk))
        figures = {member.name: found for member in self.annotators.members if (found := member.figures())}
        costs = [found["cost"] for found in figures.values() if found.get("cost") is not None]
        names = ("labels", "ties", "both_bad", "abstentions", "missing", "for_people", "taken")
        return LabellingSummary(
            num_tasks=len(self.ids),
            **{f"num_{name}": self.counts[name] for name in names},
            labels_by_annotator=dict(self.by_annotator),
            cost=math.fsum(costs) if costs else None,
            figures=figures,
        )

    def _prepare(self, chunks: Sequence[Sequence[str]]) -> None:
        """Tells each annotator what it will be asked, as far as nobody abstains, and the user what that costs."""
        planned: dict[str, list[ShownTask]] = {member.name: [] for member in self.annotators.members}
        for chunk in chunks:
            opened = self._open(chunk)
            for member, batch in _assigned(opened):
                self.wanted += len(batch)
                planned[member.name] += self._shown(member, [one.task for one in batch])
        for member in self.annotators.members:
            if planned[member.name]:
                message = member.prepare(planned[member.name])
                if message is not None and self.report is not None:
                    self.report(f"{member.name}: {message}")

    def _open(self, chunk: Sequence[str]) -> list[_Open]:
        """The tasks of a chunk with free places that programs may fill."""
        tasks = self.store.tasks(chunk)
        prompts = self.store.prompts({task.prompt for task in tasks.values()})
        opened = []
        for task_id in chunk:
            task = tasks[task_id]
            live = [one for one in self.store.assignments(task_id) if one.state in ("leased", "answered", "declined")]
            places = task.plan.num_labels - sum(one.state != "declined" for one in live)
            if places <= 0:
                continue
            prompt = prompts[task.prompt].prompt
            asked = {one.annotator for one in live}
            turns = self.annotators.pool_for(prompt).in_turn(
                self.annotators.seed, prompt, self._key(task), self.numbers.get(task_id)
            )
            waiting = [one for one in turns if one.name not in asked and task.plan.audience in (None, one.kind)]
            if task.plan.repeat_of is not None:
                before = self.store.assignments(task.plan.repeat_of)
                answered = {one.annotator for one in before if one.state == "answered"}
                waiting = [one for one in waiting if one.name in answered]
            opened.append(_Open(task, places, waiting))
        return opened

    def _label(self, opened: list[_Open]) -> None:
        """Asks until every place is filled or nobody is left to ask."""
        for one in opened:
            if any(member.kind == "human" for member in one.waiting) or one.task.plan.audience == "human":
                self.counts["for_people"] += one.places
                one.places = 0
        while batches := list(_assigned(opened)):
            for member, batch in batches:
                shown = self._shown(member, [one.task for one in batch])
                given = member.answer(shown)
                recorded = self._record(member, shown, given)
                for one, answer, kept in zip(batch, given, recorded, strict=True):
                    one.waiting.remove(member)
                    if answer.answer is not None or not kept:
                        one.places -= 1
        self.counts["missing"] += sum(one.places for one in opened)

    def _shown(self, member: TaskAnnotator, tasks: Sequence[Task]) -> list[ShownTask]:
        """The tasks as the store would show them to this annotator."""
        prompts = self.store.prompts({task.prompt for task in tasks})
        texts = self.store.responses({response for task in tasks for response in task.plan.responses})
        shown = []
        for task in tasks:
            attempt = _attempt(self.store.assignments(task.id), member.name)
            order = sorted(
                task.plan.responses,
                key=lambda one: identity("order", self.store.seed, task.id, member.name, attempt, one),
            )
            responses = tuple(ShownResponse(one, texts[one].text, texts[one].number) for one in order)
            prompt = prompts[task.prompt]
            shown.append(ShownTask(task.id, task.plan.kind, prompt, responses, self._key(task), task.plan.scale))
        return shown

    def _key(self, task: Task) -> str:
        return str(self.numbers.get(task.id, task.id))

    def _record(self, member: TaskAnnotator, shown: Sequence[ShownTask], given: Sequence[Given]) -> list[bool]:
        """Puts the answers into the store; False for those whose task has been filled by others."""
        labels = [
            MadeLabel(
                task=task.id,
                annotator=member.name,
                answer=Skip() if answer.answer is None else answer.answer,
                token=self._token(task, member.name),
                shown=tuple(one.id for one in task.responses),
                seconds=answer.seconds,
                comment=answer.comment,
                page=PAGE,
            )
            for task, answer in zip(shown, given, strict=True)
        ]
        try:
            self.store.record(labels)
            kept = [True] * len(labels)
        except RefusedError as error:
            if error.reason not in _TAKEN:
                raise
            # One that came too late refuses its whole batch.
            kept = [self._record_one(label) for label in labels]
        for answer, is_kept in zip(given, kept, strict=True):
            self._count(member.name, answer, is_kept)
        if self.progress is not None:
            self.progress(self.counts["labels"], self.wanted)
        return kept

    def _record_one(self, label: MadeLabel) -> bool:
        try:
            self.store.record([label])
        except RefusedError as error:
            if error.reason not in _TAKEN:
                raise
            return False
        return True

    def _token(self, task: ShownTask, annotator: str) -> str:
        attempt = _attempt(self.store.assignments(task.id), annotator)
        return identity("label", task.id, annotator, attempt)

    def _count(self, annotator: str, given: Given, kept: bool) -> None:
        if not kept:
            self.counts["taken"] += 1
        elif given.answer is None:
            self.counts["abstentions"] += 1
        else:
            self.counts["labels"] += 1
            self.by_annotator[annotator] += 1
            self.counts["ties"] += isinstance(given.answer, Tie)
            self.counts["both_bad"] += isinstance(given.answer, BothBad)


def _assigned(opened: Sequence[_Open]) -> Iterator[tuple[TaskAnnotator, list[_Open]]]:
    """Who is asked next about which tasks: as many of those waiting as a task has places."""
    batches: dict[str, tuple[TaskAnnotator, list[_Open]]] = {}
    for one in opened:
        for member in one.waiting[: max(one.places, 0)]:
            if member.kind != "human":
                batches.setdefault(member.name, (member, []))[1].append(one)
    yield from batches.values()


def _attempt(assignments: Sequence[Assignment], annotator: str) -> int:
    """How often the annotator had the task before."""
    return sum(one.annotator == annotator for one in assignments)
