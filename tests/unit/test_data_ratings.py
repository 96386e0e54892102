"""Rows of prompt, response and rating: as rated responses, and as what they served for without the rating."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.config.data import EmbeddedData, FileData, SplitConfig
from rlhf.data import load_demonstrations, load_prompts, load_ratings
from rlhf.data.formats import detect_format
from rlhf.errors import ConfigError, DataError
from rlhf.records import Demonstration, RatedResponse

ROWS: list[dict[str, Any]] = [
    {"prompt": "the film", "response": " was good", "rating": 4, "annotator": "ann", "source": "web"},
    {"prompt": "the film", "response": " was bad", "rating": "1.5"},
    {"prompt": "a book", "completion": " is long", "rating": 2.0, "annotator": 3},
]


def data_of(folder: Path, rows: list[dict[str, Any]], **values: Any) -> FileData:
    """The rows as the training file."""
    folder.mkdir(exist_ok=True)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return FileData(path=str(folder), splits=SplitConfig(validation=0.0, test=0.0), **values)


def test_rows_are_rated_responses_demonstrations_and_prompts(tmp_path: Path) -> None:
    data = data_of(tmp_path, ROWS)
    assert load_ratings(data).train == [
        RatedResponse("the film", " was good", 4.0, "ann", "web"),
        RatedResponse("the film", " was bad", 1.5),
        RatedResponse("a book", " is long", 2.0),
    ]
    assert load_demonstrations(data).train[0] == Demonstration("the film", " was good")
    assert [prompt.prompt for prompt in load_prompts(data).train] == ["the film", "a book"]


def test_a_rating_that_is_no_number_leaves_demonstrations() -> None:
    assert detect_format(ROWS[0]) == "rating"
    for other in ("good", None, "", "nan", [4]):
        assert detect_format({"prompt": "p", "response": " r", "rating": other}) == "prompt_response"
    assert detect_format({"prompt": "p", "rating": 3}) == "prompt_response"


def test_rows_without_a_rating_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"line 4: the row gives no rated response"):
        load_ratings(data_of(tmp_path, [*ROWS, {"prompt": "p", "response": " r", "rating": None}]))
    with pytest.raises(DataError, match=r"field 'rating' is a number, found 'good'"):
        load_ratings(data_of(tmp_path, [*ROWS, {"prompt": "p", "response": " r", "rating": "good"}]))
    skipped = load_ratings(data_of(tmp_path, [*ROWS, {"prompt": "p", "rating": 3}], on_bad_row="skip"))
    assert len(skipped.train) == 3
    assert len(skipped.bad_rows) == 1


def test_data_without_ratings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="rated responses are wanted"):
        load_ratings(data_of(tmp_path, [{"prompt": "p", "response": " r"}]))
    with pytest.raises(ConfigError, match=r"data.type=embedded has no rated responses"):
        load_ratings(EmbeddedData())
