"""Choosing what to ask: which pairs, rankings or single responses of a pool are worth a label. Pure functions.

A pool has N responses in groups, each the responses to one prompt that were sampled together. A candidate is a tuple of
positions in the pool. A strategy puts candidates into an order, and `choose` spends the budget along it. Candidates of
equal worth are told apart by random numbers of the caller, never by their place in the pool.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from rlhf.records import PromptContent

Floats = npt.NDArray[np.float64]
Candidate = tuple[int, ...]
Strategy = Literal["random", "best_worst", "near_tie", "disagreement", "diversity"]


class MemberScorer(Protocol):
    """One reward model, or the members of an ensemble."""

    def member_scores(self, prompts: Sequence[PromptContent], responses: Sequence[str]) -> Floats:
        """The scores of N responses by each of M members, shape (M, N)."""


@dataclass(frozen=True)
class Chosen:
    """A candidate to ask about, by its number; `strategy` chose it and gave it `score`, None where it gives none."""

    candidate: int
    strategy: Strategy
    score: float | None


def distinct(group: Sequence[int], texts: Sequence[str]) -> list[int]:
    """The positions of a group without those whose text an earlier one has."""
    first: dict[str, int] = {}
    for position in group:
        first.setdefault(texts[position], position)
    return list(first.values())


def all_pairs(groups: Sequence[Sequence[int]], texts: Sequence[str]) -> list[Candidate]:
    """Every pair of a group, in order; equal texts leave nothing to prefer and are left out."""
    return [
        (first, second) for group in groups for first, second in combinations(group, 2) if texts[first] != texts[second]
    ]


def best_worst_pairs(groups: Sequence[Sequence[int]], texts: Sequence[str], scores: Floats) -> list[Candidate]:
    """The best and the worst response of each group by `scores` (N,), in the order in which they were sampled.

    Of equal scores the first counts as the better one. A group of equal texts gives none.
    """
    pairs: list[Candidate] = []
    for group in groups:
        best = max(group, key=lambda position: (scores[position], -position))
        worst = min(group, key=lambda position: (scores[position], -position))
        if texts[best] != texts[worst]:
            pairs.append((min(best, worst), max(best, worst)))
    return pairs


def score_gaps(candidates: Sequence[Candidate], scores: Floats) -> Floats:
    """Mean absolute difference of `scores` (N,) over the pairs of each candidate (C,); 0 for a single response."""
    return np.array([_mean([abs(scores[a] - scores[b]) for a, b in combinations(c, 2)]) for c in candidates])


def disagreement(candidates: Sequence[Candidate], members: Floats) -> Floats:
    """Variance over the M members of P(a over b) = sigmoid(s_a - s_b), the mean over a candidate's pairs (C,).

    `members` (M, N) are the scores of an ensemble. Christiano et al. 2017, "Deep reinforcement learning from human
    preferences", section 2.2.4. The variance is the biased one, between 0 and 1/4. A single response has no pair: its
    number is the variance of its score.
    """
    return np.array([_pair_variance(candidate, members) for candidate in candidates])


def farthest_points(points: Floats, budget: int, *, chosen: Sequence[int] = ()) -> list[tuple[int, float | None]]:
    """k-center greedy: `budget` rows of `points` (C, D), each the farthest from those before, with its distance.

    Gonzalez 1985; as active learning Sener and Savarese 2018, "Active learning for convolutional neural networks: a
    core-set approach", algorithm 1. Rows that are `chosen` already come before all others and are not among those that
    are found. Without any the first is the row nearest to the mean of all, without a distance; of equally far rows the
    first counts. The largest distance that is left at the end is at most twice the smallest possible.
    """
    if budget <= 0 or len(points) == 0:
        return []
    found: list[tuple[int, float | None]] = []
    centers = list(chosen)
    if not centers:
        centers = [int(np.argmin(np.linalg.norm(points - points.mean(axis=0), axis=1)))]
        found.append((centers[0], None))
    nearest = np.full(len(points), np.inf)
    for center in centers:
        nearest = np.minimum(nearest, np.linalg.norm(points - points[center], axis=1))
    nearest[centers] = -np.inf
    while len(found) < budget and nearest.max() > -np.inf:
        farthest = int(np.argmax(nearest))
        found.append((farthest, float(nearest[farthest])))
        nearest = np.minimum(nearest, np.linalg.norm(points - points[farthest], axis=1))
        nearest[farthest] = -np.inf
    return found


def by_worth(worth: Floats, shuffle: Floats) -> list[int]:
    """The candidates from the largest `worth` (C,) to the smallest; of equal ones that with the smaller `shuffle` (C,).

    Raises `ValueError` for a worth that is not finite: a reward model gave no number.
    """
    if not np.isfinite(worth).all():
        raise ValueError(f"candidate {int(np.argmin(np.isfinite(worth)))} has the worth {worth.min()}")
    order: list[int] = np.lexsort((shuffle, -worth)).tolist()
    return order


def choose(
    strategy: Strategy,
    order: Sequence[int],
    scores: Mapping[int, float | None],
    shuffle: Floats,
    budget: int,
    *,
    random_share: float = 0.0,
) -> list[Chosen]:
    """`budget` of the C candidates, or all when there are fewer, by number.

    Of the budget, `random_share` (rounded) is drawn at random from what is left when the strategy has taken the first
    of its `order`; where the order is shorter, chance makes up for it. `shuffle` (C,) are random numbers: the smallest
    go first. `scores` are recorded with those that chance chose as well, so that the two can be compared.
    """
    budget = min(budget, len(shuffle))
    taken = list(order[: budget - round(random_share * budget)])
    rest = sorted(set(range(len(shuffle))) - set(taken), key=lambda number: (shuffle[number], number))
    drawn = rest[: budget - len(taken)]
    named: list[tuple[int, Strategy]] = [*((number, strategy) for number in taken), *((n, "random") for n in drawn)]
    return [Chosen(number, name, scores.get(number)) for number, name in sorted(named)]


def candidate_points(candidates: Sequence[Candidate], embeddings: Floats) -> Floats:
    """The mean of the embeddings (N, D) of each candidate's responses (C, D)."""
    return np.array([embeddings[list(candidate)].mean(axis=0) for candidate in candidates])


def _pair_variance(candidate: Candidate, members: Floats) -> float:
    if len(candidate) == 1:
        return float(members[:, candidate[0]].var())
    # tanh does not overflow, however large the difference.
    differences = [members[:, a] - members[:, b] for a, b in combinations(candidate, 2)]
    return _mean([float((0.5 * (1.0 + np.tanh(0.5 * difference))).var()) for difference in differences])


def _mean(values: Sequence[float]) -> float:
    return float(sum(values) / len(values)) if values else 0.0
