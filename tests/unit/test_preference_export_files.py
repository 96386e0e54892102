"""The files of an export load again, here and with `datasets`; folders are whole or absent; labels come back."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import load_dataset

from rlhf.config.data import FileData, SplitConfig
from rlhf.data import load_comparisons, load_ratings
from rlhf.errors import ConfigError, DataError
from rlhf.preferences.exchange import ExportedLabels, export_labels, import_file, publishing, write_export
from rlhf.preferences.resolution import ResolutionRule
from rlhf.preferences.store import (
    Annotator,
    Answer,
    Choice,
    Flag,
    Policy,
    PreferenceStore,
    Ranking,
    Rating,
    Response,
    Skip,
    TaskPlan,
    Tie,
)
from rlhf.records import Comparison, Message, Prompt, PromptContent, content_hash, read_records
from tests.unit.preference_files import import_rows, new_store
from tests.unit.preference_store_example import HandClock, add_responses, make_store

MEAN = ResolutionRule("mean", on_tied_vote="tie")
SPLITS = SplitConfig(validation=0.2, test=0.2)
ODD = 'He said: "no,\nnever" \u2028 and, left.'


def filled(folder: Path, conversations: bool = False) -> PreferenceStore:
    """40 prompts with a choice each, odd characters, some ties, a margin on one row alone."""
    store = new_store(folder)
    rows: list[dict[str, Any]] = []
    for number in range(40):
        prompt: Any = f"Question {number}?"
        chosen: Any = f" {ODD} {number}"
        rejected: Any = f" bad {number}"
        if conversations:
            prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": prompt}]
            chosen, rejected = ([{"role": "assistant", "content": text}] for text in (chosen, rejected))
        row = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "annotator": "anna"}
        rows.append(
            {**row, **({"probability": 0.5} if number % 10 == 0 else {}), **({"margin": 2.5} if number == 3 else {})}
        )
    import_rows(store, rows)
    return store


def export(store: PreferenceStore) -> ExportedLabels:
    return export_labels(store, rule=MEAN, splits=SPLITS)


def loaded(folder: Path) -> dict[str, list[Comparison]]:
    splits = load_comparisons(FileData(path=str(folder)))
    return {"train": splits.train, "validation": splits.validation, "test": splits.test}


def plain(record: Comparison) -> Comparison:
    """Without what the files fill up so that no column is null."""
    return replace(
        record,
        margin=record.margin or None,
        probability=None if record.probability == 1 else record.probability,
    )


@pytest.mark.parametrize("conversations", [False, True])
@pytest.mark.parametrize("format", ["trl", "jsonl", "csv", "parquet"])
def test_every_format_loads_again_as_what_it_was(tmp_path: Path, format: str, conversations: bool) -> None:
    store = filled(tmp_path, conversations)
    exported = export(store)
    if format == "csv" and conversations:
        with pytest.raises(DataError, match="format=csv has no lists"):
            write_export(exported, tmp_path / "out", format=format)
        assert not (tmp_path / "out").exists()
        return
    write_export(exported, tmp_path / "out", format=format)
    found = loaded(tmp_path / "out")
    assert sum(map(len, found.values())) == 40
    for name, records in found.items():
        assert [plain(one) for one in records] == exported.comparisons.named(name)  # type: ignore[arg-type]
    assert sum(one.probability == 0.5 for records in found.values() for one in records) == 4


def test_our_records_are_exactly_those_exported(tmp_path: Path) -> None:
    exported = export(filled(tmp_path))
    card = write_export(exported, tmp_path / "out", format="jsonl")
    again = read_records(tmp_path / "out" / "train.jsonl", Comparison)
    assert again == exported.comparisons.train
    assert content_hash(again) == card["splits"]["train"]["comparisons_sha256"]


@pytest.mark.parametrize("conversations", [False, True])
def test_datasets_reads_one_type_a_column_in_all_splits(tmp_path: Path, conversations: bool) -> None:
    """What TRL is given. No column is null in a split, whatever single rows have."""
    write_export(export(filled(tmp_path, conversations)), tmp_path / "out")
    for path in (tmp_path / "out").glob("*.jsonl"):
        assert all(None not in json.loads(line).values() for line in path.read_text().split("\n") if line)
    read = load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    assert set(read) == {"train", "validation", "test"}
    assert sum(split.num_rows for split in read.values()) == 40
    assert read["train"].features == read["validation"].features == read["test"].features
    types = {name: str(kind) for name, kind in read["train"].features.items()}
    assert "null" not in " ".join(types.values())
    assert {"prompt", "chosen", "rejected", "probability", "margin", "annotator", "agreement"} <= set(types)


def test_transcripts_hold_no_ties_and_load_again(tmp_path: Path) -> None:
    store = filled(tmp_path, conversations=True)
    card = write_export(export(store), tmp_path / "out", format="hh")
    assert card["not_written"] == {"the format has no ties": 4}
    records = [one for split in loaded(tmp_path / "out").values() for one in split]
    assert len(records) == 36
    assert str(records[0].prompt).startswith("Be brief.\n\nHuman: Question")
    assert str(records[0].prompt).endswith("\n\nAssistant:")
    assert "does not hold" not in (tmp_path / "out" / "README.md").read_text()
    assert "4 × the format has no ties" in (tmp_path / "out" / "README.md").read_text()
    # Transcripts that were imported come out byte for byte.
    own = new_store(tmp_path, "own.sqlite")
    row = {
        "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
        "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: e",
    }
    import_rows(own, [row])
    write_export(export_labels(own, rule=MEAN, split_of=lambda prompt: "train"), tmp_path / "hh", format="hh")
    (line,) = (tmp_path / "hh" / "train.jsonl").read_text().splitlines()
    assert {name: json.loads(line)[name] for name in row} == row


def test_what_a_format_cannot_hold_is_counted(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    for question, answers in (("q", ("", "b")), ("", ("a", "b")), ("fine", ("a", "b"))):
        (prompt,) = store.add_prompts([Prompt(question)])
        ids = tuple(store.add_responses(Response(prompt, text) for text in answers))
        (task,) = store.add_tasks([TaskPlan("pairwise", ids)])
        lease = store.next_assignment("a", lease_seconds=9)
        assert lease is not None
        assert lease.task == task
        store.submit(lease.id, "a", Choice(ids[1]), token=task)
    exported = export_labels(store, rule=MEAN, split_of=lambda prompt: "train")
    assert len(exported.comparisons.train) == 3
    card = write_export(exported, tmp_path / "out")
    assert sum(card["not_written"].values()) == 2
    # The card counts what is in the files.
    assert card["splits"]["train"]["num_comparisons"] == 1
    assert [one.prompt for one in loaded(tmp_path / "out")["train"]] == ["fine"]


def test_texts_and_conversations_are_exported_apart(tmp_path: Path) -> None:
    store = filled(tmp_path)
    import_rows(
        store, [{"prompt": [{"role": "user", "content": "Hi"}], "chosen": "x", "rejected": "y"}], name="more.jsonl"
    )
    exported = export(store)
    with pytest.raises(DataError, match="prompts=text and prompts=messages"):
        write_export(exported, tmp_path / "out")
    card = write_export(exported, tmp_path / "text", prompts="text")
    assert sum(one["num_comparisons"] for one in card["splits"].values()) == 40
    assert card["left_out"] == {"prompt is not text": 1}
    card = write_export(exported, tmp_path / "messages", prompts="messages")
    assert sum(one["num_comparisons"] for one in card["splits"].values()) == 1


def test_ratings_have_a_folder_of_their_own(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    for number in range(20):
        (task,) = store.add_tasks([TaskPlan("rating", add_responses(store, f"q{number}", 1), scale=5)])
        lease = store.next_assignment("a", lease_seconds=9)
        assert lease is not None
        store.submit(lease.id, "a", Rating(1 + number % 5), token=task)
    exported = export(store)
    write_export(exported, tmp_path / "out")
    found = load_ratings(FileData(path=str(tmp_path / "out" / "ratings")))
    assert [one.rating for one in found.train] == [one.rating for one in exported.ratings.train]
    front = yaml.safe_load((tmp_path / "out" / "README.md").read_text().split("---")[1])
    assert [one["config_name"] for one in front["configs"]] == ["ratings"]


def test_an_existing_folder_is_only_replaced_when_it_is_an_export(tmp_path: Path) -> None:
    exported = export(filled(tmp_path))
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="is no export of ours"):
            write_export(exported, mine, overwrite=overwrite)
    assert (mine / "thesis.txt").read_text() == "precious"
    write_export(exported, tmp_path / "out")
    with pytest.raises(ConfigError, match="overwrite=true"):
        write_export(exported, tmp_path / "out")
    write_export(exported, tmp_path / "out", format="csv", overwrite=True)
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".csv", ".md", ".json"}
    with pytest.raises(ConfigError, match="there is a file of this name"):
        write_export(exported, tmp_path / "rows.jsonl")
    with pytest.raises(ConfigError, match="format=tlr is unknown"):
        write_export(exported, tmp_path / "new", format="tlr")


def test_an_export_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exported = export(filled(tmp_path))

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(publishing, "render_card", fail)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(Exception, match="no space left"):
        write_export(exported, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_the_card_and_its_twin(tmp_path: Path) -> None:
    store = filled(tmp_path)
    write_export(export(store), tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    card = json.loads((tmp_path / "out" / "card.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    front = yaml.safe_load(text.split("---")[1])
    assert front["configs"][0]["data_files"][0] == {"split": "train", "path": "train.jsonl"}
    assert front["size_categories"] == ["n<1K"]
    assert "Comparisons: not defined: one annotator." in text
    assert card["agreement"]["comparisons"] == {"not_defined": "one annotator"}
    assert card["labels"] == {"choice": 36, "tie": 4}
    counts = [card["splits"][name]["num_comparisons"] for name in ("train", "validation", "test")]
    assert sum(counts) == 40
    for name, count in zip(("train", "validation", "test"), counts, strict=True):
        assert re.search(rf"\| {name} \| {count} \| {count} \|", text)
    assert card["split_settings"] == {"validation": 0.2, "test": 0.2, "salt": "rlhf"}
    # All 36 chosen texts are the longer ones; no side is known.
    assert (card["length_bias"]["value"], card["length_bias"]["num"]) == (1.0, 36)
    assert card["position_bias"] == {"num": 0, "not_defined": "none"}


# --- our own labels ---------------------------------------------------------------------------------------------------


def busy_store(folder: Path) -> PreferenceStore:
    """Every kind of label, corrections, an undone and redone answer, flags, a repeat, a gold question, instructions."""
    clock = HandClock()
    store = make_store(folder, clock)
    store.add_annotator(Annotator("judge", "judge", {"model": "m", "cost": 0.5}))
    store.add_policies([Policy("abc", {"name": "sft"})])
    rules = store.add_instructions("Be fair.")
    (prompt,) = store.add_prompts([Prompt((Message("user", "Hi \u2028"),), {"topic": "x"})])
    sampled = [Response(prompt, f"t{number}", "abc", {"temperature": 0.7}, 5, number) for number in range(4)]
    ids = tuple(store.add_responses(sampled))
    pair, ranking, rating, gold = store.add_tasks(
        [
            TaskPlan("pairwise", ids[:2], num_labels=2, priority=5, strategy="near_tie", score=0.25),
            TaskPlan("ranking", ids, priority=4, round=2),
            TaskPlan("rating", ids[:1], priority=3, scale=7),
            TaskPlan("pairwise", ids[2:], priority=2, gold=Tie(), audience="human"),
        ]
    )
    store.add_tasks([TaskPlan("pairwise", ids[:2], priority=1, repeat_of=pair)])
    answers: dict[str, Answer] = {
        pair: Choice(ids[0], 3),
        ranking: Ranking(((ids[1], ids[0]), (ids[3],), (ids[2],))),
        rating: Rating(6.5),
        gold: Tie(),
    }
    for number in range(5):
        clock.move(30)
        lease = store.next_assignment("a", lease_seconds=60, instructions=rules, page="page/1", repeat_gap=0)
        assert lease is not None
        clock.move(7)
        flags = (Flag("unsafe", lease.shown[0]), Flag("broken")) if lease.task == rating else ()
        answer = answers.get(lease.task, Skip())
        store.submit(lease.id, "a", answer, token=f"t{number}", seconds=6.5, flags=flags, comment="\u00e9 note")
        if lease.task == pair:
            clock.move(3)
            store.submit(lease.id, "a", Choice(ids[1], 1), token="correction")
            clock.move(3)
            store.retract(lease.id, "a", token="undo", lease_seconds=60, comment="oops")
            clock.move(3)
            store.submit(lease.id, "a", Tie(), token="again")
    lease = store.next_assignment("judge", lease_seconds=60)
    assert lease is not None
    store.submit(lease.id, "judge", None, token="flag", flags=[Flag("personal_data")])
    return store


def everything(store: PreferenceStore) -> dict[str, Any]:
    """All that there is to know of a store's labels, without the numbers of rows."""
    histories = {
        task: [replace(label, id=0, assignment=0, supersedes=None) for label in store.history(task)]
        for task in store.tasks()
    }
    screens = {
        task: [
            replace(store.screen(one.id), assignment=replace(one, id=0, lease_ends=one.leased_at))
            for one in store.assignments(task)
        ]
        for task in store.tasks()
    }
    parts = (store.tasks(), store.prompts(), store.responses(), store.policies(), store.annotators())
    used = {
        name: one
        for name, one in parts[-1].items()
        if any(name == label.annotator for given in histories.values() for label in given)
    }
    return {"labels": histories, "screens": screens, "content": parts[:-1], "annotators": used}


def test_our_labels_come_back_with_every_version(tmp_path: Path) -> None:
    store = busy_store(tmp_path)
    exported = export_labels(store, rule=MEAN)
    write_export(exported, tmp_path / "out", format="labels", store=store)
    copy = new_store(tmp_path, "copy.sqlite")
    report = import_file(copy, tmp_path / "out")
    assert (report.format, report.num_new_labels) == ("labels", 9)
    before, after = everything(store), everything(copy)
    assert after == before
    assert [len(given) for given in before["labels"].values()].count(5) == 1
    current = [replace(one, id=0, assignment=0, supersedes=None) for one in copy.current_labels()]
    assert sorted(map(repr, current)) == sorted(
        repr(replace(one, id=0, assignment=0, supersedes=None)) for one in store.current_labels()
    )
    assert import_file(copy, tmp_path / "out").num_new_labels == 0
    assert everything(copy) == before
    # The sides: what the first label saw, on which side, with which text beside it.
    first = copy.reconstruct(copy.current_labels()[0].id)
    assert first.screen.instructions == "Be fair."
    assert first.label.made_at - first.screen.assignment.leased_at > timedelta(0)


def test_an_edited_file_of_labels_is_refused(tmp_path: Path) -> None:
    store = busy_store(tmp_path)
    write_export(export_labels(store, rule=MEAN), tmp_path / "out", format="labels", store=store)
    path = tmp_path / "out" / "labels.jsonl"
    text = path.read_text()
    copy = new_store(tmp_path, "copy.sqlite")
    path.write_text(text.replace('"text": "t1"', '"text": "better"', 1))
    with pytest.raises(DataError, match=r"labels.jsonl, line 2: the response .* is not what its id says"):
        import_file(copy, path)
    path.write_text(text.replace('"comment"', '"remark"'))
    with pytest.raises(DataError, match="lacks or misspells a field"):
        import_file(copy, path)
    assert not copy.tasks()


def test_prompt_kinds(tmp_path: Path) -> None:
    """A type check of the callback that collect hands in."""

    def split(prompt: PromptContent) -> Any:
        return "validation" if isinstance(prompt, tuple) else "test"

    exported = export_labels(busy_store(tmp_path), rule=MEAN, split_of=split)
    assert exported.comparisons.validation
    assert not exported.comparisons.train
