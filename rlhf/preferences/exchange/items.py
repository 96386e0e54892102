"""What the importers make of a row: tasks with their labels, before they meet the store. Pure Python."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from rlhf.preferences.store import (
    AnnotatorKind,
    Answer,
    Flag,
    Policy,
    Response,
    TaskPlan,
    prompt_id,
    response_id,
)
from rlhf.records import Prompt, PromptContent

Fields = Mapping[str, Any]
# The strategy of an imported task, followed by the file's own word for where the pair comes from. Its score is the
# imported margin of the response whose id sorts first over the other.
IMPORTED = "imported"


class UnusableRowError(ValueError):
    """A row that is as it should be and yet holds nothing to learn from: it is counted, whatever `on_bad_row` says."""


@dataclass(frozen=True)
class ImportOptions:
    """How rows are read.

    `annotator` names whoever labelled where the file does not say; None takes the name of the format. `annotator_kind`
    is that of all annotators that the store does not know. `rating_scale` is the highest rating of the file.
    `prompt_field` and `response_fields` name the texts of a Label Studio or Argilla task that has unusual names.
    """

    annotator: str | None = None
    annotator_kind: AnnotatorKind = "human"
    rating_scale: int = 5
    prompt_field: str | None = None
    response_fields: tuple[str, ...] = ()


@dataclass(frozen=True)
class ImportedLabel:
    """An answer of `annotator`, who is one of a nameless crowd when `anonymous`; the rest is as in `MadeLabel`."""

    annotator: str
    answer: Answer | None
    anonymous: bool = False
    shown: tuple[str, ...] = ()
    seconds: float | None = None
    flags: tuple[Flag, ...] = ()
    comment: str = ""
    made_at: datetime | None = None


@dataclass(frozen=True)
class ImportedTask:
    """A task, what it is about, and its labels; `notes` say what of the row could not be kept."""

    prompt: Prompt
    responses: tuple[Response, ...]
    plan: TaskPlan
    labels: tuple[ImportedLabel, ...] = ()
    policies: tuple[Policy, ...] = ()
    notes: tuple[str, ...] = ()


def make_responses(
    prompt: Prompt, texts: Sequence[str], *, numbered: bool
) -> tuple[tuple[Response, ...], tuple[str, ...]]:
    """Responses without a known policy, and their ids.

    `numbered` where the file tells a first from a second response whatever their outcome: agreement by chance depends
    on it, and equal texts stay apart. Where it only tells the chosen from the rejected, the texts alone decide.
    """
    key = prompt_id(prompt)
    responses = tuple(Response(key, text, number=place if numbered else None) for place, text in enumerate(texts))
    return responses, tuple(response_id(response) for response in responses)


def as_prompt(content: PromptContent, columns: Mapping[str, Any] | None = None) -> Prompt:
    """A prompt for the store."""
    return Prompt(content, dict(columns or {}))


def strategy_of(source: str | None) -> str:
    """The strategy of a task that was imported from `source`."""
    return f"{IMPORTED}: {source}" if source else IMPORTED


def source_of(strategy: str) -> str | None:
    """The source of a task by its strategy: the file's word, or the strategy that chose it here."""
    if strategy == IMPORTED:
        return None
    return strategy.removeprefix(f"{IMPORTED}: ")


def cleaned(fields: Fields) -> dict[str, Any]:
    """The row without NaN, which some writers put where a value is missing."""
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in fields.items()}


def parse_time(value: Any) -> datetime | None:
    """A time in ISO 8601, UTC unless it says otherwise; None when there is none that can be read."""
    if not isinstance(value, str):
        return None
    try:
        time = datetime.fromisoformat(value)
    except ValueError:
        return None
    return time if time.tzinfo is not None else time.replace(tzinfo=UTC)


def parse_seconds(value: Any) -> float | None:
    """A length of time; None when there is none that makes sense."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) and value >= 0 else None
