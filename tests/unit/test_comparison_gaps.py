"""Comparing runs that lack something: a seed that failed, seeds that are not shared, data that changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from rlhf.cli import main
from rlhf.runs.comparison.command import as_json, is_comparison
from rlhf.runs.comparison.compare import Comparison, compare
from rlhf.runs.comparison.curves import charts
from rlhf.runs.comparison.folders import run_folders
from rlhf.runs.comparison.methods import Grouping, group_runs
from rlhf.runs.comparison.page import render_comparison
from rlhf.runs.comparison.records import Run
from tests.comparison_example import NUM_PROMPTS, NUM_UPDATES, make_methods, make_run
from tests.html_page import Page

LOW, HIGH = "kl_coefficient=0.05", "kl_coefficient=0.5"


def grouped(*paths: Path) -> Grouping:
    return group_runs([Run.read(one.path) for one in run_folders([(None, str(path)) for path in paths])])


def compared(*paths: Path) -> tuple[Grouping, Comparison]:
    grouping = grouped(*paths)
    return grouping, compare(grouping.methods)


def unfinished(path: Path, **values: object) -> Path:
    """A run that failed before its evaluation, and before it logged anything."""
    shutil.rmtree(path, ignore_errors=True)
    make_run(path, status="failed", responses=False, **values)  # type: ignore[arg-type]
    (path / "metrics.jsonl").unlink()
    return path


def test_a_seed_that_failed_leaves_the_others(tmp_path: Path) -> None:
    """Its method's results, tests and curves are those of the other seeds, and it is said."""
    make_methods(tmp_path)
    whole = compare(grouped(*(tmp_path / f"kl{kl}-seed{seed}" for kl in ("0.05", "0.5") for seed in (1, 2))).methods)
    path = unfinished(tmp_path / "kl0.05-seed3", seed=3, kl_coefficient=0.05)
    grouping, comparison = compared(tmp_path)
    assert [method.seeds for method in comparison.methods] == [(1, 2, 3)] * 2
    result = comparison.results["evaluate/gold_score"][LOW]
    assert result == whole.results["evaluate/gold_score"][LOW]
    assert len(result.seeds) == 2
    (test,) = [one for one in comparison.tests if one.measure == "score"]
    assert (test.num_seeds, test.paired_seeds, test.num_prompts) == ((2, 2), True, NUM_PROMPTS)
    assert abs(test.difference.value) == pytest.approx(abs(whole.tests[0].difference.value))
    assert comparison.against_baseline[LOW].rate == whole.against_baseline[LOW].rate
    lines = charts(comparison.methods, 0.95)["ppo"]["step"][0][0].panels[0].lines
    assert [(line.name, len(line.points)) for line in lines] == [(HIGH, NUM_UPDATES), (LOW, NUM_UPDATES)]
    assert f"{path} is not finished: its status is failed" in comparison.notes
    missing = f"{path} has no result of evaluate and no scored responses: there {LOW} is its other seeds alone"
    assert missing in comparison.notes
    page = render_comparison(grouping, comparison, 0.95)
    assert "2 of 3 seeds" in page
    assert "no test on prompts" not in page
    Page(page)


def test_a_method_without_answers_takes_no_rating_from_the_others(tmp_path: Path) -> None:
    for number in range(3):
        make_run(tmp_path / f"{number}", seed=1, kl_coefficient=0.1 * (number + 1), score=0.4 * number)
    _, three = compared(tmp_path)
    unfinished(tmp_path / "3", seed=1, kl_coefficient=0.9)
    grouping, four = compared(tmp_path)
    assert len(four.methods) == 4
    assert set(four.ratings) == {f"kl_coefficient=0.{number}" for number in (1, 2, 3)}
    assert four.ratings == three.ratings
    Page(render_comparison(grouping, four, 0.95))


@pytest.mark.parametrize(
    ("seeds", "paired", "num_seeds"),
    [((1, 2), True, (2, 2)), ((3, 4), False, (3, 2)), ((4, 5), False, (3, 2))],
)
def test_seeds_that_are_not_shared_are_told(
    tmp_path: Path, seeds: tuple[int, ...], paired: bool, num_seeds: tuple[int, int]
) -> None:
    for seed in (1, 2, 3):
        make_run(tmp_path / f"a{seed}", seed=seed, kl_coefficient=0.5)
    for seed in seeds:
        make_run(tmp_path / f"b{seed}", seed=seed, kl_coefficient=0.05)
    _, comparison = compared(tmp_path)
    assert (comparison.tests[0].paired_seeds, comparison.tests[0].num_seeds) == (paired, num_seeds)
    (note,) = comparison.notes
    assert f"do not have the same seeds ({HIGH}: 1, 2, 3; {LOW}: {', '.join(map(str, seeds))})" in note


def test_data_that_changed_is_told(tmp_path: Path) -> None:
    """The configs name one data set, and its content was another one when a run read it."""
    paths = make_methods(tmp_path)
    for path in paths:
        body = json.loads((path / "manifest.json").read_text())
        body["data"] = {"hash": "0123" if path != paths[4] else "4567", "content": "x"}
        (path / "manifest.json").write_text(json.dumps(body))
    _, comparison = compared(*paths)
    (note,) = comparison.notes
    assert f"{paths[0]} and {paths[4]} name the same data, and its content was not the same" in note
    # Another data set by its name is a method of its own, and no surprise.
    body["config"]["data"] = {"path": "other.jsonl"}
    body["data"]["hash"] = "89ab"
    (paths[5] / "manifest.json").write_text(json.dumps(body))
    assert len(compared(*paths[:4], paths[5])[1].methods) == 3
    assert not any("name the same data" in note for note in compared(*paths[:4], paths[5])[1].notes)


def test_a_finished_run_counts_before_a_later_one_that_failed(tmp_path: Path) -> None:
    same = {"ppo": {"policy": "one/model"}}
    done = make_run(tmp_path / "done", seed=1, started="2026-01-01", config=same).path
    unfinished(tmp_path / "failed", seed=1, started="2026-01-02", config=same)
    found = grouped(tmp_path)
    assert [run.folder.path for run in found.methods[0].runs] == [done]
    assert f"{done} counts" in found.notes[0]


def test_a_run_made_twice_splits_no_method_by_its_inputs(tmp_path: Path) -> None:
    """Every seed starts from a model of its own; these paths do not tell the two runs of seed 1 apart."""
    for name, seed in (("a", 1), ("b", 2), ("c", 3), ("again", 1)):
        config = {"ppo": {"policy": f"sft/seed{seed}/model"}, "evaluate": {"baseline": f"sft/seed{seed}/model"}}
        make_run(tmp_path / name, seed=seed, config=config, started="2026-01-02" if name == "again" else "2026-01-01")
    found = grouped(tmp_path)
    assert [method.seeds for method in found.methods] == [(1, 2, 3)]
    assert found.methods[0].runs[0].folder.path.name == "again"


def test_runs_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for seed in (0, 1, 2, 10):
        make_run(tmp_path / f"seed{seed}", seed=seed)
    assert [one.path.name for one in run_folders([(None, str(tmp_path))])] == ["seed0", "seed1", "seed2", "seed10"]


def test_who_is_always_longer_has_no_rate_at_equal_lengths(tmp_path: Path) -> None:
    """One method wins on every prompt, and every one of its responses is the longer one."""
    make_run(tmp_path / "long", seed=1, kl_coefficient=0.05, score=50.0, longer=20)
    make_run(tmp_path / "short", seed=1, kl_coefficient=0.5)
    grouping, comparison = compared(tmp_path)
    (rate,) = comparison.win_rates
    assert rate.rate.value == 1.0
    assert rate.controlled.extrapolated
    assert "not told by the data" in render_comparison(grouping, comparison, 0.95)
    assert as_json(grouping, comparison, 0.95, None)["win_rates"][0]["extrapolated"] is True


def test_patterns_with_labels_alone_are_a_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_methods(tmp_path, num_seeds=2)
    labelled = [f"low={tmp_path}/kl0.05-*", f"high={tmp_path}/kl0.5-*"]
    assert is_comparison(labelled)
    with pytest.raises(SystemExit) as stopped:
        main(["report", *labelled, "--json"])
    assert not stopped.value.code
    body = json.loads(capsys.readouterr().out)
    assert [(one["name"], one["seeds"]) for one in body["methods"]] == [("low", [1, 2]), ("high", [1, 2])]
    with pytest.raises(SystemExit) as stopped:
        main(["report", f"low={tmp_path}/kl0.05-sed1"])
    assert stopped.value.code == 2
    assert "there is no such run folder. Did you mean" in capsys.readouterr().err
    assert not is_comparison(["experiment=twin/tldr", "model.path=a/b", "experment=quickstart"])
