"""Bradley-Terry ratings: one number a method from who beats whom."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlhf.statistics.intervals import Interval
from rlhf.statistics.length_control import sigmoid

Array = NDArray[np.float64]
# A difference of 400 points is odds of ten to one, as in chess.
POINTS = 400 / math.log(10)
# So many games, half of them won, that each method is taken to have played with each other one.
PRIOR_GAMES = 0.1
_STEPS = 200


def bradley_terry(wins: ArrayLike) -> list[float]:
    """Ratings of K methods from `wins` (K, K): how often the row beats the column, a tie counting half for both.

    P(i beats j) = 1 / (1 + 10^((r_j - r_i) / 400)); the ratings' mean is 0. Maximum likelihood (Bradley and Terry
    1952), with a tenth of a game, half won, between any two: a method that never lost has a finite rating, and so have
    methods that never met. Raises `ValueError` for another shape or negative numbers.
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
    """Ratings (R, K) of matrices of wins (R, K, K), by damped Newton steps on the log-likelihood, which is concave."""
    num_methods = wins.shape[1]
    diagonal = np.arange(num_methods)
    counts = wins + PRIOR_GAMES / 2
    counts[:, diagonal, diagonal] = 0.0
    games, won = counts + counts.transpose(0, 2, 1), counts.sum(axis=2)
    strengths = np.zeros_like(won)
    for _ in range(_STEPS):
        expected = sigmoid(strengths[:, :, None] - strengths[:, None, :])
        information = games * expected * (1 - expected)
        curvature = -information
        curvature[:, diagonal, diagonal] = information.sum(axis=2)
        # Adding a constant to all strengths changes nothing; the ones keep their sum where it is.
        curvature += curvature[:, diagonal, diagonal].mean(axis=1)[:, None, None]
        step = np.linalg.solve(curvature, (won - (games * expected).sum(axis=2))[..., None])[..., 0]
        # Far from the optimum the parabola is a bad guide.
        step *= np.minimum(1.0, 2.0 / np.maximum(np.abs(step).max(axis=1, keepdims=True), 1e-12))
        strengths += step
        if float(np.abs(step).max()) < 1e-10:
            break
    ratings: Array = POINTS * (strengths - strengths.mean(axis=1, keepdims=True))
    return ratings
