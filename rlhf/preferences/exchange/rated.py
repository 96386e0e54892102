"""Rows that are ratings: lists of pairs that several annotators judged (PandaLM's layout), and rated responses."""

from __future__ import annotations

import math
import re
from typing import Any

from rlhf.data.formats import PROMPT_FIELDS, RowError, messages_of, parse_prompt_response
from rlhf.data.readers import json_type
from rlhf.errors import DataError
from rlhf.preferences.exchange.items import (
    Fields,
    ImportedLabel,
    ImportedTask,
    ImportOptions,
    as_prompt,
    make_responses,
    strategy_of,
)
from rlhf.preferences.resolution import rated_labels
from rlhf.preferences.store import Answer, Choice, Rating, TaskPlan, Tie
from rlhf.records import PromptContent

_ANNOTATOR = re.compile(r"annotator_?\d+")
# What tells equal rows apart; kept as columns of the prompt.
_ROW_NAMES = ("idx", "cmp_key", "id", "occurrence")


def fits_rated_list(row: Fields) -> bool:
    """`response1`, `response2` and a column for each annotator."""
    return "response1" in row and "response2" in row and any(_ANNOTATOR.fullmatch(name) for name in row)


def read_rated_list(row: Fields, options: ImportOptions) -> list[ImportedTask]:
    """A pair with the labels of `annotator1`, `annotator2`, ...: 0 tie, 1 first, 2 second; empty for none."""
    columns = {name: row[name] for name in _ROW_NAMES if isinstance(row.get(name), str | int) and row[name] != ""}
    prompt = as_prompt(_prompt(row), columns)
    texts = tuple(_text(row, name) for name in ("response1", "response2"))
    responses, ids = make_responses(prompt, texts, numbered=True)
    try:
        given = rated_labels(row, "of this row")
    except DataError as error:
        raise RowError(str(error)) from error
    answers: dict[str, Answer] = {"first": Choice(ids[0]), "second": Choice(ids[1]), "tie": Tie()}
    labels = tuple(ImportedLabel(label.annotator, answers[label.choice]) for label in given)
    source = row.get("source") or row.get("cmp_key")
    strategy = strategy_of(source if isinstance(source, str) else None)
    plan = TaskPlan("pairwise", ids, num_labels=max(1, len(labels)), strategy=strategy)
    return [ImportedTask(prompt, responses, plan, labels)]


def fits_ratings(row: Fields) -> bool:
    """`prompt`, `response` and `rating`."""
    return all(name in row for name in ("prompt", "response", "rating"))


def read_ratings(row: Fields, options: ImportOptions) -> list[ImportedTask]:
    """A response with a rating from 1 to `rating_scale`, and the columns of `RatedResponse` or without them."""
    prompt = as_prompt(_prompt(row))
    responses, ids = make_responses(prompt, (_text(row, "response"),), numbered=False)
    annotator, source = row.get("annotator"), row.get("source")
    name = str(annotator) if isinstance(annotator, str | int) and annotator != "" else None
    label = ImportedLabel(
        name or options.annotator or "ratings", checked_rating(row.get("rating"), options), anonymous=name is None
    )
    strategy = strategy_of(source if isinstance(source, str) else None)
    plan = TaskPlan("rating", ids, strategy=strategy, scale=options.rating_scale)
    return [ImportedTask(prompt, responses, plan, (label,))]


def checked_rating(value: Any, options: ImportOptions) -> Rating:
    """A rating on the scale of the options. Raises `RowError` for anything else."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 1 <= number <= options.rating_scale:
        raise RowError(
            f"a rating lies between 1 and rating_scale={options.rating_scale}, found {value!r}; name the file's own "
            "highest rating with rating_scale=N"
        )
    return Rating(int(number) if number.is_integer() else number)


def _prompt(row: Fields) -> PromptContent:
    fields = {name: row[name] for name in PROMPT_FIELDS if row.get(name) not in (None, "")}
    if isinstance(row.get("prompt"), list):
        return messages_of(row["prompt"], "prompt")
    return parse_prompt_response(fields).prompt


def _text(row: Fields, name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise RowError(f"field '{name}' is text, found {json_type(value)}")
    return value
