"""The forms of Gao et al.: fits against curves of known coefficients and a slow solver, peaks worked out by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from rlhf.evaluation.overoptimisation import Fit, choose_checkpoint, fit_curve, fit_with_intervals, turning_point

D = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0])


def test_curves_of_known_coefficients_are_found() -> None:
    best = fit_curve("best_of_n", D, D * (1.2 - 0.3 * D))
    assert (best.alpha, best.beta, best.r_squared) == pytest.approx((1.2, 0.3, 1.0))
    # 1.2 / 0.6 = 2, and 1.44 / 1.2 = 1.2.
    assert best.peak == pytest.approx((2.0, 1.2))
    assert best.warning is None
    positive = D[1:]
    learned = fit_curve("reinforcement_learning", positive, positive * (1.0 - 0.5 * np.log(positive)))
    assert (learned.alpha, learned.beta, learned.r_squared) == pytest.approx((1.0, 0.5, 1.0))
    # exp(1 / 0.5 - 1) = e, where R = e (1 - 0.5) = e / 2.
    assert learned.peak == pytest.approx((math.e, math.e / 2))
    assert learned.reward([0.0, 1.0, math.e]).tolist() == pytest.approx([0.0, 1.0, math.e / 2])


@pytest.mark.parametrize("form", ["best_of_n", "reinforcement_learning"])
def test_the_peak_is_the_highest_point_of_the_curve(form: str) -> None:
    fit = Fit(form, 1.1, 0.4, 1.0, None, 5, 0.1, 4.0)  # type: ignore[arg-type]
    grid = np.linspace(0.001, 6, 60_000)
    rewards = fit.reward(grid)
    assert fit.peak is not None
    assert fit.peak == pytest.approx((float(grid[rewards.argmax()]), float(rewards.max())), abs=1e-3)


def slow_fit(form: str, distances: list[float], rewards: list[float], weights: list[float]) -> tuple[float, float]:
    """The normal equations by Cramer's rule, in loops."""
    aa = ab = bb = ay = by = 0.0
    for d, y, w in zip(distances, rewards, weights, strict=True):
        a, b = d, -d * d if form == "best_of_n" else (-d * math.log(d) if d else 0.0)
        aa, ab, bb, ay, by = aa + w * a * a, ab + w * a * b, bb + w * b * b, ay + w * a * y, by + w * b * y
    determinant = aa * bb - ab * ab
    return (ay * bb - by * ab) / determinant, (aa * by - ab * ay) / determinant


@pytest.mark.parametrize("form", ["best_of_n", "reinforcement_learning"])
def test_weighted_fits_solve_the_normal_equations(form: str) -> None:
    rewards, weights = [0.0, 0.4, 0.9, 0.7, 0.8, 0.1], [1.0, 2.0, 0.5, 1.0, 3.0, 0.25]
    found = fit_curve(form, D, rewards, weights)  # type: ignore[arg-type]
    alpha, beta = slow_fit(form, D.tolist(), rewards, weights)
    assert (found.alpha, found.beta) == pytest.approx((alpha, beta))
    predicted = found.reward(D)
    plain = 1 - sum((y - p) ** 2 for y, p in zip(rewards, predicted, strict=True)) / sum(
        (y - sum(rewards) / 6) ** 2 for y in rewards
    )
    center = sum(w * y for w, y in zip(weights, rewards, strict=True)) / sum(weights)
    weighted = 1 - sum(w * (y - p) ** 2 for w, y, p in zip(weights, rewards, predicted, strict=True)) / sum(
        w * (y - center) ** 2 for w, y in zip(weights, rewards, strict=True)
    )
    assert found.r_squared == pytest.approx(plain)
    assert found.weighted_r_squared == pytest.approx(weighted)
    assert fit_curve(form, D, rewards).weighted_r_squared is None  # type: ignore[arg-type]


def test_r_squared_is_negative_for_a_curve_worse_than_the_mean() -> None:
    # R(0) = 0 is built in: rewards around 1 that hardly change are worse described by it than by their mean.
    assert fit_curve("best_of_n", [0.1, 0.2, 3.0], [1.0, 1.1, 1.0]).r_squared < 0
    assert math.isnan(fit_curve("best_of_n", D, np.ones(6)).r_squared)
    assert fit_curve("best_of_n", D, np.ones(6)).to_json()["r_squared"] is None


def test_a_curve_that_never_turns_has_no_peak_and_one_beyond_the_points_warns() -> None:
    rising = fit_curve("best_of_n", D, D * (1.0 + 0.1 * D))
    assert rising.peak is None
    assert rising.warning == "the fitted curve does not turn down"
    assert Fit("reinforcement_learning", 900.0, 1.0, 1.0, None, 3, 0.1, 1.0).peak is None
    far = fit_curve("best_of_n", D, D * (1.0 - 0.1 * D))
    assert far.peak == pytest.approx((5.0, 2.5))
    assert far.warning == "the peak at distance 5 is an extrapolation: the points lie between 0 and 3"
    assert json.loads(json.dumps(far.to_json()))["peak"] == pytest.approx({"distance": 5.0, "reward": 2.5})


def test_intervals_hold_the_truth_and_grow_with_the_noise() -> None:
    generator = np.random.default_rng(1)
    curve, widths = D * (1.2 - 0.3 * D), []
    for noise in (0.05, 0.5):
        found = fit_with_intervals(
            "best_of_n", D, curve + noise * generator.normal(size=(60, 6)), num_resamples=300, seed=3
        )
        assert found.alpha.low < 1.2 < found.alpha.high
        assert found.peak_distance is not None
        assert found.peak_distance.low < 2 < found.peak_distance.high
        assert found.peak_share == 1
        widths.append(found.alpha.high - found.alpha.low)
    assert widths[1] > 5 * widths[0]
    # A unit's own distances are averaged along: two seeds on one curve, a and b, make the mean of both.
    own = fit_with_intervals("best_of_n", [D, 2 * D], [D, 3 * D], num_resamples=20)
    assert own.fit.alpha == pytest.approx(2 / 1.5)
    assert own.fit.largest == 4.5


def test_resamples_without_a_peak_open_the_interval() -> None:
    rewards = [D * (1.0 - 0.05 * D), D * (1.0 + 0.03 * D)]
    found = fit_with_intervals("best_of_n", D, rewards, num_resamples=400)
    # A quarter of the resamples takes the rising unit twice.
    assert found.peak_share == pytest.approx(0.75, abs=0.08)
    assert found.peak_distance is not None
    assert math.isinf(found.peak_distance.high)
    assert found.to_json()["peak_distance"]["high"] is None


def test_the_turning_point_of_a_curve() -> None:
    generator = np.random.default_rng(2)
    clear = np.array([0.0, 0.6, 1.0, 0.7, 0.2]) + 0.1 * generator.normal(size=(30, 5))
    found = turning_point([0, 1, 2, 3, 4], clear, num_resamples=300)
    assert (found.index, found.distance.value) == (2, 2.0)
    assert found.turned
    assert found.fall.value == pytest.approx((clear[:, 2] - clear[:, 4]).mean())
    assert found.turn_share == 1
    # A curve that rises to its end has not turned, and falls by nothing.
    rising = turning_point([0, 1, 2], [[0, 1, 2], [0, 1, 3]], num_resamples=50)
    assert (rising.index, rising.fall.value, rising.turn_share, rising.turned) == (2, 0.0, 0.0, False)
    # Noise without a turn does not count as one.
    noise = turning_point([0, 1, 2], generator.normal(size=(8, 3)) + [0.0, 1.0, 1.0], num_resamples=200)
    assert not noise.turned
    # Nor does a fall that one of three units does not share: it is drawn thrice in 1 of 27 resamples.
    unsure = turning_point([0, 1, 2], [[0, 1.0, 0.5], [0, 0.6, 0.9], [0, 1.0, 0.9]], num_resamples=2000)
    assert (unsure.index, unsure.fall.value) == pytest.approx((1, 0.1))
    assert unsure.fall.low == pytest.approx(-0.3)
    assert not unsure.turned
    assert noise.distance.low <= noise.distance.value <= noise.distance.high


def test_gold_chooses_another_checkpoint_than_the_proxy() -> None:
    gold = [[0.0, 1.0, 0.5], [0.0, 3.0, 1.5]]
    proxy = [[0.0, 1.0, 2.0]]
    choice = choose_checkpoint(gold, proxy, num_resamples=50)
    assert (choice.index, choice.proxy_index) == (1, 2)
    assert (choice.reward.value, choice.gain.value) == (2.0, 1.0)
    # Measured on other prompts, the choice stays and the numbers are theirs.
    other = choose_checkpoint(gold, proxy, [[9.0, 0.5, 0.75]], num_resamples=50)
    assert (other.index, other.reward.value, other.gain.value) == (1, 0.5, -0.25)
    assert choose_checkpoint([[1.0, 1.0]], [[0.0, 1.0]]).index == 0


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match=r"two distinct distances above 0; got \[0.0, 2.0\]"):
        fit_curve("best_of_n", [0, 2, 2], [0, 1, 1])
    with pytest.raises(ValueError, match="distances must be >= 0 and weights > 0"):
        fit_curve("best_of_n", [-1, 2, 3], [0, 1, 1])
    with pytest.raises(ValueError, match="3 distances, 2 rewards"):
        fit_curve("best_of_n", [0, 1, 2], [0, 1])
    with pytest.raises(ValueError, match=r"distances have shape \(2,\), rewards \(1, 3\)"):
        turning_point([0, 1], [[0, 1, 2]])
    with pytest.raises(ValueError, match="have 2, 1 and 2 checkpoints"):
        choose_checkpoint([[0, 1]], [[0]])
    with pytest.raises(ValueError, match="rewards must be finite numbers in 2 dimension"):
        fit_with_intervals("best_of_n", D, D)
