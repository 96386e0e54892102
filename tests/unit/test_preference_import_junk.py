"""Whatever a row holds in whatever place, an importer reads it or says what is wrong with it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest

from rlhf.preferences.exchange import IMPORT_FORMATS, ImportOptions, lossless
from rlhf.preferences.exchange.items import ImportedTask, cleaned
from rlhf.preferences.store import task_id
from tests.unit.preference_files import hh_row

JUNK: tuple[Any, ...] = (
    None,
    "",
    " ",
    "x",
    "left",
    0,
    -1,
    2.5,
    True,
    float("inf"),
    [],
    [None],
    ["x"],
    {},
    {"a": 1},
    [[1]],
    [{"role": 1}],
)
TEXTS = {"prompt": "p", "response-1": "a", "response-2": "b"}
RANKING = [{"rank": 1, "value": "response-2"}, {"rank": 2, "value": "response-1"}]
STUDIO = [
    {"type": "pairwise", "from_name": "pw", "to_name": "answer1,answer2", "value": {"selected": "left"}},
    {"type": "choices", "from_name": "c", "to_name": "prompt", "value": {"choices": ["funny"]}},
    {"type": "rating", "from_name": "r", "to_name": "answer1", "value": {"rating": 3}},
    {"type": "textarea", "from_name": "t", "to_name": "prompt", "value": {"text": ["why"]}},
]
ROWS: list[tuple[str, dict[str, Any]]] = [
    (
        "trl",
        {
            "prompt": "p",
            "chosen": "a",
            "rejected": "b",
            "margin": 1.0,
            "probability": 0.75,
            "num_annotators": 2,
            "agreement": 0.5,
            "annotator": "x",
        },
    ),
    (
        "trl",
        {
            "chosen": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}],
            "rejected": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "b"}],
        },
    ),
    ("hh", hh_row(1, 3)),
    (
        "rated_list",
        {
            "idx": 1,
            "cmp_key": "k",
            "instruction": "i",
            "input": "j",
            "response1": "a",
            "response2": "b",
            "annotator1": 1,
            "annotator2": "0",
        },
    ),
    ("ratings", {"prompt": "p", "response": "a", "rating": 3, "annotator": "x", "source": "s"}),
    (
        "label_studio",
        {
            "data": {"prompt": "p", "answer1": "a", "answer2": "b"},
            "annotations": [
                {
                    "completed_by": {"id": 1, "email": "e"},
                    "result": STUDIO,
                    "lead_time": 3.0,
                    "created_at": "2026-01-01T00:00:00Z",
                    "was_cancelled": False,
                }
            ],
        },
    ),
    (
        "argilla",
        {
            "fields": TEXTS,
            "responses": [
                {"user_id": "u", "status": "submitted", "values": {"rank": {"value": RANKING}, "note": {"value": "n"}}}
            ],
        },
    ),
    (
        "argilla",
        {
            "fields": TEXTS,
            "responses": {
                "rank": [{"user_id": "u", "value": ["response-1", "response-2"]}],
                "response-1-rating": [{"user_id": "u", "value": 4}],
            },
        },
    ),
]


def spoilt(row: Any) -> Iterator[Any]:
    """Copies of a nested value with one part replaced by each piece of junk, or taken away."""
    parts = row.items() if isinstance(row, dict) else enumerate(row) if isinstance(row, list) else ()
    for key, value in list(parts):
        for junk in JUNK:
            changed = copy.copy(row)
            changed[key] = junk
            yield changed
        if isinstance(row, dict):
            yield {name: part for name, part in row.items() if name != key}
        for inner in spoilt(value):
            changed = copy.copy(row)
            changed[key] = inner
            yield changed


@pytest.mark.parametrize(("name", "row"), ROWS)
def test_junk_is_refused_in_words(name: str, row: dict[str, Any]) -> None:
    read = IMPORT_FORMATS[name].read
    assert read is not None
    assert IMPORT_FORMATS[name].fits(row)
    assert all(task.labels for task in read(row, ImportOptions()))
    num_read = num_refused = 0
    for changed in spoilt(row):
        try:
            tasks: list[ImportedTask] = read(cleaned(changed), ImportOptions())
            # What is read has an identity, so that it can be stored.
            assert all(task_id(task.plan) and len(task.responses) == len(task.plan.responses) for task in tasks)
            num_read += 1
        except ValueError:
            num_refused += 1
    assert num_read or name == "hh"
    assert num_refused


def test_junk_in_our_own_labels_is_refused_in_words() -> None:
    row = {
        "schema": lossless.TASK, "id": "t", "kind": "pairwise", "prompt": "p", "columns": {}, "responses": [],
        "num_labels": 1, "priority": 0.0, "round": 0, "strategy": "s", "score": None, "audience": None, "scale": None,
        "repeat_of": None, "gold": None, "labels": [],
    }  # fmt: skip
    for changed in (*spoilt(row), *spoilt({"schema": lossless.HEADER, "annotators": [{"name": "a"}], "policies": []})):
        with pytest.raises(ValueError, match=r"."):
            lossless.read(changed)
