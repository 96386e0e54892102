"""Argilla's records as JSON: version 1 (`FeedbackDataset`) and version 2 (`dataset.records.to_json`).

Both have `fields`. Version 1 lists `responses` by user: `{"user_id", "status", "values": {QUESTION: {"value"}}}`;
version 2 has them by question: `{QUESTION: [{"user_id", "value", "status"}]}`. The value tells the type of a question:
a list is a ranking, a text a label or a comment, a number a rating.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

from rlhf.data.formats import RowError
from rlhf.data.readers import json_type
from rlhf.preferences.exchange.fields import find_prompt, find_responses, place_of, read_choice, read_flag
from rlhf.preferences.exchange.items import (
    Fields,
    ImportedLabel,
    ImportedTask,
    ImportOptions,
    as_prompt,
    make_responses,
    parse_time,
    strategy_of,
)
from rlhf.preferences.exchange.rated import checked_rating
from rlhf.preferences.store import NUM_RESPONSES, Answer, Choice, Flag, Ranking, Response, Skip, TaskPlan, Tie
from rlhf.records import Prompt

_STATUSES = ("submitted", "discarded", "draft")


@dataclass
class _User:
    """What one user answered."""

    name: str | None
    status: str
    values: dict[str, Any] = field(default_factory=dict)
    time: Any = None


@dataclass(frozen=True)
class _Record:
    """A record's texts: the names of the fields of its responses, the responses, their ids."""

    prompt: Prompt
    names: tuple[str, ...]
    responses: tuple[Response, ...]
    ids: tuple[str, ...]


def fits(row: Fields) -> bool:
    """`fields` and `responses`."""
    return isinstance(row.get("fields"), dict) and isinstance(row.get("responses", []), list | dict)


def read(row: Fields, options: ImportOptions) -> list[ImportedTask]:
    """The tasks that a record's questions ask: pairs, a ranking, ratings; drafts are left out and counted."""
    data = row["fields"] if isinstance(row.get("fields"), dict) else {}
    names = find_responses(data, options)
    prompt = as_prompt(find_prompt(data, options, names))
    responses, ids = make_responses(prompt, [data[name] for name in names], numbered=True)
    record = _Record(prompt, names, responses, ids)
    labels: dict[tuple[str, tuple[str, ...]], list[ImportedLabel]] = {}
    notes = []
    for user in _users(row.get("responses") or []):
        if user.status == "draft":
            notes.append("a draft was left out")
            continue
        for key, label in _labels(user, record, options):
            labels.setdefault(key, []).append(label)
    if not labels:
        kind = "pairwise" if len(ids) == 2 else "ranking" if len(ids) >= NUM_RESPONSES["ranking"][0] else "rating"
        if kind == "rating" and len(ids) > 1:
            return [_pair_task(record, pair, [], notes) for pair in combinations(ids, 2)]
        labels = {(kind, ids): []}
    return [_as_task(record, kind, of, given, options, notes) for (kind, of), given in labels.items()]


def _as_task(
    record: _Record,
    kind: str,
    of: tuple[str, ...],
    labels: Sequence[ImportedLabel],
    options: ImportOptions,
    notes: Sequence[str],
) -> ImportedTask:
    if kind == "pairwise":
        return _pair_task(record, of, labels, notes)
    responses = tuple(record.responses[record.ids.index(response)] for response in of)
    count, strategy = max(1, len(labels)), strategy_of("argilla")
    if kind == "ranking":
        plan = TaskPlan("ranking", of, num_labels=count, strategy=strategy)
    else:
        plan = TaskPlan("rating", of, num_labels=count, strategy=strategy, scale=options.rating_scale)
    return ImportedTask(record.prompt, responses, plan, tuple(labels), notes=tuple(notes))


def _pair_task(
    record: _Record, pair: tuple[str, ...], labels: Sequence[ImportedLabel], notes: Sequence[str]
) -> ImportedTask:
    responses = tuple(record.responses[record.ids.index(response)] for response in pair)
    plan = TaskPlan("pairwise", pair, num_labels=max(1, len(labels)), strategy=strategy_of("argilla"))
    return ImportedTask(record.prompt, responses, plan, tuple(labels), notes=tuple(notes))


def _users(responses: Any) -> Iterator[_User]:
    """The answers user by user, from either version's layout."""
    users: dict[str | None, _User] = {}
    if isinstance(responses, dict):
        for question, given in responses.items():
            if not isinstance(given, list):
                raise RowError(f"the responses to {question!r} are a list, found {json_type(given)}")
            for entry in given:
                user = _user(entry)
                # One without an id cannot be told from the next one.
                held = user if user.name is None else users.setdefault(user.name, user)
                held.values[question] = entry.get("value")
                if held.name is None:
                    yield held
        yield from users.values()
        return
    if not isinstance(responses, list):
        raise RowError(f"field 'responses' is a list or an object, found {json_type(responses)}")
    for entry in responses:
        user = _user(entry)
        values = entry.get("values") or {}
        if not isinstance(values, dict):
            raise RowError(f"the values of a response are an object by question, found {json_type(values)}")
        user.values = {name: value.get("value") if isinstance(value, dict) else value for name, value in values.items()}
        yield user


def _user(entry: Any) -> _User:
    if not isinstance(entry, dict):
        raise RowError(f"a response is an object with user_id, status and a value, found {json_type(entry)}")
    status = entry.get("status") or "submitted"
    if not isinstance(status, str) or status not in _STATUSES:
        raise RowError(f"the status of a response is {', '.join(_STATUSES)}, found {status!r}")
    name = entry.get("user_id")
    return _User(None if name in (None, "") else str(name), status, time=entry.get("updated_at"))


def _labels(
    user: _User, record: _Record, options: ImportOptions
) -> Iterator[tuple[tuple[str, tuple[str, ...]], ImportedLabel]]:
    """(kind of the task, its responses) and the label, for each question that asks about responses."""
    base = ImportedLabel(
        user.name or options.annotator or "argilla", None, user.name is None, made_at=parse_time(user.time)
    )
    found: list[tuple[tuple[str, tuple[str, ...]], Answer]] = []
    flags: list[Flag] = []
    comments: list[str] = []
    for question, value in user.values.items():
        if isinstance(value, list) and value and place_of(_option(value[0]), record.names) is not None:
            found += _ranking(value, record)
        elif isinstance(value, str) and (flag := read_flag(value)) is not None:
            flags.append(Flag(flag))
        elif (
            isinstance(value, str) and len(record.ids) == 2 and (answer := read_choice(value, record.names, record.ids))
        ):
            found.append((("pairwise", record.ids), answer))
        elif isinstance(value, int | float) and (place := _rated(question, record.names)) is not None:
            found.append((("rating", (record.ids[place],)), checked_rating(value, options)))
        elif value not in (None, "", []):
            comments.append(f"{question}: {value}")
    if user.status == "discarded":
        kind = "pairwise" if len(record.ids) == 2 else "ranking" if len(record.ids) >= 4 else ""
        found = [((kind, record.ids), Skip())] if kind else []
    base = replace(base, comment="\n".join(comments))
    if not found and flags and len(record.ids) == 2:
        yield ("pairwise", record.ids), replace(base, flags=tuple(flags))
    for key, answer in found:
        yield key, replace(base, answer=answer, flags=tuple(flags))


def _rated(question: str, names: Sequence[str]) -> int | None:
    """Which response a rating is of: the one that the question names, or the only one."""
    if len(names) == 1:
        return 0
    plain = question.lower()
    named = [place for place, name in enumerate(names) if name.lower() in plain]
    if len(named) == 1:
        return named[0]
    return place_of(question.lower().removesuffix("rating").strip("-_ "), names)


def _option(entry: Any) -> str:
    value = entry.get("value") if isinstance(entry, dict) else entry
    return value if isinstance(value, str) else ""


def _ranking(value: Sequence[Any], record: _Record) -> list[tuple[tuple[str, tuple[str, ...]], Answer]]:
    """A ranking of 4 to 9 responses, or the pairs of fewer; equal ranks are ties."""
    ranks: dict[int, int] = {}
    for number, entry in enumerate(value, start=1):
        place = place_of(_option(entry), record.names)
        rank = entry.get("rank") if isinstance(entry, dict) else None
        if place is None or place in ranks:
            raise RowError(f"a ranking names each of {', '.join(record.names)} once, found {value!r:.200}")
        ranks[place] = rank if isinstance(rank, int) else number
    least, greatest = NUM_RESPONSES["ranking"]
    if len(ranks) != len(record.ids) or len(ranks) > greatest or len(ranks) < 2:
        raise RowError(
            f"a ranking names each of the {len(record.ids)} responses, 2 to {greatest}, once; got {len(ranks)}"
        )
    if len(ranks) >= least:
        tiers = tuple(
            tuple(record.ids[place] for place in sorted(ranks) if ranks[place] == rank)
            for rank in sorted(set(ranks.values()))
        )
        return [(("ranking", record.ids), Ranking(tiers))]
    pairs: list[tuple[tuple[str, tuple[str, ...]], Answer]] = []
    for first, second in combinations(range(len(record.ids)), 2):
        better = first if ranks[first] < ranks[second] else second
        answer: Answer = Tie() if ranks[first] == ranks[second] else Choice(record.ids[better])
        pairs.append((("pairwise", (record.ids[first], record.ids[second])), answer))
    return pairs
