"""A frontier: the reward that a method reaches at a KL, as a curve that does not fall, and two of them compared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Point = tuple[float, float]


@dataclass(frozen=True)
class Frontier:
    """A non-decreasing line through (KL, reward) knots; it starts at the first policy, and ends at the largest KL."""

    knots: tuple[Point, ...]

    @classmethod
    def through(cls, start: float, points: Sequence[Point]) -> Frontier:
        """The least-squares non-decreasing fit to the points, from (0, `start`), the first policy's reward.

        More KL never forces a lower reward, since the policy of less KL is still there. A largest reward up to a KL
        would rise with the number of points alone; a mean does not. By pooling adjacent violators (Ayer et al. 1955):
        neighbours that fall are replaced by their mean at the mean of their KLs. KLs below 0 count as 0. Raises
        `ValueError` for a number that is not finite.
        """
        cleaned = sorted((max(kl, 0.0), reward) for kl, reward in points)
        if not all(math.isfinite(value) for point in [(0.0, start), *cleaned] for value in point):
            raise ValueError("a frontier is made of finite numbers")
        pools: list[tuple[float, float, int]] = []
        for kl, reward in cleaned:
            pool = (kl, reward, 1)
            while pools and pools[-1][1] / pools[-1][2] > pool[1] / pool[2]:
                before = pools.pop()
                pool = (before[0] + pool[0], before[1] + pool[1], before[2] + pool[2])
            pools.append(pool)
        means = [(kl / count, reward / count) for kl, reward, count in pools]
        # What lies below the first policy is not on its frontier: that policy has no KL at all.
        risen = [(kl, max(reward, start)) for kl, reward in means]
        return cls(((0.0, start), *risen))

    @property
    def reach(self) -> float:
        """The largest KL that the frontier knows."""
        return self.knots[-1][0]

    def at(self, kl: float) -> float:
        """The reward at a KL, linear between knots; beyond the last one its reward."""
        for (left, low), (right, high) in zip(self.knots, self.knots[1:], strict=False):
            if kl <= right:
                return high if right == left else low + (high - low) * (kl - left) / (right - left)
        return self.knots[-1][1]


def mean_lead(first: Frontier, second: Frontier, num_steps: int = 200) -> float:
    """How much more reward the first gets than the second, on average over the KLs from 0 to where both end.

    By the trapezoidal rule. NaN where one of them never leaves 0.
    """
    end = min(first.reach, second.reach)
    if end <= 0:
        return math.nan
    leads = [first.at(end * n / num_steps) - second.at(end * n / num_steps) for n in range(num_steps + 1)]
    return (math.fsum(leads) - (leads[0] + leads[-1]) / 2) / num_steps
