"""What an annotator can answer. It names responses by id, so that no order matters."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

TaskKind = Literal["pairwise", "ranking", "rating"]
LabelKind = Literal["choice", "tie", "both_bad", "skip", "ranking", "rating", "flag", "retract"]
FlagKind = Literal["unsafe", "personal_data", "broken"]
# The least and the greatest number of responses that a task of each kind has.
NUM_RESPONSES: dict[TaskKind, tuple[int, int]] = {"pairwise": (2, 2), "ranking": (4, 9), "rating": (1, 1)}
STRENGTHS = (1, 2, 3)


@dataclass(frozen=True)
class Choice:
    """One of two responses is better; `strength` is 1 (slightly), 2 (clearly) or 3 (much)."""

    preferred: str
    strength: int = 1


@dataclass(frozen=True)
class Tie:
    """Two responses are equally good."""


@dataclass(frozen=True)
class BothBad:
    """Neither of two responses is acceptable, and neither is preferred."""


@dataclass(frozen=True)
class Skip:
    """The annotator does not answer: another one is asked."""


@dataclass(frozen=True)
class Ranking:
    """All responses from best to worst; those of one tier are equally good."""

    tiers: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Rating:
    """How good a response is, from 1 to the task's `scale`; imported ratings need not be whole."""

    value: float


Answer = Choice | Tie | BothBad | Skip | Ranking | Rating
_KINDS: dict[LabelKind, type[Answer]] = {
    "choice": Choice,
    "tie": Tie,
    "both_bad": BothBad,
    "skip": Skip,
    "ranking": Ranking,
    "rating": Rating,
}
_FITTING: dict[TaskKind, tuple[type[Answer], ...]] = {
    "pairwise": (Choice, Tie, BothBad, Skip),
    "ranking": (Ranking, Skip),
    "rating": (Rating, Skip),
}


@dataclass(frozen=True)
class Flag:
    """Something is wrong with a response, or, when `response` is None, with the task as a whole."""

    kind: FlagKind
    response: str | None = None


def answer_kind(answer: Answer | None) -> LabelKind:
    """The name under which an answer is stored; flags alone are `flag`."""
    return next((kind for kind, made in _KINDS.items() if isinstance(answer, made)), "flag")


def answer_to_json(answer: Answer) -> str:
    """The fields of an answer as JSON text; its kind is stored beside it."""
    return json.dumps(vars(answer), sort_keys=True)


def answer_from_json(kind: LabelKind, text: str | None) -> Answer | None:
    """The inverse of `answer_kind` and `answer_to_json`; None for flags alone and for a retraction."""
    if text is None:
        return None
    fields: dict[str, Any] = json.loads(text)
    if "tiers" in fields:
        fields["tiers"] = tuple(tuple(tier) for tier in fields["tiers"])
    return _KINDS[kind](**fields)


def flags_to_json(flags: Iterable[Flag]) -> str:
    """Flags as JSON text, each once and in a fixed order, so that equal flags give equal text."""
    pairs = {(flag.kind, flag.response) for flag in flags}
    return json.dumps(sorted(pairs, key=lambda pair: (pair[0], pair[1] or "")))


def flags_from_json(text: str) -> tuple[Flag, ...]:
    """The inverse of `flags_to_json`."""
    return tuple(Flag(kind, response) for kind, response in json.loads(text))


def check_answer(kind: TaskKind, responses: Sequence[str], scale: int | None, answer: Answer) -> None:
    """Raises `ValueError` when a task of that kind with these responses cannot have this answer."""
    if not isinstance(answer, _FITTING[kind]):
        fitting = ", ".join(made.__name__ for made in _FITTING[kind])
        raise ValueError(f"a {kind} task is answered by {fitting}, not by {answer!r}")
    if isinstance(answer, Choice):
        if answer.preferred not in responses:
            raise ValueError(f"a choice prefers one of the task's responses, not {answer.preferred!r}")
        if type(answer.strength) is not int or answer.strength not in STRENGTHS:
            raise ValueError(f"the strength of a choice is 1, 2 or 3, not {answer.strength!r}")
    if isinstance(answer, Ranking):
        named = [response for tier in answer.tiers for response in tier]
        if sorted(named) != sorted(responses) or not all(answer.tiers):
            raise ValueError(f"a ranking names each of the {len(responses)} responses once, in tiers; got {answer!r}")
    if isinstance(answer, Rating) and not (
        isinstance(answer.value, int | float) and math.isfinite(answer.value) and 1 <= answer.value <= (scale or 1)
    ):
        raise ValueError(f"a rating of this task lies between 1 and {scale}, not {answer.value!r}")


def check_flags(responses: Sequence[str], flags: Iterable[Flag]) -> None:
    """Raises `ValueError` for an unknown flag, and for one on a response that the task does not have."""
    for flag in flags:
        if flag.kind not in get_args(FlagKind):
            raise ValueError(f"a flag is one of {', '.join(get_args(FlagKind))}, not {flag.kind!r}")
        if flag.response is not None and flag.response not in responses:
            raise ValueError(f"a flag names one of the task's responses or none, not {flag.response!r}")


def agrees(answer: Answer, other: Answer) -> bool:
    """Whether two answers to one task say the same; the strength of a choice does not count."""
    if isinstance(answer, Choice) and isinstance(other, Choice):
        return answer.preferred == other.preferred
    if isinstance(answer, Ranking) and isinstance(other, Ranking):
        return [set(tier) for tier in answer.tiers] == [set(tier) for tier in other.tiers]
    return answer == other
