"""Count, mean and variance of numbers that arrive in batches, as a normalisation by running statistics needs them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rlhf.ops._checks import check_floating


class RunningMoments:
    """Moments of every number seen so far, in float64: as if all had come in one batch, up to rounding.

    Batches are merged by their counts, means and sums of squared deviations, so neither their order nor their sizes
    matter, and ranks may be merged like batches. Chan, Golub and LeVeque 1979, "Updating formulae and a pairwise
    algorithm for computing sample variances", equations 2.1.
    """

    def __init__(self) -> None:
        """Nothing seen yet."""
        self._count = 0
        self._mean = 0.0
        self._squares = 0.0

    @property
    def count(self) -> int:
        """Numbers seen so far."""
        return self._count

    @property
    def mean(self) -> float:
        """Mean of the numbers seen so far; NaN before the first."""
        return self._mean if self._count else math.nan

    @property
    def std(self) -> float:
        """Biased standard deviation (divided by the count, ddof = 0); 0 after one number, NaN before the first."""
        return math.sqrt(self._squares / self._count) if self._count else math.nan

    @torch.no_grad()
    def update(self, values: Tensor) -> None:
        """Adds all numbers of a floating-point tensor of any shape; an empty one changes nothing.

        Raises `ValueError` when one is NaN or infinite: it would stay in the statistics for ever.
        """
        check_floating(values=values)
        numbers = values.detach().to(torch.float64).flatten()
        if not bool(numbers.isfinite().all()):
            bad = int((~numbers.isfinite()).sum())
            raise ValueError(f"running moments need finite numbers, but {bad} of {len(numbers)} are NaN or infinite")
        if len(numbers):
            mean = numbers.mean()
            self._merge(len(numbers), float(mean), float((numbers - mean).square().sum()))

    def merge(self, other: RunningMoments) -> None:
        """Adds all numbers that another has seen, those of another rank for instance."""
        if other._count:
            self._merge(other._count, other._mean, other._squares)

    def _merge(self, count: int, mean: float, squares: float) -> None:
        total = self._count + count
        step = mean - self._mean
        self._squares += squares + step * step * self._count * count / total
        self._mean += step * count / total
        self._count = total

    def state_dict(self) -> dict[str, Any]:
        """Everything there is, as plain numbers: `count`, `mean`, `squares` (summed squared deviations)."""
        return {"count": self._count, "mean": self._mean, "squares": self._squares}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave. Raises `ValueError` for other names or numbers that cannot be moments."""
        if set(state) != {"count", "mean", "squares"}:
            raise ValueError(f"the state of running moments has count, mean and squares, but came with {sorted(state)}")
        count, mean, squares = int(state["count"]), float(state["mean"]), float(state["squares"])
        if count < 0 or not math.isfinite(mean) or not 0.0 <= squares < math.inf:
            raise ValueError(f"not the state of running moments: {state}")
        self._count, self._mean, self._squares = count, mean, squares
