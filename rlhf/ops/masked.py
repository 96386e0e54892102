"""Sums, means, variances and whitening over the real tokens of a padded tensor."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf.ops._checks import check_bool, check_floating, check_same_shape, kept

# Added to the variance, not to the deviation: as in lm-human-preferences.
WHITEN_EPSILON = 1e-8


def _check(values: Tensor, mask: Tensor) -> None:
    check_bool(mask=mask)
    check_floating(values=values)
    check_same_shape(values=values, mask=mask)


def masked_sum(*, values: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], dim: int | None = None) -> Tensor:
    """Sum of the values under `mask`, in float32 (float64 stays): a scalar, or without the axis `dim`."""
    _check(values, mask)
    total = kept(values, mask)
    return total.sum() if dim is None else total.sum(dim)


def masked_mean(*, values: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], dim: int | None = None) -> Tensor:
    """Mean of the values under `mask`: a scalar, or without the axis `dim`. The mean of nothing is NaN."""
    count = mask.sum() if dim is None else mask.sum(dim)
    return masked_sum(values=values, mask=mask, dim=dim) / count


def masked_var(*, values: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """Biased variance (divided by the count, ddof = 0) of the values under `mask`. Of nothing it is NaN."""
    mean = masked_mean(values=values, mask=mask)
    return masked_mean(values=(kept(values, mask) - mean).square(), mask=mask)


def masked_whiten(
    *, values: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], shift_mean: bool = True
) -> Float[Tensor, "*shape"]:
    """Values scaled to unit variance under `mask`, zero outside.

    `shift_mean=True` moves the mean to 0; `shift_mean=False` keeps the old mean. Biased variance, as in Ziegler et
    al. 2019 (`tf.nn.moments`). The statistics are of the tensor that is passed: pass the global batch.
    """
    _check(values, mask)
    count = mask.sum().clamp(min=1)
    inside = kept(values, mask)
    mean = inside.sum() / count
    centred = torch.where(mask, inside - mean, 0.0)
    variance = centred.square().sum() / count
    whitened = centred * torch.rsqrt(variance + WHITEN_EPSILON)
    if not shift_mean:
        whitened = whitened + mean
    return torch.where(mask, whitened, 0.0)


def explained_variance(
    *, predictions: Float[Tensor, "*shape"], targets: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]
) -> Float[Tensor, ""]:
    """1 - Var(targets - predictions) / Var(targets) under `mask`: 1 is perfect, 0 a constant; NaN for equal targets."""
    check_same_shape(predictions=predictions, targets=targets, mask=mask)
    total = masked_var(values=targets, mask=mask)
    residual = masked_var(values=targets - predictions, mask=mask)
    return torch.where(total > 0, 1.0 - residual / total, torch.nan)
