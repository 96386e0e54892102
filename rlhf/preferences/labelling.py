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
from rlhf.records import Prompt, PromptContent

CHUNK_SIZE = 256
PAGE = "program"
# The states of an assignment that takes a place of its task.
_HOLDING = ("leased", "answered")
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

    @property
    def details(self) -> list[str]:
        """A line for each annotator that has figures: its counts, and how often it took what was shown first."""
        lines = []
        for name, figures in self.figures.items():
            counts = {key.replace("_", " "): value for key, value in figures.items() if type(value) is int and value}
            counts.pop("took first", None)
            parts = [f"{value:,} {noun}" for noun, value in counts.items()]
            if share := figures.get("first_share"):
                value, low, high = (100 * share[end] for end in ("value", "low", "high"))
                parts.append(f"took the response shown first in {value:.1f} % [{low:.1f}, {high:.1f}] of the choices")
            lines.append(f"{name}: {', '.join(parts)}")
        return lines

    @property
    def is_plain(self) -> bool:
        """Whether all programs answered all that they were asked, and there is nothing else to say of them."""
        return not (self.figures or self.num_abstentions or self.num_missing or self.num_taken)


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
    """A task with the places that it has, what is shown of it, who had it before, and who is still to be asked."""

    task: Task
    prompt: Prompt
    responses: tuple[ShownResponse, ...]
    assigned: tuple[str, ...]
    places: int
    waiting: list[TaskAnnotator]

    def attempt(self, annotator: str) -> int:
        """How often the annotator had the task before."""
        return self.assigned.count(annotator)


@dataclass(frozen=True)
class _Answered:
    """What an annotator gave for a task that is open, as it was shown."""

    member: TaskAnnotator
    opened: _Open
    shown: ShownTask
    given: Given

    def label(self) -> MadeLabel:
        """The label of the answer; an abstention is a skip."""
        name = self.member.name
        return MadeLabel(
            task=self.shown.id,
            annotator=name,
            answer=Skip() if self.given.answer is None else self.given.answer,
            token=identity("label", self.shown.id, name, self.opened.attempt(name)),
            shown=tuple(one.id for one in self.shown.responses),
            seconds=self.given.seconds,
            comment=self.given.comment,
            page=PAGE,
        )


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
    plans: dict[str, Task] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    by_annotator: Counter[str] = field(default_factory=Counter)
    wanted: int = 0

    def run(self) -> LabellingSummary:
        for member in self.annotators.members:
            self.store.add_annotator(Annotator(member.name, member.kind, dict(member.settings)))
        self.plans = self.store.tasks(self.ids)
        unknown = [task for task in self.ids if task not in self.plans]
        if unknown:
            raise DataError(f"{self.store.path} has no task {unknown[0]!r}; add it before it is labelled")
        repeats = [task for task in self.ids if self.plans[task].plan.repeat_of is not None]
        ordinary = [task for task in self.ids if self.plans[task].plan.repeat_of is None]
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
                planned[member.name] += [self._shown(member, one) for one in batch]
        for member in self.annotators.members:
            if planned[member.name]:
                message = member.prepare(planned[member.name])
                if message is not None and self.report is not None:
                    self.report(f"{member.name}: {message}")

    def _open(self, chunk: Sequence[str]) -> list[_Open]:
        """The tasks of a chunk with free places that programs may fill."""
        tasks = [self.plans[task] for task in chunk]
        before = self.store.assignments_of({one for task in tasks for one in (task.id, task.plan.repeat_of) if one})
        free: dict[str, int] = {}
        for task in tasks:
            places = task.plan.num_labels - sum(one.state in _HOLDING for one in before.get(task.id, ()))
            if places > 0:
                free[task.id] = places
        tasks = [task for task in tasks if task.id in free]
        prompts = self.store.prompts({task.prompt for task in tasks})
        texts = self.store.responses({one for task in tasks for one in task.plan.responses})
        return [
            _Open(
                task,
                prompts[task.prompt],
                tuple(ShownResponse(one, texts[one].text, texts[one].number) for one in task.plan.responses),
                tuple(one.annotator for one in before.get(task.id, ())),
                free[task.id],
                self._waiting(task, prompts[task.prompt].prompt, before),
            )
            for task in tasks
        ]

    def _waiting(
        self, task: Task, prompt: PromptContent, before: Mapping[str, Sequence[Assignment]]
    ) -> list[TaskAnnotator]:
        """Who may be asked about a task, in turn: of its audience, and of a repeat those who answered the original."""
        seed, pool = self.annotators.seed, self.annotators.pool_for(prompt)
        asked = {one.annotator for one in before.get(task.id, ()) if one.state in (*_HOLDING, "declined")}
        turns = pool.in_turn(seed, prompt, self._key(task), self.numbers.get(task.id))
        waiting = [one for one in turns if one.name not in asked and task.plan.audience in (None, one.kind)]
        if task.plan.repeat_of is None:
            return waiting
        answered = {one.annotator for one in before.get(task.plan.repeat_of, ()) if one.state == "answered"}
        return [one for one in waiting if one.name in answered]

    def _label(self, opened: list[_Open]) -> None:
        """Asks until every place is filled or nobody is left to ask."""
        for one in opened:
            if any(member.kind == "human" for member in one.waiting) or one.task.plan.audience == "human":
                self.counts["for_people"] += one.places
                one.places = 0
        while batches := list(_assigned(opened)):
            answered: list[_Answered] = []
            try:
                for member, batch in batches:
                    if answered and self.progress is not None:
                        self.progress(self.counts["labels"], self.wanted)
                    shown = [self._shown(member, one) for one in batch]
                    given = member.answer(shown)
                    answered += [_Answered(member, *item) for item in zip(batch, shown, given, strict=True)]
            finally:
                # Where an annotator breaks off, what the others have said is kept.
                self._record(answered)
        self.counts["missing"] += sum(one.places for one in opened)

    def _shown(self, member: TaskAnnotator, opened: _Open) -> ShownTask:
        """The task as the store would show it to this annotator."""
        task, attempt = opened.task, opened.attempt(member.name)
        responses = sorted(
            opened.responses,
            key=lambda one: identity("order", self.store.seed, task.id, member.name, attempt, one.id),
        )
        return ShownTask(task.id, task.plan.kind, opened.prompt, tuple(responses), self._key(task), task.plan.scale)

    def _key(self, task: Task) -> str:
        return str(self.numbers.get(task.id, task.id))

    def _record(self, answered: Sequence[_Answered]) -> None:
        """Puts the answers into the store, in one transaction unless the tasks of some have been filled by others."""
        labels = [one.label() for one in answered]
        try:
            self.store.record(labels)
            kept = [True] * len(labels)
        except RefusedError as error:
            if error.reason not in _TAKEN:
                raise
            # One that came too late refuses its whole batch.
            kept = [self._record_one(label) for label in labels]
        for one, is_kept in zip(answered, kept, strict=True):
            self._count(one.member.name, one.given, is_kept)
            one.opened.waiting.remove(one.member)
            if one.given.answer is not None or not is_kept:
                one.opened.places -= 1
        if answered and self.progress is not None:
            self.progress(self.counts["labels"], self.wanted)

    def _record_one(self, label: MadeLabel) -> bool:
        try:
            self.store.record([label])
        except RefusedError as error:
            if error.reason not in _TAKEN:
                raise
            return False
        return True

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
