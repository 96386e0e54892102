"""Importing comparisons: TRL's format, HH-RLHF's transcripts, our own records, in every kind of file."""

from __future__ import annotations

import csv
import json
import time
from datetime import UTC
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from rlhf.data.comparison_columns import comparison_columns
from rlhf.errors import ConfigError, DataError
from rlhf.preferences.exchange import ImportOptions, check_file, export_labels, import_file
from rlhf.preferences.resolution import ResolutionRule
from rlhf.preferences.store import Annotator, Choice, PreferenceStore, Response, TaskPlan, Tie
from rlhf.records import Comparison, Message, Prompt, dump_line
from tests.unit.preference_files import hh_row, import_rows, new_store, said, write_rows

MEAN = ResolutionRule("mean")
TEXT = {"prompt": "Why?", "chosen": "because", "rejected": "no idea"}


def comparisons(store: PreferenceStore, rule: ResolutionRule = MEAN) -> list[Comparison]:
    exported = export_labels(store, rule=rule, split_of=lambda prompt: "train")
    return exported.comparisons.train


def test_trl_rows_of_every_shape_become_pairs(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    turn = {"role": "user", "content": "Hello"}
    report = import_rows(
        store,
        [
            TEXT,
            {"chosen": "Sum: one two", "rejected": "Sum: two one"},
            {
                "prompt": [turn],
                "chosen": [{"role": "assistant", "content": "Hi"}],
                "rejected": [{"role": "assistant", "content": "Go"}],
            },
            {
                "chosen": [turn, {"role": "assistant", "content": "Hey"}],
                "rejected": [turn, {"role": "assistant", "content": "What"}],
            },
        ],
    )
    assert (report.format, report.num_rows, report.num_tasks, report.num_new_labels) == ("trl", 4, 4, 4)
    hello = (Message("user", "Hello"),)
    found = {(one.prompt, one.chosen, one.rejected) for one in comparisons(store)}
    assert found == {
        ("Why?", "because", "no idea"),
        ("Sum:", " one two", " two one"),
        (hello, "Hi", "Go"),
        (hello, "Hey", "What"),
    }
    assert {label.annotator for label in store.current_labels()} == {"trl"}


def test_importing_again_adds_nothing_and_other_rows_of_another_file_only_themselves(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    rows = [TEXT, {**TEXT, "annotator": "anna"}, {**TEXT, "prompt": "How?", "annotator": "anna"}]
    assert import_rows(store, rows).num_new_labels == 3
    again = import_rows(store, rows, name="copy.jsonl")
    assert (again.num_labels, again.num_new_labels, again.num_new_tasks) == (3, 0, 0)
    more = import_rows(store, [*rows[1:], {**TEXT, "annotator": "ben"}], name="more.jsonl")
    assert (more.num_new_labels, more.num_new_tasks) == (1, 0)
    assert said(store) == {
        ("Why?", "trl", "because"),
        ("Why?", "anna", "because"),
        ("Why?", "ben", "because"),
        ("How?", "anna", "because"),
    }


def test_a_label_says_where_it_comes_from(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    import_rows(store, [TEXT, {**TEXT, "prompt": "How?"}])
    pages = {page.page for task in store.tasks() for page in store.assignments(task)}
    assert pages == {f"trl, {tmp_path}/rows.jsonl, line {number}" for number in (1, 2)}


def test_the_crowd_disagrees_and_one_annotator_repeats(tmp_path: Path) -> None:
    """Without a name a second, contrary row is another member of the crowd; with one it is a blind repeat."""
    store = new_store(tmp_path)
    contrary = {"prompt": "Why?", "chosen": "no idea", "rejected": "because"}
    import_rows(store, [TEXT, contrary, TEXT])
    assert said(store) == {("Why?", "trl", "because"), ("Why?", "trl#2", "no idea"), ("Why?", "trl#3", "because")}
    (only,) = comparisons(store)
    assert only.chosen == "because"
    assert only.probability == pytest.approx(2 / 3)
    named = new_store(tmp_path, "named.sqlite")
    import_rows(named, [{**row, "annotator": "anna"} for row in (TEXT, contrary, contrary)])
    repeats = [task for task in named.tasks().values() if task.plan.repeat_of is not None]
    assert len(repeats) == 2
    figures = named.annotator_figures()[0]
    assert (figures.num_answered, figures.num_repeats) == (3, 2)
    assert [one.chosen for one in comparisons(named)] == ["because"]
    # A second time the chain of repeats is found again.
    assert import_rows(named, [{**row, "annotator": "anna"} for row in (TEXT, contrary, contrary)]).num_new_labels == 0


def test_the_columns_of_a_comparison_are_kept(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    rows = [
        Comparison("p1", "a", "b", margin=1.5, annotator="anna", chosen_shown_first=False, source="forum"),
        Comparison("p2", "a", "b", annotator="anna", probability=0.5),
        Comparison("p3", "a", "b", annotator="anna", chosen_shown_first=True),
    ]
    path = tmp_path / "own.jsonl"
    path.write_text("".join(dump_line(row) + "\n" for row in rows))
    import_file(store, path)
    first, tie, last = comparisons(store)
    assert (first.margin, first.annotator, first.chosen_shown_first, first.source) == (1.5, "anna", False, "forum")
    assert (tie.probability, tie.margin) == (0.5, None)
    assert last.chosen_shown_first is True


@pytest.mark.parametrize(
    ("votes", "names"),
    [
        ({"probability": 2 / 3, "agreement": 2 / 3, "num_annotators": 3}, {"trl", "trl#2", "trl#3"}),
        ({"probability": 2 / 3, "agreement": 1 / 3, "num_annotators": 3}, {"trl", "trl#2", "trl#3"}),
        ({"probability": 0.5, "agreement": 0.0, "num_annotators": 2}, {"trl", "trl#2"}),
        ({"probability": 0.5, "agreement": 1 / 3, "num_annotators": 3}, {"trl", "trl#2", "trl#3"}),
        ({"probability": 1.0, "agreement": 1.0, "num_annotators": 2, "annotator": "anna, ben"}, {"anna", "ben"}),
    ],
)
def test_a_soft_label_is_taken_apart_into_its_votes(tmp_path: Path, votes: dict[str, Any], names: set[str]) -> None:
    """The mean of the votes and their agreement are those of the row."""
    store = new_store(tmp_path)
    import_rows(store, [{**TEXT, **votes}])
    assert {label.annotator for label in store.current_labels()} == names
    (one,) = comparisons(store)
    assert (one.probability or 1.0) == pytest.approx(votes["probability"])
    assert one.agreement == pytest.approx(votes["agreement"])
    assert one.num_annotators == votes["num_annotators"]


def test_a_soft_label_of_nobody_knows_whom_becomes_a_strength_and_is_said(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    report = import_rows(store, [{**TEXT, "probability": 0.8}, {**TEXT, "prompt": "How?", "probability": 0.9}])
    strengths = sorted(label.answer.strength for label in store.current_labels() if isinstance(label.answer, Choice))
    # 0.5 + s / 6 is 2/3, 5/6, 1.
    assert strengths == [2, 2]
    assert dict(report.notes) == {"a probability between 0.5 and 1 became the nearest strength": 2}


def test_transcripts_of_several_turns_and_the_odd_ones(tmp_path: Path) -> None:
    good = [hh_row(number, turns=1 + number % 4) for number in range(8)]
    identical = {**hh_row(20, 2), "rejected": hh_row(20, 2)["chosen"]}
    no_answer = {**hh_row(21, 2), "chosen": hh_row(21, 2)["chosen"].removesuffix(" yes 21")}
    forks = {**hh_row(22, 3), "rejected": hh_row(23, 3)["rejected"]}
    ends_with_question = {"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c", "rejected": hh_row(1, 1)["rejected"]}
    store = new_store(tmp_path)
    report = import_rows(store, [*good, identical, no_answer, forks, ends_with_question], name="hh.jsonl.gz")
    assert (report.format, report.num_rows, report.num_tasks) == ("hh", 12, 8)
    assert sum(report.unusable.values()) == 4
    assert not report.bad_rows
    text = str(report)
    for reason in ("the same", "empty last turn", "differ before", "does not end with an assistant turn"):
        assert reason in text
    assert f"first: {tmp_path}/hh.jsonl.gz, line 9" in text
    deep = next(one for one in comparisons(store) if "last question 3" in str(one.prompt))
    assert str(deep.prompt).count("\n\nHuman:") == 4
    assert (deep.chosen, deep.rejected) == (" yes 3", " no 3")


def test_two_thousand_transcripts_take_seconds(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "hh.jsonl.gz", [hh_row(number, turns=1 + number % 5) for number in range(2312)])
    store = new_store(tmp_path)
    start = time.perf_counter()
    report = import_file(store, path)
    assert (report.num_tasks, report.num_new_labels) == (2312, 2312)
    assert time.perf_counter() - start < 30


def test_csv_parquet_json_and_folders(tmp_path: Path) -> None:
    row = {**TEXT, "margin": 2.0, "annotator": "anna"}
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*row, "probability"])
        writer.writeheader()
        writer.writerow({**row, "probability": ""})
    # A column of numbers with gaps has NaN where pandas wrote it.
    table = pyarrow.Table.from_pylist(
        [{**row, "agreement": float("nan")}, {**row, "prompt": "How?", "margin": float("nan")}]
    )
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet")
    write_rows(tmp_path / "c.json", [row])
    counts = {}
    for name in ("a.csv", "b.parquet", "c.json"):
        with new_store(tmp_path, f"{name}.sqlite") as store:
            counts[name] = import_file(store, tmp_path / name).num_new_labels
            assert {one.margin for one in comparisons(store)} >= {2.0}
    assert counts == {"a.csv": 1, "b.parquet": 2, "c.json": 1}
    folder = tmp_path / "folder"
    folder.mkdir()
    write_rows(folder / "train.jsonl", [row])
    write_rows(folder / "test.jsonl.gz", [{**row, "prompt": "Where?"}])
    with new_store(tmp_path) as store:
        assert import_file(store, folder).num_new_labels == 2


def test_broken_rows_stop_with_file_and_line_or_are_counted(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    path = tmp_path / "rows.jsonl"
    lines = [
        json.dumps(TEXT),
        "{broken",
        json.dumps({"prompt": "p", "chosen": 3, "rejected": "x"}),
        json.dumps({**TEXT, "probability": 0.2}),
    ]
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(
        DataError, match=r"3 broken rows of 4(.|\n)*rows.jsonl, line 2: malformed JSON(.|\n)*on_bad_row=skip"
    ) as error:
        import_file(store, path)
    assert "line 3: field 'chosen' is text" in str(error.value)
    assert "line 4: field 'probability'" in str(error.value)
    assert not store.tasks()
    report = import_file(store, path, on_bad_row="skip")
    assert (report.num_tasks, sum(report.bad_rows.values())) == (1, 3)
    assert "broken, left out" in str(report)


def test_a_wrong_file_says_what_was_tried_and_found(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    with pytest.raises(ConfigError) as error:
        import_rows(store, [{"colour": "red", "size": 3}])
    for part in ("label_studio", "argilla", "rated_list", "hh", "trl", "colour, size", "format=NAME"):
        assert part in str(error.value)
    with pytest.raises(ConfigError, match="did you mean hh"):
        import_rows(store, [TEXT], format="hhh")
    with pytest.raises(ConfigError, match=r"did you mean rows\.jsonl"):
        import_file(store, tmp_path / "row.jsonl")
    with pytest.raises(ConfigError, match="cannot tell how to read"):
        import_file(store, store.path)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match="empty"):
        import_file(store, tmp_path / "empty.jsonl")


def test_labels_take_the_places_of_tasks_in_the_queue_and_make_room(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    (prompt,) = store.add_prompts([Prompt("Why?")])
    responses = tuple(store.add_responses([Response(prompt, "because"), Response(prompt, "no idea")]))
    (task,) = store.add_tasks([TaskPlan("pairwise", responses, num_labels=1)])
    store.add_annotator(Annotator("anna", "judge", {"model": "m"}))
    report = import_rows(store, [{**TEXT, "annotator": name} for name in ("anna", "ben")])
    assert (report.num_tasks, report.num_new_tasks, report.num_new_labels) == (1, 0, 2)
    assert store.tasks()[task].plan.num_labels == 2
    # One who is known keeps kind and description.
    assert store.annotators()["anna"] == Annotator("anna", "judge", {"model": "m"})
    assert store.annotators()["ben"].kind == "human"
    kinds = new_store(tmp_path, "kinds.sqlite")
    import_rows(kinds, [TEXT], options=ImportOptions(annotator="gpt", annotator_kind="judge"))
    assert kinds.annotators() == {"gpt": Annotator("gpt", "judge")}


def test_checking_writes_nothing_and_reports_the_same(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [TEXT, TEXT])
    before = sorted(tmp_path.iterdir())
    checked = check_file(path)
    assert sorted(tmp_path.iterdir()) == before
    with new_store(tmp_path) as store:
        assert import_file(store, path) == checked


def test_the_columns_beside_the_texts() -> None:
    row = {
        "margin": "2",
        "annotator": 7,
        "probability": "0.75",
        "agreement": "x",
        "num_annotators": 2.0,
        "source": ["s"],
    }
    assert comparison_columns(row) == {"margin": 2.0, "annotator": "7", "probability": 0.75, "num_annotators": 2}
    assert comparison_columns({"chosen_shown_first": "False", "margin": "", "annotator": ""}) == {
        "chosen_shown_first": False
    }
    for bad in ({"margin": True}, {"margin": float("nan")}, {"probability": 0.4}, {"probability": "high"}):
        with pytest.raises(ValueError, match="field '"):
            comparison_columns(bad)


def test_a_tie_is_imported_as_one(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    import_rows(store, [{**TEXT, "probability": 0.5}])
    (label,) = store.current_labels()
    assert label.answer == Tie()
    assert label.made_at.tzinfo == UTC
