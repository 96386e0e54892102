"""What an annotator is: it is shown tasks and gives an answer to each, or abstains. One protocol for all kinds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rlhf.errors import ConfigError
from rlhf.preferences.store import AnnotatorKind, Answer, TaskKind
from rlhf.records import Prompt


@dataclass(frozen=True)
class ShownResponse:
    """A response with its id in the store; `number` says which sample it is, where that is known."""

    id: str
    text: str
    number: int | None = None


@dataclass(frozen=True)
class ShownTask:
    """A task as one annotator sees it: the responses are in the order shown.

    `key` tells the tasks of a prompt apart where random numbers are drawn; `scale` is the best rating.
    """

    id: str
    kind: TaskKind
    prompt: Prompt
    responses: tuple[ShownResponse, ...]
    key: str
    scale: int | None = None

    @property
    def in_fixed_order(self) -> tuple[ShownResponse, ...]:
        """The responses in an order that the sides do not change: by their sample's number, then by id."""
        return tuple(sorted(self.responses, key=lambda one: (one.number is None, one.number or 0, one.id)))


@dataclass(frozen=True)
class Given:
    """What an annotator gives for a task: an answer in terms of the responses' ids, or None where it abstains."""

    answer: Answer | None
    comment: str = ""
    seconds: float | None = None


class TaskAnnotator(Protocol):
    """Simulated annotators, judges, rules and functions; people are asked through the page."""

    @property
    def name(self) -> str:
        """The name in the store."""

    @property
    def kind(self) -> AnnotatorKind:
        """What it is."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """All that decides its answers, as JSON values: the annotator's description in the store."""

    def prepare(self, tasks: Sequence[ShownTask]) -> str | None:
        """Called once with all tasks before the first is asked: what they will cost, for people to read.

        None where they cost nothing. Raises `ConfigError` when that is more than the config allows.
        """

    def answer(self, tasks: Sequence[ShownTask]) -> list[Given]:
        """What it gives for each task, in order."""

    def figures(self) -> dict[str, Any]:
        """Counts over all answers so far, as JSON values: requests, tokens, cost, bias. Empty where there is none."""


@dataclass(frozen=True)
class People:
    """The marker of human annotators. Their tasks stay open, and the page of `rlhf label` shows them."""

    name: str = "people"
    kind: AnnotatorKind = "human"

    @property
    def settings(self) -> Mapping[str, Any]:
        """People say themselves who they are."""
        return {}

    def prepare(self, tasks: Sequence[ShownTask]) -> str | None:
        """People are not paid here."""
        return None

    def answer(self, tasks: Sequence[ShownTask]) -> list[Given]:
        """Raises `ConfigError`: no program answers for people."""
        raise ConfigError(
            f"{len(tasks)} tasks are for people, whom no program can stand in for; they label on the page: "
            "rlhf label store=PATH"
        )

    def figures(self) -> dict[str, Any]:
        """The store has them: `annotator_figures`."""
        return {}
