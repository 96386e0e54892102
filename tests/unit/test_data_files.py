"""Files: every file type, broken rows with their place, folders, and messages for paths that do not work."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlhf.config.data import FileData, SplitConfig
from rlhf.data import load_comparisons, load_demonstrations, load_prompts, preflight
from rlhf.data.folders import split_of_name
from rlhf.data.readers import Row, read_rows
from rlhf.data.splits import BadRow
from rlhf.errors import ConfigError, DataError, UserError
from rlhf.records import Comparison, Demonstration, Prompt
from tests.read_only import as_nobody

NO_SPLIT = SplitConfig(validation=0.0, test=0.0)
ROWS = [{"prompt": f"say {i}", "response": f" word {i}, é\u2028\n"} for i in range(6)]
EXPECTED = [Demonstration(row["prompt"], row["response"]) for row in ROWS]


def config(path: Path | str, on_bad_row: Any = "error", splits: SplitConfig = NO_SPLIT, **kwargs: Any) -> FileData:
    return FileData(path=str(path), on_bad_row=on_bad_row, splits=splits, **kwargs)


def write_jsonl(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def csv_text(separator: str) -> str:
    lines = [f'"{row["prompt"]}"{separator}"{row["response"]}"' for row in ROWS]
    return separator.join(["prompt", "response"]) + "\n" + "\r\n".join(lines)


def write_as(folder: Path, kind: str) -> Path:
    file = folder / f"rows{kind}"
    lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
    match kind:
        case ".jsonl" | ".ndjson":
            file.write_bytes(b"\xef\xbb\xbf" + lines.encode())
        case ".jsonl.gz":
            file.write_bytes(gzip.compress(lines.encode()))
        case ".json":
            file.write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
        case ".csv" | ".tsv":
            file.write_bytes(b"\xef\xbb\xbf" + csv_text("," if kind == ".csv" else "\t").encode())
        case ".parquet":
            pq.write_table(pa.Table.from_pylist(ROWS), file, row_group_size=4)
    return file


@pytest.mark.parametrize("kind", [".jsonl", ".ndjson", ".jsonl.gz", ".json", ".csv", ".tsv", ".parquet"])
def test_every_file_type_gives_the_same_records(tmp_path: Path, kind: str) -> None:
    file = write_as(tmp_path, kind)
    for path in (file, tmp_path):
        preflight(config(path))
        splits = load_demonstrations(config(path))
        assert splits.train == EXPECTED
        assert splits.validation == splits.test == []
        assert not splits.bad_rows
    assert [prompt.prompt for prompt in load_prompts(config(file)).train] == [row["prompt"] for row in ROWS]


def test_json_may_be_lines_or_hold_the_list_under_a_key(tmp_path: Path) -> None:
    lines = write_jsonl(tmp_path / "lines.json", ROWS)
    wrapped = tmp_path / "wrapped.json"
    wrapped.write_text(json.dumps({"version": 1, "data": ROWS}, indent=2))
    single = tmp_path / "single.json"
    single.write_text(json.dumps(ROWS[0], indent=2))
    assert load_demonstrations(config(lines)).train == EXPECTED
    assert load_demonstrations(config(wrapped)).train == EXPECTED
    assert load_demonstrations(config(single)).train == EXPECTED[:1]


def test_broken_json_lines_are_named_with_file_line_and_reason(tmp_path: Path) -> None:
    good = b'{"prompt": "p", "response": "r"}\n'
    lines = [
        good,
        b'{"prompt": "a", "response": \n',
        b"\n",
        b'{"prompt": "\xff", "response": "r"}\n',
        b"[1, 2]\n",
        b'{"prompt": "\\ud800", "response": "r"}\n',
        b'{"prompt": "b"}\n',
        b'{"prompt": "c", "response": 7}\n',
        b'{"prompt": "d", "response": ""}\n',
        b'{"prompt": "\\ud83d\\ude00", "response": "r"}\n',
    ]
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"".join(lines))
    with pytest.raises(DataError) as caught:
        load_demonstrations(config(file))
    message = str(caught.value)
    assert caught.value.exit_code == 1
    assert f"7 broken rows of 9 in data.path={file}" in message
    assert f"{file}, line 2: malformed JSON (Expecting value at column" in message
    assert f"{file}, line 4: not UTF-8 (byte 0xff at position 13)" in message
    assert f"{file}, line 5: a row is a JSON object, found a list" in message
    assert f"{file}, line 6: holds half of a surrogate pair" in message
    assert f"{file}, line 7: the row gives no demonstration" in message
    assert "and 2 more" in message
    assert "data.on_bad_row=skip" in message

    splits = load_demonstrations(config(file, on_bad_row="skip"))
    assert splits.train == [Demonstration("p", "r"), Demonstration("\U0001f600", "r")]
    assert [row.origin.number for row in splits.bad_rows] == [2, 4, 5, 6, 7, 8, 9]
    assert splits.origin("train", 1).number == 10
    shown: list[str] = []
    splits.report(shown.append)
    assert len(shown) == 1
    assert shown[0].startswith("left out 7 of 9 rows: 1 x malformed JSON")
    assert f"(first: {file}, line 2)" in shown[0]


def test_broken_csv_rows_cost_one_row_each(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_bytes(
        b'prompt,response\na,b\na,b,c\nonly\n"two\nlines",ok\n"never closed,x\nafter,fine\n\xe9,latin\n\nlast,one'
    )
    rows = list(read_rows(file, "rows.csv"))
    assert [row.fields["prompt"] for row in rows if isinstance(row, Row)] == ["a", "two\nlines", "after", "last"]
    bad = {row.origin.number: row.reason for row in rows if isinstance(row, BadRow)}
    assert bad[3] == "3 columns, expected 2 (prompt, response)"
    assert bad[4] == "1 columns, expected 2 (prompt, response)"
    assert bad[7].startswith("malformed CSV")
    assert bad[9] == "not UTF-8"
    assert sorted(bad) == [3, 4, 7, 9]
    assert [row.origin.number for row in rows if isinstance(row, Row)] == [2, 5, 8, 11]


def test_broken_parquet_rows(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"prompt": ["p", None, "q"], "response": ["r", "s", ""]}), file)
    splits = load_demonstrations(config(file, on_bad_row="skip"))
    assert splits.train == [Demonstration("p", "r")]
    assert [str(row) for row in splits.bad_rows] == [
        f"{file}, row 2: field 'prompt' is missing (or 'instruction', 'question')",
        f"{file}, row 3: field 'response' is empty",
    ]
    file.write_bytes(b"PAR1 is not enough")
    with pytest.raises(DataError, match=r"cannot be read as Parquet"):
        load_demonstrations(config(file))


def test_parquet_text_that_is_not_utf8_is_one_bad_row(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    prompts = pa.Array.from_buffers(
        pa.string(), 3, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0\3\0\0\0\7\0\0\0"), pa.py_buffer(b"ok\xfffine")]
    )
    pq.write_table(pa.table({"prompt": prompts, "response": ["a", "b", "c"]}), file)
    splits = load_demonstrations(config(file, on_bad_row="skip"))
    assert splits.train == [Demonstration("ok", "a"), Demonstration("fine", "c")]
    assert [str(row) for row in splits.bad_rows] == [f"{file}, row 2: not UTF-8 (byte 0xff at position 1)"]


def test_columns_survive_only_for_prompts(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "r.jsonl", [{"prompt": "p", "answer": "4", "tags": ["x"]}])
    assert load_prompts(config(file)).train == [Prompt("p", {"answer": "4", "tags": ["x"]})]


def test_equal_prompts_are_kept_once(tmp_path: Path) -> None:
    rows = [{"prompt": prompt, "chosen": " a", "rejected": " b"} for prompt in ("x", "y", " x ", "x")]
    file = write_jsonl(tmp_path / "r.jsonl", rows)
    splits = load_prompts(config(file))
    assert [prompt.prompt for prompt in splits.train] == ["x", "y"]
    assert [origin.number for origin in splits.origins["train"]] == [1, 2]
    assert len(load_comparisons(config(file)).train) == 4


# --- formats and kinds ------------------------------------------------------------------------------------------------


def test_a_broken_first_row_does_not_decide_the_format(tmp_path: Path) -> None:
    dialogue = "\n\nHuman: Hi\n\nAssistant:"
    rows = [{"chosen": None, "rejected": "x"}, {"chosen": dialogue + " a", "rejected": dialogue + " b"}]
    file = write_jsonl(tmp_path / "r.jsonl", rows)
    splits = load_comparisons(config(file, on_bad_row="skip"))
    assert splits.train == [Comparison(dialogue, " a", " b")]
    assert splits.bad_rows.rows[0].reason == "field 'chosen' is missing"


def test_unknown_format_lists_what_is_known_and_names_the_key(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "r.jsonl", [{"premise": "x"}])
    with pytest.raises(ConfigError, match=r"(?s)data\.path=.*fields are: premise.*prompt_response.*data\.format"):
        load_prompts(config(file))
    with pytest.raises(ConfigError):
        preflight(config(file))


def test_wanting_more_than_the_rows_hold_says_what_they_hold(tmp_path: Path) -> None:
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "p"}])
    with pytest.raises(
        ConfigError, match=r"demonstrations are wanted, but its rows \(format prompt_response\) give only p"
    ):
        load_demonstrations(config(prompts))
    demonstrations = write_jsonl(tmp_path / "d.jsonl", [{"prompt": "p", "response": "r"}])
    with pytest.raises(ConfigError, match=r"comparisons are wanted.*give only demonstrations and prompts"):
        load_comparisons(config(demonstrations))
    texts = write_jsonl(tmp_path / "t.jsonl", [{"text": "x"}])
    assert load_demonstrations(config(texts)).train == [Demonstration("", "x")]
    with pytest.raises(ConfigError, match=r"prompts are wanted.*give only demonstrations"):
        load_prompts(config(texts))


def test_configured_format_overrides_detection(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "r.jsonl", [{"prompt": "p", "response": "r", "text": "p r"}])
    assert load_demonstrations(config(file, format="text")).train == [Demonstration("", "p r")]


# --- folders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.jsonl", "train"),
        ("train-00000-of-00002.parquet", "train"),
        ("Training_set.csv", "train"),
        ("valid.jsonl", "validation"),
        ("dev.csv", "validation"),
        ("validation", "validation"),
        ("test_prefs", "test"),
        ("imdb_test.jsonl", "test"),
        ("testimonials.jsonl", None),
        ("device.jsonl", None),
        ("data.jsonl", None),
    ],
)
def test_names_tell_the_split(name: str, split: str | None) -> None:
    assert split_of_name(name) == split


def test_folder_with_split_files(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train-0.jsonl", ROWS[:2])
    write_jsonl(tmp_path / "train-1.jsonl", ROWS[2:4])
    write_jsonl(tmp_path / "dev.jsonl", ROWS[4:5])
    write_jsonl(tmp_path / "test.jsonl", ROWS[5:])
    (tmp_path / "README.md").write_text("about")
    write_jsonl(tmp_path / "extra.jsonl", [{"other": 1}])
    splits = load_demonstrations(config(tmp_path, splits=SplitConfig(validation=0.4, test=0.4)))
    assert (splits.train, splits.validation, splits.test) == (EXPECTED[:4], EXPECTED[4:5], EXPECTED[5:])
    assert str(splits.origin("train", 2)) == f"{tmp_path}/train-1.jsonl, line 1"


def test_missing_split_files_come_from_the_train_file(tmp_path: Path) -> None:
    rows = [{"prompt": f"q {i}", "response": "r"} for i in range(400)]
    write_jsonl(tmp_path / "train.jsonl", rows[:300])
    write_jsonl(tmp_path / "test.jsonl", rows[300:])
    splits = load_demonstrations(config(tmp_path, splits=SplitConfig(validation=0.2, test=0.5)))
    assert len(splits.test) == 100
    assert len(splits.train) + len(splits.validation) == 300
    assert 30 < len(splits.validation) < 90


def test_a_prompt_in_two_files_leaks_and_is_a_broken_row(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [*ROWS[:3], {"prompt": " say  5", "response": "other"}, ROWS[4]])
    write_jsonl(tmp_path / "validation.jsonl", [ROWS[4], ROWS[5]])
    write_jsonl(tmp_path / "test.jsonl", ROWS[5:])
    with pytest.raises(DataError, match=r"leaks into test: the same prompt is in .*test.jsonl, line 1"):
        load_demonstrations(config(tmp_path))
    splits = load_demonstrations(config(tmp_path, on_bad_row="skip"))
    assert (splits.train, splits.validation, splits.test) == (EXPECTED[:3], EXPECTED[4:5], EXPECTED[5:])
    assert [row.reason.split(":")[0] for row in splits.bad_rows] == [
        "leaks into test",
        "leaks into validation",
        "leaks into test",
    ]


# --- paths that do not work -------------------------------------------------------------------------------------------


def refused(kind: type[UserError], path: Path | str) -> str:
    """The message, which `preflight` and loading share."""
    with pytest.raises(kind) as early:
        preflight(config(path))
    with pytest.raises(kind) as late:
        load_prompts(config(path))
    assert str(early.value) == str(late.value)
    return str(early.value)


def test_missing_file_names_what_was_tried_and_what_is_near(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(tmp_path / "comparisons.jsonl", ROWS)
    monkeypatch.chdir(tmp_path)
    message = refused(ConfigError, "comparison.jsonl")
    assert "data.path=comparison.jsonl" in message
    assert str(tmp_path / "comparison.jsonl") in message
    assert "did you mean comparisons.jsonl?" in message
    assert refused(ConfigError, "zzz").endswith("; data files there: comparisons.jsonl")
    assert f"nearest folder that exists is {tmp_path}" in refused(ConfigError, tmp_path / "no" / "such" / "file.jsonl")


def test_paths_with_nothing_usable(tmp_path: Path) -> None:
    empty_file = tmp_path / "empty.jsonl"
    empty_file.touch()
    assert "is empty" in refused(DataError, empty_file)
    folder = tmp_path / "folder"
    folder.mkdir()
    assert "it holds nothing" in refused(ConfigError, folder)
    (folder / "data").mkdir()
    (folder / "notes.txt").write_text("x")
    assert "it holds data/, notes.txt" in refused(ConfigError, folder)
    assert ".parquet" in refused(ConfigError, folder / "notes.txt")
    write_jsonl(folder / "a.jsonl", ROWS)
    write_jsonl(folder / "b.jsonl", ROWS)
    assert "a.jsonl, b.jsonl. Name one train" in refused(ConfigError, folder)
    write_jsonl(folder / "test.jsonl", ROWS)
    assert "which file" in refused(ConfigError, folder)


def test_files_without_rows_or_with_only_broken_ones(tmp_path: Path) -> None:
    blank = tmp_path / "blank.jsonl"
    blank.write_text("\n \n")
    with pytest.raises(DataError, match=r"there is no row"):
        load_prompts(config(blank))
    broken = tmp_path / "broken.jsonl"
    broken.write_text("{\n" * 3)
    with pytest.raises(DataError, match=r"3 broken rows of 3"):
        load_prompts(config(broken))
    with pytest.raises(DataError, match=r"no row is left to train on; left out 3 of 3 rows"):
        load_prompts(config(broken, on_bad_row="skip"))
    array = tmp_path / "array.json"
    array.write_text('[{"prompt": "p"},\n {"prompt": }]')
    with pytest.raises(DataError, match=r"array.json, line 2: malformed JSON .*\.jsonl"):
        load_prompts(config(array))
    header = tmp_path / "header.csv"
    header.write_text("prompt,prompt\na,b\n")
    with pytest.raises(DataError, match=r"must name every column once"):
        load_prompts(config(header))


def test_other_encodings_are_named(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.csv", "a.json"):
        file = tmp_path / name
        file.write_bytes('{"prompt": "p"}\n'.encode("utf-16"))
        with pytest.raises(DataError, match=r"is UTF-16; save it as UTF-8"):
            load_prompts(config(file))


def test_damaged_gzip(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl.gz"
    file.write_bytes(gzip.compress(b'{"prompt": "p"}\n' * 100)[:-12])
    with pytest.raises(DataError, match=r"cannot be read"):
        load_prompts(config(file))


def test_permissions() -> None:
    with TemporaryDirectory() as name:  # which others may enter, unlike pytest's
        folder = Path(name)
        folder.chmod(0o755)
        file = write_jsonl(folder / "a.jsonl", ROWS)
        with as_nobody():
            assert load_prompts(config(file)).train
        file.chmod(0)
        with as_nobody():
            assert "may not be read by this user" in refused(DataError, file)
        folder.chmod(0)
        with as_nobody():
            assert "may not be read by this user" in refused(DataError, folder)
        folder.chmod(0o700)


def test_permission_errors_become_messages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", ROWS)
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert f"{file} may not be read by this user" in refused(DataError, file)


# --- speed and imports ------------------------------------------------------------------------------------------------


def test_a_hundred_thousand_rows_load_in_seconds(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"question {i} " + "x" * 80, "chosen": " yes " * 20, "rejected": " no " * 20} for i in range(100_000)
    ]
    file = write_jsonl(tmp_path / "r.jsonl", rows)
    start = time.process_time()
    splits = load_comparisons(config(file, splits=SplitConfig()))
    assert time.process_time() - start < 60
    assert len(splits.train) + len(splits.validation) + len(splits.test) == 100_000


def test_preflight_is_fast_and_imports_nothing_heavy(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "r.jsonl", ROWS * 20_000)
    code = (
        "import sys, time\n"
        "from rlhf.config.data import FileData\n"
        "from rlhf.data import preflight\n"
        f"config = FileData(path={str(file)!r})\n"
        "start = time.process_time(); preflight(config); print(time.process_time() - start)\n"
        "heavy = ('torch', 'numpy', 'pandas', 'pyarrow', 'datasets', 'transformers')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    seconds, heavy = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split("\n")[:2]
    assert float(seconds) < 0.1
    assert heavy == "[]"
