"""Best-of-n sampling: its KL divergence, and what it earns, estimated without bias from N >= n samples of a prompt.

numpy only. `n` is the number of responses among which the best by the proxy reward is taken, N the number drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlhf.statistics.intervals import Interval, bootstrap_mean

Array = NDArray[np.float64]


def best_of_n_kl(n: int) -> float:
    """log n - (n - 1) / n, in nats: the KL divergence of best-of-n from the policy that is sampled.

    Exact where no two samples can score the same, such as scores with a density (Stiennon et al. 2020, appendix G.3;
    Hilton and Gao 2022). An upper bound for a discrete distribution, as a language model's is, where the same response,
    or one with an equal score, may be drawn twice (Beirami et al. 2024, theorem 1). The bound is close while every
    likely response has a probability far below 1/n. `discrete_best_of_n_kl` is exact for a known distribution. Raises
    `ValueError` for n < 1.
    """
    if n < 1:
        raise ValueError(f"best-of-n needs n >= 1, not {n}")
    return math.log(n) - (n - 1) / n


def discrete_best_of_n_kl(probabilities: ArrayLike, scores: ArrayLike, n: int) -> float:
    """The exact KL divergence, in nats, of best-of-n over finitely many responses, ties broken by chance.

    `probabilities` and `scores`, shape (num_responses,): what the policy gives each response and the proxy reward. The
    responses of one score have, under best-of-n, the mass F^n - (F - p)^n together, p being their mass and F that of
    all scores up to theirs, shared out in proportion (Beirami et al. 2024, lemma 1, with ties). Raises `ValueError` for
    n < 1, for shapes that differ, and for probabilities that are negative or do not add up to 1.
    """
    mass, level = _array(probabilities, 1, "probabilities"), _array(scores, 1, "scores")
    if n < 1:
        raise ValueError(f"best-of-n needs n >= 1, not {n}")
    if mass.shape != level.shape:
        raise ValueError(f"{mass.size} probabilities, but {level.size} scores")
    if (mass < 0).any() or abs(float(mass.sum()) - 1) > 1e-9:
        raise ValueError(f"probabilities are >= 0 and add up to 1; their sum is {float(mass.sum())}")
    _, index = np.unique(level, return_inverse=True)
    levels = np.bincount(index, weights=mass)
    above = np.minimum(np.cumsum(levels), 1.0)
    chosen = above**n - np.concatenate([[0.0], above[:-1]]) ** n
    # Within a score the two distributions are in proportion, so the divergence is that of the scores.
    kept = chosen > 0
    return float(np.sum(chosen[kept] * np.log(chosen[kept] / levels[kept])))


def best_of_n_weights(num_samples: int, n: int) -> Array:
    """The probability, shape (num_samples,), that the k-th smallest of N samples is the largest of n of them.

    C(k - 1, n - 1) / C(N, n) for k = 1 … N (Gao et al. 2023, appendix I), by the ratio of neighbours from n / N
    downwards, so that no binomial coefficient is ever computed. They add up to 1. Raises `ValueError` unless
    1 <= n <= N.
    """
    if not 1 <= n <= num_samples:
        raise ValueError(f"best of n needs 1 <= n <= {num_samples}, the number of samples; got n = {n}")
    ranks = np.arange(num_samples, 1, -1, dtype=np.float64)
    # C(k - 2, n - 1) / C(k - 1, n - 1) = (k - n) / (k - 1), which is 0 from k = n downwards.
    ratios = np.maximum(ranks - n, 0.0) / (ranks - 1)
    return (n / num_samples) * np.concatenate([[1.0], np.cumprod(ratios)])[::-1]


def best_of_n_rewards(proxy: ArrayLike, rewards: ArrayLike, sizes: Sequence[int]) -> Array:
    """The expected reward of the proxy's favourite among n samples, shape (num_prompts, len(sizes)), without bias.

    `proxy` and `rewards`, shape (num_prompts, N): the scores by which the best is taken, and what is measured of it
    (the gold reward, or the proxy itself). Each number is the average over all C(N, n) subsets of a prompt's samples,
    computed exactly (Gao et al. 2023, appendix I). Samples with equal proxy scores share their ranks' weights
    evenly, which is a choice among them by chance. Raises `ValueError` for shapes that differ, numbers that are not
    finite and an n beyond N.
    """
    scores, values = _array(proxy, 2, "proxy"), _array(rewards, 2, "rewards")
    if scores.shape != values.shape:
        raise ValueError(f"proxy has shape {scores.shape}, but rewards {values.shape}")
    weights = np.stack([best_of_n_weights(scores.shape[1], n) for n in sizes])
    result = np.empty((scores.shape[0], len(sizes)))
    for row, (score, value) in enumerate(zip(scores, values, strict=True)):
        order = np.argsort(score, kind="stable")
        _, starts, counts = np.unique(score[order], return_index=True, return_counts=True)
        # The mean reward of each group of equal scores, weighted by what the group's ranks have together.
        means = np.add.reduceat(value[order], starts) / counts
        result[row] = np.add.reduceat(weights, starts, axis=1) @ means
    return result


@dataclass(frozen=True)
class BestOfNPoint:
    """Best-of-n for one n: its KL divergence in nats (`best_of_n_kl`) and mean rewards over prompts, with intervals."""

    n: int
    kl: float
    proxy: Interval
    gold: Interval

    @property
    def distance(self) -> float:
        """The square root of the KL divergence: the d of Gao et al. (2023)."""
        return math.sqrt(self.kl)

    def to_json(self) -> dict[str, Any]:
        """Plain values, `distance` included."""
        rewards = {"proxy": self.proxy.to_json(), "gold": self.gold.to_json()}
        return {"n": self.n, "kl": self.kl, "distance": self.distance, **rewards}


def best_of_n_curve(
    proxy: ArrayLike,
    gold: ArrayLike,
    sizes: Sequence[int],
    *,
    confidence: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> list[BestOfNPoint]:
    """Proxy and gold reward of best-of-n for each n of `sizes`, with bootstrap intervals over prompts.

    `proxy` and `gold`, shape (num_prompts, N). The intervals say how far other prompts would have moved the mean; that
    other samples of the same prompts would have moved it too is part of that, since each prompt brings its own. Errors
    as in `best_of_n_rewards`.
    """
    points = []
    scored = best_of_n_rewards(proxy, proxy, sizes)
    earned = best_of_n_rewards(proxy, gold, sizes)
    for column, n in enumerate(sizes):
        by_proxy, by_gold = (
            bootstrap_mean(values[:, column].tolist(), confidence=confidence, num_resamples=num_resamples, seed=seed)
            for values in (scored, earned)
        )
        points.append(BestOfNPoint(n, best_of_n_kl(n), by_proxy, by_gold))
    return points


def _array(values: ArrayLike, dimensions: int, name: str) -> Array:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != dimensions or array.size == 0 or not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite numbers in {dimensions} dimension(s); got shape {array.shape}")
    return array
