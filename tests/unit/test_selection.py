"""Choosing what to ask, on pools small enough to work out by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from rlhf.preferences.selection import (
    all_pairs,
    best_worst_pairs,
    by_worth,
    candidate_points,
    choose,
    disagreement,
    distinct,
    farthest_points,
    score_gaps,
)

TEXTS = ["a", "b", "a", "c", "d", "d"]
GROUPS = [[0, 1, 2], [3, 4, 5]]


def test_a_pair_never_has_one_text_twice() -> None:
    assert distinct([0, 1, 2], TEXTS) == [0, 1]
    assert all_pairs(GROUPS, TEXTS) == [(0, 1), (1, 2), (3, 4), (3, 5)]


def test_best_against_worst_of_each_group() -> None:
    scores = np.array([0.5, -1.0, 2.0, 3.0, 1.0, 3.0])
    # Of group 1 the responses 3 and 5 are equally good: the first counts.
    assert best_worst_pairs(GROUPS, TEXTS, scores) == [(1, 2), (3, 4)]
    assert best_worst_pairs([[4, 5]], TEXTS, scores) == []
    assert best_worst_pairs([[0, 2, 1]], TEXTS, np.zeros(3)) == []


def test_score_gaps_are_means_over_a_candidates_pairs() -> None:
    scores = np.array([0.0, 3.0, -1.0, 1.0])
    # Of 0, 3, -1 and 1 the gaps are 3, 1, 1, 4, 2 and 2.
    assert score_gaps([(0, 1), (1, 2), (0, 1, 2, 3), (2,)], scores).tolist() == [3.0, 4.0, 13 / 6, 0.0]


def test_disagreement_is_the_variance_of_the_members_preference() -> None:
    # P(0 over 1) by the members: sigmoid(ln 3) = 3/4 and sigmoid(-ln 3) = 1/4, of variance 1/16.
    members = np.array([[math.log(3), 0.0, 0.0], [0.0, math.log(3), 0.0]])
    # P(0 over 2) = 3/4 and 1/2, of variance 1/64; P(1 over 2) = 1/2 and 3/4, likewise.
    found = disagreement([(0, 1), (0, 2), (0, 1, 2)], members)
    assert found == pytest.approx([1 / 16, 1 / 64, (1 / 16 + 1 / 64 + 1 / 64) / 3])
    assert disagreement([(0,), (2,)], members) == pytest.approx([math.log(3) ** 2 / 4, 0.0])
    # Members of one mind do not disagree, however strongly they feel; the most that two can is 1/4.
    assert disagreement([(0, 1)], np.array([[9.0, 0.0], [9.0, 0.0]])).tolist() == [0.0]
    assert disagreement([(0, 1)], np.array([[900.0, 0.0], [-900.0, 0.0]])).tolist() == [0.25]


def test_farthest_points_of_a_line() -> None:
    # The mean of 0, 1, 2, 10 and 12 is 5: 2 is nearest. From it 12 is farthest (10), then 0 (2) and 10 (2), then 1.
    points = np.array([[0.0], [1.0], [2.0], [10.0], [12.0]])
    assert farthest_points(points, 4) == [(2, None), (4, 10.0), (0, 2.0), (3, 2.0)]
    assert [number for number, _ in farthest_points(points, 9)] == [2, 4, 0, 3, 1]
    assert farthest_points(points, 0) == []


def test_equal_points_are_chosen_once() -> None:
    found = farthest_points(np.zeros((3, 2)), 3)
    assert sorted(number for number, _ in found) == [0, 1, 2]


def test_the_farthest_points_cover_at_most_twice_as_badly_as_the_best_choice() -> None:
    points = np.random.Generator(np.random.PCG64(3)).normal(size=(9, 2))
    distances = np.linalg.norm(points[:, None] - points[None], axis=2)

    def radius(centers: tuple[int, ...]) -> float:
        return float(distances[:, list(centers)].min(axis=1).max())

    best = min(radius(centers) for centers in itertools.combinations(range(9), 3))
    assert best <= radius(tuple(number for number, _ in farthest_points(points, 3))) <= 2 * best


def test_the_points_of_a_candidate_are_the_mean_of_its_responses() -> None:
    embeddings = np.array([[0.0, 4.0], [2.0, 0.0], [9.0, 9.0]])
    assert candidate_points([(0, 1), (2,)], embeddings).tolist() == [[1.0, 2.0], [9.0, 9.0]]


def test_chance_decides_between_equal_worth() -> None:
    assert by_worth(np.array([1.0, 3.0, 1.0, 3.0]), np.array([0.9, 0.8, 0.1, 0.2])) == [3, 1, 2, 0]
    with pytest.raises(ValueError, match="candidate 1 has the worth nan"):
        by_worth(np.array([1.0, math.nan]), np.array([0.1, 0.2]))


def test_the_budget_goes_to_the_strategy_and_its_share_to_chance() -> None:
    shuffle = np.array([0.5, 0.1, 0.2, 0.9, 0.3, 0.4])
    scores: dict[int, float | None] = {number: float(number) for number in range(6)}
    chosen = choose("near_tie", [5, 4, 3, 2, 1, 0], scores, shuffle, 4, random_share=0.5)
    # 5 and 4 by the order; of the rest 1 and 2 have the smallest random numbers.
    assert [(item.candidate, item.strategy, item.score) for item in chosen] == [
        (1, "random", 1.0),
        (2, "random", 2.0),
        (4, "near_tie", 4.0),
        (5, "near_tie", 5.0),
    ]


def test_random_takes_the_smallest_numbers_and_everything_when_there_is_enough() -> None:
    shuffle = np.array([0.5, 0.1, 0.2])
    assert [item.candidate for item in choose("random", [], {}, shuffle, 2)] == [1, 2]
    everything = choose("random", [], {}, shuffle, 5)
    assert [(item.candidate, item.strategy, item.score) for item in everything] == [
        (0, "random", None),
        (1, "random", None),
        (2, "random", None),
    ]


def test_chance_makes_up_for_an_order_that_is_too_short() -> None:
    chosen = choose("best_worst", [2], {2: 7.0}, np.array([0.3, 0.2, 0.1, 0.4]), 3)
    assert [(item.candidate, item.strategy) for item in chosen] == [(0, "random"), (1, "random"), (2, "best_worst")]
