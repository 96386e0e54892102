"""How the gold reward follows the distance from the start while a proxy is optimised: Gao et al. (2023).

The distance is d = sqrt(KL(policy || initial policy)), KL in nats. Rewards are differences to the initial policy's, so
that R(0) = 0 (section 3 of the paper). The functional forms, its equations (1):

    best-of-n                R(d) = d (alpha - beta d)
    reinforcement learning   R(d) = d (alpha - beta log d)

Both are linear in alpha and beta, so that least squares is exact. numpy only. A *unit* is what is resampled for an
interval: a prompt (best-of-n) or a seed (trainings); units are the rows of rewards, points of the curve the columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlhf.statistics.intervals import Interval, bootstrap_difference, bootstrap_mean

Array = NDArray[np.float64]
Form = Literal["best_of_n", "reinforcement_learning"]


@dataclass(frozen=True)
class Fit:
    """A fitted curve. `r_squared` is 1 - (squared residuals) / (squares about the mean), over the points given.

    It is unweighted even where the fit is weighted, and negative for a curve worse than a constant;
    `weighted_r_squared` (None without weights) has the fit's weights in both sums and in the mean. Where all rewards
    are equal both are NaN. `smallest` and `largest` are the ends of the distances fitted.
    """

    form: Form
    alpha: float
    beta: float
    r_squared: float
    weighted_r_squared: float | None
    num_points: int
    smallest: float
    largest: float

    def reward(self, distance: ArrayLike) -> Array:
        """The curve at `distance` (any shape, >= 0); 0 at 0, which both forms tend to."""
        columns = _columns(self.form, np.asarray(distance, dtype=np.float64))
        return columns[..., 0] * self.alpha + columns[..., 1] * self.beta

    @property
    def peak(self) -> tuple[float, float] | None:
        """Distance and reward where the curve turns down; None when it never does, or beyond every float.

        Best-of-n: alpha / (2 beta) and alpha^2 / (4 beta). Reinforcement learning: exp(alpha / beta - 1), and beta
        times that.
        """
        if self.beta <= 0 or (self.form == "best_of_n" and self.alpha <= 0):
            return None
        if self.form == "best_of_n":
            distance, height = self.alpha / (2 * self.beta), self.alpha * (self.alpha / self.beta) / 4
        else:
            exponent = self.alpha / self.beta - 1
            if exponent > math.log(np.finfo(np.float64).max):
                return None
            distance = math.exp(exponent)
            height = self.beta * distance
        return (distance, height) if math.isfinite(distance) and math.isfinite(height) else None

    @property
    def warning(self) -> str | None:
        """What to say beside the peak when the points do not show it; None when it lies among them."""
        if self.peak is None:
            return "the fitted curve does not turn down"
        if not self.smallest <= self.peak[0] <= self.largest:
            return (
                f"the peak at distance {self.peak[0]:.3g} is an extrapolation: the points lie between "
                f"{self.smallest:.3g} and {self.largest:.3g}"
            )
        return None

    def to_json(self) -> dict[str, Any]:
        """Plain values; `peak` is null or `{"distance", "reward"}`, a NaN is null."""
        peak = None if self.peak is None else {"distance": self.peak[0], "reward": self.peak[1]}
        weighted = self.weighted_r_squared
        return {
            "form": self.form,
            "alpha": self.alpha,
            "beta": self.beta,
            "r_squared": _finite(self.r_squared),
            "weighted_r_squared": None if weighted is None else _finite(weighted),
            "num_points": self.num_points,
            "distances": [self.smallest, self.largest],
            "peak": peak,
            "warning": self.warning,
        }


@dataclass(frozen=True)
class FitIntervals:
    """A fit with percentile bootstrap intervals over units (Efron 1979).

    `peak_share` is the share of resamples whose curve turns down. A resample without a peak counts as one at infinity,
    so an end of `peak_distance` or `peak_reward` may be infinite; both are None where the fit itself has no peak.
    """

    fit: Fit
    alpha: Interval
    beta: Interval
    peak_distance: Interval | None
    peak_reward: Interval | None
    peak_share: float
    num_units: int

    def to_json(self) -> dict[str, Any]:
        """Plain values; an infinite end is null."""
        peaks = {"peak_distance": self.peak_distance, "peak_reward": self.peak_reward}
        return {
            **self.fit.to_json(),
            "alpha_interval": self.alpha.to_json(),
            "beta_interval": self.beta.to_json(),
            **{name: None if peak is None else _plain(peak) for name, peak in peaks.items()},
            "peak_share": self.peak_share,
            "num_units": self.num_units,
        }


def fit_curve(form: Form, distances: ArrayLike, rewards: ArrayLike, weights: ArrayLike | None = None) -> Fit:
    """Least squares for alpha and beta. All shapes (num_points,); `weights` (> 0) are 1 / variance of the rewards.

    `rewards` are differences to the initial policy: gold, or the proxy's, for which the paper fits the same forms. A
    point at distance 0 decides nothing but counts in R squared. Raises `ValueError` for other shapes, numbers that are
    not finite, a negative distance, a weight that is not positive, and when fewer than two distinct distances above 0
    are there (or two at which the columns are proportional), since then alpha and beta are not determined.
    """
    distance, reward = _vector(distances, "distances"), _vector(rewards, "rewards")
    weight = np.ones_like(distance) if weights is None else _vector(weights, "weights")
    if not distance.shape == reward.shape == weight.shape:
        raise ValueError(f"{distance.size} distances, {reward.size} rewards, {weight.size} weights")
    if (distance < 0).any() or (weight <= 0).any():
        raise ValueError("distances must be >= 0 and weights > 0")
    root = np.sqrt(weight)
    columns = _columns(form, distance)
    solution, _, rank, _ = np.linalg.lstsq(columns * root[:, None], reward * root, rcond=None)
    if rank < 2:
        raise ValueError(
            f"alpha and beta of {form} need two distinct distances above 0; got {sorted(set(distance.tolist()))}"
        )
    residuals = reward - columns @ solution
    return Fit(
        form,
        float(solution[0]),
        float(solution[1]),
        _r_squared(reward, residuals, np.ones_like(reward)),
        None if weights is None else _r_squared(reward, residuals, weight),
        distance.size,
        float(distance.min()),
        float(distance.max()),
    )


def fit_with_intervals(
    form: Form,
    distances: ArrayLike,
    rewards: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    confidence: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
) -> FitIntervals:
    """The fit to the mean curve over units, with intervals from resampling the units.

    `rewards` (num_units, num_points): `best_of_n_rewards` less the reward at n = 1 for prompts, or one row a seed.
    `distances` (num_points,), or (num_units, num_points) where units have their own, which are averaged along.
    `weights` (num_points,). R squared is therefore that of the mean curve's points, not of single units. With few
    units, three seeds say, a bootstrap interval is too narrow. Raises `ValueError` as `fit_curve` does, and when shapes
    differ.
    """
    values = _matrix(rewards, "rewards")
    own = _own_distances(distances, values)
    fitted = fit_curve(form, own.mean(axis=0), values.mean(axis=0), weights)
    drawn = [
        fit_curve(form, own[rows].mean(axis=0), values[rows].mean(axis=0), weights)
        for rows in _resamples(len(values), num_resamples, seed)
    ]
    peaks = [(math.inf, math.inf) if fit.peak is None else fit.peak for fit in drawn]
    distance_peak = reward_peak = None
    if fitted.peak is not None:
        distance_peak = _percentiles(fitted.peak[0], [peak[0] for peak in peaks], confidence)
        reward_peak = _percentiles(fitted.peak[1], [peak[1] for peak in peaks], confidence)
    return FitIntervals(
        fitted,
        _percentiles(fitted.alpha, [fit.alpha for fit in drawn], confidence),
        _percentiles(fitted.beta, [fit.beta for fit in drawn], confidence),
        distance_peak,
        reward_peak,
        sum(fit.peak is not None for fit in drawn) / num_resamples,
        len(values),
    )


@dataclass(frozen=True)
class TurningPoint:
    """Where a measured curve, not a fitted one, is highest, and whether it falls behind that point.

    `index` is the column of the highest mean reward (the first of equals), `distance` lies there with the interval of
    where resamples have their highest point. `fall` is the mean reward there less that of the last point, paired by
    unit; since the point was chosen for being highest, it is somewhat too large. `turn_share` is the share of
    resamples that are highest before their last point. `turned`: the point is not the last, and `fall` excludes 0.
    """

    index: int
    distance: Interval
    reward: Interval
    fall: Interval
    turn_share: float

    @property
    def turned(self) -> bool:
        """Whether the reward goes down behind this point by more than chance explains."""
        return self.fall.low > 0

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        intervals = {"distance": self.distance, "reward": self.reward, "fall": self.fall}
        return {
            "index": self.index,
            **{name: interval.to_json() for name, interval in intervals.items()},
            "turn_share": self.turn_share,
            "turned": self.turned,
        }


def turning_point(
    distances: ArrayLike,
    rewards: ArrayLike,
    *,
    confidence: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> TurningPoint:
    """Where the gold reward turns down along a curve.

    `rewards` (num_units, num_points) in the order of the optimisation; `distances` (num_points,) or
    (num_units, num_points). Raises `ValueError` for other shapes and numbers that are not finite.
    """
    values = _matrix(rewards, "rewards")
    own = _own_distances(distances, values)
    index = int(np.argmax(values.mean(axis=0)))
    places, early = [], 0
    for rows in _resamples(len(values), num_resamples, seed):
        highest = int(np.argmax(values[rows].mean(axis=0)))
        places.append(float(own[rows, highest].mean()))
        early += highest < values.shape[1] - 1
    options: dict[str, Any] = {"confidence": confidence, "num_resamples": num_resamples, "seed": seed}
    at, end = values[:, index].tolist(), values[:, -1].tolist()
    return TurningPoint(
        index,
        _percentiles(float(own[:, index].mean()), places, confidence),
        bootstrap_mean(at, **options),
        bootstrap_difference(at, end, **options),
        early / num_resamples,
    )


@dataclass(frozen=True)
class CheckpointChoice:
    """The checkpoint that the gold reward chooses, beside the one that the proxy would choose.

    `reward` is the gold reward of the choice and `gain` its lead over the proxy's, paired by unit.
    """

    index: int
    proxy_index: int
    reward: Interval
    gain: Interval

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        chosen = {"index": self.index, "proxy_index": self.proxy_index}
        return {**chosen, "reward": self.reward.to_json(), "gain": self.gain.to_json()}


def choose_checkpoint(
    gold: ArrayLike,
    proxy: ArrayLike,
    held_out: ArrayLike | None = None,
    *,
    confidence: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> CheckpointChoice:
    """The column with the highest mean gold reward, the earliest of equals, and what it gains over the proxy's choice.

    `gold` and `proxy` (num_units, num_checkpoints) on the prompts that choose; `held_out` (num_other_units,
    num_checkpoints) is the gold reward on others, on which choice and gain are then measured. Without it they are
    measured where they were chosen, and are too good. Raises `ValueError` for other shapes.
    """
    chosen_by, scored = _matrix(gold, "gold"), _matrix(proxy, "proxy")
    measured = chosen_by if held_out is None else _matrix(held_out, "held_out")
    if not chosen_by.shape[1] == scored.shape[1] == measured.shape[1]:
        raise ValueError(
            f"gold, proxy and held_out have {chosen_by.shape[1]}, {scored.shape[1]} and {measured.shape[1]} checkpoints"
        )
    index, proxy_index = int(np.argmax(chosen_by.mean(axis=0))), int(np.argmax(scored.mean(axis=0)))
    options: dict[str, Any] = {"confidence": confidence, "num_resamples": num_resamples, "seed": seed}
    best, by_proxy = measured[:, index].tolist(), measured[:, proxy_index].tolist()
    return CheckpointChoice(
        index, proxy_index, bootstrap_mean(best, **options), bootstrap_difference(best, by_proxy, **options)
    )


def _columns(form: Form, distance: Array) -> Array:
    """What alpha and beta are multiplied by, shape (..., 2)."""
    # d log d tends to 0 at 0.
    factor = distance if form == "best_of_n" else np.log(np.where(distance > 0, distance, 1.0))
    return np.stack([distance, -distance * factor], axis=-1)


def _own_distances(distances: ArrayLike, rewards: Array) -> Array:
    """Each unit's distances, shape (num_units, num_points)."""
    given = np.asarray(distances, dtype=np.float64)
    if given.shape not in (rewards.shape, rewards.shape[1:]) or not np.isfinite(given).all():
        raise ValueError(f"distances have shape {given.shape}, rewards {rewards.shape}; both must be finite")
    return np.broadcast_to(given, rewards.shape)


def _r_squared(rewards: Array, residuals: Array, weights: Array) -> float:
    mean = np.average(rewards, weights=weights)
    spread = float(np.sum(weights * (rewards - mean) ** 2))
    return 1 - float(np.sum(weights * residuals**2)) / spread if spread > 0 else math.nan


def _resamples(num_units: int, num_resamples: int, seed: int) -> NDArray[np.int64]:
    if num_resamples < 1:
        raise ValueError(f"num_resamples must be at least 1, not {num_resamples}")
    generator = np.random.Generator(np.random.PCG64(seed))
    return generator.integers(num_units, size=(num_resamples, num_units))


def _percentiles(value: float, drawn: list[float], confidence: float) -> Interval:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence lies between 0 and 1, both excluded; got {confidence}")
    # A quantile that is one of the values: between a number and infinity there is nothing to interpolate.
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2], method="inverted_cdf")
    return Interval(value, float(low), float(high))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _plain(interval: Interval) -> dict[str, float | None]:
    return {name: _finite(value) for name, value in interval.to_json().items()}


def _vector(values: ArrayLike, name: str) -> Array:
    return _checked(values, 1, name)


def _matrix(values: ArrayLike, name: str) -> Array:
    return _checked(values, 2, name)


def _checked(values: ArrayLike, dimensions: int, name: str) -> Array:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != dimensions or array.size == 0 or not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite numbers in {dimensions} dimension(s); got shape {array.shape}")
    return array
