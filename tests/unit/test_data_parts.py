"""Source `parts`: a data set for each kind of record, its limits, its fingerprint, and prompts that leak."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from rlhf import data
from rlhf.config import config_from_values
from rlhf.config.compose import load_config
from rlhf.config.data import FileData, PartsData, paths_of, source_of
from rlhf.data.tokenization import fit_lengths
from rlhf.errors import ConfigError, DataError
from rlhf.models.scratch import train_tokenizer
from rlhf.records import Comparison, Demonstration, Prompt


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def parts(tmp_path: Path) -> PartsData:
    """Three files; prompts have a test file of their own."""
    prompts = tmp_path / "prompts"
    write(prompts / "train.jsonl", [{"prompt": f"p{number}"} for number in range(6)])
    write(prompts / "test.jsonl", [{"prompt": "held"}])
    demonstrations = write(tmp_path / "demos.jsonl", [{"prompt": f"d{n}", "response": f" r{n}"} for n in range(8)])
    pairs = [{"prompt": f"c{n}", "chosen": " good", "rejected": " bad"} for n in range(5)]
    comparisons = write(tmp_path / "pairs.jsonl", pairs)
    none = {"splits": {"validation": 0.0, "test": 0.0}}
    return PartsData.model_validate(
        {
            "demonstrations": {"type": "files", "path": demonstrations, **none},
            "comparisons": {"type": "files", "path": comparisons, **none},
            "prompts": {"type": "files", "path": str(prompts), **none},
        }
    )


def with_part(parts: PartsData, name: str, **values: Any) -> PartsData:
    body = parts.model_dump()
    body[name] |= values
    return PartsData.model_validate(body)


def test_a_mistake_in_a_part_names_the_parts_key(parts: PartsData) -> None:
    missing = with_part(parts, "prompts", path="no-such-file.jsonl")
    for check in (data.preflight, data.load_prompts, data.load_demonstrations, data.load_comparisons):
        with pytest.raises(ConfigError, match=r"data\.prompts\.path=no-such-file") as caught:
            check(missing)
        assert "data.path" not in str(caught.value)
    none = with_part(parts, "comparisons", format="messages")
    with pytest.raises((ConfigError, DataError), match="format messages") as refused:
        data.load_comparisons(none)
    assert "data.path" not in str(refused.value)


def test_each_kind_comes_from_its_own_source(parts: PartsData) -> None:
    assert [row.prompt for row in data.load_demonstrations(parts).train] == [f"d{n}" for n in range(8)]
    assert [row.prompt for row in data.load_comparisons(parts).train] == [f"c{n}" for n in range(5)]
    found = data.load_prompts(parts)
    assert ([row.prompt for row in found.train], [row.prompt for row in found.test]) == (
        [f"p{n}" for n in range(6)],
        ["held"],
    )
    assert len(list(data.training_texts(parts))) == 8 + 2 * 5 + 6
    data.preflight(parts)
    assert len(paths_of(parts)) == 3


def test_what_a_part_lacks_comes_from_another_or_is_refused(parts: PartsData) -> None:
    only = PartsData(comparisons=parts.comparisons)
    assert [row.response for row in data.load_demonstrations(only).train] == [" good"] * 5
    assert [row.prompt for row in data.load_prompts(only).train] == [f"c{n}" for n in range(5)]
    without = PartsData(demonstrations=parts.demonstrations)
    assert data.gives_comparisons(only)
    assert not data.gives_comparisons(without)
    with pytest.raises(ConfigError, match=r"has no comparisons: set data\.comparisons\.type"):
        data.load_comparisons(without)
    with pytest.raises(ConfigError, match="has no ratings"):
        data.load_ratings(parts)
    with pytest.raises(ConfigError, match="names no source"):
        data.preflight(PartsData())


@pytest.mark.parametrize("kind", ["demonstrations", "comparisons"])
def test_a_held_out_prompt_is_not_learnt_from(parts: PartsData, kind: str) -> None:
    path = Path(getattr(parts, kind).path)
    row = {"prompt": "held ", "response": " r", "chosen": " a", "rejected": " b"}
    path.write_text(path.read_text() + json.dumps(row) + "\n")
    load: Any = getattr(data, f"load_{kind}")
    with pytest.raises(DataError, match=r"leaks into test: the same prompt is in .*prompts/test.jsonl, line 1"):
        load(parts)
    found = load(with_part(parts, kind, on_bad_row="skip"))
    assert (len(found.train), len(found.bad_rows)) == (8 if kind == "demonstrations" else 5, 1)


def test_the_fingerprint_is_the_content_of_every_part_wherever_it_lies(parts: PartsData, tmp_path: Path) -> None:
    known = data.data_hash(parts)
    moved = tmp_path / "elsewhere.jsonl"
    assert isinstance(parts.comparisons, FileData)
    moved.write_bytes(Path(parts.comparisons.path).read_bytes())
    assert data.data_hash(with_part(parts, "comparisons", path=str(moved))) == known
    assert data.data_hash(with_part(parts, "comparisons", max_prompt_tokens=65)) != known
    moved.write_text(moved.read_text().replace("good", "fine"))
    assert data.data_hash(with_part(parts, "comparisons", path=str(moved))) != known
    swapped = parts.model_copy(update={"demonstrations": parts.comparisons, "comparisons": parts.demonstrations})
    assert data.data_hash(swapped) != known


def test_limits_of_length_are_those_of_the_part(parts: PartsData) -> None:
    tokenizer = train_tokenizer(["p0 d0 c0 good bad"] * 3, 262, 64)
    limited = with_part(with_part(parts, "comparisons", max_response_tokens=2, on_bad_row="skip"), "prompts")
    comparisons, demonstrations = data.load_comparisons(limited), data.load_demonstrations(limited)
    with pytest.raises(DataError, match=r"no row is left.*max_response_tokens=2"):
        fit_lengths(comparisons, tokenizer, limited)
    assert fit_lengths(demonstrations, tokenizer, limited) == demonstrations
    assert source_of(limited, "prompts") == limited.prompts
    records: list[Any] = [Prompt("p"), Demonstration("d", "r"), Comparison("c", "a", "b")]
    assert len({type(record) for record in records}) == 3


def test_parts_are_set_on_the_command_line_and_survive_a_file(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"prompt": "p", "response": "r"}])
    arguments = ["data=parts", "data.demonstrations.type=files", f"data.demonstrations.path={path}"]
    config = load_config([*arguments, "data.demonstrations.max_prompt_tokens=9", "data.prompts.type=embedded"]).config
    assert isinstance(config.data, PartsData)
    assert source_of(config.data, "demonstrations") == FileData(path=path, max_prompt_tokens=9)
    assert config_from_values(config.model_dump(mode="json"), "itself") == config
    with pytest.raises(ConfigError, match=r"did you mean data\.demonstrations\.path"):
        load_config([*arguments, "data.demonstrations.pth=x"])
