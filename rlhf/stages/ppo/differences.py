"""How two log-probs of the same response tokens differ: the sizes and patterns by which a mistake is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor

from rlhf.batches import Rollout

# Dividing logits by another temperature ties the difference to the log-prob itself, and keeps the two log-probs nearly
# on a line. On small trained policies, with temperatures 0.7 and 1.3 taken for 1, the difference correlated with the
# log-prob by 0.4 to 0.8 and the log-probs with each other by 0.98 and more; rounding and somewhat other weights gave at
# most 0.25 for the former, quite other weights at most 0.9 for the latter.
TEMPERATURE_CORRELATION = 0.35
LINE_CORRELATION = 0.95
# Differences on one side: at least this share of tokens there, and on the other side at most this share of those.
ONE_SIDED_SHARE, OTHER_SIDE_SHARE = 0.05, 0.05
# Leaving out tokens raises the others' log-probs by -log of the probability that is kept: 2 nats keep 14 %. Tokens of
# an unrelated model are on one side as well, by more.
LARGEST_NORMALISER_NATS = 2.0


@dataclass(frozen=True)
class Tolerance:
    """What rounding may do to log-probs, in nats: mean and largest absolute difference over tokens."""

    mean: float
    largest: float


@dataclass(frozen=True, eq=False)
class Differences:
    """`first - second` of the log-probs of one rollout, as float64 on the CPU; N counts the real tokens.

    `rows` and `slots` say where each of the N entries stands; `padding` (B,) counts each row's padded prompt slots.
    """

    first: Tensor  # (N,)
    second: Tensor  # (N,)
    rows: Tensor  # (N,) int64
    slots: Tensor  # (N,) int64
    padding: Tensor  # (B,) int64

    @classmethod
    def of(cls, first: Tensor, second: Tensor, rollout: Rollout) -> Self:
        """Of two (B, R) tensors under the rollout's response mask."""
        mask = rollout.response_mask.cpu()
        if first.shape != mask.shape or second.shape != mask.shape:
            raise ValueError(f"log-probs must be {tuple(mask.shape)}, not {tuple(first.shape)}, {tuple(second.shape)}")
        rows, slots = mask.nonzero(as_tuple=True)
        return cls(
            first.detach().double().cpu()[mask],
            second.detach().double().cpu()[mask],
            rows,
            slots,
            (~rollout.prompts.prompt_mask.cpu()).sum(1),
        )

    @property
    def values(self) -> Tensor:
        """The differences (N,)."""
        return self.first - self.second

    @property
    def finite(self) -> bool:
        """False when a log-prob is NaN or infinite."""
        return bool(self.first.isfinite().all() and self.second.isfinite().all())

    @property
    def excluded(self) -> bool:
        """True when every number is finite but for tokens of probability 0 in `second` alone."""
        broken = ~self.second.isfinite()
        return bool(self.first.isfinite().all() and (self.second[broken] == -torch.inf).all())

    @property
    def mean(self) -> float:
        """Mean difference, with its sign."""
        return float(self.values.mean())

    def within(self, tolerance: Tolerance) -> bool:
        """True when rounding explains the differences, and when there is no token at all."""
        if not len(self.first):
            return True
        sizes = self.values.abs()
        # Comparisons with NaN are False, so NaN is never within.
        return bool(sizes.mean() <= tolerance.mean) and bool(sizes.max() <= tolerance.largest)

    def describe(self) -> str:
        """The sizes, for a message."""
        sizes = self.values.abs()
        worst = int(sizes.argmax())
        return (
            f"log-probs differ by {float(sizes.mean()):.3g} nats on average over {len(sizes)} tokens, at most by "
            f"{float(sizes[worst]):.3g} (response {int(self.rows[worst])}, token {int(self.slots[worst])})"
        )

    def describe_not_finite(self, whose: str) -> str:
        """Where NaN and infinity are, for a message."""
        broken = ~(self.first.isfinite() & self.second.isfinite())
        place = int(broken.nonzero()[0])
        row = int(self.rows[place])
        return (
            f"{int(broken.sum())} of {len(broken)} {whose} log-probs are not finite, the first in response {row}, "
            f"token {int(self.slots[place])} ({float(self.first[place])} and {float(self.second[place])}; "
            f"{int(self.padding[row])} padded prompt slots)"
        )

    def only_padded_rows(self, tolerance: Tolerance) -> bool:
        """True when no row without padding is off, and at least half of those with padding are."""
        num_rows = len(self.padding)
        counts = torch.zeros(num_rows).index_add_(0, self.rows, torch.ones(len(self.rows)))
        sums = torch.zeros(num_rows, dtype=torch.float64).index_add_(0, self.rows, self.values.abs())
        real = counts > 0
        off = real & (sums > tolerance.mean * counts)
        padded, plain = real & (self.padding > 0), real & (self.padding == 0)
        if not bool(plain.any()) or not bool(padded.any()):
            return False
        return not bool(off[plain].any()) and float(off[padded].double().mean()) >= 0.5

    def only_before(self, slot: int, tolerance: Tolerance) -> bool:
        """True when tokens before response slot `slot` are off, and those from there on are not."""
        sizes = self.values.abs()
        earlier, later = sizes[self.slots < slot], sizes[self.slots >= slot]
        return bool(earlier.mean() > tolerance.mean) and bool(later.mean() <= tolerance.mean)

    def grows_along_response(self, tolerance: Tolerance) -> bool:
        """True when all rows agree on their first token and differ later."""
        sizes = self.values.abs()
        return bool(sizes[self.slots == 0].mean() <= tolerance.mean) and bool(
            sizes[self.slots > 0].mean() > tolerance.mean
        )

    def one_sided(self, tolerance: Tolerance) -> bool:
        """True when `first` is larger for many tokens and smaller for hardly any, as after leaving out tokens."""
        above = float((self.values > 2 * tolerance.mean).double().mean())
        below = float((self.values < -2 * tolerance.mean).double().mean())
        return (
            above >= ONE_SIDED_SHARE
            and below <= OTHER_SIDE_SHARE * above
            and float(self.values.mean()) <= LARGEST_NORMALISER_NATS
        )

    def like_rounding(self, tolerance: Tolerance) -> bool:
        """True when the differences are within `tolerance` and centred on 0 as far as their number can tell."""
        spread = float(self.values.std(correction=0)) / len(self.values) ** 0.5
        return self.within(tolerance) and abs(self.mean) <= 4 * spread

    @property
    def slope(self) -> float:
        """Least-squares slope of `second` on `first`; 1 for log-probs of equal temperature."""
        centred = self.first - self.first.mean()
        return float((centred * self.second).sum() / centred.square().sum())

    @property
    def correlation(self) -> float:
        """Correlation of the difference with `first`; NaN when one of them is constant."""
        return _correlation(self.first, self.values)

    def sharper(self) -> Literal["first", "second"] | None:
        """Which of the two has the lower temperature; None when temperature does not explain the differences.

        Log-probs of softmax(z / T) are z / T less a normaliser. Were that one constant, the slope of `second` on
        `first` would be T_first / T_second; as it is, the slope lies between that and 1.
        """
        # A correlation that is NaN is no evidence: comparisons with NaN are False.
        tied = abs(self.correlation) >= TEMPERATURE_CORRELATION
        on_a_line = _correlation(self.first, self.second) >= LINE_CORRELATION
        if len(self.first) < 3 or not (tied and on_a_line):
            return None
        return "first" if self.slope < 1 else "second"


def _correlation(first: Tensor, second: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([first, second]))[0, 1])
