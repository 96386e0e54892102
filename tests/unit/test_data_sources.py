"""What all sources share: hashes for fingerprints, texts for a tokenizer, the embedded corpus."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf.config.data import EmbeddedData, FileData, LabelledTextData, SplitConfig
from rlhf.data import (
    data_hash,
    gives_comparisons,
    load_comparisons,
    load_demonstrations,
    load_prompts,
    preflight,
    training_texts,
)
from rlhf.errors import ConfigError

NO_SPLIT = SplitConfig(validation=0.0, test=0.0)
SMALL = EmbeddedData(num_demonstrations=60, num_prompts=50, num_test_prompts=10, num_validation_prompts=10)


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_hash_follows_content_and_settings_but_not_the_path(tmp_path: Path) -> None:
    one = write(tmp_path / "one.jsonl", {"prompt": "p"})
    same = write(tmp_path / "same.jsonl", {"prompt": "p"})
    other = write(tmp_path / "other.jsonl", {"prompt": "q"})
    reference = data_hash(FileData(path=str(one)))
    assert data_hash(FileData(path=str(same))) == reference
    assert data_hash(FileData(path=str(other))) != reference
    assert data_hash(FileData(path=str(one), max_prompt_tokens=7)) != reference
    assert data_hash(FileData(path=str(one), splits=SplitConfig(salt="x"))) != reference
    assert data_hash(LabelledTextData(path=str(one))) != reference
    assert data_hash(SMALL) == data_hash(SMALL.model_copy()) != data_hash(EmbeddedData())


def test_hash_of_a_folder_follows_its_split_files(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", {"prompt": "p"})
    config = FileData(path=str(tmp_path))
    before = data_hash(config)
    (tmp_path / "notes.txt").write_text("x")
    assert data_hash(config) == before
    write(tmp_path / "test.jsonl", {"prompt": "p"})
    assert data_hash(config) != before


def test_training_texts_are_prompt_and_response_of_the_training_split(tmp_path: Path) -> None:
    def texts(*rows: object) -> list[str]:
        return list(training_texts(FileData(path=str(write(tmp_path / "r.jsonl", *rows)), splits=NO_SPLIT)))

    assert texts({"prompt": "p", "response": " r"}) == ["p r"]
    assert texts({"prompt": "p", "chosen": " c", "rejected": " r"}) == ["p c", "p r"]
    assert texts({"prompt": "p"}) == ["p"]
    assert texts({"text": "whole"}) == ["whole"]
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    assert texts({"messages": turns}) == ["Hi\n\nHello"]
    assert texts({"messages": turns[:1]}) == ["Hi"]


def test_training_texts_leave_out_what_is_held_out(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", *[{"prompt": f"p {i}"} for i in range(5)])
    write(tmp_path / "test.jsonl", {"prompt": "secret"})
    config = FileData(path=str(tmp_path), splits=NO_SPLIT)
    assert "secret" not in "".join(training_texts(config))


def test_training_texts_of_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such file"):
        list(training_texts(FileData(path=str(tmp_path / "no.jsonl"))))


def test_embedded_corpus() -> None:
    preflight(SMALL)
    prompts, demonstrations = load_prompts(SMALL), load_demonstrations(SMALL)
    assert (len(prompts.train), len(prompts.validation), len(prompts.test)) == (50, 10, 10)
    assert len(demonstrations.train) + len(demonstrations.validation) + len(demonstrations.test) == 60
    texts = list(training_texts(SMALL))
    first = demonstrations.train[0]
    assert f"{first.prompt}{first.response}" == texts[0]
    assert prompts.train[0].prompt in texts
    assert not gives_comparisons(SMALL)
    with pytest.raises(ConfigError, match="come from the collect stage"):
        load_comparisons(SMALL)
