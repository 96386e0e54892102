"""Guards of stage ppo: each fires on a hand-made series when it must, and all are silent on runs that went well."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping

import pytest

from rlhf.config.ppo import PPOConfig
from rlhf.errors import EXIT_FAILURE
from rlhf.stages.ppo.guards import REPEAT_AFTER_UPDATES, Guards, TrainingStoppedError

# Updates of two runs that learned well, the later ones thinned out. The first update of the second is a rough one.
COLUMNS = [
    *("loss", "policy_loss", "value_loss", "grad_norm", "score_mean", "score_std", "kl_to_reference", "entropy"),
    *("approx_kl", "clip_fraction", "ratio_max", "explained_variance", "response_length", "stopped_fraction"),
]
QUICKSTART = """
0.278 -0.00637 2.84 0.629 0.0282 1.02 0 1.16 0.00164 0.00469 2.99 -4.04 16.7 1
0.103 -0.00506 1.08 0.435 0.0574 1.05 0.0186 1.14 0.000838 0.00218 1.43 -1.39 16.1 1
0.0484 -0.00371 0.521 0.357 0.231 1.05 0.225 1.14 0.000516 0.0015 1.32 -0.445 18.2 0.992
0.0317 -0.00346 0.351 0.319 0.227 0.973 0.279 1.11 0.000694 0.00155 1.24 -0.319 17.6 0.992
0.0193 -0.00335 0.227 0.292 0.426 0.946 0.902 1.07 0.000276 0.000411 1.15 0.0707 19 0.984
0.014 -0.00391 0.179 0.327 0.502 0.941 0.816 1.08 0.000296 0.00084 1.53 0.215 18.6 0.984
0.0129 -0.00367 0.166 0.314 0.686 0.886 1.01 1.06 0.000569 0.00256 1.46 0.186 18.3 1
0.0136 -0.00386 0.174 0.315 0.601 0.969 1.04 1.03 0.000468 0.00194 1.42 0.287 18.2 0.992
0.0131 -0.00328 0.164 0.323 0.645 0.964 0.941 1.06 0.000285 0.000487 1.12 0.367 16 1
0.0103 -0.00331 0.136 0.324 0.758 0.87 1.13 1.04 0.000385 0.000975 1.12 0.394 16 1
0.0113 -0.00338 0.146 0.312 0.807 0.942 1.03 1.01 0.000227 0.000482 1.42 0.408 16.2 0.992
0.00834 -0.00307 0.114 0.336 1.09 0.849 1.69 0.982 0.000171 0.000252 1.16 0.432 15.5 0.992
0.00692 -0.00253 0.0945 0.278 1.07 0.694 1.75 0.96 0.000146 0 1.15 0.376 16.1 1
0.00869 -0.00333 0.12 0.33 1.04 0.892 1.78 0.967 0.000385 0.00151 1.24 0.484 15.6 1
0.00651 -0.00261 0.0912 0.325 1.18 0.749 1.89 0.958 0.000124 0.000516 1.11 0.483 15.1 1
0.00524 -0.00216 0.074 0.297 1.23 0.706 2.21 0.919 0.00014 0.000243 1.11 0.506 16.1 1
0.00499 -0.00216 0.0715 0.301 1.34 0.706 2.44 0.931 0.000127 0.000481 1.15 0.453 16.2 1
0.00225 -0.00208 0.0433 0.302 1.39 0.579 2.6 0.882 0.000127 0.000721 1.15 0.592 16.2 1
0.00375 -0.00181 0.0556 0.344 1.55 0.576 3.09 0.911 9.33e-05 0 1.13 0.454 16.3 1
0.00432 -0.00164 0.0596 0.319 1.44 0.676 2.62 0.89 0.000124 0.000511 1.25 0.527 15.3 1
0.00333 -0.00114 0.0447 0.299 1.49 0.521 2.3 0.907 8.74e-05 0.000265 1.1 0.452 14.8 1
0.00131 -0.00198 0.0329 0.409 1.54 0.473 2.77 0.879 6.32e-05 0.000556 1.04 0.607 14.1 1
0.000856 -0.00168 0.0254 0.379 1.55 0.407 2.7 0.918 6.85e-05 0.000547 1.15 0.577 14.3 1
0.00433 -0.00046 0.0479 0.395 1.5 0.583 2.62 0.911 2.3e-05 0 1.13 0.504 14.8 1
0.00193 -0.000651 0.0258 0.311 1.6 0.441 2.91 0.893 1.48e-05 0 1.04 0.611 15.4 1
0.00221 -0.000283 0.025 0.339 1.6 0.36 2.77 0.911 4.22e-06 0 1.07 0.455 15 1
0.00227 -0.00024 0.0251 0.33 1.6 0.405 2.74 0.92 1.67e-06 0 1.02 0.572 15 1
0.00222 -7.83e-05 0.023 0.326 1.58 0.375 2.68 0.907 1.96e-07 0 1 0.543 15 1
"""
MOVIE_REVIEWS = """
0.207 -0.0494 2.56 1.49 0.0807 0.853 0 5.17 0.021 0.141 14.7 -1.48 24.5 0.875
0.000593 -0.0334 0.34 0.998 0.0584 0.829 0.273 5.13 0.00528 0.0585 2.11 -0.174 25.8 0.859
-0.00769 -0.0263 0.186 0.993 0.133 0.878 0.679 5.21 0.00411 0.0409 1.9 0.222 24.8 0.883
-0.0118 -0.0225 0.106 0.872 0.132 0.866 1.23 5.19 0.00206 0.0173 1.76 0.337 29.3 0.766
-0.0124 -0.0227 0.103 0.927 0.0562 0.817 1.25 5.17 0.00188 0.0155 1.58 0.311 25.7 0.812
-0.0109 -0.0192 0.0832 0.896 0.0384 0.778 1.52 5.12 0.00176 0.0132 2.22 0.353 27.9 0.836
-0.011 -0.0201 0.0913 0.96 0.104 0.872 1.47 5.1 0.00245 0.0219 1.87 0.453 25.3 0.867
-0.00968 -0.0193 0.0959 1.04 0.127 0.872 1.73 5 0.00209 0.0149 1.84 0.424 23.8 0.891
-0.00896 -0.0181 0.0915 0.975 0.0488 0.803 1.65 4.96 0.0014 0.0117 1.55 0.384 22.6 0.914
-0.00967 -0.0195 0.0983 1.04 0.142 0.862 2.06 5.05 0.00164 0.0119 1.89 0.442 23 0.898
-0.00809 -0.0173 0.0921 1.06 0.311 0.825 2.18 5.11 0.00152 0.013 1.47 0.485 23.1 0.898
-0.00917 -0.0181 0.0889 1.05 0.323 0.829 2.21 5.04 0.00135 0.00865 1.9 0.483 21.2 0.906
-0.0101 -0.019 0.0889 1.14 0.227 0.872 2.04 5.04 0.00158 0.0143 1.68 0.543 18.3 0.945
-0.0135 -0.0222 0.0866 1.24 0.168 0.903 1.85 4.99 0.00174 0.0176 1.54 0.603 15.8 0.961
-0.0073 -0.0168 0.0948 1.2 0.293 0.859 2.35 4.97 0.00134 0.0105 1.67 0.595 18.2 0.945
-0.00697 -0.0172 0.103 1.17 0.0881 0.958 2.23 4.96 0.00137 0.00913 1.73 0.625 18.8 0.953
-0.00721 -0.0155 0.083 1.14 0.355 0.807 2.54 4.91 0.00113 0.00914 1.54 0.583 19.7 0.961
-0.00344 -0.0131 0.0969 1.09 0.163 0.881 2.98 4.89 0.000763 0.00461 1.48 0.522 22 0.922
-0.00493 -0.0121 0.0712 1.12 0.398 0.779 2.63 4.84 0.000555 0.00251 1.3 0.618 20.2 0.914
-0.00303 -0.011 0.0797 1.19 0.491 0.766 2.84 4.68 0.000473 0.00188 1.33 0.601 18.7 0.992
-0.00275 -0.0102 0.0748 1.19 0.509 0.781 2.77 4.72 0.000478 0.00123 1.57 0.622 19.1 0.977
-0.000288 -0.0084 0.0811 1.1 0.38 0.907 2.48 4.87 0.00033 0.000917 1.29 0.66 21.3 0.914
0.000748 -0.00718 0.0793 1.17 0.499 0.884 2.66 4.86 0.000264 0.000834 1.24 0.654 18.7 0.961
0.00129 -0.00597 0.0726 1.12 0.336 0.849 2.93 4.86 0.000192 0 1.16 0.696 20.4 0.977
0.00207 -0.00439 0.0646 1.17 0.497 0.796 2.56 4.85 8.89e-05 0 1.15 0.695 19.5 0.953
0.00428 -0.00318 0.0746 1.08 0.458 0.899 3.11 4.84 6.03e-05 0 1.09 0.662 21.2 0.969
0.00513 -0.00209 0.0722 1.15 0.414 0.858 2.89 4.77 2.09e-05 0 1.08 0.675 20.4 0.969
0.00766 -0.000676 0.0834 1.15 0.443 0.779 2.98 4.86 1.8e-06 0 1.02 0.568 19.5 0.969
"""
# An update in which nothing is wrong.
HEALTHY = {
    "ppo/loss": 0.1,
    "ppo/policy_loss": 0.05,
    "ppo/value_loss": 0.5,
    "ppo/grad_norm": 1.0,
    "ppo/raw_score_mean": 1.0,
    "ppo/score_mean": 1.0,
    "ppo/score_std": 0.5,
    "ppo/kl_to_reference": 3.0,
    "ppo/entropy": 1.0,
    "ppo/approx_kl": 0.001,
    "ppo/clip_fraction": 0.05,
    "ppo/ratio_max": 2.0,
    "ppo/explained_variance": 0.4,
    "ppo/response_length": 15.0,
    "ppo/stopped_fraction": 0.9,
}


def watch(
    change: Callable[[int], Mapping[str, float]], num: int = 40, guards: Guards | None = None, start: int = 1
) -> dict[int, list[str]]:
    """Warnings by update of a series of healthy updates, in which `change(update)` sets metrics (without `ppo/`)."""
    guards = Guards(PPOConfig()) if guards is None else guards
    found = {}
    for update in range(start, num + 1):
        changed = {f"ppo/{name}": value for name, value in change(update).items()}
        warnings = guards.check(update, HEALTHY | changed)
        if warnings:
            found[update] = warnings
    return found


def names(found: Mapping[int, list[str]]) -> dict[int, list[str]]:
    return {update: [text.split(": ")[1] for text in texts] for update, texts in found.items()}


@pytest.mark.parametrize(("series", "max_response_tokens"), [(QUICKSTART, 32), (MOVIE_REVIEWS, 40)])
def test_runs_that_learned_well_get_no_warning(series: str, max_response_tokens: int) -> None:
    guards = Guards(PPOConfig(max_response_tokens=max_response_tokens))
    rows = [line.split() for line in series.strip().splitlines()]
    assert len(rows) > 25
    for update, row in enumerate(rows, 1):
        metrics = {f"ppo/{name}": float(value) for name, value in zip(COLUMNS, row, strict=True)}
        assert guards.check(update, metrics) == []


def test_healthy_updates_and_those_of_the_smallest_runs_get_no_warning() -> None:
    assert watch(lambda update: {}) == {}
    # Three updates of an untrained model: hardly anything stops, the critic knows nothing.
    smoke = {"stopped_fraction": 0.0, "response_length": 16.0, "explained_variance": -0.04, "entropy": 5.76}
    assert watch(lambda update: smoke, num=3, guards=Guards(PPOConfig(max_response_tokens=16))) == {}
    # Returns can all be equal: then nothing can be explained.
    assert watch(lambda update: {"explained_variance": math.nan}) == {}


@pytest.mark.parametrize(
    ("metric", "value", "knob"),
    [
        ("loss", math.nan, "ppo.learning_rate"),
        ("value_loss", math.inf, "ppo.value_learning_rate"),
        ("grad_norm", math.nan, "ppo.learning_rate"),
        ("raw_score_mean", math.nan, "ppo.rewards"),
        ("score_std", math.nan, "ppo.score_clip"),
        ("kl_to_reference", -math.inf, "distributed.precision=fp32"),
        ("ratio_max", math.inf, "ppo.kl_stop_nats_per_token"),
    ],
)
def test_a_number_that_is_not_finite_stops_at_once(metric: str, value: float, knob: str) -> None:
    with pytest.raises(TrainingStoppedError) as caught:
        watch(lambda update: {metric: value} if update == 4 else {})
    message = str(caught.value)
    assert message.startswith(f"update 4: not finite: ppo/{metric} is {value}. Likely cause: ")
    assert knob in message
    assert "Checkpoints of earlier updates stay" in message
    assert caught.value.exit_code == EXIT_FAILURE


def test_warn_goes_on_and_off_says_nothing() -> None:
    def broken(update: int) -> Mapping[str, float]:
        return {"loss": math.nan, "entropy": 0.0} if update > 1 else {}

    warned = watch(broken, num=30, guards=Guards(PPOConfig(guards="warn")))
    # Nothing else is said of an update whose numbers are broken.
    assert names(warned) == {2: ["not finite"], 22: ["not finite"]}
    assert watch(broken, num=30, guards=Guards(PPOConfig(guards="off"))) == {}


def test_a_growing_kl_is_a_warning_and_one_far_out_is_the_end() -> None:
    # 0, 2, 4, ...: beyond 25 nats more than the first at update 14 (26), and growing by far more than a quarter.
    found = names(watch(lambda update: {"kl_to_reference": 2.0 * (update - 1)}))
    assert found == {14: ["KL runaway"], 34: ["KL runaway"]}
    # 4 nats an update: 100 at update 26, beyond it in two updates on end at 28.
    with pytest.raises(TrainingStoppedError, match=r"update 28: KL runaway.* 108 nats a response.*ppo\.kl_coefficient"):
        watch(lambda update: {"kl_to_reference": 4.0 * (update - 1)})
    # One wild update is not the end.
    assert names(watch(lambda update: {"kl_to_reference": 500.0 if update == 20 else 3.0})) == {20: ["KL runaway"]}


def test_a_kl_that_has_settled_or_was_there_from_the_start_is_fine() -> None:
    # 25 more than the first from update 30 on (22 at update 20), so it grew by less than a quarter in ten updates.
    settled = [30 * (1 - math.exp(-update / 12)) for update in range(61)]
    assert watch(lambda update: {"kl_to_reference": settled[update]}, num=60) == {}
    # Another reference on purpose.
    assert watch(lambda update: {"kl_to_reference": 300.0 + update / 10}) == {}
    # 120 nats are little for 800 tokens.
    long = {"kl_to_reference": 0.0, "response_length": 800.0}
    assert watch(lambda update: long | {"kl_to_reference": 3.0 * update}) == {}


def test_a_negative_kl_is_no_kl() -> None:
    found = watch(lambda update: {"kl_to_reference": -1.5 if update > 10 else -0.5}, num=20)
    assert names(found) == {15: ["negative KL"]}
    assert "ppo/sampling_logprob_error" in found[15][0]


def test_entropy_collapse() -> None:
    # Falls from 1 by 0.06 an update: 0.22 at update 14, 0.16 at update 15, the fifth on end at 19.
    found = watch(lambda update: {"entropy": max(1.06 - 0.06 * update, 0.0)}, num=38)
    assert names(found) == {19: ["entropy collapse"]}
    assert "ppo.entropy_coefficient" in found[19][0]
    # A third of the first update's is what a run that learned well keeps.
    assert watch(lambda update: {"entropy": 0.33 if update > 1 else 1.0}) == {}


@pytest.mark.parametrize(("from_start", "knob"), [(True, "ppo.max_response_tokens"), (False, "ppo.length_penalty")])
def test_length_at_its_limit(from_start: bool, knob: str) -> None:
    full = {"response_length": 31.5, "stopped_fraction": 0.02}
    found = watch(lambda update: full if from_start or update > 6 else {}, num=20)
    assert names(found) == {5 if from_start else 11: ["length at its limit"]}
    assert knob in next(iter(found.values()))[0]
    # As long, but ended by the policy itself.
    assert watch(lambda update: {"response_length": 31.5, "stopped_fraction": 0.6}) == {}


def test_scores_without_spread() -> None:
    found = watch(lambda update: {"score_std": 0.0} if update > 3 else {}, num=20)
    assert names(found) == {8: ["scores without spread"]}
    # Less than a hundredth of what it was counts as well; a tenth does not.
    assert len(watch(lambda update: {"score_std": 0.004} if update > 3 else {}, num=20)) == 1
    assert watch(lambda update: {"score_std": 0.05} if update > 3 else {}) == {}
    # Nothing but rounding, from the start.
    assert len(watch(lambda update: {"score_std": 1e-7}, num=20)) == 1
    # One response has no spread.
    assert watch(lambda update: {"score_std": 0.0}, guards=Guards(PPOConfig(batch_size=1))) == {}


def test_a_critic_that_explains_nothing_after_its_warm_up() -> None:
    assert names(watch(lambda update: {"explained_variance": -0.1}, num=30)) == {20: ["the critic explains nothing"]}
    later = Guards(PPOConfig(critic_warmup_updates=7))
    assert names(watch(lambda update: {"explained_variance": -0.1}, num=30, guards=later)) == {
        27: ["the critic explains nothing"]
    }
    assert watch(lambda update: {"explained_variance": -0.1 if update % 10 else 0.1}) == {}


@pytest.mark.parametrize("metric", [{"clip_fraction": 0.4}, {"approx_kl": 0.2}])
def test_steps_too_large(metric: dict[str, float]) -> None:
    found = watch(lambda update: metric if update > 2 else {}, num=10)
    assert names(found) == {7: ["steps too large"]}
    assert "ppo.num_epochs" in found[7][0]
    assert watch(lambda update: metric if update % 5 else {}) == {}


def test_ratio_explosion() -> None:
    found = watch(lambda update: {"ratio_max": 2e4} if update == 3 else {})
    assert names(found) == {3: ["ratio explosion"]}
    assert "2e+04 times as likely" in found[3][0]
    assert "ppo.dual_clip" in found[3][0]


def test_each_warning_is_repeated_only_now_and_then() -> None:
    found = names(watch(lambda update: {"ratio_max": 2e4, "explained_variance": -1.0}, num=45))
    assert found == {
        1: ["ratio explosion"],
        20: ["the critic explains nothing"],
        1 + REPEAT_AFTER_UPDATES: ["ratio explosion"],
        40: ["the critic explains nothing"],
        1 + 2 * REPEAT_AFTER_UPDATES: ["ratio explosion"],
    }


def test_row_25_a_resumed_run_warns_as_an_undisturbed_one() -> None:
    def change(update: int) -> Mapping[str, float]:
        return {
            "kl_to_reference": 2.0 * update,
            "entropy": 1.0 / update,
            "explained_variance": -1.0,
            "ratio_max": 2e4 if update > 8 else 1.0,
        }

    whole = watch(change)
    for cut in (1, 7, 10, 19, 30):
        guards = Guards(PPOConfig())
        first = watch(change, num=cut, guards=guards)
        resumed = Guards(PPOConfig())
        resumed.load_state_dict(json.loads(json.dumps(guards.state_dict())))
        assert first | watch(change, guards=resumed, start=cut + 1) == whole
