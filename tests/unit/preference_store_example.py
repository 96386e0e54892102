"""A small preference store for tests, with a clock that a test moves."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from rlhf.preferences.store import Annotator, Choice, Label, PreferenceStore, Response, TaskPlan
from rlhf.records import Prompt

START = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)


@dataclass
class HandClock:
    """A clock that stands still until it is moved."""

    time: datetime = START

    def __call__(self) -> datetime:
        return self.time

    def move(self, seconds: float) -> None:
        self.time += timedelta(seconds=seconds)


def add_responses(store: PreferenceStore, question: str, number: int) -> tuple[str, ...]:
    """Ids of `number` responses to a question."""
    (prompt,) = store.add_prompts([Prompt(question)])
    return tuple(store.add_responses(Response(prompt, f"{question}: text {n}", number=n) for n in range(number)))


def add_pair(
    store: PreferenceStore, question: str = "q", num_labels: int = 1, priority: float = 0.0, round: int = 0
) -> str:
    """The id of a pairwise task about two responses to a question."""
    responses = add_responses(store, question, 2)
    plan = TaskPlan("pairwise", responses, num_labels=num_labels, priority=priority, round=round)
    return store.add_tasks([plan])[0]


def make_store(folder: Path, clock: HandClock | None = None, annotators: str = "abc", seed: int = 1) -> PreferenceStore:
    """A store without tasks; each letter of `annotators` is a person."""
    store = PreferenceStore.create(folder / "store.sqlite", seed=seed, clock=clock or HandClock())
    for name in annotators:
        store.add_annotator(Annotator(name, "human"))
    return store


def lease(store: PreferenceStore, annotator: str, seconds: float = 60.0) -> int:
    """The id of the next assignment, which there must be."""
    assignment = store.next_assignment(annotator, lease_seconds=seconds)
    assert assignment is not None
    return assignment.id


def answer_next(store: PreferenceStore, annotator: str, seconds: float | None = None) -> Label | None:
    """Chooses the response shown first of the next task; None when there is none."""
    assignment = store.next_assignment(annotator, lease_seconds=60.0, repeat_gap=0)
    if assignment is None:
        return None
    token = f"{annotator}-{assignment.id}"
    return store.submit(assignment.id, annotator, Choice(assignment.shown[0]), token=token, seconds=seconds)
