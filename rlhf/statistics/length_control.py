"""Win rates that length cannot buy: what the win rate would be, were both responses equally long."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlhf.statistics.intervals import Interval, wilson

Array = NDArray[np.float64]
# A weak normal prior (variance 1 / RIDGE) on both parameters: a side that always wins, or always when it is longer,
# has finite ones.
RIDGE = 0.01
_STEPS = 60


@dataclass(frozen=True)
class LengthControlled:
    """The length-controlled win rate with its interval, and the log-odds that a longer response earns.

    `length_effect` is the coefficient of tanh(length difference / its standard deviation); NaN where one side won all.
    With `extrapolated` one side was the longer one every time: nothing was seen near equal lengths, so what the win
    rate would be there is not in the data.
    """

    win_rate: Interval
    length_effect: float
    extrapolated: bool = False


def length_controlled_win_rate(
    wins: ArrayLike,
    length_differences: ArrayLike,
    *,
    confidence: float = 0.95,
    num_resamples: int = 500,
    seed: int = 0,
    groups: ArrayLike | None = None,
) -> LengthControlled:
    """The win rate with the effect of length taken out (Dubois et al., arXiv 2404.04475, section 3).

    `wins` (N,) are 1 for a win, 0.5 for a tie, 0 for a loss, or a judge's probabilities; `length_differences` (N,) are
    own length less the other's. A logistic regression logit P(win) = theta + phi tanh(difference / its standard
    deviation) is fitted, and the result is sigmoid(theta): the win rate at equal lengths. The paper's term for the
    difficulty of each instruction is left out: it is estimated from the responses of many models. The interval is the
    percentile bootstrap over `groups` (the prompts, by number), or over rows; where one side won all it is Wilson's.
    Raises `ValueError` for other shapes, wins outside [0, 1], or numbers that are not finite.
    """
    target, lengths = np.asarray(wins, dtype=np.float64), np.asarray(length_differences, dtype=np.float64)
    if target.shape != lengths.shape or target.ndim != 1 or target.size == 0:
        raise ValueError(f"length control needs a length difference for each win; got {target.shape}, {lengths.shape}")
    if not (np.isfinite(lengths).all() and (target >= 0).all() and (target <= 1).all()):
        raise ValueError("length control needs wins in [0, 1] and finite length differences")
    numbers = np.arange(target.size) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    num_groups = int(numbers.max()) + 1
    one_sided = float(lengths.min()) > 0.0 or float(lengths.max()) < 0.0
    if target.min() == target.max() and target[0] in (0.0, 1.0):
        # No length tells anything of who wins.
        rate = wilson(float(target[0]) * num_groups, num_groups, confidence=confidence)
        return LengthControlled(rate, math.nan, one_sided)
    deviation = float(lengths.std())
    terms = np.tanh(lengths / deviation) if deviation > 0 else np.zeros_like(lengths)
    fitted = _fit(target, terms, np.ones((1, target.size)))
    generator = np.random.Generator(np.random.PCG64(seed))
    counts = generator.multinomial(num_groups, np.full(num_groups, 1 / num_groups), size=num_resamples)
    draws = sigmoid(_fit(target, terms, counts[:, numbers].astype(np.float64))[:, 0])
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    value = float(sigmoid(fitted[:, 0])[0])
    rate = Interval(value, min(value, float(low)), max(value, float(high)))
    return LengthControlled(rate, float(fitted[0, 1]), one_sided)


def _fit(target: Array, terms: Array, weights: Array) -> Array:
    """(theta, phi) for each row of weights (R, N), shape (R, 2), by damped Newton steps on the penalised likelihood."""
    parameters = np.zeros((weights.shape[0], 2))
    design = np.stack([np.ones_like(terms), terms], axis=1)
    penalty = np.full(2, RIDGE)
    for _ in range(_STEPS):
        shares = sigmoid(parameters @ design.T)
        gradient = (weights * (target - shares)) @ design - penalty * parameters
        curvature = np.einsum("rn,ni,nj->rij", weights * shares * (1 - shares), design, design, optimize=True)
        step = np.linalg.solve(curvature + np.diag(penalty), gradient[..., None])[..., 0]
        # Far from the optimum the parabola is a bad guide.
        step *= np.minimum(1.0, 2.0 / np.maximum(np.abs(step).max(axis=1, keepdims=True), 1e-12))
        parameters += step
        if float(np.abs(step).max()) < 1e-10:
            break
    return parameters


def sigmoid(values: Array) -> Array:
    """1 / (1 + exp(-values)), of any shape, without an overflow."""
    return 0.5 * (1.0 + np.tanh(values / 2.0))
