"""The studies made of runs: which arms they have, what each one changes, and what is read from finished ones."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from rlhf.config import RLHFConfig, load_config
from rlhf.errors import ArtifactError, ConfigError
from rlhf.runs.folder import RunFolder, StageResult
from rlhf.studies import arms as arms_module
from rlhf.studies.arms import Arm, arm_config, arm_folder
from rlhf.studies.curves import PPOCurve, Scores, ppo_curve

POLICY = "models/sft"


def _config(experiment: str, *arguments: str) -> RLHFConfig:
    return load_config([f"experiment={experiment}", *arguments]).config


def _arms(config: RLHFConfig, run: RunFolder, name: Any) -> dict[str, Arm]:
    return {arm.name: arm for arm in arms_module.study_of(name).arms(config, run, POLICY)}


def _finish(run: RunFolder, stage: str, summary: Mapping[str, Any]) -> None:
    folder = run.stage(stage)
    folder.path.mkdir(parents=True)
    folder.write_result(StageResult(stage, "", 1.0, {}, dict(summary)))


def _metrics(run: RunFolder, rows: list[tuple[float, float, float]]) -> None:
    """Lines of PPO: KL, gold and proxy of each update."""
    run.path.mkdir(parents=True, exist_ok=True)
    lines = [
        {"stage": "ppo", "step": n, "ppo/kl_to_reference": kl, "ppo/reward/gold": gold, "ppo/reward/proxy": proxy}
        for n, (kl, gold, proxy) in enumerate(rows, start=1)
    ]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


@pytest.mark.parametrize("name", ["iterated", "overoptimisation", "noisy_labels"])
def test_every_arm_of_the_shipped_experiment_is_a_valid_config(run: RunFolder, name: str) -> None:
    config = _config(name)
    arms = _arms(config, run, name)
    assert len(arms) > 3
    for arm in arms.values():
        own = arm_config(config, run, arm)
        assert name not in own.stages  # an arm is no study
        assert own.run.dir == str(arm_folder(run, arm.name).path)


# --- iterated ----------------------------------------------------------------------------------------------------


def test_a_round_goes_on_from_the_one_before(run: RunFolder) -> None:
    arms = _arms(_config("iterated", "seed=5", "iterated.num_seeds=1"), run, "iterated")
    assert list(arms) == ["seed-5/round-1", "seed-5/round-2", "seed-5/round-3", "seed-5/one-batch"]
    first, second = arms["seed-5/round-1"].changes, arms["seed-5/round-2"].changes
    trained = str(run.path / "arms/seed-5/round-1/stages/ppo/model")
    assert (first["collect.policy"], second["collect.policy"]) == (POLICY, trained)
    assert (first["ppo.policy"], second["ppo.policy"]) == (POLICY, trained)
    assert first["ppo.reference"] == second["ppo.reference"] == POLICY
    assert first["preferences.store"] == second["preferences.store"]
    assert (first["preferences.round"], second["preferences.round"]) == (1, 2)


def test_one_batch_spends_the_labels_and_updates_of_all_rounds(run: RunFolder) -> None:
    config = _config("iterated")
    whole = arm_config(config, run, _arms(config, run, "iterated")["seed-1/one-batch"])
    assert whole.collect.num_comparisons == 3 * config.collect.num_comparisons
    assert whole.ppo.num_updates == 3 * config.ppo.num_updates
    afresh = _config("iterated", "iterated.start_from=first")
    whole = arm_config(afresh, run, _arms(afresh, run, "iterated")["seed-1/one-batch"])
    assert whole.ppo.num_updates == config.ppo.num_updates


def test_every_key_of_the_loop_changes_an_arm(run: RunFolder) -> None:
    arms = _arms(_config("iterated", "iterated.start_from=first"), run, "iterated")
    assert arms["seed-1/round-2"].changes["ppo.policy"] == POLICY
    arms = _arms(_config("iterated", "iterated.reward_model_from=previous"), run, "iterated")
    assert arms["seed-1/round-2"].changes["reward_model.base"].endswith("round-1/stages/reward_model/model")
    assert "seed-1/one-batch" not in _arms(_config("iterated", "iterated.one_batch=false"), run, "iterated")


def test_people_are_not_asked_for_the_comparison(run: RunFolder) -> None:
    assert "seed-1/one-batch" not in _arms(_config("iterated", "preferences.annotator=human"), run, "iterated")


def test_rounds_are_compared_with_the_round_before_and_with_one_batch(run: RunFolder) -> None:
    config = _config("iterated", "iterated.num_rounds=2", "iterated.num_seeds=3")
    scores = {"round-1": [0.9, 1.0, 1.1], "round-2": [1.4, 1.5, 1.6], "one-batch": [1.3, 1.5, 1.7]}
    folders = {}
    for label, values in scores.items():
        for seed, value in enumerate(values, start=1):
            folder = arm_folder(run, f"seed-{seed}/{label}")
            folders[f"seed-{seed}/{label}"] = folder
            estimate = {"value": value, "low": value - 0.1, "high": value + 0.1}
            evaluated = {"gold_score_policy": estimate, "gold_score_baseline": 0.3, "win_rate": 0.8}
            _finish(folder, "evaluate", {**evaluated, "kl_to_reference": 2.0})
            _finish(folder, "reward_model", {"num_train": 200 if label == "round-1" else 400, "accuracy": 0.7})
    summary, exhibits = arms_module.study_of("iterated").exhibits(config, folders)
    assert summary["round_2_gold_score"]["value"] == pytest.approx(1.5)
    # By hand: half of the interval is 4.303 * 0.1 / sqrt(3).
    assert summary["round_2_gold_score"]["high"] == pytest.approx(1.5 + 4.303 * 0.1 / math.sqrt(3))
    assert exhibits.tables[0].rows[1][:2] == ("round-2", 400)
    assert exhibits.remarks[0].startswith("round-2 beats round-1: +0.500")
    # The seeds' differences are 0.1, 0 and -0.1.
    assert exhibits.remarks[1].startswith("round-2 cannot be told from one-batch: +0.000")


# --- curves ------------------------------------------------------------------------------------------------------


def test_a_curve_is_read_from_the_metrics(run: RunFolder) -> None:
    _metrics(run, [(-0.01, 0.3, 0.0), (4.0, 1.0, 1.0), (9.0, 0.5, 2.0)])
    curve = ppo_curve(run, proxy="proxy", gold="gold")
    assert curve == PPOCurve((1, 2, 3), (0.0, 2.0, 3.0), (0.3, 1.0, 0.5), (0.0, 1.0, 2.0))
    with pytest.raises(ArtifactError, match="ppo/reward/other"):
        ppo_curve(run, proxy="other", gold="gold")


def test_windows_do_not_overlap_and_an_incomplete_one_is_left_out() -> None:
    curve = PPOCurve((1, 2, 3, 4, 5), (0.0, 2.0, 4.0, 6.0, 9.0), (1.0, 3.0, 5.0, 7.0, 9.0), (0.0,) * 5)
    assert curve.smoothed(2) == PPOCurve((2, 4), (1.0, 5.0), (2.0, 6.0), (0.0, 0.0))


def test_scores_are_standardised_over_all_samples(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    path.write_text('{"rewards": {"a": [1, 3], "b": [2, 2]}}\n{"rewards": {"a": [1, 3], "b": [2, 2]}}\n')
    scores = Scores.read(path)
    assert scores.standard("a") == (2.0, 1.0)
    assert scores.standardized("a") == [[-1.0, 1.0], [-1.0, 1.0]]
    assert scores.standard("b") == (2.0, 1.0)  # equal scores: nothing to divide by


# --- noisy labels ------------------------------------------------------------------------------------------------


def test_single_and_ensemble_learn_from_the_same_labels_and_share_the_critic(run: RunFolder) -> None:
    config = _config("noisy_labels", "noisy_labels.num_seeds=1", "noisy_labels.aggregations=[worst,mean]")
    arms = _arms(config, run, "noisy_labels")
    assert list(arms)[3:] == ["seed-1/ppo-single", "seed-1/ppo-worst", "seed-1/ppo-mean"]
    single, ensemble = arms["seed-1/reward-single"].changes, arms["seed-1/reward-ensemble"].changes
    assert single["reward_model.comparisons"] == ensemble["reward_model.comparisons"]
    assert arm_config(config, run, arms["seed-1/reward-ensemble"]).reward_model.bootstrap
    assert arm_config(config, run, arms["seed-1/reward-single"]).reward_model.num_members == 1
    values = {arms[f"seed-1/ppo-{name}"].changes["ppo.value_model"] for name in ("single", "worst", "mean")}
    assert len(values) == 1
    worst = arm_config(config, run, arms["seed-1/ppo-worst"]).ppo.rewards
    assert worst["proxy"].aggregation == "worst"  # type: ignore[union-attr]  # it is a model's reward
    assert worst["gold"].weight == 0


def test_the_fall_is_from_the_best_window_to_the_last(run: RunFolder) -> None:
    config = _config("noisy_labels", "noisy_labels.num_seeds=2")
    folders = {}
    for seed in (1, 2):
        for kind in ("single", "ensemble"):
            folders[f"seed-{seed}/reward-{kind}"] = arm_folder(run, f"seed-{seed}/reward-{kind}")
            _finish(folders[f"seed-{seed}/reward-{kind}"], "reward_model", {"accuracy": 0.7})
        for name, last in (("single", 0.2), ("worst", 1.0)):
            folder = folders[f"seed-{seed}/ppo-{name}"] = arm_folder(run, f"seed-{seed}/ppo-{name}")
            _metrics(folder, [(1.0, 0.5, 0.0)] * 5 + [(4.0, 1.0 + seed / 10, 1.0)] * 5 + [(9.0, last, 2.0)] * 5)
    summary, exhibits = arms_module.study_of("noisy_labels").exhibits(config, folders)
    assert summary["single_best"]["value"] == pytest.approx(1.15)
    assert summary["single_fall"]["value"] == pytest.approx(0.95)
    assert summary["worst_fall"]["value"] == pytest.approx(0.15)
    assert summary["single_kl"]["value"] == pytest.approx(9.0)
    assert summary["worst_lead"]["value"] == pytest.approx(0.8)
    assert summary["worst_less_fall"]["value"] == pytest.approx(0.8)
    assert [row[0] for row in exhibits.tables[1].rows] == ["1", "2"]
    assert "leads by +0.80" in exhibits.remarks[0]


# --- over-optimisation -------------------------------------------------------------------------------------------


def test_every_proxy_is_optimised_in_every_way(run: RunFolder) -> None:
    config = _config(
        "overoptimisation",
        "overoptimisation.num_comparisons=[10,20]",
        "overoptimisation.num_epochs=[2,1]",
        "overoptimisation.ensemble_comparisons=20",
        "overoptimisation.beta_comparisons=10",
        "overoptimisation.betas=[0,0.1]",
        "overoptimisation.dpo_betas=[0.5]",
    )
    arms = _arms(config, run, "overoptimisation")
    assert list(arms) == [
        *("labels", "proxy-10", "proxy-20", "ensemble-20", "best-of-n"),
        *("ppo/proxy-10-beta-0", "ppo/proxy-20-beta-0", "ppo/ensemble-20-beta-0", "ppo/proxy-10-beta-0.1"),
        *("dpo/10-beta-0.5", "dpo/20-beta-0.5"),
    ]
    assert arm_config(config, run, arms["labels"]).collect.num_comparisons == 20
    small = arm_config(config, run, arms["proxy-10"]).reward_model
    assert (small.num_comparisons, small.num_epochs, small.num_members) == (10, 2.0, 1)
    assert set(arm_config(config, run, arms["best-of-n"]).best_of_n.rewards) == {
        *("proxy-10", "proxy-20", "ensemble-20", "gold")
    }
    assert arm_config(config, run, arms["ppo/proxy-10-beta-0.1"]).ppo.kl_coefficient == 0.1
    assert arm_config(config, run, arms["dpo/10-beta-0.5"]).dpo.num_comparisons == 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["overoptimisation.num_comparisons=[20,10]", "overoptimisation.num_epochs=[1,1]"], "ascends"),
        (["overoptimisation.num_epochs=[1]"], "one number a proxy"),
        (["overoptimisation.beta_comparisons=7"], "one of num_comparisons"),
        (["overoptimisation.betas=[0.1,0.1]"], "twice"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _config("overoptimisation", *arguments)


def test_the_figure_the_fits_and_the_checkpoints(run: RunFolder) -> None:
    config = _config(
        "overoptimisation",
        "overoptimisation.num_comparisons=[10]",
        "overoptimisation.num_epochs=[1]",
        "overoptimisation.ensemble_comparisons=null",
        "overoptimisation.beta_comparisons=10",
        "overoptimisation.betas=[0]",
        "overoptimisation.dpo_betas=[0.5,1]",
    )
    bon = arm_folder(run, "best-of-n")
    bon.stage("best_of_n").path.mkdir(parents=True)
    # The proxy orders the samples as the gold reward does, so best-of-n gains.
    row = {"rewards": {"proxy-10": [1.0, 2.0, 3.0, 4.0], "gold": [0.0, 1.0, 1.5, 1.7]}}
    (bon.stage("best_of_n").path / "scores.jsonl").write_text((json.dumps(row) + "\n") * 3)
    # An exact curve of the paper's form: gold = 0.2 + d (1.0 - 0.5 log d).
    ppo = arm_folder(run, "ppo/proxy-10-beta-0")
    distances = [0.0, 1.0, 2.0, 3.0, 4.0, 8.0]
    gold = [0.2 + (d * (1.0 - 0.5 * math.log(d)) if d else 0.0) for d in distances]
    _metrics(ppo, [(d * d, g, d) for d, g in zip(distances, gold, strict=True)])
    folders = {"best-of-n": bon, "ppo/proxy-10-beta-0": ppo}
    for beta, kl in (("0.5", 4.0), ("1", 1.0)):
        folder = folders[f"dpo/10-beta-{beta}"] = arm_folder(run, f"dpo/10-beta-{beta}")
        estimate = {"value": 1.0, "low": 0.9, "high": 1.1}
        found = {"kl_to_reference": {"value": kl}, "gold_score_policy": estimate}
        _finish(folder, "evaluate", {**found, "reward_model_score_policy": {"value": 3.5}})
    summary, exhibits = arms_module.study_of("overoptimisation").exhibits(config, folders)
    assert summary["ppo/proxy-10-beta-0/r_squared"] == pytest.approx(1.0)
    assert summary["ppo/proxy-10-beta-0/alpha"] == pytest.approx(1.0)
    # Windows of three updates, by hand from the gold rewards above.
    assert summary["ppo/proxy-10-beta-0/peak"] == pytest.approx(sum(gold[:3]) / 3)
    assert summary["ppo/proxy-10-beta-0/fall"] == pytest.approx((sum(gold[:3]) - sum(gold[3:])) / 3)
    fits, checkpoints, dpo = exhibits.tables
    assert fits.rows[1][:2] == ("PPO", "proxy-10 beta 0")
    assert list(fits.rows[1][2:5]) == pytest.approx([1.0, 0.5, 1.0])
    assert fits.rows[1][5] == pytest.approx(math.e)  # exp(alpha / beta - 1)
    # Windows of three updates: gold is 0.969 on average over the first and 0.954 over the second, the proxy rises.
    assert (checkpoints.rows[0][2], checkpoints.rows[0][4]) == (3, 6)
    best_of_n, along_ppo, of_dpo = exhibits.figures[0].panels
    assert [line.name for line in best_of_n.lines] == ["proxy-10: gold", "proxy-10: proxy"]
    # Best of one is the mean of the samples; the proxy is shown standardised, so it begins at 0.
    assert [line.points[0][0] for line in best_of_n.lines] == [0.0, 0.0]
    assert [line.points[0][1] for line in best_of_n.lines] == pytest.approx([1.05, 0.0])
    assert along_ppo.lines[0].points[1][1] == pytest.approx(1.2)
    assert [x for x, _ in of_dpo.lines[0].points] == [1.0, 2.0]  # ordered by KL
    assert len(dpo.rows) == 2
