"""Label Studio's JSON export: a list of tasks, each with `data` and what annotators made of it.

`annotations[].result[]` holds results of the types `pairwise` (`value.selected` left or right), `choices`
(`value.choices`), `rating` (`value.rating` of the response that `to_name` names) and `textarea` (comments). Left is the
first name in `to_name` of a pairwise result, so the sides are known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
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
    parse_seconds,
    parse_time,
    strategy_of,
)
from rlhf.preferences.exchange.rated import checked_rating
from rlhf.preferences.store import Answer, Choice, Flag, FlagKind, Skip, TaskPlan


@dataclass
class _Said:
    """What one annotation says."""

    answer: Answer | None = None
    flags: list[FlagKind] = field(default_factory=list)
    ratings: dict[int, Any] = field(default_factory=dict)
    comments: list[str] = field(default_factory=list)


def fits(row: Fields) -> bool:
    """`data` and `annotations` (`completions` before version 1)."""
    return isinstance(row.get("data"), dict) and any(isinstance(row.get(name), list) for name in _LISTS)


_LISTS = ("annotations", "completions")


def read(row: Fields, options: ImportOptions) -> list[ImportedTask]:
    """A pairwise task, and a rating task of each response that was rated."""
    data = row["data"] if isinstance(row.get("data"), dict) else {}
    lists: list[list[Any]] = [row[name] for name in _LISTS if isinstance(row.get(name), list)]
    annotations = lists[0] if lists else []
    if any(not isinstance(annotation, dict) for annotation in annotations):
        raise RowError("an annotation is an object; is this Label Studio's JSON export, not JSON_MIN?")
    names = find_responses(data, options, _named(annotations))
    prompt = as_prompt(find_prompt(data, options, names))
    responses, ids = make_responses(prompt, [data[name] for name in names], numbered=True)
    labels: list[ImportedLabel] = []
    ratings: dict[int, list[ImportedLabel]] = {}
    for annotation in annotations:
        said = _said(annotation, names, ids)
        base = ImportedLabel(
            _annotator(annotation, options),
            said.answer,
            anonymous=annotation.get("completed_by") is None,
            shown=ids if len(ids) == 2 else (),
            seconds=parse_seconds(annotation.get("lead_time")),
            comment="\n".join(said.comments),
            made_at=parse_time(annotation.get("created_at")),
        )
        if annotation.get("was_cancelled") is True:
            base = replace(base, answer=Skip())
        if base.answer is not None or said.flags:
            labels.append(replace(base, flags=tuple(Flag(kind) for kind in said.flags)))
        for place, value in said.ratings.items():
            rated = replace(base, answer=checked_rating(value, options), shown=())
            ratings.setdefault(place, []).append(rated)
    tasks = []
    if len(ids) == 2 and (labels or not ratings):
        plan = TaskPlan("pairwise", ids, num_labels=max(1, len(labels)), strategy=strategy_of("label_studio"))
        tasks.append(ImportedTask(prompt, responses, plan, tuple(labels)))
    for place, given in ratings.items():
        plan = TaskPlan(
            "rating",
            (ids[place],),
            num_labels=len(given),
            strategy=strategy_of("label_studio"),
            scale=options.rating_scale,
        )
        tasks.append(ImportedTask(prompt, (responses[place],), plan, tuple(given)))
    if not tasks:
        raise RowError(f"the task has {len(ids)} responses and no rating; pairwise tasks have two")
    return tasks


def _named(annotations: Sequence[Fields]) -> tuple[str, ...]:
    """The names of the two texts that a pairwise result compares, left first."""
    for annotation in annotations:
        results = annotation.get("result")
        for result in results if isinstance(results, list) else ():
            if isinstance(result, dict) and result.get("type") == "pairwise" and isinstance(result.get("to_name"), str):
                return tuple(name.strip() for name in result["to_name"].split(","))
    return ()


def _annotator(annotation: Fields, options: ImportOptions) -> str:
    by = annotation.get("completed_by")
    if isinstance(by, dict):
        by = by.get("email") or by.get("id")
    return str(by) if isinstance(by, str | int) and by != "" else options.annotator or "label_studio"


def _said(annotation: Fields, names: Sequence[str], ids: Sequence[str]) -> _Said:
    said = _Said()
    results = annotation.get("result") or []
    if not isinstance(results, list):
        raise RowError(f"field 'result' of an annotation is a list, found {json_type(results)}")
    for result in results:
        value = result.get("value") if isinstance(result, dict) else None
        if not isinstance(value, dict):
            raise RowError("a result of an annotation is an object with type and value")
        kind = result.get("type")
        if kind == "pairwise":
            side = value.get("selected")
            if side not in ("left", "right") or len(ids) != 2:
                raise RowError(f"a pairwise result selects left or right of two responses, found {side!r}")
            said.answer = Choice(ids[0 if side == "left" else 1])
        elif kind == "choices":
            _read_choices(value.get("choices"), names, ids, said)
        elif kind == "rating":
            place = place_of(str(result.get("to_name", "")), names)
            place = 0 if place is None and len(names) == 1 else place
            if place is None:
                said.comments.append(f"{result.get('from_name', 'rating')}: {value.get('rating')}")
            else:
                said.ratings[place] = value.get("rating")
        elif kind == "textarea":
            text = value.get("text")
            said.comments += [str(line) for line in (text if isinstance(text, list) else [text]) if line]
    return said


def _read_choices(choices: Any, names: Sequence[str], ids: Sequence[str], said: _Said) -> None:
    """A choice that names a response or an outcome is the answer, a flag a flag, and anything else a comment."""
    for choice in choices if isinstance(choices, list) else [choices]:
        if not isinstance(choice, str):
            raise RowError(f"a choice is text, found {json_type(choice)}")
        answer = read_choice(choice, names, ids) if len(ids) == 2 else None
        flag = read_flag(choice)
        if flag is not None:
            said.flags.append(flag)
        elif answer is not None and said.answer is None:
            said.answer = answer
        else:
            said.comments.append(choice)
