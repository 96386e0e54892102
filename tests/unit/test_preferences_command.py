"""`rlhf preferences import|export|status|check`: what it prints, its exit codes and its messages."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest

from rlhf.cli import main
from rlhf.errors import ConfigError
from rlhf.preferences.command import ExportArguments, parse_arguments
from rlhf.preferences.store import PreferenceStore
from tests.unit.preference_files import write_rows

ROWS = [
    {"prompt": f"q{number}", "chosen": f"good {number}", "rejected": "bad", "annotator": name}
    for number in range(12)
    for name in ("anna", "ben")
]


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["preferences", *arguments])
    return int(ended.value.code or 0)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", ROWS)


def test_import_status_export(tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = tmp_path / "store.sqlite"
    assert run("import", f"from={source}", f"--store={store}", "seed=7") == 0
    printed = capsys.readouterr().out
    assert "24 labels, 24 of them new, by 2 annotators: anna, ben" in printed
    assert f"made the store {store}" in printed
    assert run("import", f"from={source}", f"store={store}") == 0
    assert "24 labels, 0 of them new" in capsys.readouterr().out
    with PreferenceStore.open(store) as opened:
        assert opened.seed == 7
    assert run("status", f"store={store}") == 0
    table = capsys.readouterr().out
    for part in ("12 tasks, 24 labels", "anna", "agreement of comparisons: 100.0 %", "12 items"):
        assert part in table
    assert run("status", f"store={store}", "--json") == 0
    status = json.loads(capsys.readouterr().out)
    assert status["num_labels"] == 24
    assert status["rounds"][0]["num_done"] == 12
    assert status["agreement"]["comparisons"]["percent_agreement"]["value"] == 1.0
    folder = tmp_path / "out"
    assert run("export", f"store={store}", f"to={folder}", "rule=mean", "validation=0.3", "test=0") == 0
    printed = capsys.readouterr().out
    assert "test 0 comparisons" in printed
    assert "rule: mean" in printed
    assert (folder / "train.jsonl").exists()
    assert not (folder / "test.jsonl").exists()
    assert run("export", f"store={store}", f"to={folder}") == 2
    assert "overwrite=true" in capsys.readouterr().err
    assert run("export", f"store={store}", f"to={folder}", "overwrite=true", "format=parquet") == 0


def test_check_writes_nothing(tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("check", f"from={source}") == 0
    assert "nothing was written" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "rlhf preferences takes import"),
        (("imprt",), "did you mean import"),
        (("import", "form=x"), "unknown key 'form'; did you mean"),
        (("import",), "from= is missing"),
        (("import", "from=a", "from=b"), "given twice"),
        (("import", "rows.jsonl"), "expected key=value"),
        (("export", "store=x"), "to= is missing"),
        (("export", "store=x", "to=y", "rule=most"), "rule=most: expected 'majority', 'mean' or 'all'"),
        (("export", "store=x", "to=y", "format=tlr"), "did you mean trl"),
        (("export", "store=x", "to=y", "leave_out_flagged=[rude]"), "leave_out_flagged=[rude]"),
        (("export", "store=x", "to=y", "validation=0.6", "test=0.6"), "validation + test"),
        (("status", "store=nowhere.sqlite"), "no preference store at nowhere.sqlite"),
        (("import", "from=nowhere.jsonl"), "there is no such file"),
    ],
)
def test_wrong_usage_ends_with_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_other_trouble_ends_with_1(tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with sqlite3.connect(tmp_path / "other.sqlite") as other:
        other.execute("CREATE TABLE t (x)")
    assert run("status", f"store={source}") == 1
    assert "no SQLite database" in capsys.readouterr().err
    assert run("import", f"from={source}", f"store={tmp_path}/other.sqlite") == 1
    assert "another program" in capsys.readouterr().err
    source.write_text(
        '{"prompt": "p", "chosen": "a", "rejected": "b"}\n{"prompt": "p", "chosen": 1, "rejected": "b"}\n'
    )
    assert run("import", f"from={source}", f"store={tmp_path}/new.sqlite") == 1
    assert "on_bad_row=skip" in capsys.readouterr().err
    # A file that cannot be imported leaves no store behind.
    assert not (tmp_path / "new.sqlite").exists()
    assert run("import", f"from={source}", f"store={tmp_path}/new.sqlite", "on_bad_row=skip") == 0


def test_arguments_are_read_as_what_they_are() -> None:
    made = parse_arguments(
        ["store=1", "to=2", "rounds=[0,2]", "leave_out_flagged=unsafe,broken", "use-strength=true", "rule=mean"],
        ExportArguments,
        "export",
    )
    assert (made.store, made.rounds, made.leave_out_flagged) == ("1", (0, 2), ("unsafe", "broken"))
    assert made.use_strength is True
    with pytest.raises(ConfigError, match="rounds=x"):
        parse_arguments(["store=1", "to=2", "rounds=x"], ExportArguments, "export")
