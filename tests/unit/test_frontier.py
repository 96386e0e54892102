"""Study frontier: its arms, the frontier through its points, and what is read from finished arms."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from rlhf.config import RLHFConfig, load_config
from rlhf.errors import ArtifactError, ConfigError
from rlhf.evaluation.frontier import Frontier, mean_lead
from rlhf.runs.folder import RunFolder, StageResult
from rlhf.studies import frontier
from rlhf.studies.arms import arm_config, arm_folder

POLICY = "models/sft"


def _config(*arguments: str) -> RLHFConfig:
    return load_config(["experiment=twin/imdb_sentiment", *arguments]).config


# --- the curve --------------------------------------------------------------------------------------------------------


def test_neighbours_that_fall_are_pooled_by_hand() -> None:
    """Rewards 0.6, 0.9, 0.7 at KLs 1, 2, 4: the last two become 0.8 at a KL of 3."""
    found = Frontier.through(0.5, [(4.0, 0.7), (1.0, 0.6), (2.0, 0.9)])
    assert [x for x, _ in found.knots] == [0.0, 1.0, 3.0]
    assert [y for _, y in found.knots] == pytest.approx([0.5, 0.6, 0.8])
    assert found.reach == 3.0
    assert found.at(0.5) == pytest.approx(0.55)
    assert found.at(2.0) == pytest.approx(0.7)
    assert found.at(9.0) == pytest.approx(0.8)


def test_a_frontier_neither_falls_nor_begins_below_the_first_policy() -> None:
    found = Frontier.through(0.5, [(-0.2, 0.4), (1.0, 0.45), (2.0, 0.44)])
    assert [reward for _, reward in found.knots] == [0.5, 0.5, 0.5]
    assert found.knots[1][0] == 0.0
    with pytest.raises(ValueError, match="finite"):
        Frontier.through(0.5, [(1.0, math.nan)])


def test_the_mean_lead_is_the_area_between_up_to_where_both_end() -> None:
    """0.1 a nat against 0.05 a nat from the same start: on average over 0 to 2 nats 0.05; beyond it nothing counts."""
    steep = Frontier.through(0.5, [(1.0, 0.6), (2.0, 0.7)])
    flat = Frontier.through(0.5, [(2.0, 0.6), (8.0, 1.0)])
    assert mean_lead(steep, flat) == pytest.approx(0.05)
    assert mean_lead(flat, steep) == pytest.approx(-0.05)
    assert math.isnan(mean_lead(steep, Frontier.through(0.5, [(0.0, 0.6)])))


# --- the study --------------------------------------------------------------------------------------------------------


def test_arms_differ_in_what_the_study_says(tmp_path: Path) -> None:
    config = _config("frontier.ppo_targets=[2.0,8.0]", "frontier.dpo_betas=[0.1]")
    run = RunFolder(tmp_path / "run")
    made = {arm.name: arm for arm in frontier.arms(config, run, POLICY)}
    assert list(made) == [
        *("labels", "reward", "ppo/target-2", "ppo/target-8", "ppo_true/target-2", "ppo_true/target-8"),
        "dpo/beta-0.1",
    ]
    configs = {name: arm_config(config, run, arm) for name, arm in made.items()}
    learned, true = configs["ppo/target-8"].ppo, configs["ppo_true/target-2"].ppo
    assert (learned.kl_target_nats_per_sequence, true.kl_target_nats_per_sequence) == (8.0, 2.0)
    assert {name: reward.weight for name, reward in learned.rewards.items()} == {"learned": 1.0, "true": 0.0}
    assert {name: reward.weight for name, reward in true.rewards.items()} == {"learned": 0.0, "true": 1.0}
    assert learned.value_model == str(run.path / "arms/reward/stages/reward_model/model")
    comparisons = str(run.path / "arms/labels/stages/collect/comparisons")
    assert configs["reward"].reward_model.comparisons == configs["dpo/beta-0.1"].dpo.comparisons == comparisons
    assert configs["dpo/beta-0.1"].dpo.beta == 0.1
    assert configs["dpo/beta-0.1"].evaluate.reference == POLICY
    alone = frontier.arms(_config("frontier.true_reward=false"), run, POLICY)
    assert not [arm.name for arm in alone if arm.name.startswith("ppo_true")]
    other = frontier.arms(_config("ppo.value_init=policy"), run, POLICY)
    assert all("ppo.value_model" not in arm.changes for arm in other)


def test_a_value_that_comes_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="dpo_betas lists a value twice"):
        _config("frontier.dpo_betas=[0.1,0.1]")


def _finish(run: RunFolder, stage: str, summary: dict[str, Any]) -> None:
    run.stage(stage).path.mkdir(parents=True)
    run.stage(stage).write_result(StageResult(stage, "", 1.0, {}, summary))


def _training(run: RunFolder, rows: list[tuple[float, float]]) -> None:
    run.path.mkdir(parents=True)
    lines = [
        {"stage": "ppo", "step": step, "ppo/kl_to_reference": kl, "ppo/reward/true": true, "ppo/reward/learned": 2.0}
        for step, (kl, true) in enumerate(rows, start=1)
    ]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_results_are_read_from_finished_arms(tmp_path: Path) -> None:
    """By hand: DPO goes from 0.5 to 0.7 at 2 nats, PPO to 0.9: means over two updates are points."""
    settings = ("frontier.ppo_targets=[2.0]", "frontier.dpo_betas=[0.1]", "frontier.true_reward=false")
    config = _config(*settings, "frontier.window=2")
    run = RunFolder(tmp_path / "run")
    folders = {arm.name: arm_folder(run, arm.name) for arm in frontier.arms(config, run, POLICY)}
    numbers = {"kl_to_reference": 2.0, "sentiment_policy": 0.4, "sentiment_baseline": 0.0}
    _finish(folders["dpo/beta-0.1"], "evaluate", {name: {"value": value} for name, value in numbers.items()})
    _finish(folders["reward"], "reward_model", {"accuracy": {"value": 0.9, "low": 0.8, "high": 1.0}})
    _training(folders["ppo/target-2"], [(0.5, 0.6), (1.5, 0.8), (1.8, 0.85), (2.2, 0.95), (9.0, 0.0)])
    summary, exhibits = frontier.exhibits(config, folders)
    assert summary["frontier/sentiment_of_reference"] == 0.5
    assert summary["frontier/dpo_reach_nats"] == 2.0
    assert summary["frontier/ppo_largest_sentiment"] == pytest.approx(0.9)
    # Both rise from 0.5 in a straight line, by 0.1 and by 0.2 a nat: 0.1 less on average over two nats.
    assert summary["frontier/dpo_minus_ppo"] == pytest.approx(-0.1, abs=1e-6)
    assert summary["frontier/dpo_at_equal_kl"] == pytest.approx(0.6)
    assert summary["frontier/ppo_at_equal_kl"] == pytest.approx(0.7, abs=1e-6)
    assert summary["frontier/reward_model_accuracy"] == {"value": 0.9, "low": 0.8, "high": 1.0}
    assert exhibits.remarks == ("At equal KL, up to 2.0 nats, PPO, learned reward lies above DPO by 0.100 on average.",)
    ends = {row[0]: row for row in exhibits.tables[0].rows}
    # The last two updates: KL 2.2 and 9, sentiment 0.95 and 0.
    assert ends["PPO, learned reward"][2:4] == (pytest.approx(5.6), pytest.approx(0.475))
    assert ends["DPO"][2:4] == (2.0, 0.7)


def test_an_evaluation_without_sentiment_is_an_error(tmp_path: Path) -> None:
    config = _config("frontier.ppo_targets=[2.0]", "frontier.dpo_betas=[0.1]")
    run = RunFolder(tmp_path / "run")
    folders = {arm.name: arm_folder(run, arm.name) for arm in frontier.arms(config, run, POLICY)}
    _finish(folders["dpo/beta-0.1"], "evaluate", {"kl_to_reference": {"value": 2.0}})
    with pytest.raises(ArtifactError, match="no sentiment and KL of its responses"):
        frontier.exhibits(config, folders)
