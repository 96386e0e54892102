"""Writes imported tasks and labels into the store, so that a label that is there is not added again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from rlhf.errors import DataError
from rlhf.preferences.exchange import lossless
from rlhf.preferences.exchange.items import ImportedLabel, ImportedTask
from rlhf.preferences.store import (
    Annotator,
    AnnotatorKind,
    MadeLabel,
    Policy,
    PreferenceStore,
    RefusedError,
    Skip,
    TaskPlan,
    task_id,
)
from rlhf.preferences.store.answers import answer_kind, answer_to_json, flags_to_json
from rlhf.preferences.store.content import identity


@dataclass(frozen=True)
class Written:
    """How many tasks and labels an import has, and how many of them the store did not have."""

    num_tasks: int
    num_new_tasks: int
    num_new_labels: int
    annotators: tuple[str, ...]


@dataclass
class _Held:
    """What the store holds of a task: the tokens of its labels, who has it, and how many places are taken."""

    tokens: set[str] = field(default_factory=set)
    annotators: set[str] = field(default_factory=set)
    num_taken: int = 0
    num_labels: int | None = None


class _Placing:
    """Decides which task and which annotator each label goes to."""

    def __init__(self, store: PreferenceStore, ids: Iterable[str]) -> None:
        self._store = store
        self._held: dict[str, _Held] = {}
        wanted = list(dict.fromkeys(ids))
        there = store.tasks(wanted)
        for task in wanted:
            self._held[task] = self._look(task, there[task].plan.num_labels) if task in there else _Held()
        self._occurrences: Counter[tuple[str, str]] = Counter()
        self.plans: dict[str, TaskPlan] = {}
        self.labels: list[MadeLabel] = []

    def add(self, task: ImportedTask, page: str) -> None:
        """Places the labels of a task."""
        key = task_id(task.plan)
        self.plans.setdefault(key, task.plan)
        for label in task.labels:
            self._occurrences[key, label.annotator] += 1
            occurrence = self._occurrences[key, label.annotator]
            self._place(key, label, _token(key, label, occurrence), page)

    def _place(self, key: str, label: ImportedLabel, token: str, page: str) -> None:
        annotator = label.annotator
        held = self.held(key)
        number = 1
        while token not in held.tokens and annotator in held.annotators:
            if label.anonymous:
                # Somebody else of the nameless crowd labelled the same pair.
                number += 1
                annotator = f"{label.annotator}#{number}"
            else:
                # The same annotator, asked again.
                plan = replace(self.plans[key], repeat_of=key, num_labels=1)
                key = task_id(plan)
                self.plans.setdefault(key, plan)
                held = self.held(key)
        if token in held.tokens:
            return
        held.tokens.add(token)
        held.annotators.add(annotator)
        if label.answer is not None and not isinstance(label.answer, Skip):
            held.num_taken += 1
        self.labels.append(
            MadeLabel(
                key,
                annotator,
                label.answer,
                token,
                label.shown,
                label.seconds,
                label.flags,
                label.comment,
                page,
                label.made_at,
            )
        )

    def held(self, key: str) -> _Held:
        """What is known of a task."""
        if key not in self._held:
            there = self._store.tasks([key])
            self._held[key] = self._look(key, there[key].plan.num_labels) if there else _Held()
        return self._held[key]

    def _look(self, task: str, num_labels: int) -> _Held:
        held = _Held(num_labels=num_labels)
        held.tokens = {label.token for label in self._store.history(task)}
        for assignment in self._store.assignments(task):
            if assignment.state in ("leased", "answered", "declined"):
                held.annotators.add(assignment.annotator)
                held.num_taken += assignment.state != "declined"
        return held


def write_tasks(
    store: PreferenceStore, tasks: Sequence[tuple[str, ImportedTask]], annotator_kind: AnnotatorKind
) -> Written:
    """Adds tasks, each with a word on where it comes from, and their labels."""
    placing = _Placing(store, (task_id(task.plan) for _, task in tasks))
    for page, task in tasks:
        placing.add(task, page)
    _add_annotators(store, {label.annotator: Annotator(label.annotator, annotator_kind) for label in placing.labels})
    store.add_policies(policy for _, task in tasks for policy in task.policies)
    store.add_prompts(task.prompt for _, task in tasks)
    store.add_responses(response for _, task in tasks for response in task.responses)
    ordered = sorted(placing.plans.items(), key=lambda item: item[1].repeat_of is not None)
    store.add_tasks(
        replace(plan, num_labels=max(plan.num_labels, placing.held(key).num_taken)) for key, plan in ordered
    )
    _make_room(store, {key: placing.held(key) for key in placing.plans})
    new = _record(store, placing.labels)
    annotators = dict.fromkeys(label.annotator for _, task in tasks for label in task.labels)
    num_new_tasks = sum(placing.held(key).num_labels is None for key in placing.plans)
    return Written(len(placing.plans), num_new_tasks, new, tuple(annotators))


def write_labelled(
    store: PreferenceStore, headers: Iterable[lossless.Header], tasks: Sequence[lossless.LabelledTask]
) -> Written:
    """Adds tasks of our own format with every version of their labels, and the plans that they had."""
    there = store.tasks(task.id for task in tasks)
    annotators = {version.annotator.name: version.annotator for task in tasks for version in task.versions}
    policies = {response.policy for task in tasks for response in task.responses if response.policy is not None}
    for header in headers:
        annotators.update({annotator.name: annotator for annotator in header.annotators})
        store.add_policies(header.policies)
        for text in header.instructions:
            store.add_instructions(text)
    _add_annotators(store, annotators)
    store.add_policies(Policy(policy) for policy in sorted(policies))
    store.add_prompts(task.prompt for task in tasks)
    store.add_responses(response for task in tasks for response in task.responses)
    for depth in (False, True):
        store.add_tasks(task.plan for task in tasks if (task.plan.repeat_of is not None) is depth)
    _make_room(
        store,
        {
            task.id: _Held(num_taken=len(task.versions) + len(store.assignments(task.id)), num_labels=0)
            for task in tasks
            if task.versions
        },
    )
    try:
        new = lossless.replay(store, tasks)
    except RefusedError as error:
        raise DataError(f"a label of the file cannot be taken: {error}") from error
    finally:
        for task in tasks:
            wanted = there[task.id].plan.num_labels if task.id in there else task.plan.num_labels
            if task.versions:
                store.replan([task.id], num_labels=wanted)
    return Written(len(tasks), len(tasks) - len(there), new, tuple(sorted(annotators)))


def _add_annotators(store: PreferenceStore, annotators: dict[str, Annotator]) -> None:
    """Adds those that the store does not know; one that it knows keeps its kind and description."""
    there = store.annotators()
    for name, annotator in annotators.items():
        if name not in there:
            store.add_annotator(annotator)


def _make_room(store: PreferenceStore, held: dict[str, _Held]) -> None:
    """Lets each task that is there want as many labels as it is about to have."""
    wanted: dict[int, list[str]] = {}
    for key, one in held.items():
        if one.num_labels is not None and one.num_taken > one.num_labels:
            wanted.setdefault(one.num_taken, []).append(key)
    for number, keys in wanted.items():
        store.replan(keys, num_labels=number)


def _record(store: PreferenceStore, labels: Sequence[MadeLabel]) -> int:
    try:
        return store.record(labels)
    except RefusedError as error:
        raise DataError(f"a label of the file cannot be taken: {error}") from error


def _token(task: str, label: ImportedLabel, occurrence: int) -> str:
    """The name of a label: equal for the same answer to the same task, whatever file it comes from."""
    answer = None if label.answer is None else answer_to_json(label.answer)
    time = None if label.made_at is None else label.made_at.isoformat()
    said = (answer_kind(label.answer), answer, flags_to_json(label.flags), label.comment, time)
    return f"import-{identity('import', task, label.annotator, occurrence, *said)}"
