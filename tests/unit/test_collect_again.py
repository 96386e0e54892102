"""Stage collect on a store that others have used, and what it says of labels, splits and costs."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rlhf.errors import ConfigError
from rlhf.pipeline import preflight
from rlhf.preferences.asked import FILE, AskedTasks
from rlhf.preferences.store import PreferenceStore
from rlhf.runs.folder import RunFolder
from tests.chat_server import chat_server, said
from tests.collect_example import SIZES, collect_config, comparisons_of, run_collect, write_policy


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_policy(tmp_path_factory.mktemp("models"))


def asked_in(run: Path) -> AskedTasks:
    asked = AskedTasks.read(run / "stages/collect" / FILE)
    assert asked is not None
    return asked


def card_of(run: Path) -> dict[str, Any]:
    body: dict[str, Any] = json.loads((run / "stages/collect/comparisons/card.json").read_text())
    return body


def test_tasks_that_are_there_get_as_many_labels_as_the_config_wants(policy: str, tmp_path: Path) -> None:
    """The number of labels is no part of a task's id: what one collection asked once, the next may ask thrice."""
    shared = {"store": str(tmp_path / "shared.sqlite")}
    run_collect(collect_config(shared), tmp_path / "once", policy)
    run_collect(collect_config({**shared, "labels_per_task": 3}), tmp_path / "thrice", policy)
    asked = asked_in(tmp_path / "thrice")
    assert asked.tasks == asked_in(tmp_path / "once").tasks
    with PreferenceStore.open(tmp_path / "shared.sqlite") as store:
        counts = Counter(label.task for label in store.current_labels())
        assert {counts[task] for task in (*asked.tasks["train"], *asked.tasks["validation"])} == {3}
        assert {counts[task] for task in asked.tasks["test"]} == {1}
        run_collect(collect_config({**shared, "labels_per_task": 2}), tmp_path / "twice", policy)
        # What has been answered stays; nothing is waited for that this config does not want.
        assert {store.tasks()[task].plan.num_labels for task in asked.tasks["train"]} == {2}
        assert sum(counts.values()) == len(store.current_labels())
    assert {one.num_annotators for one in comparisons_of(tmp_path / "thrice")["train"]} == {3}


def test_the_card_counts_the_checks_of_its_own_rounds(policy: str, tmp_path: Path) -> None:
    section = {"store": str(tmp_path / "shared.sqlite"), "gold_share": 0.25, "repeat_share": 0.25}
    run_collect(collect_config(section), tmp_path / "first", policy)
    first = asked_in(tmp_path / "first")
    for use_rounds in ("current", "all"):
        run = tmp_path / use_rounds
        run_collect(collect_config({**section, "round": 1, "use_rounds": use_rounds}), run, policy)
        card, asked = card_of(run), [asked_in(run), *([first] if use_rounds == "all" else [])]
        num_asked = sum(len(one.everything) for one in asked)
        assert sum(one["num_labels"] for one in card["annotators"].values()) == num_asked
        assert sum(card["labels"].values()) == num_asked - sum(len(one.checks) for one in asked)
    assert "Labels of gold questions and blind repeats count here, and nowhere else" in (
        tmp_path / "all/stages/collect/comparisons/README.md"
    ).read_text(encoding="utf-8")


def test_the_card_says_that_the_data_has_split_the_prompts(policy: str, tmp_path: Path) -> None:
    run_collect(collect_config(), tmp_path, policy)
    text = (tmp_path / "stages/collect/comparisons/README.md").read_text(encoding="utf-8")
    assert card_of(tmp_path)["split_settings"] is None
    assert "Each prompt has the split that the data of the run gives it" in text
    assert "hash of a prompt decides" not in text


def test_what_a_judge_cost_and_prefers_is_said(policy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with chat_server(lambda body, before: said("Verdict: A")) as server:
        judge = {
            "type": "judge",
            "address": server.address,
            "model_name": "m",
            "cache": None,
            "both_orders": False,
            "input_price": 1.0,
        }
        run_collect(collect_config({"annotator": judge}), tmp_path, policy)
    printed = capsys.readouterr().out
    total = sum(SIZES.values())
    assert f"collect: {total} labels of {total} tasks, cost " in printed
    assert f"judge: {total} requests" in printed
    assert "took the response shown first in 100.0 % [91.6, 100.0]" in printed


def test_no_round_has_the_random_numbers_of_another_nor_of_its_repeats(policy: str, tmp_path: Path) -> None:
    """Whatever the size of the pool: 256 is one where distances that are powers of two meet."""
    section = {
        "store": str(tmp_path / "shared.sqlite"),
        "repeat_share": 0.5,
        "annotator": {"type": "simulated", "num_annotators": 256},
    }
    numbers: list[tuple[str, int]] = []
    for round_ in (0, 1):
        run = tmp_path / str(round_)
        run_collect(collect_config({**section, "round": round_}), run, policy)
        asked = asked_in(run)
        own = {task: asked.numbers[task] for task in (*asked.tasks["train"], *asked.checks)}
        with PreferenceStore.open(tmp_path / "shared.sqlite") as store:
            tasks = store.tasks(own)
            labels = {label.task: label.annotator for label in store.current_labels(tasks=own)}
        numbers += [(tasks[task].prompt, number) for task, number in own.items()]
        repeats = {task: plan.plan.repeat_of for task, plan in tasks.items() if plan.plan.repeat_of is not None}
        assert len(repeats) == len(asked.checks) > 0
        assert all(labels[task] == labels[original] for task, original in repeats.items())
        assert all((own[task] - own[original]) % 256 == 0 for task, original in repeats.items())
    assert len(set(numbers)) == len(numbers)


@pytest.mark.parametrize(("where", "message"), [("gone/x.sqlite", "needs the folder"), ("", "is a folder")])
def test_a_store_that_cannot_be_is_refused_before_anything_runs(where: str, message: str, tmp_path: Path) -> None:
    """Else a run would train and sample for hours before it says so."""
    config = collect_config({"store": str(tmp_path / where)}, stages=("sft", "collect"))
    with pytest.raises(ConfigError, match=rf"preferences\.store=.*{message}"):
        preflight(config, RunFolder(tmp_path / "run"))
