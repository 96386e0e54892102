"""Hypothesis strategies and helpers for batches of unequal length."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

# What padding may hold. NaN finds sums that multiply by the mask, 1e4 finds sums that forget it.
FILLS = (float("nan"), 1e4, float("inf"))


def prefix_mask(lengths: Sequence[int], width: int) -> Tensor:
    """(B, R) bool with the first `lengths[b]` slots of row b True."""
    return torch.arange(width).unsqueeze(0) < torch.tensor(lengths, dtype=torch.long).unsqueeze(1)


@st.composite
def ragged(draw: st.DrawFn, max_rows: int = 5, max_width: int = 6) -> tuple[Tensor, torch.Generator]:
    """A prefix mask with at least one True, empty and full rows included, and a generator for what goes under it."""
    width = draw(st.integers(1, max_width))
    lengths = draw(st.lists(st.integers(0, width), min_size=1, max_size=max_rows).filter(any))
    return prefix_mask(lengths, width), torch.Generator().manual_seed(draw(st.integers(0, 2**31)))


def normal(mask: Tensor, generator: torch.Generator, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers of the mask's shape."""
    return torch.randn(mask.shape, generator=generator, dtype=dtype)


def fill(values: Tensor, mask: Tensor, number: float) -> Tensor:
    """`values` with `number` in every padded slot, as a new leaf."""
    return torch.where(mask, values.detach(), torch.full_like(values, number)).requires_grad_(values.requires_grad)


def backward(loss: Tensor) -> None:
    """`loss.backward()`, which torch leaves untyped."""
    loss.backward()  # type: ignore[no-untyped-call]
