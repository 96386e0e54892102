"""Whether a reward model's probabilities can be believed: cross-entropy, Brier score, calibration, temperature.

The probability that `chosen` is the better response is P = sigmoid(d), d its score less that of `rejected` (Bradley and
Terry 1952). Ties count here as labels of 1/2, other soft labels as what they say. numpy only.
"""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf import statistics
from rlhf.evaluation.reward_rows import FEW_ROWS, Figure, Floats, ScoredRows, figure, not_defined, over_prompts
from rlhf.statistics.annotations import Resampling
from rlhf.statistics.intervals import Interval

_NUM_SIMULATIONS = 400
_BLOCK = 1_000_000
_HALVINGS = 100


def sigmoid(values: Floats) -> Floats:
    """1 / (1 + exp(-x)) without overflow."""
    return 0.5 * (1 + np.tanh(0.5 * values))


def cross_entropies(differences: Floats, labels: Floats) -> Floats:
    """-p log sigmoid(d) - (1 - p) log sigmoid(-d) of each comparison, in nats, shape (N,)."""
    lost: Floats = labels * np.logaddexp(0, -differences) + (1 - labels) * np.logaddexp(0, differences)
    return lost


def confidences(differences: Floats) -> Floats:
    """How likely the model holds it that the response it prefers is the better one: sigmoid(|d|), in [0.5, 1)."""
    return sigmoid(np.abs(differences))


def expected_right(differences: Floats, labels: Floats) -> Floats:
    """How likely, by the label, the response that the model prefers is the better one; 1/2 for equal scores."""
    return 0.5 + np.sign(differences) * (labels - 0.5)


def equal_mass_bins(values: Floats, num_bins: int) -> NDArray[np.int64]:
    """The bin of each value, from 0, in bins of about equal counts; equal values share a bin, so there may be fewer."""
    order = np.sort(values)
    inner = [order[(len(order) * number) // num_bins] for number in range(1, num_bins)]
    placed = np.searchsorted(np.unique(inner), values, side="right") if inner else np.zeros(len(values), dtype=np.int64)
    return np.unique(placed, return_inverse=True)[1].astype(np.int64)


def calibration(rows: ScoredRows, resampling: Resampling, num_bins: int = 10) -> dict[str, Any]:
    """Cross-entropy, Brier score, calibration curve, ECE, and the temperature that would calibrate.

    The expected calibration error is sum over bins of |share right - mean confidence| n_bin / N (Naeini et al. 2015;
    Guo et al. 2017, equation 3), here with bins of equal mass, at least 20 comparisons each where there are as many.
    An estimate is never 0, whatever the model: `ece_if_calibrated` is what a calibrated model with these confidences
    would show on as many certain labels. The bootstrap interval of the ECE shares that bias and lies high.
    """
    confident, likely = confidences(rows.differences), expected_right(rows.differences, rows.labels)
    bins = equal_mass_bins(confident, max(1, min(num_bins, len(rows) // FEW_ROWS)))
    member = np.eye(int(bins.max()) + 1)[bins]
    lost = cross_entropies(rows.differences, rows.labels)
    squared = (sigmoid(rows.differences) - rows.labels) ** 2

    def of_resamples(weights: Floats) -> Floats:
        total = weights.sum(axis=1)
        error = np.abs(weights @ (member * (likely - confident)[:, None])).sum(axis=1)
        means: Floats = np.stack([weights @ lost, weights @ squared, error], axis=1) / total[:, None]
        return means

    entropy, brier, error = over_prompts(rows, of_resamples, resampling)
    return {
        "cross_entropy": figure(entropy),
        "brier": figure(brier),
        "ece": figure(error),
        "ece_if_calibrated": _error_of_calibrated(confident, member, resampling),
        "curve": _curve(bins, confident, likely, resampling.confidence),
        "temperature": temperature(rows, resampling.confidence),
    }


def _error_of_calibrated(confident: Floats, member: Floats, resampling: Resampling) -> Figure:
    """The mean and the middle 95 % of the ECE where every label is drawn with the model's own confidence."""
    generator = np.random.Generator(np.random.PCG64(resampling.seed))
    size = max(1, _BLOCK // len(confident))
    errors = []
    for start in range(0, _NUM_SIMULATIONS, size):
        drawn = generator.random((min(size, _NUM_SIMULATIONS - start), len(confident))) < confident
        errors.append(np.abs((drawn - confident) @ member).sum(axis=1) / len(confident))
    found = np.concatenate(errors)
    low, high = np.quantile(found, [(1 - resampling.confidence) / 2, (1 + resampling.confidence) / 2])
    return figure(Interval(float(found.mean()), float(low), float(high)))


def _curve(bins: NDArray[np.int64], confident: Floats, likely: Floats, confidence: float) -> list[dict[str, Any]]:
    """Of each bin: how many, the mean confidence, and the share right with Wilson's interval."""
    curve = []
    for number in range(int(bins.max()) + 1):
        inside = bins == number
        count = int(inside.sum())
        right = min(float(count), max(0.0, float(likely[inside].sum())))
        curve.append(
            {
                "num": count,
                "confidence": float(confident[inside].mean()),
                "lowest": float(confident[inside].min()),
                "highest": float(confident[inside].max()),
                "accuracy": statistics.wilson(right, count, confidence=confidence).to_json(),
            }
        )
    return curve


def temperature(rows: ScoredRows, confidence: float = 0.95) -> Figure:
    """The T > 0 whose sigmoid(d / T) has the least cross-entropy (Guo et al. 2017, section 4.2), on these comparisons.

    Above 1 the model is too sure of itself. The interval is that of 1 / T by its standard error, robust and clustered
    by prompt (White 1980; Liang and Zeger 1986), turned over; its upper end is None where it has none.
    """
    scale = float(np.sqrt(np.mean(rows.differences**2)))
    if scale == 0:
        return not_defined("all differences of scores are 0")
    differences, labels = rows.differences / scale, rows.labels

    def slope(inverse: float) -> float:
        return float(np.mean((sigmoid(inverse * differences) - labels) * differences))

    if slope(0.0) >= 0:
        return not_defined("the scores do not favour the chosen responses: no temperature makes them calibrated")
    if not np.any(np.where(differences > 0, 1 - labels, labels) * np.abs(differences)):
        return not_defined("every comparison is right with certainty: the lower the temperature the better")
    high = 1.0
    while slope(high) < 0:
        high *= 2
    low = 0.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    found = (low + high) / 2
    chance = sigmoid(found * differences)
    by_prompt = np.bincount(rows.prompts, weights=(chance - labels) * differences)
    curvature = float(np.sum(chance * (1 - chance) * differences**2))
    error = float(np.sqrt(np.sum(by_prompt**2))) / curvature if curvature > 0 else np.inf
    half = NormalDist().inv_cdf(0.5 + confidence / 2) * error
    if not np.isfinite(half):
        return {**not_defined("the scores are so far apart that the fit has no curvature")}
    body: Figure = {"value": scale / found, "low": scale / (found + half)}
    body["high"] = scale / (found - half) if found > half else None
    after = rows.differences / body["value"]
    return {**body, "cross_entropy": float(cross_entropies(after, labels).mean())}
