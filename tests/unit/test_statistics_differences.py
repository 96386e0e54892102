"""Differences between methods: by hand, against scipy and scikit-learn, and the coverage of intervals by simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.stats
from sklearn.linear_model import LogisticRegression

from rlhf import statistics
from rlhf.statistics.length_control import RIDGE
from rlhf.statistics.ratings import PRIOR_GAMES


@pytest.mark.parametrize("freedom", [1, 2, 3.7, 10, 200, 1e5])
def test_student_is_students(freedom: float) -> None:
    for t in (0.0, 0.1, 1.0, -2.5, 12.7, 300.0):
        expected = 2 * scipy.stats.t.sf(abs(t), freedom)
        assert statistics.student_p_value(t, freedom) == pytest.approx(expected, rel=1e-7, abs=1e-14)
    for confidence in (0.5, 0.9, 0.95, 0.999):
        expected = scipy.stats.t.ppf((1 + confidence) / 2, freedom)
        assert statistics.student_quantile(confidence, freedom) == pytest.approx(expected, rel=1e-7)


def test_t_interval_by_hand() -> None:
    # Mean 2, standard deviation 1, t(0.975, 2) = 4.30265: half = 4.30265 / sqrt(3).
    interval = statistics.t_interval([1.0, 2.0, 3.0])
    assert interval.value == 2.0
    assert interval.high - interval.value == pytest.approx(2.48414, rel=1e-5)
    assert interval.value - interval.low == pytest.approx(2.48414, rel=1e-5)
    with pytest.raises(ValueError, match="at least two"):
        statistics.t_interval([1.0])


def test_seeds_alone_are_a_paired_t_test() -> None:
    first, second = np.array([[1.0], [2.5], [4.0]]), np.array([[0.5], [1.0], [3.5]])
    found = statistics.hierarchical_difference(first, second, paired_seeds=True)
    expected = scipy.stats.ttest_rel(first[:, 0], second[:, 0])
    assert found.value == pytest.approx(2.5 / 3)
    assert found.p_value == pytest.approx(expected.pvalue)
    assert found.degrees_of_freedom == pytest.approx(2)
    assert found.effect_size is None


def test_prompts_alone_are_a_paired_bootstrap() -> None:
    generator = np.random.default_rng(1)
    first, second = generator.normal(0.3, 1, (1, 200)), generator.normal(0, 1, (1, 200))
    found = statistics.hierarchical_difference(first, second, paired_seeds=True, num_resamples=4000)
    expected = scipy.stats.ttest_rel(first[0], second[0])
    assert found.p_value == pytest.approx(expected.pvalue)
    bootstrap = scipy.stats.bootstrap((first[0] - second[0],), np.mean, method="percentile", n_resamples=4000, rng=2)
    assert found.bootstrap_low == pytest.approx(bootstrap.confidence_interval.low, abs=0.02)
    assert found.bootstrap_high == pytest.approx(bootstrap.confidence_interval.high, abs=0.02)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval()))
    differences = first[0] - second[0]
    assert found.effect_size == pytest.approx(differences.mean() / differences.std(ddof=1))


def test_unpaired_seeds_are_welchs() -> None:
    first, second = np.array([[1.0], [2.0], [4.0]]), np.array([[0.0], [0.1], [0.5], [0.2]])
    found = statistics.hierarchical_difference(first, second, paired_seeds=False, paired_prompts=False)
    expected = scipy.stats.ttest_ind(first[:, 0], second[:, 0], equal_var=False)
    assert found.p_value == pytest.approx(expected.pvalue)
    assert found.degrees_of_freedom == pytest.approx(expected.df)


def test_the_variance_of_crossed_factors_by_hand() -> None:
    # Seed means 1 and 4, prompt means 2, 2.5 and 3: the residuals are 0. V = 9/4 + 1/12.
    scores = np.array([[0.5, 1.0, 1.5], [3.5, 4.0, 4.5]])
    found = statistics.hierarchical_difference(scores, np.zeros((2, 3)), paired_seeds=True)
    assert found.value == 2.5
    assert found.standard_error == pytest.approx(math.sqrt(9 / 4 + 1 / 12))
    # A quarter of the resamples has the low seed twice: 2.5 - 1.5 sqrt(2), less what a tenth of the prompts' reaches.
    assert found.bootstrap_low == pytest.approx(0.0, abs=0.25)
    assert found.bootstrap_high == pytest.approx(5.0, abs=0.25)
    # A residual of 1 with alternating sign in every cell counts once: V_residual = 6 / 2 / 6.
    scores += np.array([[1.0, -2.0, 1.0], [-1.0, 2.0, -1.0]])
    found = statistics.hierarchical_difference(scores, np.zeros((2, 3)), paired_seeds=True)
    assert found.standard_error == pytest.approx(math.sqrt(9 / 4 + max(0.0, 1 / 12 - 12 / 2 / 6)))


@pytest.mark.parametrize(
    ("num_seeds", "seeds", "prompts", "rest", "paired"),
    [(3, 0.3, 0.0, 0.1, True), (3, 0.1, 1.0, 1.0, True), (1, 0.0, 1.0, 1.0, True), (4, 0.2, 0.5, 0.5, False)],
)
def test_intervals_cover(num_seeds: int, seeds: float, prompts: float, rest: float, paired: bool) -> None:
    generator = np.random.default_rng(3)

    def scores() -> np.ndarray:
        return generator.normal(0, seeds, (num_seeds, 1)) + generator.normal(0, rest, (num_seeds, 40))

    covered = 0
    for number in range(200):
        shared = generator.normal(0, prompts, 40)
        found = statistics.hierarchical_difference(
            0.5 + shared + scores(), scores(), paired_seeds=paired, num_resamples=10, seed=number
        )
        covered += found.low <= 0.5 <= found.high
    # 95 % of 200 is 190, its standard deviation 3.1; the residual's estimate makes some intervals wider than need be.
    assert covered >= 178


def test_a_difference_without_spread() -> None:
    found = statistics.hierarchical_difference(np.ones((2, 3)), np.zeros((2, 3)), paired_seeds=True)
    assert (found.low, found.high, found.p_value, found.effect_size) == (1.0, 1.0, 0.0, None)
    assert statistics.hierarchical_difference(np.ones((2, 3)), np.ones((2, 3)), paired_seeds=True).p_value == 1.0


@pytest.mark.parametrize(
    ("first", "second", "paired", "message"),
    [
        ([[1.0]], [[2.0]], True, "two numbers"),
        ([[1.0, 2.0]], [[2.0]], True, "paired prompts"),
        ([[1.0], [2.0]], [[2.0]], True, "paired seeds"),
        ([[math.nan, 1.0]], [[2.0, 1.0]], True, "finite"),
        ([1.0], [2.0], True, "shape"),
    ],
)
def test_what_has_no_difference(first: list[object], second: list[object], paired: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        statistics.hierarchical_difference(first, second, paired_seeds=paired)  # type: ignore[arg-type]


def test_signs_by_hand() -> None:
    # Of the eight signs of 1, 2, 3 only +++ and --- reach 6.
    assert statistics.sign_flip_p_value([1.0, 2.0, 3.0]) == 0.25
    # |sum| >= 2 of 3, -1: all four.  Of 3, 1: ++ and --.
    assert statistics.sign_flip_p_value([3.0, -1.0]) == 1.0
    assert statistics.sign_flip_p_value([3.0, 1.0]) == 0.5
    assert statistics.sign_flip_p_value([0.0] * 40) == 1.0


def test_drawn_signs_agree_with_all_signs() -> None:
    values = np.random.default_rng(0).normal(0.4, 1.0, 16)
    exact = np.mean(
        [
            abs(np.dot(signs, values)) >= abs(values.sum()) - 1e-9
            for signs in itertools.product((1.0, -1.0), repeat=values.size)
        ]
    )
    assert statistics.sign_flip_p_value(values, num_flips=20_000) == pytest.approx(exact, abs=0.012)


def test_permutations() -> None:
    # Six divisions of 1, 2, 3, 4 into pairs; {1, 2} and {3, 4} are two of them.
    assert statistics.permutation_p_value([1.0, 2.0], [3.0, 4.0]) == pytest.approx(1 / 3)
    generator = np.random.default_rng(5)
    first, second = generator.normal(0.5, 1, 30), generator.normal(0, 1, 25)
    expected = scipy.stats.permutation_test(
        (first, second), lambda a, b: np.mean(a) - np.mean(b), n_resamples=9999, rng=1
    ).pvalue
    assert statistics.permutation_p_value(first, second) == pytest.approx(expected, abs=0.015)


def test_holm_by_hand() -> None:
    # 3 * 0.01, 2 * 0.03, and 0.04 is not less than its forerunner.
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert statistics.holm([0.6, 0.5]) == [1.0, 1.0]
    assert statistics.holm([]) == []


def test_effect_of_unpaired_prompts() -> None:
    # Means 2 and 5, both variances 1.
    assert statistics.effect_size([[1.0, 2.0, 3.0]], [[4.0, 5.0, 6.0]], paired_prompts=False) == pytest.approx(-3.0)


def test_length_control_is_logistic_regression() -> None:
    generator = np.random.default_rng(7)
    differences = generator.normal(5, 20, 300)
    terms = np.tanh(differences / differences.std())
    wins = (generator.random(300) < 1 / (1 + np.exp(-(0.3 + 1.5 * terms)))).astype(float)
    wins[:20] = 0.5
    # A tie is half a win and half a loss.
    design = np.stack([np.ones(300), terms], axis=1)
    model = LogisticRegression(C=1 / RIDGE, fit_intercept=False, tol=1e-10, max_iter=1000)
    model.fit(np.concatenate([design, design]), [1] * 300 + [0] * 300, np.concatenate([wins, 1 - wins]))
    theta, phi = model.coef_[0]
    found = statistics.length_controlled_win_rate(wins, differences)
    assert found.win_rate.value == pytest.approx(1 / (1 + math.exp(-theta)), abs=1e-5)
    assert found.length_effect == pytest.approx(phi, abs=1e-4)
    assert found.win_rate.low < found.win_rate.value < found.win_rate.high


def test_length_control_takes_length_out() -> None:
    """The longer side wins nine times of ten, and one side is mostly longer: at equal length it is no better."""
    differences = np.array([10.0] * 80 + [-10.0] * 20)
    wins = np.array([1.0] * 72 + [0.0] * 8 + [1.0] * 2 + [0.0] * 18)
    found = statistics.length_controlled_win_rate(wins, differences)
    assert wins.mean() == 0.74
    # The odds are 9 to 1 and 1 to 9 at opposite lengths, so the curve through both is 1/2 in the middle.
    assert found.win_rate.value == pytest.approx(0.5, abs=0.01)
    # Without a difference of length there is nothing to take out.
    same = statistics.length_controlled_win_rate(wins, np.zeros(100))
    assert same.win_rate.value == pytest.approx(0.74, abs=1e-3)
    # Rows of one prompt stay together: two seeds of each prompt tell no more than one.
    doubled = statistics.length_controlled_win_rate(
        np.repeat(wins, 2), np.zeros(200), groups=np.repeat(np.arange(100), 2)
    )
    assert doubled.win_rate.high - doubled.win_rate.low == pytest.approx(same.win_rate.high - same.win_rate.low, 0.1)
    # Who always wins need not always win on other prompts.
    whole = statistics.length_controlled_win_rate(np.ones(100), differences)
    assert whole.win_rate == statistics.wilson(100, 100)
    assert math.isnan(whole.length_effect)
    with pytest.raises(ValueError, match="wins in"):
        statistics.length_controlled_win_rate([1.2], [0.0])
    with pytest.raises(ValueError, match="for each win"):
        statistics.length_controlled_win_rate([1.0], [0.0, 1.0])


def test_lengths_that_never_meet_tell_nothing() -> None:
    """Who is the longer one every time may win by it or not: a rate at equal lengths is beyond what was seen."""
    wins = np.array([1.0, 0.0] * 20)
    longer = np.linspace(1.0, 9.0, 40)
    assert statistics.length_controlled_win_rate(wins, longer).extrapolated
    assert statistics.length_controlled_win_rate(wins, -longer).extrapolated
    assert statistics.length_controlled_win_rate(np.ones(40), longer).extrapolated
    for lengths in (longer - 5.0, longer - 1.0, np.zeros(40)):
        assert not statistics.length_controlled_win_rate(wins, lengths).extrapolated


def test_the_sides_of_length_control_are_mirrored() -> None:
    lengths = np.array([5.0, -2.0, 8.0, 1.0, -7.0, 3.0] * 10)
    wins = np.array([1.0, 0.0, 1.0, 0.0, 0.5, 1.0] * 10)
    ours = statistics.length_controlled_win_rate(wins, lengths)
    theirs = statistics.length_controlled_win_rate(1 - wins, -lengths)
    assert ours.win_rate.value + theirs.win_rate.value == pytest.approx(1.0)
    # Longer responses win here, whoever wrote them.
    assert ours.length_effect == pytest.approx(theirs.length_effect)
    assert ours.length_effect > 0


def test_ratings_by_hand() -> None:
    # Odds of 300 to 100, with half a prior game's tenth on both sides: 400 log10(300.05 / 100.05).
    strong, weak = statistics.bradley_terry([[0.0, 300.0], [100.0, 0.0]])
    half = PRIOR_GAMES / 2
    assert strong - weak == pytest.approx(400 * math.log10((300 + half) / (100 + half)), rel=1e-6)
    assert strong + weak == pytest.approx(0.0, abs=1e-9)


def test_ratings_are_the_maximum_of_the_likelihood() -> None:
    wins = np.array([[0.0, 12.0, 30.0], [8.0, 0.0, 15.0], [2.0, 9.0, 0.0]])
    prior = PRIOR_GAMES / 2 * (1 - np.eye(3))
    ratings = np.array(statistics.bradley_terry(wins))

    def likelihood(values: np.ndarray) -> float:
        return float(sum((wins + prior) * -np.log1p(10 ** ((values[None, :] - values[:, None]) / 400)))[:].sum())

    best = likelihood(ratings)
    for index, step in itertools.product(range(3), (-1.0, 1.0)):
        assert likelihood(ratings + step * np.eye(3)[index]) < best


@pytest.mark.parametrize(
    "pairs",
    [
        {(0, 1): 60, (1, 0): 40, (2, 3): 1000},  # two islands that never met
        {(0, 1): 100, (1, 2): 100, (2, 3): 100},  # a chain in which each always wins
        {(0, 1): 1e6, (0, 2): 1e6, (0, 3): 1e6},
    ],
)
def test_ratings_of_methods_that_never_met(pairs: dict[tuple[int, int], float]) -> None:
    """At the maximum each method's expected wins are those that it has, the prior's games included."""
    counts = PRIOR_GAMES / 2 * (1 - np.eye(4))
    for pair, wins in pairs.items():
        counts[pair] += wins
    ratings = np.array(statistics.bradley_terry(counts - PRIOR_GAMES / 2 * (1 - np.eye(4))))
    expected = (counts + counts.T) / (1 + 10 ** ((ratings[None, :] - ratings[:, None]) / 400))
    assert expected.sum(axis=1) == pytest.approx(counts.sum(axis=1), rel=1e-9, abs=1e-9)


def test_rating_intervals() -> None:
    outcomes = np.zeros((60, 2, 2))
    outcomes[:40, 0, 1], outcomes[40:, 1, 0] = 1.0, 1.0
    first, second = statistics.rating_intervals(outcomes)
    assert first.value == pytest.approx(-second.value)
    assert first.low < first.value < first.high
    # The share of wins is 2/3 with standard error 0.061, so the odds' logarithm has one of 0.274: 23.8 points each.
    assert first.high - first.low == pytest.approx(2 * 1.96 * 23.8, rel=0.15)
    with pytest.raises(ValueError, match="shape"):
        statistics.rating_intervals(np.zeros((2, 2)))
    with pytest.raises(ValueError, match="square"):
        statistics.bradley_terry([[0.0, 1.0]])
