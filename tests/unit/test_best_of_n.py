"""Best-of-n against all subsets, enumerated, and against distributions worked out by hand."""

from __future__ import annotations

import math
from itertools import combinations, product
from math import comb

import numpy as np
import pytest

from rlhf.evaluation.best_of_n import (
    best_of_n_curve,
    best_of_n_kl,
    best_of_n_rewards,
    best_of_n_weights,
    discrete_best_of_n_kl,
)


def over_subsets(proxy: list[float], rewards: list[float], n: int) -> float:
    """The mean over every subset of n samples of the mean reward of those that are highest in it."""
    total = []
    for subset in combinations(range(len(proxy)), n):
        highest = max(proxy[index] for index in subset)
        best = [rewards[index] for index in subset if proxy[index] == highest]
        total.append(sum(best) / len(best))
    return sum(total) / len(total)


def test_the_estimate_is_the_mean_over_all_subsets() -> None:
    proxy = [0.3, -1.0, 2.0, 0.3, 0.3, 2.0, -0.5]
    gold = [1.0, -2.0, 0.0, 4.0, 5.0, -3.0, 7.0]
    sizes = list(range(1, 8))
    found = best_of_n_rewards([proxy, gold], [gold, gold], sizes)
    assert found[0] == pytest.approx([over_subsets(proxy, gold, n) for n in sizes], abs=1e-12)
    assert found[1] == pytest.approx([over_subsets(gold, gold, n) for n in sizes], abs=1e-12)
    # The best of 1 is the mean, the best of all the best: here two are, with gold 0 and -3.
    assert found[0, 0] == pytest.approx(12 / 7)
    assert found[0, -1] == pytest.approx(-1.5)


def test_three_samples_by_hand() -> None:
    # Of the pairs of {1, 2, 3} the larger is 2 once and 3 twice.
    assert best_of_n_weights(3, 2).tolist() == pytest.approx([0, 1 / 3, 2 / 3])
    assert best_of_n_rewards([[1, 2, 3]], [[10, 20, 60]], [2])[0, 0] == pytest.approx(20 / 3 + 40)


@pytest.mark.parametrize(("num_samples", "n"), [(5, 1), (9, 4), (60, 30), (7, 7)])
def test_weights_are_the_binomial_ones(num_samples: int, n: int) -> None:
    exact = [comb(k - 1, n - 1) / comb(num_samples, n) for k in range(1, num_samples + 1)]
    assert best_of_n_weights(num_samples, n).tolist() == pytest.approx(exact, rel=1e-12)


def test_weights_of_many_samples_stay_finite() -> None:
    weights = best_of_n_weights(200_000, 60_000)
    assert np.isfinite(weights).all()
    assert weights.sum() == pytest.approx(1, abs=1e-9)
    # About n / N of the time the best of all is in the subset.
    assert weights[-1] == pytest.approx(0.3)


def test_a_prompt_whose_samples_all_tie_gives_their_mean() -> None:
    assert best_of_n_rewards([[2, 2, 2, 2]], [[1, 2, 3, 6]], [1, 2, 3, 4])[0].tolist() == pytest.approx([3.0] * 4)


def brute_kl(probabilities: list[float], scores: list[float], n: int) -> float:
    """KL of best-of-n from every possible draw of n responses."""
    chosen = [0.0] * len(scores)
    for draw in product(range(len(scores)), repeat=n):
        highest = max(scores[index] for index in draw)
        best = [index for index in draw if scores[index] == highest]
        for index in best:
            chosen[index] += math.prod(probabilities[i] for i in draw) / len(best)
    return sum(q * math.log(q / p) for q, p in zip(chosen, probabilities, strict=True) if q > 0)


def test_kl_of_discrete_responses() -> None:
    probabilities, scores = [0.5, 0.2, 0.2, 0.1], [0.0, 1.0, 1.0, -3.0]
    for n in (1, 2, 3, 5):
        exact = brute_kl(probabilities, scores, n)
        assert discrete_best_of_n_kl(probabilities, scores, n) == pytest.approx(exact, abs=1e-12)
        assert exact <= best_of_n_kl(n) + 1e-12
    # One response with probability 1: best-of-n is the policy, whatever the formula says.
    assert discrete_best_of_n_kl([1.0], [0.0], 8) == 0
    assert best_of_n_kl(8) == pytest.approx(1.2044415417, abs=1e-9)
    # Two equally likely ones: q = 3/4, so KL = 3/4 log 3/2 + 1/4 log 1/2.
    by_hand = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert discrete_best_of_n_kl([0.5, 0.5], [1, 2], 2) == pytest.approx(by_hand)
    # Many equally likely ones are as good as a density.
    many = np.full(20_000, 1 / 20_000)
    assert discrete_best_of_n_kl(many, np.arange(20_000), 8) == pytest.approx(best_of_n_kl(8), abs=1e-3)


def test_a_curve_has_intervals_over_prompts() -> None:
    generator = np.random.default_rng(0)
    gold = generator.normal(size=(40, 16))
    proxy = gold + generator.normal(size=(40, 16))
    curve = best_of_n_curve(proxy, gold, [1, 4, 16], num_resamples=200)
    assert [point.n for point in curve] == [1, 4, 16]
    assert curve[0].kl == 0
    assert curve[1].distance == pytest.approx(math.sqrt(math.log(4) - 0.75))
    # Half of what the proxy promises is noise, which is not earned.
    assert curve[2].gold.value < curve[2].proxy.value
    assert curve[0].gold.value == pytest.approx(gold.mean())
    assert all(point.gold.low < point.gold.value < point.gold.high for point in curve)
    assert curve[2].to_json()["gold"]["value"] == curve[2].gold.value


@pytest.mark.parametrize("n", [0, 4])
def test_an_impossible_n_is_refused(n: int) -> None:
    with pytest.raises(ValueError, match=f"1 <= n <= 3, the number of samples; got n = {n}"):
        best_of_n_rewards([[1, 2, 3]], [[1, 2, 3]], [n])


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match=r"proxy has shape \(1, 2\), but rewards \(1, 3\)"):
        best_of_n_rewards([[1, 2]], [[1, 2, 3]], [1])
    with pytest.raises(ValueError, match="rewards must be finite numbers in 2 dimension"):
        best_of_n_rewards([[1, 2]], [[1, math.nan]], [1])
    with pytest.raises(ValueError, match="n >= 1, not 0"):
        best_of_n_kl(0)
    with pytest.raises(ValueError, match=r"their sum is 0\.9"):
        discrete_best_of_n_kl([0.5, 0.4], [1, 2], 2)
