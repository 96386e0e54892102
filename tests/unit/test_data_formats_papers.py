"""Rows as the papers' data sets have them, read by hand-made examples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from rlhf import data
from rlhf.config.data import FileData, HubData, LabelledTextData
from rlhf.data import hub_access
from rlhf.data.formats import FORMATS, RowError, detect_format
from rlhf.errors import ConfigError, DataError
from rlhf.models.scratch import train_tokenizer
from rlhf.proving.schemas import DATA_SETS, rows_of
from rlhf.proving.schemas import FORMATS as SCHEMAS
from rlhf.records import Comparison, Demonstration, Prompt

TLDR = "SUBREDDIT: r/pets\n\nTITLE: A cat\n\nPOST: It ran.\n\nTL;DR:"
INFO = {"id": "t3_1", "post": "It ran.", "title": "A cat", "subreddit": "pets", "article": None}
ASKED = "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"


@pytest.mark.parametrize(
    ("row", "name", "record"),
    [
        (
            {"query": "q TL;DR:", "reference_response": " a<|endoftext|>"},
            "query_responses",
            Demonstration("q TL;DR:", " a"),
        ),
        (
            {"query": "q", "response0": " a<|endoftext|>", "response1": "b", "choice": 1, "info": {}, "summaries": []},
            "query_responses",
            Comparison("q", " b", " a"),
        ),
        (
            {"info": INFO, "summaries": [{"text": " one"}, {"text": "two"}], "choice": 0, "worker": "w"},
            "summaries",
            Comparison(TLDR, " one", " two"),
        ),
        (
            {"subreddit": "r/pets", "title": "A cat", "post": "It ran.", "summary": "gone"},
            "post_summary",
            Demonstration(TLDR, " gone"),
        ),
        (
            {"instruction": "Add.", "input": "1 2", "output_1": "3", "output_2": "4", "preference": 1},
            "instruction",
            Comparison(ASKED, "3", "4"),
        ),
        (
            {"instruction": "Add.", "input": "1 2", "answers": ["3", "4"], "preference": 1},
            "instruction",
            Comparison(ASKED, "4", "3"),
        ),
        ({"query": "q", "sample0": "a", "sample1": "b", "best": 1}, "best_of", Comparison("q", "b", "a")),
        # TRL's copies of the same data need nothing new.
        ({"prompt": TLDR, "completion": " gone"}, "prompt_response", Demonstration(TLDR, " gone")),
    ],
)
def test_a_row_is_recognised_and_read(row: dict[str, Any], name: str, record: Any) -> None:
    assert detect_format(row) == name
    assert FORMATS[name].parse(row) == record


def test_one_output_is_laid_out_where_the_format_is_named() -> None:
    row = {"instruction": "Say hello.", "input": "", "output": "Hello."}
    assert detect_format(row) == "prompt_response"
    plain = "### Instruction:\nSay hello.\n\n### Response:\n"
    assert FORMATS["instruction"].parse(row) == Demonstration(plain, "Hello.")
    assert FORMATS["instruction"].parse({"instruction": "Say hello."}) == Prompt(plain)


def test_the_best_of_four_is_a_comparison_with_each_of_the_others() -> None:
    row = {"query": "q", "sample0": "a", "sample1": "b", "sample2": "c", "sample3": "a", "best": 2}
    assert FORMATS["best_of"].records(row, Comparison) == [Comparison("q", "c", "a"), Comparison("q", "c", "b")]
    assert FORMATS["best_of"].records(row, Prompt) == [Comparison("q", "c", "a")]


@pytest.mark.parametrize(
    ("name", "row", "said"),
    [
        ("summaries", {"info": {"post": None}, "summaries": [], "choice": 0}, "only the rows on Reddit posts"),
        ("summaries", {"info": INFO, "summaries": [{"text": "a"}], "choice": 0}, "list of two objects"),
        ("summaries", {"info": INFO, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 2}, "from 0 to 1, found 2"),
        (
            "query_responses",
            {"query": "q", "response0": "a", "response1": "a", "choice": 0},
            "both responses are the same",
        ),
        ("query_responses", {"query": "q", "reference_response": "<|endoftext|>"}, "a response is empty"),
        (
            "instruction",
            {"instruction": "i", "output_1": "a", "output_2": "b", "preference": 0},
            "from 1 to 2, found 0",
        ),
        ("instruction", {"instruction": "i", "answers": ["a"], "preference": 0}, "list of two texts"),
        ("best_of", {"query": "q", "sample0": "a", "best": 0}, "at least two samples"),
        (
            "best_of",
            {"query": [3, 4], "sample0": "a", "sample1": "b", "best": 0},
            "holds token ids: name the tokenizer",
        ),
    ],
)
def test_what_does_not_fit_says_why(name: str, row: dict[str, Any], said: str) -> None:
    with pytest.raises(RowError, match=said):
        FORMATS[name].parse(row)


def test_token_ids_are_decoded_by_the_tokenizer_that_wrote_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = train_tokenizer(["once upon a time. it was good"] * 3, 270, 64)
    tokenizer.save_pretrained(tmp_path / "tokenizer")

    def ids(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False)) + [50259]  # padding beyond the vocabulary

    row = {
        "query": ids("once upon"),
        "sample0": ids(" a time"),
        "sample1": ids(" it was"),
        "sample2": ids(" good"),
        "best": 2,
    }
    rows = tmp_path / "offline.json"
    rows.write_text(json.dumps([row]))
    none: Any = {"splits": {"validation": 0.0, "test": 0.0}, "path": str(rows)}
    with pytest.raises(DataError, match="decode_with"):
        data.load_comparisons(FileData.model_validate(none))
    # A folder is read without a question to the hub.
    monkeypatch.setattr(hub_access, "why_silent", lambda *_: pytest.fail("the hub was asked"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    config = FileData.model_validate({**none, "decode_with": str(tmp_path / "tokenizer")})
    found = data.load_comparisons(config)
    assert found.train == [Comparison("once upon", " good", " a time"), Comparison("once upon", " good", " it was")]
    assert [prompt.prompt for prompt in data.load_prompts(config).train] == ["once upon"]
    with pytest.raises(ConfigError, match="no tokenizer can be loaded"):
        data.load_comparisons(FileData.model_validate({**none, "decode_with": str(tmp_path)}))


def save(folder: Path, name: str) -> str:
    import datasets

    datasets.disable_progress_bars()
    splits = {split: datasets.Dataset.from_list(rows) for split, rows in rows_of(DATA_SETS[name]).items()}
    datasets.DatasetDict(splits).save_to_disk(str(folder))
    return str(folder)


def test_one_split_of_a_data_set_is_divided(tmp_path: Path) -> None:
    path = save(tmp_path / "farm", "tatsu-lab/alpaca_farm/alpaca_instructions")
    found = data.load_prompts(HubData(path=path, split="unlabeled", format="instruction"))
    assert len(found.train) + len(found.validation) + len(found.test) == 48
    with pytest.raises(ConfigError, match=r"no such split; it has sft, .*Did you mean unlabeled"):
        data.load_prompts(HubData(path=path, split="unlabelled", format="instruction"))
    with pytest.raises(ConfigError, match=r"Name one with data\.split"):
        data.load_prompts(HubData(path=path, format="instruction"))


def test_labelled_texts_come_from_the_hub_as_well(tmp_path: Path) -> None:
    path = save(tmp_path / "imdb", "stanfordnlp/imdb")
    config = LabelledTextData(path=path, from_hub=True, preferred_label="1", judge_share=0.0, prompt_words=2)
    data.preflight(config)
    found = data.load_comparisons(config)
    assert all(" film" in pair.chosen or " story" in pair.chosen or "acting" in pair.chosen for pair in found.train)
    # The split `unsupervised` is none of ours.
    assert len(data.load_demonstrations(config).train) <= 240
    assert data.data_hash(config) != data.data_hash(config.model_copy(update={"preferred_label": "0"}))
    with pytest.raises(ConfigError, match="not a folder written by save_to_disk"):
        data.preflight(config.model_copy(update={"path": str(tmp_path)}))


def test_a_query_with_chosen_and_rejected_is_read_where_the_format_is_named() -> None:
    row = {"query": "q TL;DR:", "chosen": " a<|endoftext|>", "rejected": "b", "choice": 1, "info": {}, "summaries": []}
    assert FORMATS["query_responses"].parse(row) == Comparison("q TL;DR:", " a", " b")
    assert detect_format({"query": "q", "chosen": "p a", "rejected": "p b"}) == "preference"
    with pytest.raises(RowError, match="field 'rejected' is missing"):
        FORMATS["query_responses"].parse({"query": "q", "chosen": "a"})


@pytest.mark.parametrize("name", sorted(SCHEMAS))
def test_every_format_reads_its_stand_in(name: str) -> None:
    for rows in rows_of(SCHEMAS[name]).values():
        for row in rows:
            FORMATS[name].parse(row)
