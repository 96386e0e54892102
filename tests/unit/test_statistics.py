"""Intervals: published values, hand-worked values, and coverage by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rlhf.statistics.intervals import Interval, bootstrap_difference, bootstrap_mean, wilson, win_rate


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    [
        # Newcombe (1998), Statistics in Medicine 17, table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_gives_the_published_intervals(successes: int, count: int, low: float, high: float) -> None:
    interval = wilson(successes, count)
    assert interval.value == successes / count
    assert (round(interval.low, 4), round(interval.high, 4)) == (low, high)


def test_wilson_ends_solve_the_score_equation() -> None:
    interval = wilson(37, 60, confidence=0.9)
    for end in (interval.low, interval.high):
        assert abs(37 / 60 - end) / math.sqrt(end * (1 - end) / 60) == pytest.approx(1.6448536, abs=1e-6)


def test_wilson_is_symmetric_and_stays_within_0_and_1() -> None:
    low, high = wilson(0, 7), wilson(7, 7)
    assert (low.low, high.high) == (0.0, 1.0)
    assert low.high == pytest.approx(1 - high.low)
    assert wilson(2.5, 5).value == 0.5


def test_wilson_covers_about_as_often_as_it_says() -> None:
    generator = np.random.Generator(np.random.PCG64(0))
    for share in (0.1, 0.5, 0.8):
        draws = generator.binomial(100, share, size=4000)
        intervals = [wilson(int(draw), 100) for draw in draws]
        assert np.mean([i.low <= share <= i.high for i in intervals]) == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize(("successes", "count"), [(0, 0), (-1, 5), (6, 5), (math.nan, 5)])
def test_wilson_refuses_what_is_no_share(successes: float, count: int) -> None:
    with pytest.raises(ValueError, match="successes"):
        wilson(successes, count)


def test_win_rate_counts_a_tie_as_half() -> None:
    interval = win_rate([3.0, 2.0, 1.0, 0.0], [1.0, 2.0, 0.0, 5.0])
    assert interval.value == 2.5 / 4
    assert interval == wilson(2.5, 4)


def test_win_rate_of_a_model_against_itself_is_one_half() -> None:
    assert win_rate([1.0] * 50, [1.0] * 50).value == 0.5


def test_win_rate_covers_at_least_as_often_as_it_says_with_ties() -> None:
    generator = np.random.Generator(np.random.PCG64(1))
    outcomes = generator.choice([1.0, 0.0, -1.0], p=[0.6, 0.2, 0.2], size=(2000, 200))
    intervals = [win_rate(list(row), [0.0] * 200) for row in outcomes]
    assert 0.95 <= np.mean([i.low <= 0.7 <= i.high for i in intervals]) <= 0.99


def test_win_rate_refuses_unequal_numbers() -> None:
    with pytest.raises(ValueError, match="2 and 1"):
        win_rate([1.0, 2.0], [1.0])


def test_bootstrap_of_two_values_by_hand() -> None:
    # Of the resamples of (0, 1), a quarter has mean 0, a half 1/2, a quarter 1.
    wide = bootstrap_mean([0.0, 1.0], confidence=0.95)
    assert wide == Interval(0.5, 0.0, 1.0)
    assert bootstrap_mean([0.0, 1.0], confidence=0.4) == Interval(0.5, 0.5, 0.5)


def test_bootstrap_matches_the_normal_interval_of_a_large_sample() -> None:
    sample = np.random.Generator(np.random.PCG64(2)).normal(3.0, 2.0, size=2000)
    interval = bootstrap_mean(sample.tolist(), num_resamples=4000)
    half = 1.959964 * sample.std() / math.sqrt(2000)
    assert interval.value == pytest.approx(sample.mean())
    assert interval.low == pytest.approx(sample.mean() - half, abs=0.01)
    assert interval.high == pytest.approx(sample.mean() + half, abs=0.01)


def test_bootstrap_covers_about_as_often_as_it_says() -> None:
    generator = np.random.Generator(np.random.PCG64(3))
    hits = []
    for number in range(400):
        interval = bootstrap_mean(generator.exponential(size=80).tolist(), num_resamples=400, seed=number)
        hits.append(interval.low <= 1.0 <= interval.high)
    assert 0.89 <= np.mean(hits) <= 0.98


def test_bootstrap_is_decided_by_its_seed() -> None:
    values = [0.1, 0.7, 0.3, 2.0, 1.5]
    assert bootstrap_mean(values, seed=1) == bootstrap_mean(values, seed=1)
    assert bootstrap_mean(values, seed=1, num_resamples=50) != bootstrap_mean(values, seed=2, num_resamples=50)


def test_bootstrap_of_equal_values_is_a_point() -> None:
    assert bootstrap_mean([0.1] * 7) == Interval(0.1, 0.1, 0.1)


def test_bootstrap_in_blocks_equals_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.Generator(np.random.PCG64(4)).normal(size=50).tolist()
    whole = bootstrap_mean(values, num_resamples=300)
    monkeypatch.setattr("rlhf.statistics.intervals._BLOCK", 50 * 7)
    assert bootstrap_mean(values, num_resamples=300) == whole


def test_paired_difference_uses_the_pairs() -> None:
    generator = np.random.Generator(np.random.PCG64(5))
    common = generator.normal(scale=10.0, size=300)
    better = common + 1.0 + generator.normal(scale=0.1, size=300)
    paired = bootstrap_difference(better.tolist(), common.tolist())
    assert paired.value == pytest.approx(1.0, abs=0.03)
    assert paired.high - paired.low < 0.05
    with pytest.raises(ValueError, match="2 and 1"):
        bootstrap_difference([1.0, 2.0], [1.0])


@pytest.mark.parametrize("values", [[], [math.nan], [1.0, math.inf]])
def test_values_that_have_no_mean_are_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="finite"):
        bootstrap_mean(values)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0])
def test_confidence_is_a_share(confidence: float) -> None:
    with pytest.raises(ValueError, match="confidence"):
        wilson(1, 2, confidence=confidence)
    with pytest.raises(ValueError, match="confidence"):
        bootstrap_mean([1.0], confidence=confidence)


def test_interval_as_json() -> None:
    assert Interval(0.5, 0.25, 0.75).to_json() == {"value": 0.5, "low": 0.25, "high": 0.75}
