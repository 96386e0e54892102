"""Estimates over seeds, against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest

from rlhf.studies.seeds import Estimate, mean_of, over_seeds


def test_three_samples_by_hand() -> None:
    # Mean 2, sample variance ((-1)^2 + 0 + 1) / 2 = 1, so 4.303 * sqrt(1 / 3).
    estimate = mean_of([1.0, 2.0, 3.0])
    assert estimate.value == 2.0
    assert estimate.high - 2.0 == pytest.approx(4.303 / math.sqrt(3))
    assert 2.0 - estimate.low == pytest.approx(4.303 / math.sqrt(3))


def test_one_sample_has_no_interval_of_its_own() -> None:
    assert mean_of([3.0]) == Estimate(3.0, -math.inf, math.inf, (3.0,))
    with pytest.raises(ValueError, match="at least one sample"):
        mean_of([])


def test_one_result_keeps_the_interval_it_came_with() -> None:
    assert over_seeds([{"value": 0.5, "low": 0.4, "high": 0.6}]) == Estimate(0.5, 0.4, 0.6, (0.5,))
    assert over_seeds([{"value": 1.0, "low": 0.9, "high": 1.1}, 3.0]).value == 2.0


def test_a_missing_result_is_not_a_number() -> None:
    assert math.isnan(over_seeds([1.0, None]).value)
    assert math.isnan(over_seeds([]).value)


def test_differences_are_paired_by_seed() -> None:
    # Both vary much, their difference does not at all.
    first, second = mean_of([1.0, 5.0, 9.0]), mean_of([0.5, 4.5, 8.5])
    difference = first.minus(second)
    assert (difference.value, difference.low, difference.high) == (0.5, 0.5, 0.5)


def test_differences_of_single_seeds_add_variances() -> None:
    difference = Estimate(1.0, 0.7, 1.3, (1.0,)).minus(Estimate(0.0, -0.4, 0.4, (0.0,)))
    assert difference.low == pytest.approx(0.5)
    assert difference.high == pytest.approx(1.5)
