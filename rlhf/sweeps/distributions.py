"""The distributions of W&B's sweep file, each as the quantile function of its parameter.

Source: W&B, "Sweep configuration options", and the schema of its package `sweeps`. `q_` rounds to multiples of
q. `log_uniform`, `q_log_uniform` and `inv_log_uniform`, whose bounds are exponents of e, are withdrawn there and here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

# What each distribution takes besides its name: what it must have, and what has a default.
REQUIRED: dict[str, tuple[str, ...]] = {
    "constant": ("value",),
    "categorical": ("values",),
    "categorical_w_probabilities": ("values", "probabilities"),
    "int_uniform": ("min", "max"),
    "uniform": ("min", "max"),
    "q_uniform": ("min", "max"),
    "log_uniform_values": ("min", "max"),
    "q_log_uniform_values": ("min", "max"),
    "inv_log_uniform_values": ("min", "max"),
    "normal": (),
    "q_normal": (),
    "log_normal": (),
    "q_log_normal": (),
    "beta": (),
    "q_beta": (),
}
WITHDRAWN = ("log_uniform", "q_log_uniform", "inv_log_uniform")
NUMBERS = ("min", "max", "mu", "sigma", "q", "a", "b")
# Values that are tried to see whether the config takes them: the ends of what is likely to be drawn, and the middle.
TRIED_QUANTILES = (0.0, 0.5, 1.0)
TRIED_TAILS = (0.001, 0.5, 0.999)


def optional(kind: str) -> dict[str, float]:
    """What distribution `kind` may be given besides what it must have, with W&B's defaults."""
    found: dict[str, float] = {}
    if kind.endswith("normal"):
        found |= {"mu": 0.0, "sigma": 1.0}
    if kind.endswith("beta"):
        found |= {"a": 1.0, "b": 1.0}
    if kind.startswith("q_"):
        found["q"] = 1
    return found


def infer_kind(spec: Mapping[str, Any]) -> str | None:
    """The distribution that W&B takes when none is named; None when nothing says."""
    if "value" in spec:
        return "constant"
    if "values" in spec:
        return "categorical_w_probabilities" if "probabilities" in spec else "categorical"
    if "min" in spec and "max" in spec:
        whole = all(isinstance(spec[name], int) for name in ("min", "max"))
        return "int_uniform" if whole else "uniform"
    return None


@dataclass(frozen=True)
class Distribution:
    """What a parameter is drawn from. `numbers` holds min, max, mu, sigma, q, a, b as far as the kind has them."""

    kind: str
    values: tuple[Any, ...] = ()
    probabilities: tuple[float, ...] = ()
    numbers: Mapping[str, float] | None = None

    @property
    def is_listed(self) -> bool:
        """Whether the values are written out: a constant or a choice."""
        return bool(self.values)

    @property
    def is_choice(self) -> bool:
        """Whether all values are written out and none is more likely than another."""
        return self.is_listed and not self.probabilities

    @property
    def in_grid(self) -> tuple[Any, ...] | None:
        """The values that a grid goes through, as W&B's does; None where it refuses."""
        if self.kind in ("constant", "categorical"):
            return self.values
        if self.kind == "int_uniform":
            return tuple(range(int(self["min"]), int(self["max"]) + 1))
        if self.kind == "q_uniform":
            # Like W&B's, without the upper end.
            count = math.ceil((self["max"] - self["min"]) / self["q"])
            return tuple(self["min"] + index * self["q"] for index in range(count))
        return None

    @property
    def tried(self) -> tuple[Any, ...]:
        """Values to try the config with: all that are listed (of fractions the ends), else both ends and the middle."""
        if self.is_listed and all(type(value) is float for value in self.values):
            return tuple(dict.fromkeys((min(self.values), max(self.values))))
        if self.is_listed:
            return self.values
        bounded = "min" in (self.numbers or {}) or self.kind.endswith("beta")
        return tuple(self.quantile(share) for share in (TRIED_QUANTILES if bounded else TRIED_TAILS))

    def __getitem__(self, name: str) -> float:
        return (self.numbers or {})[name]

    def quantile(self, share: float) -> Any:
        """The value below which `share` (0 to 1) of the draws lie."""
        if self.kind == "constant":
            return self.values[0]
        if self.kind == "categorical":
            return self.values[max(math.ceil(share * len(self.values)) - 1, 0)]
        if self.kind == "categorical_w_probabilities":
            return self._listed(share)
        if self.kind == "int_uniform":
            low, high = int(self["min"]), int(self["max"])
            return max(low + math.ceil(share * (high - low + 1)) - 1, low)
        value = self._continuous(share)
        if not self.kind.startswith("q_"):
            return value
        step = self["q"]
        rounded = round(value / step) * step
        # 3 * 0.1 is 0.30000000000000004, which nobody wants to read in a command.
        return rounded if isinstance(rounded, int) else float(f"{rounded:.12g}")

    def _listed(self, share: float) -> Any:
        total = 0.0
        for value, probability in zip(self.values, self.probabilities, strict=True):
            total += probability
            if share < total:
                return value
        return next(
            value
            for value, probability in zip(reversed(self.values), reversed(self.probabilities), strict=True)
            if probability > 0
        )

    def _continuous(self, share: float) -> float:
        kind = self.kind.removeprefix("q_")
        if kind == "uniform":
            return self["min"] + share * (self["max"] - self["min"])
        if kind in ("log_uniform_values", "inv_log_uniform_values"):
            low, high = math.log(self["min"]), math.log(self["max"])
            # Rounding must not leave the range: exp(log(0.1)) is more than 0.1.
            return min(max(math.exp(low + share * (high - low)), self["min"]), self["max"])
        if kind in ("normal", "log_normal"):
            inner = min(max(share, 1e-12), 1 - 1e-12)
            drawn = self["mu"] + self["sigma"] * NormalDist().inv_cdf(inner)
            return drawn if kind == "normal" else math.exp(drawn)
        from scipy.special import betaincinv

        return float(betaincinv(self["a"], self["b"], share))
