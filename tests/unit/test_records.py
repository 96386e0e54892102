"""Text records: their JSON form, hashes and error messages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.errors import DataError
from rlhf.records import (
    Comparison,
    Demonstration,
    Message,
    Prompt,
    content_hash,
    dump_line,
    from_json,
    prompt_hash,
    prompt_key,
    read_records,
    to_json,
)

CONVERSATION = (Message("system", "Be brief."), Message("user", "Hi"))
TEXT = st.text(st.characters(codec="utf-8"), max_size=40)


def test_each_kind_survives_a_file(tmp_path: Path) -> None:
    comparisons = [
        Comparison("one", " a", " b"),
        Comparison(CONVERSATION, "a", "b", margin=0.5, annotator="x", chosen_shown_first=False),
    ]
    file = tmp_path / "comparisons.jsonl"
    file.write_text("".join(dump_line(record) + "\n" for record in comparisons), encoding="utf-8")
    assert read_records(file, Comparison) == comparisons
    for record in (Demonstration(CONVERSATION, "x\u2028y"), Demonstration("", "é")):
        assert from_json(to_json(record), Demonstration) == record
    prompt = Prompt("p", {"answer": "42", "list": [1, None]})
    assert from_json(to_json(prompt), Prompt) == prompt


@given(TEXT, TEXT)
def test_any_text_is_one_line_and_returns(prompt: str, response: str) -> None:
    record = Demonstration(prompt, response)
    line = dump_line(record)
    assert "\n" not in line
    assert from_json(json.loads(line), Demonstration) == record


def test_none_fields_are_left_out_and_false_is_kept() -> None:
    assert to_json(Comparison("p", "c", "r", chosen_shown_first=False)) == {
        "schema": "comparison/1",
        "prompt": "p",
        "chosen": "c",
        "rejected": "r",
        "chosen_shown_first": False,
    }


def test_reading_names_file_line_and_reason(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text(dump_line(Demonstration("p", "r")) + "\n" + dump_line(Prompt("p")) + "\n")
    with pytest.raises(
        DataError, match=r"d\.jsonl, line 2: expected a record of schema demonstration/1, found 'prompt/1'"
    ):
        read_records(file, Demonstration)
    file.write_text('{"schema": "demonstration/1", "prompt": [{"role": "robot", "content": "x"}], "response": "r"}\n')
    with pytest.raises(DataError, match="line 1: a message has a role of system, user, assistant"):
        read_records(file, Demonstration)


def test_prompt_hash_ignores_white_space_and_is_fixed() -> None:
    assert prompt_key(" a  b\n") == "a b"
    assert prompt_hash("a b") == prompt_hash("a\tb ") != prompt_hash("ab")
    assert prompt_hash((Message("user", "a b"),)) != prompt_hash("a b")
    # First 8 bytes of BLAKE2b of the text, big-endian: published splits depend on this value.
    assert prompt_hash("the film is") == 2530912672777534964


def test_content_hash_sees_order_and_content() -> None:
    one, two = Demonstration("a", "b"), Demonstration("a", "c")
    assert content_hash([one, two]) == content_hash(iter([one, two])) != content_hash([two, one])
