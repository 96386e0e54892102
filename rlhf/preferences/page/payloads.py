"""What goes over the wire: bodies of requests, checked; tasks and answers by their place on the screen.

The browser never learns an id of a response, a model, a score or which answer is known to be right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from rlhf.preferences.store import (
    STRENGTHS,
    Answer,
    BothBad,
    Choice,
    Flag,
    FlagKind,
    Label,
    Ranking,
    Rating,
    Screen,
    Skip,
    Tie,
)
from rlhf.records import prompt_to_json

MAX_COMMENT = 4000
MAX_NAME = 80
# The ids of SQLite.
_MAX_ID = 2**63 - 1
Position = Annotated[int, Field(ge=0, le=8)]
AssignmentId = Annotated[int, Field(ge=1, le=_MAX_ID)]
SubmissionToken = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{8,100}$")]


class Body(BaseModel):
    """Base of all request bodies: unknown fields and values of another type are refused."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class ChoiceBody(Body):
    kind: Literal["choice"]
    position: Position
    strength: Annotated[int, Field(ge=STRENGTHS[0], le=STRENGTHS[-1])] = 1


class PlainBody(Body):
    """An answer without fields; `flag_only` is none, and stands for the flags sent beside it."""

    kind: Literal["tie", "both_bad", "skip", "flag_only"]


class RankingBody(Body):
    kind: Literal["ranking"]
    tiers: Annotated[list[list[Position]], Field(max_length=9)]


class RatingBody(Body):
    kind: Literal["rating"]
    ratings: Annotated[list[int], Field(min_length=1, max_length=1)]


AnswerBody = Annotated[ChoiceBody | PlainBody | RankingBody | RatingBody, Field(discriminator="kind")]


class FlagBody(Body):
    kind: FlagKind
    position: Position | None = None


class SubmitBody(Body):
    assignment: AssignmentId
    given: Annotated[str, Field(max_length=40)] | None = None
    token: SubmissionToken
    answer: AnswerBody
    flags: Annotated[list[FlagBody], Field(max_length=30)] = []
    comment: Annotated[str, Field(max_length=MAX_COMMENT)] = ""
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None


class EmptyBody(Body):
    pass


class UndoBody(Body):
    token: SubmissionToken | None = None


class AssignmentBody(Body):
    assignment: AssignmentId


class NameBody(Body):
    name: Annotated[str, Field(max_length=1000)]


class ReplanBody(Body):
    num_labels: Annotated[int, Field(ge=0, le=1000)] | None = None
    priority: Annotated[float, Field(allow_inf_nan=False)] | None = None
    round: Annotated[int, Field(ge=0, le=_MAX_ID)] | None = None


class ImpossibleAnswerError(ValueError):
    """A position that the task does not have."""


def answer_from_body(body: AnswerBody, shown: Sequence[str]) -> Answer | None:
    """The answer to a task whose responses (ids) were shown in this order; None for flags alone.

    Raises `ImpossibleAnswerError` for a position that was not on the screen; whether the answer fits the task is for
    the store to say.
    """
    if isinstance(body, ChoiceBody):
        return Choice(_at(shown, body.position), body.strength)
    if isinstance(body, RankingBody):
        return Ranking(tuple(tuple(_at(shown, position) for position in tier) for tier in body.tiers))
    if isinstance(body, RatingBody):
        return Rating(body.ratings[0])
    plain: dict[str, Answer | None] = {"tie": Tie(), "both_bad": BothBad(), "skip": Skip(), "flag_only": None}
    return plain[body.kind]


def flags_from_body(flags: Sequence[FlagBody], shown: Sequence[str]) -> list[Flag]:
    """The flags; one without a position is about the task as a whole."""
    return [Flag(flag.kind, None if flag.position is None else _at(shown, flag.position)) for flag in flags]


def answer_to_body(label: Label) -> dict[str, Any]:
    """A label's answer by position, as it was sent, with its flags and its comment."""
    shown = label.shown
    answer = label.answer
    body: dict[str, Any] = {"kind": "flag_only" if label.kind == "flag" else label.kind}
    if isinstance(answer, Choice):
        body |= {"position": shown.index(answer.preferred), "strength": answer.strength}
    elif isinstance(answer, Ranking):
        body["tiers"] = [sorted(shown.index(response) for response in tier) for tier in answer.tiers]
    elif isinstance(answer, Rating):
        body["ratings"] = [answer.value]
    flags = [
        {"kind": flag.kind, "position": None if flag.response is None else shown.index(flag.response)}
        for flag in label.flags
    ]
    return {**body, "flags": flags, "comment": label.comment}


def task_body(screen: Screen, *, lease_seconds: float, previous: Label | None, number: int) -> dict[str, Any]:
    """What the browser is told of an assignment; `number` says which of the annotator's tasks it is, from 1."""
    prompt = prompt_to_json(screen.prompt.prompt)
    return {
        "assignment": screen.assignment.id,
        "given": screen.assignment.leased_at.isoformat(),
        "kind": screen.task.plan.kind,
        "prompt": {"text": prompt} if isinstance(prompt, str) else {"messages": prompt},
        "responses": [{"text": response.text} for response in screen.responses],
        "scale": screen.task.plan.scale,
        "strengths": len(STRENGTHS),
        "lease_seconds": lease_seconds,
        "previous": None if previous is None else answer_to_body(previous),
        "number": number,
    }


def _at(shown: Sequence[str], position: int) -> str:
    if position >= len(shown):
        raise ImpossibleAnswerError(f"the task has {len(shown)} responses; there is none at position {position}")
    return shown[position]
