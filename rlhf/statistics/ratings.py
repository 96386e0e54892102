"""Bradley-Terry ratings: one number a method from who beats whom."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlhf.statistics.intervals import Interval

Array = NDArray[np.float64]
# A difference of 400 points is odds of ten to one, as in chess.
POINTS = 400 / math.log(10)
# So many games, half of them won, that each method is taken to have played with each other one.
PRIOR_GAMES = 0.1


def bradley_terry(wins: ArrayLike) -> list[float]:
    """Ratings of K methods from `wins` (K, K): how often the row beats the column, a tie counting half for both.

    P(i beats j) = 1 / (1 + 10^((r_j - r_i) / 400)); the ratings' mean is 0. Maximum likelihood (Bradley and Terry 1952)
    by the MM algorithm of Hunter (2004), with a tenth of a game, half won, between any two: a method that
    never lost has a finite rating. Raises `ValueError` for another shape or negative numbers.
    """
    counts = np.asarray(wins, dtype=np.float64)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1] or counts.shape[0] < 2 or not (counts >= 0).all():
        raise ValueError(f"ratings need a square matrix of wins, none negative; got shape {counts.shape}")
    return [float(rating) for rating in _ratings(counts[None])[0]]


def rating_intervals(
    outcomes: ArrayLike, *, confidence: float = 0.95, num_resamples: int = 500, seed: int = 0
) -> list[Interval]:
    """Ratings with percentile bootstrap intervals over prompts.

    `outcomes` (P, K, K) holds the wins of row over column on each prompt, the seeds' mean; the diagonal is ignored.
    """
    array = np.asarray(outcomes, dtype=np.float64)
    if array.ndim != 3 or array.shape[1] != array.shape[2] or array.shape[0] == 0:
        raise ValueError(f"rating intervals need outcomes of shape (prompts, methods, methods); got {array.shape}")
    values = bradley_terry(array.sum(axis=0))
    generator = np.random.Generator(np.random.PCG64(seed))
    num_prompts = array.shape[0]
    counts = generator.multinomial(num_prompts, np.full(num_prompts, 1 / num_prompts), size=num_resamples)
    draws = _ratings(np.tensordot(counts.astype(np.float64), array, axes=1))
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return [
        Interval(value, min(value, float(below)), max(value, float(above)))
        for value, below, above in zip(values, low, high, strict=True)
    ]


def _ratings(wins: Array) -> Array:
    """Ratings (R, K) of matrices of wins (R, K, K)."""
    num_methods = wins.shape[1]
    counts = wins + PRIOR_GAMES / 2
    counts[:, np.arange(num_methods), np.arange(num_methods)] = 0.0
    games, won = counts + counts.transpose(0, 2, 1), counts.sum(axis=2)
    strengths = np.ones_like(won)
    for _ in range(10_000):
        expected = (games / (strengths[:, :, None] + strengths[:, None, :])).sum(axis=2)
        improved = won / expected
        improved /= np.exp(np.log(improved).mean(axis=1, keepdims=True))
        change = float(np.abs(np.log(improved / strengths)).max())
        strengths = improved
        if change < 1e-10:
            break
    ratings: Array = POINTS * np.log(strengths)
    return ratings
