"""Splits by hash: stable, of the right size, and no prompt in two of them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.config.data import FileData, SplitConfig
from rlhf.data import load_comparisons, load_demonstrations, load_prompts
from rlhf.data.splits import SPLITS, BadRow, BadRows, Origin, Splits, refuse_or_skip, split_key, split_of
from rlhf.errors import DataError
from rlhf.records import Comparison, Demonstration, Message, Prompt, prompt_key

SHARES = SplitConfig(validation=0.2, test=0.3)


def test_the_split_of_a_text_never_changes() -> None:
    # `b2sum -l 64` over the salt, a zero byte and the text gives the shares 0.126, 0.401 and 0.643 of 2**64. Published
    # splits depend on them: below 0.3 is test, below 0.5 validation.
    drawn = [split_of(text, SHARES) for text in ("the end", "a b", "the film is")]
    assert drawn == ["test", "validation", "train"]


def test_shares_are_met_and_the_salt_redraws() -> None:
    keys = [f"prompt {i}" for i in range(20_000)]
    drawn = [split_of(key, SHARES) for key in keys]
    counts = Counter(drawn)
    # Binomial standard deviation at 20,000 draws is at most 71.
    assert abs(counts["test"] - 6000) < 350
    assert abs(counts["validation"] - 4000) < 350
    other = [split_of(key, SplitConfig(validation=0.2, test=0.3, salt="other")) for key in keys]
    assert 0.3 < sum(one == two for one, two in zip(drawn, other, strict=True)) / len(keys) < 0.46
    assert {split_of(key, SplitConfig(validation=0.0, test=0.0)) for key in keys} == {"train"}


@given(
    st.lists(
        st.tuples(st.sampled_from(["a b", " a  b", "c", "d e f", "g", "h"]), st.text("xyz", min_size=1)), min_size=1
    )
)
def test_the_same_prompt_never_straddles(pairs: list[tuple[str, str]]) -> None:
    seen: dict[str, set[str]] = {}
    for prompt, response in pairs:
        record = Demonstration(prompt, response)
        seen.setdefault(prompt_key(prompt), set()).add(split_of(split_key(record), SHARES))
    assert all(len(splits) == 1 for splits in seen.values())


def test_all_kinds_of_one_file_agree_on_the_split(tmp_path: Path) -> None:
    file = tmp_path / "r.jsonl"
    rows = [{"prompt": f"q {i % 150}", "chosen": f" a{i}", "rejected": f" b{i}"} for i in range(400)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = FileData(path=str(file), splits=SHARES)
    by_kind = [load_prompts(config), load_demonstrations(config), load_comparisons(config)]
    for name in SPLITS:
        prompts = [{record.prompt for record in splits.named(name)} for splits in by_kind]  # type: ignore[attr-defined]
        assert prompts[0] == prompts[1] == prompts[2] != set()
    everything = [record.prompt for name in SPLITS for record in by_kind[0].named(name)]  # type: ignore[attr-defined]
    assert len(everything) == len(set(everything)) == 150


def test_without_a_prompt_the_response_decides() -> None:
    assert split_key(Demonstration("", "a  text")) == "a text"
    assert split_key(Comparison(" ", "one", "two")) == "one"
    assert split_key(Demonstration((), "x")) == "x"
    conversation = (Message("user", "Hi"),)
    assert split_key(Demonstration(conversation, "x")) == split_key(Prompt(conversation)) == prompt_key(conversation)


def test_bad_rows_are_refused_or_counted() -> None:
    bad = [BadRow(Origin("f.jsonl", number), "broken" if number % 2 else "empty") for number in range(1, 8)]
    with pytest.raises(DataError) as caught:
        refuse_or_skip(bad, 10, "error", "data.path=f.jsonl")
    assert str(caught.value).splitlines() == [
        "7 broken rows of 10 in data.path=f.jsonl:",
        *[f"  f.jsonl, line {number}: {'broken' if number % 2 else 'empty'}" for number in range(1, 6)],
        "  ... and 2 more",
        "Correct the data, or leave such rows out with data.on_bad_row=skip.",
    ]
    counted = refuse_or_skip(bad, 10, "skip", "x")
    assert len(counted) == 7
    assert str(counted) == (
        "left out 7 of 10 rows: 4 x broken (first: f.jsonl, line 1); 3 x empty (first: f.jsonl, line 2)"
    )
    assert not refuse_or_skip([], 10, "error", "x")
    silent: list[str] = []
    Splits[Prompt]([], [], [], BadRows((), 3)).report(silent.append)
    assert silent == []
