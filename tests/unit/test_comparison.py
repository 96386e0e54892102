"""Comparing runs: which folders, which methods, what is found between them, and what is said of mistakes."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats

from rlhf.cli import main
from rlhf.errors import ConfigError
from rlhf.runs.comparison.command import console_table, is_comparison, read_arguments
from rlhf.runs.comparison.compare import Comparison, compare
from rlhf.runs.comparison.curves import charts, mean_line
from rlhf.runs.comparison.folders import run_folders
from rlhf.runs.comparison.methods import Grouping, group_runs
from rlhf.runs.comparison.page import render_comparison
from rlhf.runs.comparison.records import Run, prompt_id
from rlhf.runs.comparison.samples import collect_samples, to_script
from rlhf.runs.files import fingerprint
from tests.comparison_example import NUM_PROMPTS, NUM_UPDATES, make_methods, make_run
from tests.html_page import Page
from tests.web.attacks import ATTACKS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two methods with three seeds."""
    place = tmp_path_factory.mktemp("comparison")
    make_methods(place)
    return place


def grouped(*paths: Path, group_by: Sequence[str] = ()) -> Grouping:
    folders = run_folders([(None, str(path)) for path in paths])
    return group_runs([Run.read(one.path, one.label) for one in folders], group_by)


def compared(*paths: Path) -> Comparison:
    return compare(grouped(*paths).methods)


def command(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        main(["report", *arguments])
    out, err = capsys.readouterr()
    return int(stopped.value.code or 0), out, err


def test_folders_stand_for_their_runs(folder: Path, tmp_path: Path) -> None:
    names = [one.path.name for one in run_folders([(None, str(folder))])]
    assert names == [f"kl{kl}-seed{seed}" for kl in ("0.5", "0.05") for seed in (1, 2, 3)]
    make_run(tmp_path / "sweep/trials/10", seed=1)
    make_run(tmp_path / "sweep/trials/9", seed=2)
    make_run(tmp_path / "sweep/cache/x", seed=3)
    assert [one.path.name for one in run_folders([(None, str(tmp_path / "sweep"))])] == ["9", "10"]
    make_run(tmp_path / "study", seed=1)
    make_run(tmp_path / "study/arms/a", seed=1)
    assert [one.path.name for one in run_folders([(None, str(tmp_path / "study"))])] == ["a"]
    # A folder named twice is one run, and the label of either counts.
    twice = run_folders([(None, str(tmp_path / "study/arms/a")), ("label", str(tmp_path / "study/arms/a/"))])
    assert [one.label for one in twice] == ["label"]
    assert len(run_folders([("low", str(folder / "kl0.05-seed*"))])) == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("kl0.5-sed1", r"there is no such run folder\. Did you mean .*kl0\.5-seed1\?"),
        ("nothing-like-it/at/all", "has no nothing-like-it"),
        ("kl0.5-seed1/stages", "is no run folder and holds none: expected one with manifest.json"),
        ("kl0.5-seed1/metrics.jsonl", "is no run folder"),
    ],
)
def test_folders_that_are_no_runs(folder: Path, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_folders([(None, str(folder / name))])


def test_methods_are_the_keys_that_differ(folder: Path) -> None:
    found = grouped(folder)
    assert [method.name for method in found.methods] == ["kl_coefficient=0.5", "kl_coefficient=0.05"]
    assert [method.seeds for method in found.methods] == [(1, 2, 3)] * 2
    assert found.differing["ppo.kl_coefficient"] == ("0.5", "0.05")
    # run.dir differs as well, and decides nothing.
    assert not any(key.startswith("run.") for key in found.differing)
    assert found.notes == ()


def test_what_makes_no_method(tmp_path: Path) -> None:
    """Bookkeeping, settings of stages that a run has not, and the folders of other seeds' models."""
    runs = []
    for seed in (1, 2):
        config = {
            "sft": {"log_every": seed},
            "dpo": {"beta": float(seed)},
            "tracking": {"wandb": str(seed)},
            "ppo": {"reward_model": f"runs/seed{seed}/model"},
            "experiment": "example",
        }
        runs.append(make_run(tmp_path / str(seed), seed=seed, config=config).path)
    assert [method.seeds for method in grouped(*runs).methods] == [(1, 2)]
    # Two runs of one seed that differ in nothing but the model they start from are two methods.
    runs.append(make_run(tmp_path / "3", seed=2, config={"ppo": {"reward_model": "runs/other/model"}}).path)
    assert len(grouped(*runs).methods) == 3


def test_names_have_as_few_keys_as_tell_methods_apart(tmp_path: Path) -> None:
    paths = []
    for number, (low, rate) in enumerate(((True, 1e-3), (True, 1e-2), (False, 1e-3))):
        config = {"ppo": {"whiten": low, "norm": low, "learning_rate": rate}, "sft": {"learning_rate": rate}}
        paths.append(make_run(tmp_path / str(number), seed=1, config=config).path)
    names = [method.name for method in grouped(*paths).methods]
    assert len(set(names)) == 3
    assert all(name.count("=") == 2 for name in names)
    stages = [make_run(tmp_path / "d", seed=1, config={"stages": ["sft", "dpo", "evaluate"]}).path, paths[0]]
    assert "stages=dpo" in grouped(*stages).methods[0].name
    labelled = run_folders([("mine", str(paths[0])), (None, str(paths[1]))])
    found = group_runs([Run.read(one.path, one.label) for one in labelled])
    assert found.methods[0].name == "mine"


def test_group_by_is_what_the_user_says(folder: Path) -> None:
    found = grouped(folder, group_by=["experiment", "ppo.kl_coefficient"])
    assert found.methods[0].name == "experiment=example, kl_coefficient=0.5"
    (one,) = grouped(*sorted(folder.glob("*seed1"))[:1], group_by=["ppo"]).methods
    assert one.name.startswith("ppo=")
    with pytest.raises(ConfigError, match=r"did you mean ppo\.kl_coefficient\?"):
        grouped(folder, group_by=["ppo.kl_coeficient"])


def test_a_seed_counts_once(tmp_path: Path) -> None:
    times = {"again": "2026-01-02", "first": "2026-01-01"}
    same = {"ppo": {"policy": "one/model"}}
    paths = [make_run(tmp_path / name, seed=1, started=time, config=same).path for name, time in times.items()]
    found = grouped(*paths)
    assert [run.folder.path.name for run in found.methods[0].runs] == ["again"]
    assert "have the same seed 1" in found.notes[0]


def test_results_are_means_over_seeds(folder: Path) -> None:
    comparison = compared(folder)
    result = comparison.results["evaluate/gold_score"]["kl_coefficient=0.05"]
    values = [
        json.loads((folder / f"kl0.05-seed{seed}/stages/evaluate/result.json").read_text())["summary"]
        for seed in (1, 2, 3)
    ]
    scores = [value["gold_score_policy"]["value"] for value in values]
    assert result.seeds == tuple(scores)
    expected = scipy.stats.t.interval(0.95, 2, np.mean(scores), scipy.stats.sem(scores))
    assert (result.estimate.low, result.estimate.high) == pytest.approx(expected)
    # A share's interval ends where shares do.
    high = comparison.results["evaluate/win_rate"]["kl_coefficient=0.05"].estimate.high
    assert high is not None
    assert high <= 1.0


def test_the_known_effect_is_found(folder: Path) -> None:
    comparison = compared(folder)
    test = next(test for test in comparison.tests if test.measure == "score")
    assert (test.first, test.num_seeds, test.paired_seeds) == ("kl_coefficient=0.5", (3, 3), True)
    assert test.num_prompts == NUM_PROMPTS
    assert test.difference.value == pytest.approx(-0.6, abs=0.3)
    assert test.p_prompts == 1e-4
    assert test.p_seeds == 0.25
    matrix = np.array(
        [
            [[one["policy"]["score"] for one in _responses(folder / f"kl{kl}-seed{seed}")] for seed in (1, 2, 3)]
            for kl in ("0.5", "0.05")
        ]
    )
    assert test.difference.value == pytest.approx(matrix[0].mean() - matrix[1].mean())
    rate = comparison.win_rates[0]
    assert rate.rate.value == pytest.approx(np.mean(matrix[0] > matrix[1]))
    assert rate.rate.value < 0.3
    assert set(comparison.against_baseline) == {"kl_coefficient=0.5", "kl_coefficient=0.05"}
    assert comparison.notes == ()


def test_several_comparisons_are_corrected(tmp_path: Path) -> None:
    paths = [
        make_run(tmp_path / f"{number}-{seed}", seed=seed, kl_coefficient=0.1 * (number + 1), score=0.4 * number).path
        for number in range(3)
        for seed in (1, 2, 3)
    ]
    comparison = compared(*paths)
    tests = [test for test in comparison.tests if test.measure == "score"]
    assert len(tests) == 3
    smallest = min(tests, key=lambda test: test.difference.p_value)
    assert smallest.adjusted == pytest.approx(min(1.0, 3 * smallest.difference.p_value))
    assert all(test.adjusted >= test.difference.p_value for test in tests)
    ratings = [comparison.ratings[method.name].value for method in comparison.methods]
    assert ratings == sorted(ratings)
    assert sum(ratings) == pytest.approx(0.0, abs=1e-6)


def test_seeds_that_are_not_shared_are_not_paired(tmp_path: Path) -> None:
    paths = [
        make_run(tmp_path / f"{kl}-{seed}", seed=seed, kl_coefficient=kl, score=10 * kl).path
        for kl, seeds in ((0.1, (1, 2)), (0.2, (5, 6, 7)))
        for seed in seeds
    ]
    comparison = compared(*paths)
    test = comparison.tests[0]
    assert (test.paired_seeds, test.num_seeds) == (False, (2, 3))
    # Ten divisions of five runs; only the one seen is as extreme.
    assert test.p_seeds == pytest.approx(0.1)
    wins = comparison.win_rates[0]
    scores = {path.name: [one["policy"]["score"] for one in _responses(path)] for path in paths}
    expected = [
        np.mean(np.array(scores[f"0.1-{one}"]) > np.array(scores[f"0.2-{other}"]))
        for one in (1, 2)
        for other in (5, 6, 7)
    ]
    assert wins.rate.value == pytest.approx(np.mean(expected))
    assert wins.rate.low < wins.rate.value < wins.rate.high
    page = render_comparison(grouped(*paths), comparison, 0.95)
    assert "their runs are not paired" in page


def test_opponents_that_differ_widen_a_win_rate(tmp_path: Path) -> None:
    """One side wins against one opponent and loses to two, on every prompt: another opponent might be either."""
    scores = {1: 0.0, 2: 0.0, 5: -50.0, 6: 50.0, 7: 50.0}
    paths = [
        make_run(tmp_path / str(seed), seed=seed, kl_coefficient=0.1 if seed < 5 else 0.2, score=score).path
        for seed, score in scores.items()
    ]
    (rate,) = compared(*paths).win_rates
    assert rate.rate.value == pytest.approx(1 / 3)
    assert (rate.rate.low, rate.rate.high) == (0.0, 1.0)


def test_who_always_wins_has_an_interval(tmp_path: Path) -> None:
    (rate,) = compared(*make_methods(tmp_path, effect=50.0)).win_rates
    # Wilson's lower end at n of n is n / (n + z^2).
    square = scipy.stats.norm.ppf(0.975) ** 2
    assert rate.rate.value == 1.0
    assert rate.rate.low == pytest.approx(NUM_PROMPTS / (NUM_PROMPTS + square))


def test_one_seed_is_said_to_be_one(tmp_path: Path) -> None:
    comparison = compared(*make_methods(tmp_path, num_seeds=1))
    assert "seeds were not varied" in comparison.notes[0]
    assert comparison.tests[0].p_seeds is None
    one = comparison.results["evaluate/gold_score"]["kl_coefficient=0.5"]
    summary = json.loads((tmp_path / "kl0.5-seed1/stages/evaluate/result.json").read_text())["summary"]
    assert one.estimate.low == summary["gold_score_policy"]["low"]


def test_what_the_reader_must_know(tmp_path: Path) -> None:
    paths = make_methods(tmp_path, num_seeds=2)
    make_run(paths[0], seed=1, kl_coefficient=0.05, status="running")
    (paths[1] / "stages/evaluate/responses.jsonl").unlink()
    body = json.loads((paths[2] / "stages/evaluate/result.json").read_text())
    body["summary"]["judge"] = "classifier"
    (paths[2] / "stages/evaluate/result.json").write_text(json.dumps(body))
    (paths[1] / "samples.jsonl").write_text(
        json.dumps(
            {
                "stage": "evaluate",
                "prompt": "Prompt 3: what did you think ?",
                "policy_response": " x",
                "policy_score": 1.0,
            }
        )
        + "\n"
    )
    notes = "\n".join(compared(*paths).notes)
    assert "is still running" in notes
    assert "different judges (classifier, gold)" in notes
    assert "kept the responses of their sample table alone" in notes
    assert "no two methods have scored responses to the same prompts" in notes


def test_a_prompt_has_the_id_that_stage_evaluate_gives_it() -> None:
    for prompt in ("Größe \N{SNOWMAN}?", [{"role": "user", "content": "x"}]):
        assert prompt_id(prompt) == fingerprint(prompt)[:16]


def test_curves_have_the_mean_and_its_band(folder: Path) -> None:
    found = charts(grouped(folder).methods, 0.95)
    main, others = found["ppo"]["step"]
    titles = [figure.title for figure in main]
    assert titles[:3] == ["Score", "KL to the reference", "Reward gold"]
    assert [figure.title for figure in others] == ["Step seconds"]
    line = main[0].panels[0].lines[1]
    assert line.name == "kl_coefficient=0.05"
    values = [
        [
            json.loads(text)["ppo/score_mean"]
            for text in (folder / f"kl0.05-seed{seed}/metrics.jsonl").read_text().split("\n")[:-1]
        ]
        for seed in (1, 2, 3)
    ]
    assert [y for _, y in line.points] == pytest.approx(np.mean(values, axis=0).tolist())
    assert line.band is not None
    low, high = scipy.stats.t.interval(0.95, 2, np.mean(values, axis=0)[4], scipy.stats.sem(values, axis=0)[4])
    assert line.band[4] == pytest.approx((low, high))
    episodes = found["ppo"]["examples"][0][0].panels[0].lines[0].points
    assert episodes[-1][0] == NUM_UPDATES * 16
    tokens = found["ppo"]["tokens"][0][0].panels[0].lines[0].points
    lengths = [8 + 4 * (1 - math.exp(-step / 6)) for step in range(1, NUM_UPDATES + 1)]
    assert tokens[-1][0] == pytest.approx(16 * sum(lengths))


def test_curves_of_other_steps_meet_where_all_are() -> None:
    first, second = (np.array([0.0, 10.0]), np.array([0.0, 10.0])), (np.array([5.0, 15.0]), np.array([1.0, 3.0]))
    line = mean_line("m", [first, second], 0.95)
    assert line is not None
    # At 5: 5 and 1; at 10: 10 and 2.
    assert line.points == ((5.0, 3.0), (10.0, 6.0))
    assert mean_line("m", [first, (np.array([20.0]), np.array([1.0]))], 0.95) is None


def test_the_page_is_whole_and_inert(tmp_path: Path) -> None:
    attack = "</script><script>window.attacked=1</script><img src=x onerror=window.attacked=1>"
    paths = make_methods(tmp_path, num_seeds=2)
    for number, text in enumerate([attack, "".join(ATTACKS)]):
        config = {"ppo": {"note": text}, "experiment": text}
        paths.append(make_run(tmp_path / f"bad{number}", seed=1, text=text, config=config, num_prompts=10).path)
    grouping = grouped(*paths)
    text = render_comparison(grouping, compare(grouping.methods), 0.95)
    page = Page(text)
    assert page.elements.count("script") == 2
    assert "img" not in page.elements
    assert not any(name.startswith("on") for name, _ in page.attributes)
    links = [value or "" for name, value in page.attributes if name in ("src", "href", "action")]
    assert all(link.startswith("#") for link in links)
    assert attack not in text
    policy = next(value for name, value in page.attributes if name == "content" and value and "default-src" in value)
    assert "default-src 'none'" in policy
    assert "sha256-" in policy
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_samples_are_data(folder: Path) -> None:
    samples = collect_samples(grouped(folder).methods)
    assert (samples.num_prompts, samples.num_all) == (NUM_PROMPTS, NUM_PROMPTS)
    row = samples.body["rows"][0]
    assert row["prompt"] == [["", "Prompt 0: what did you think ?"]]
    means = [np.mean([one["score"] for one in of_method]) for of_method in row["responses"]]
    assert row["gap"] == pytest.approx(max(means) - min(means))
    few = collect_samples(grouped(folder).methods, most_characters=5000)
    assert 0 < few.num_prompts < NUM_PROMPTS
    gaps = sorted((one["gap"] for one in samples.body["rows"]), reverse=True)
    assert sorted((one["gap"] for one in few.body["rows"]), reverse=True) == gaps[: few.num_prompts]
    for attack in ATTACKS:
        script = to_script({"text": attack})
        assert script.isascii()
        assert not set("<>&") & set(script)
        assert json.loads(script) == {"text": attack}


def test_the_command_writes_page_and_table(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "out.html"
    code, out, _ = command(str(folder), f"to={page}", "confidence=0.9", capsys=capsys)
    assert code == 0
    assert "kl_coefficient=0.05" in out
    assert "length-controlled" in out
    assert "90 % intervals" in page.read_text()
    labels = [f"low={folder}/kl0.05-seed*", f"high={folder}/kl0.5-seed*"]
    code, out, _ = command(*labels, str(folder / "kl0.5-seed1"), "--json", capsys=capsys)
    body: dict[str, Any] = json.loads(out)
    assert [method["name"] for method in body["methods"]] == ["low", "high"]
    assert body["page"] is None
    assert body["tests"][0]["difference"]["value"] > 0
    assert body["results"]["evaluate/gold_score"]["low"]["seeds"]


def test_one_run_has_its_own_report(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = command(str(folder / "kl0.5-seed1"), f"to={tmp_path / 'r.html'}", capsys=capsys)
    assert code == 0
    assert "one run has nothing to be compared with" in out
    assert "Score against KL" in (tmp_path / "r.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{folder}", "confidence=2"], "confidence=2: expected a number between 0 and 1"),
        (["{folder}", "--jsn"], "unknown option --jsn; did you mean --json?"),
        (["{folder}", "gruop_by=seed"], "Did you mean group_by=?"),
        (["{folder}", "ppo.kl_coefficient=0.1"], "Config keys belong to a report of one run"),
        (["{folder}", "group_by=ppo.kl"], "group_by=ppo.kl: no run's config has this key"),
        (["{folder}/nowhere"], "there is no such run folder"),
        (["{folder}", "to={folder}"], "is a folder: name the file to write"),
        (["{folder}", "label=nowhere/x"], "there is no such run folder"),
    ],
)
def test_mistakes_end_with_two(
    folder: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = command(*(text.format(folder=folder) for text in arguments), capsys=capsys)
    assert code == 2
    assert message in err


def test_runs_with_nothing_in_common(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = make_run(tmp_path / "a", seed=1)
    second = make_run(tmp_path / "b", seed=1, kl_coefficient=0.3)
    (second.path / "metrics.jsonl").unlink()
    (second.path / "stages/evaluate/result.json").unlink()
    code, _, err = command(str(first.path), str(second.path), capsys=capsys)
    assert code == 2
    assert "no result and no metric in common" in err
    assert "no finished stage, nothing logged" in err


def test_a_report_of_one_config_stays_what_it_is(folder: Path) -> None:
    assert not is_comparison(["experiment=quickstart", "seed=2", "--debug"])
    assert not is_comparison([f"run.dir={folder}"])
    assert not is_comparison([f"data={folder}"])
    assert is_comparison(["runs/x"])
    assert is_comparison([f"mine={folder}"])
    request = read_arguments(["a", "mine=b", "group_by=[seed, ppo.x]", "--json", "to=c"])
    assert request.folders == ((None, "a"), ("mine", "b"))
    assert (request.group_by, request.as_json, request.to) == (("seed", "ppo.x"), True, "c")


def test_many_methods_are_compared_with_the_first(tmp_path: Path) -> None:
    paths = [make_run(tmp_path / str(n), seed=1, kl_coefficient=0.01 * (n + 1), num_prompts=4).path for n in range(8)]
    comparison = compared(*paths)
    tests = [test for test in comparison.tests if test.measure == "score"]
    assert {test.first for test in tests} == {"kl_coefficient=0.01"}
    assert len(tests) == 7
    assert console_table(comparison).count("kl_coefficient=0.01 \N{MINUS SIGN}") == 7


def _responses(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "stages/evaluate/responses.jsonl").read_text().splitlines()]
