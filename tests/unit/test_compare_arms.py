"""Study compare_arms: the arms a config names, what they take from the run, and what is read from finished ones."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from rlhf.config import RLHFConfig, load_config
from rlhf.errors import ArtifactError, ConfigError
from rlhf.pipeline import decided_by
from rlhf.runs.folder import RunFolder, StageResult
from rlhf.studies import arms as arms_module
from rlhf.studies import measures
from rlhf.studies.arms import Arm, arm_config, arm_folder, check_arms
from rlhf.studies.measures import Series

TWINS = ("alpacafarm", "hh", "instructgpt", "secrets")
TWO = "compare_arms.arms={low: {ppo: {kl_coefficient: 0.01}}, high: {ppo: {kl_coefficient: 0.1}}}"
RESULTS = "compare_arms.results=[evaluate/win_rate,ppo/reward/gold@fall]"


def config_of(*arguments: str, stages: str = "[sft,collect,reward_model,compare_arms]") -> RLHFConfig:
    return load_config(["experiment=smoke", f"stages={stages}", *arguments]).config


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def arms_of(config: RLHFConfig, run: RunFolder) -> dict[str, Arm]:
    return {arm.name: arm for arm in arms_module.study_of("compare_arms").arms(config, run, "models/sft")}


def own(config: RLHFConfig, run: RunFolder, name: str) -> RLHFConfig:
    return arm_config(config, run, arms_of(config, run)[name])


def finish(arm: RunFolder, stage: str, summary: Mapping[str, Any]) -> None:
    folder = arm.stage(stage)
    folder.path.mkdir(parents=True)
    folder.write_result(StageResult(stage, "", 1.0, {}, dict(summary)))


def log(arm: RunFolder, gold: list[float], kl: list[float] | None = None) -> None:
    arm.path.mkdir(parents=True, exist_ok=True)
    lines: list[dict[str, Any]] = [
        {"stage": "ppo", "step": step, "ppo/reward/gold": value} for step, value in enumerate(gold, start=1)
    ]
    for line, value in zip(lines, kl or [], strict=False):
        line["ppo/kl_to_reference"] = value
    arm.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))


# --- arms ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TWINS)
def test_every_arm_of_the_shipped_twins_is_a_valid_config(run: RunFolder, name: str) -> None:
    config = load_config([f"experiment=twin/{name}"]).config
    check_arms(config, run)
    for arm in arms_of(config, run).values():
        assert not set(arm_config(config, run, arm).stages) & set(arms_module.STUDY_MODULES)


def test_an_arm_takes_what_it_does_not_make_from_the_run(run: RunFolder) -> None:
    config = config_of(TWO, RESULTS)
    assert list(arms_of(config, run)) == ["seed-1/low", "seed-1/high"]
    low = own(config, run, "seed-1/low")
    assert low.stages == ("ppo", "evaluate", "report")
    assert low.ppo.kl_coefficient == 0.01
    assert low.ppo.policy == low.ppo.reference == low.evaluate.baseline == "models/sft"
    reward_model = str(run.stage("reward_model").model)
    assert low.ppo.reward_model == low.evaluate.reward_model == reward_model
    assert low.dpo.comparisons == str(run.stage("collect").path / "comparisons")
    assert low.best_of_n.rewards["proxy"].path == reward_model  # type: ignore[union-attr]  # it is a model's reward
    assert own(config, run, "seed-1/high").ppo.kl_coefficient == 0.1


def test_what_an_arm_makes_or_names_is_not_replaced(run: RunFolder) -> None:
    arms = (
        "compare_arms.arms={own: {stages: [collect, reward_model, ppo], ppo: {policy: mine}}, "
        "other: {stages: [reward_model], reward_model: {comparisons: '{arms}/own/stages/collect/comparisons'}}}"
    )
    config = config_of(arms, "compare_arms.results=[ppo/score_mean@last]", "dpo.comparisons=theirs")
    first, second = own(config, run, "seed-1/own"), own(config, run, "seed-1/other")
    assert (first.ppo.policy, first.ppo.reference, first.collect.policy) == ("mine", "models/sft", "models/sft")
    assert first.ppo.reward_model is None
    assert first.reward_model.comparisons is None
    assert first.dpo.comparisons == second.dpo.comparisons == "theirs"
    folder = arm_folder(run, "seed-1/own").stage("collect").path / "comparisons"
    assert second.reward_model.comparisons == str(folder)


def test_mappings_are_merged_and_another_type_replaces(run: RunFolder) -> None:
    arms = (
        "compare_arms.arms={a: {ppo: {rewards: {gold: {type: gold, weight: 0.0}}}}, "
        "b: {reward_model: {loss: {type: kwise}}, preferences: {annotator: {flip_share: 0.25}}}}"
    )
    config = config_of(
        arms,
        "compare_arms.results=[ppo/score_mean@last]",
        "ppo.rewards={proxy: {type: model}}",
        "preferences.annotator.temperature=0.5",
        "reward_model.loss.use_margin=true",
    )
    assert set(own(config, run, "seed-1/a").ppo.rewards) == {"proxy", "gold"}
    second = own(config, run, "seed-1/b")
    loss = second.reward_model.loss
    assert loss.type == "kwise"
    assert not loss.use_margin  # what was set of the other type went with it
    annotator = second.preferences.annotator
    assert annotator.type == "simulated"
    assert (annotator.temperature, annotator.flip_share) == (0.5, 0.25)


def test_seeds_repeat_the_arms(run: RunFolder) -> None:
    config = config_of(TWO, RESULTS, "seed=4", "compare_arms.num_seeds=2")
    assert list(arms_of(config, run)) == ["seed-4/low", "seed-4/high", "seed-5/low", "seed-5/high"]
    assert own(config, run, "seed-5/low").seed == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((RESULTS,), "at least two arms"),
        ((TWO,), "names nothing to compare"),
        ((TWO, "compare_arms.results=[win_rate]"), "write STAGE/NAME"),
        ((TWO, "compare_arms.results=[ppo/score_mean@lats]"), "did you mean ppo/score_mean@last"),
        ((TWO, "compare_arms.results=[evalute/win_rate]"), "no stage evalute; did you mean evaluate"),
        ((TWO, "compare_arms.results=[dpo/loss@last]"), "no arm has stage dpo"),
        ((TWO, RESULTS, "compare_arms.curves=[sft/loss]"), "compare_arms.curves has sft/loss"),
        ((TWO, RESULTS, "compare_arms.differences=[low/hihg]"), "two of the arms low, high"),
        ((TWO, RESULTS, "compare_arms.differences=[low/low]"), "two of the arms"),
        ((TWO, RESULTS, "compare_arms.arms.low.ppo.kl_coeficient=1"), r"ppo.kl_coeficient.*\n?.*kl_coefficient"),
        ((TWO, RESULTS, "compare_arms.arms.low.poo.kl_coefficient=1"), r"arm seed-1/low"),
        ((TWO, RESULTS, "compare_arms.arms.low=3"), "holds config keys"),
        ((TWO, RESULTS, "compare_arms.arms.low.stages=[iterated]"), "is a study"),
    ],
)
def test_mistakes_show_before_anything_runs(run: RunFolder, arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_arms(config_of(*arguments), run)


def test_the_arms_and_what_they_share_decide_the_result(run: RunFolder) -> None:
    base = decided_by(config_of(TWO, RESULTS), run, "compare_arms", {}, "data")
    other = decided_by(config_of(TWO, RESULTS, "compare_arms.arms.low.ppo.lam=1.0"), run, "compare_arms", {}, "data")
    assert base["section"]["named_arms"] != other["section"]["named_arms"]
    shared = decided_by(config_of(TWO, RESULTS, "ppo.lam=1.0"), run, "compare_arms", {}, "data")
    assert base["section"]["arms"] != shared["section"]["arms"]


# --- measures -----------------------------------------------------------------------------------------------------


def test_windows_end_with_the_last_step() -> None:
    series = Series((1, 2, 3, 4, 5), (9.0, 1.0, 3.0, 5.0, 7.0), (0.0, 1.0, 2.0, 3.0, 4.0))
    assert series.smoothed(2) == Series((3, 5), (2.0, 6.0), (1.5, 3.5))
    assert series.smoothed(9) == Series((5,), (5.0,), (2.0,))


def test_reductions_by_hand() -> None:
    # Windows of two: 1, 6, 3.
    series = Series((1, 2, 3, 4, 5, 6), (0.0, 2.0, 5.0, 7.0, 4.0, 2.0))
    expected = {"first": 1.0, "last": 3.0, "max": 6.0, "min": 1.0, "rise": 2.0, "fall": 3.0, "peak_step": 4.0}
    assert {name: measures.reduce(series, name, 2) for name in expected} == expected
    assert measures.reduce(series, "linear_slope", 2) is None  # no KL was logged


def test_a_line_over_the_root_of_the_kl() -> None:
    assert measures.line_fit([0.0, 1.0, 2.0], [1.0, 3.0, 5.0]) == pytest.approx((2.0, 1.0))
    # By hand: means 1 and 1, xy = 1, xx = 2, yy = 2: slope 1/2, R squared 1/4.
    assert measures.line_fit([0.0, 1.0, 2.0], [1.0, 0.0, 2.0]) == pytest.approx((0.5, 0.25))
    assert all(math.isnan(number) for number in measures.line_fit([1.0, 1.0], [0.0, 2.0]))


def test_results_are_read_under_either_name(run: RunFolder) -> None:
    finish(run, "ppo", {"ppo/entropy": 1.5, "name": "text"})
    finish(run, "evaluate", {"win_rate": {"value": 0.75, "low": 0.7, "high": 0.8}})
    assert measures.result_of(run, "ppo/entropy", 1) == 1.5
    assert measures.result_of(run, "evaluate/win_rate", 1) == {"value": 0.75, "low": 0.7, "high": 0.8}
    assert measures.result_of(run, "ppo/name", 1) is None
    assert measures.result_of(run, "dpo/loss", 1) is None


# --- exhibits -----------------------------------------------------------------------------------------------------


def finished_arms(run: RunFolder, config: RLHFConfig) -> dict[str, RunFolder]:
    """Gold falls by 2, and by 2.5 with the second seed, in arm low; it rises in arm high."""
    folders = {name: arm_folder(run, name) for name in arms_of(config, run)}
    for name, arm in folders.items():
        seed = int(name[5])
        log(arm, [0.0, 3.0, 1.5 - 0.5 * seed] if "low" in name else [0.0, 1.0, 2.0], [0.0, 1.0, 4.0])
        rate = 0.25 if "low" in name else 0.75
        finish(arm, "evaluate", {"win_rate": {"value": rate, "low": rate - 0.05, "high": rate + 0.05}})
    return folders


def test_results_differences_and_curves(run: RunFolder) -> None:
    extra = ("compare_arms.differences=[high/low]", "compare_arms.curves=[ppo/reward/gold]", "compare_arms.window=1")
    config = config_of(TWO, RESULTS, *extra, "compare_arms.num_seeds=2")
    folders = finished_arms(run, config)
    summary, exhibits = arms_module.study_of("compare_arms").exhibits(config, folders)
    assert summary["low/ppo/reward/gold_fall"]["value"] == pytest.approx(2.25)
    # By hand: the seeds' differences are -2 and -2.5; half of the interval is 12.706 * 0.25.
    difference = summary["high_minus_low/ppo/reward/gold_fall"]
    assert difference["value"] == pytest.approx(-2.25)
    assert difference["high"] == pytest.approx(-2.25 + 12.706 * 0.25)
    assert summary["high_minus_low/evaluate/win_rate"]["value"] == pytest.approx(0.5)
    results, differences = exhibits.tables
    assert [row[0] for row in results.rows] == ["low", "high"]
    assert differences.rows[0][0] == "high less low"
    assert exhibits.remarks[0] == "evaluate/win_rate: high less low +0.5 [+0.5, +0.5] (0.75 against 0.25)"
    (panel,) = exhibits.figures[0].panels
    assert [line.name for line in panel.lines] == ["low", "high"]
    assert [x for x, _ in panel.lines[0].points] == [1.0, 2.0, 3.0]
    assert [y for _, y in panel.lines[0].points] == pytest.approx([0.0, 3.0, 0.75])
    assert panel.lines[0].band is not None


def test_over_the_kl_every_seed_has_its_line(run: RunFolder) -> None:
    extra = ("compare_arms.curves=[ppo/reward/gold]", "compare_arms.window=1", "compare_arms.x=sqrt_kl")
    config = config_of(TWO, RESULTS, *extra, "compare_arms.num_seeds=2")
    _, exhibits = arms_module.study_of("compare_arms").exhibits(config, finished_arms(run, config))
    lines = exhibits.figures[0].panels[0].lines
    assert [line.group for line in lines] == ["low", "low", "high", "high"]
    assert lines[2].points == ((0.0, 0.0), (1.0, 1.0), (2.0, 2.0))


def test_what_one_arm_lacks_is_empty_and_what_all_lack_is_an_error(run: RunFolder) -> None:
    config = config_of(TWO, "compare_arms.results=[evaluate/win_rate,ppo/reward/gold@last]", "compare_arms.window=1")
    folders = finished_arms(run, config)
    folders["seed-1/high"].metrics.write_text("")
    summary, exhibits = arms_module.study_of("compare_arms").exhibits(config, folders)
    assert exhibits.tables[0].rows[1][2] is None
    assert "high/ppo/reward/gold_last" not in summary
    wrong = config_of(TWO, "compare_arms.results=[ppo/reward/glod@last]")
    with pytest.raises(ArtifactError, match="did you mean ppo/reward/gold"):
        arms_module.study_of("compare_arms").exhibits(wrong, folders)
