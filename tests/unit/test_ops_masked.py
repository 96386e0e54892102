"""Sums, means, variances, whitening."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor

from rlhf.ops.masked import explained_variance, masked_mean, masked_sum, masked_var, masked_whiten
from tests.unit import oracles
from tests.unit.ragged import normal, ragged

NAN = float("nan")


def test_sums_and_means_by_hand() -> None:
    values = torch.tensor([[1.0, 2.0, NAN], [6.0, NAN, NAN], [NAN, NAN, NAN]])
    mask = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])
    assert masked_sum(values=values, mask=mask).item() == 9.0
    assert masked_mean(values=values, mask=mask).item() == 3.0
    # ((1-3)^2 + (2-3)^2 + (6-3)^2) / 3 = 14 / 3; divided by 2 it would be 7.
    assert masked_var(values=values, mask=mask).item() == pytest.approx(14 / 3)
    assert masked_sum(values=values, mask=mask, dim=1).tolist() == [3.0, 6.0, 0.0]


def test_sequence_mean_counts_no_padding_row_13() -> None:
    """Row 13: the mean of a sequence divides by its own length, and an empty one has no mean."""
    values = torch.tensor([[1.0, 2.0, 1e4, 1e4], [5.0, 1e4, 1e4, 1e4], [1e4, 1e4, 1e4, 1e4]])
    mask = torch.tensor([[True, True, False, False], [True, False, False, False], [False] * 4])
    means = masked_mean(values=values, mask=mask, dim=1)
    assert means[:2].tolist() == [1.5, 5.0]
    assert math.isnan(means[2])


def test_sums_are_float32_for_bf16_input() -> None:
    # 256 + 1 is not a bf16 number: a bf16 running sum of 257 ones stops at 256.
    ones = torch.ones(1, 257, dtype=torch.bfloat16)
    assert masked_sum(values=ones, mask=torch.ones(1, 257, dtype=torch.bool)).item() == 257.0


def test_whitening_golden_3x3_row_32() -> None:
    """Row 32: biased variance. 1..9 has mean 5 and variance 60/9; (9 - 5) / sqrt(60/9) = 1.549193, not 4/sqrt(60/8)."""
    values = torch.arange(1.0, 10.0).reshape(3, 3)
    whitened = masked_whiten(values=values, mask=torch.ones(3, 3, dtype=torch.bool))
    expected = torch.tensor(
        [[-1.549193, -1.161895, -0.774597], [-0.387298, 0.0, 0.387298], [0.774597, 1.161895, 1.549193]]
    )
    assert torch.allclose(whitened, expected, atol=1e-5)


def test_whitening_golden_3x3_masked_row_32() -> None:
    """Row 32, masked: of 1, 2, 4, 7, 8, 9 the mean is 31/6 and the mean square 215/6, so the variance is 329/36."""
    values = torch.arange(1.0, 10.0).reshape(3, 3)
    mask = torch.tensor([[True, True, False], [True, False, False], [True, True, True]])
    whitened = masked_whiten(values=values, mask=mask)
    assert whitened[2, 2].item() == pytest.approx((9 - 31 / 6) / math.sqrt(329 / 36), abs=1e-5)
    assert (whitened[~mask] == 0).all()


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_moves_the_mean_only_when_asked_row_31(shift_mean: bool) -> None:
    """Row 31: the mean becomes 0, or stays exactly what it was; the variance is 1 either way."""
    values = torch.tensor([[3.0, 5.0, NAN], [10.0, NAN, NAN]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    whitened = masked_whiten(values=values, mask=mask, shift_mean=shift_mean)
    assert masked_mean(values=whitened, mask=mask).item() == pytest.approx(0.0 if shift_mean else 6.0, abs=1e-6)
    assert masked_var(values=whitened, mask=mask).item() == pytest.approx(1.0, abs=1e-5)
    assert (whitened[~mask] == 0).all()


@given(case=ragged())
def test_whitening_against_oracle(case: tuple[Tensor, torch.Generator]) -> None:
    mask, generator = case
    values = 3.0 * normal(mask, generator) + 2.0
    for shift_mean in (True, False):
        found = masked_whiten(values=values, mask=mask, shift_mean=shift_mean)[mask]
        np.testing.assert_allclose(found, oracles.whiten(values[mask].tolist(), shift_mean), rtol=1e-7, atol=1e-7)


def test_whitening_of_one_number_or_none_is_zero() -> None:
    values = torch.full((2, 2), 7.0)
    one = torch.tensor([[True, False], [False, False]])
    assert (masked_whiten(values=values, mask=one) == 0).all()
    assert (masked_whiten(values=values, mask=torch.zeros_like(one)) == 0).all()


def test_explained_variance_by_hand() -> None:
    targets = torch.tensor([[1.0, 3.0, NAN], [5.0, NAN, NAN]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    # Targets vary by 8/3. Residuals 1, 0, -1 vary by 2/3: 1 - 2/8 = 0.75. A constant offset in the residual is free.
    predictions = torch.tensor([[0.0, 3.0, 1e4], [6.0, 1e4, 1e4]])
    assert explained_variance(predictions=predictions, targets=targets, mask=mask).item() == pytest.approx(0.75)
    shifted = explained_variance(predictions=predictions + 9.0, targets=targets, mask=mask)
    assert shifted.item() == pytest.approx(0.75)
    constant = explained_variance(predictions=predictions, targets=torch.ones(2, 3), mask=mask)
    assert math.isnan(constant)


@pytest.mark.parametrize("operation", [masked_sum, masked_mean, masked_var, masked_whiten])
def test_refusals_rows_4_and_29(operation: object) -> None:
    """Rows 4 and 29: a mask that is not bool and shapes that would broadcast are refused; nothing is positional."""
    assert callable(operation)
    values, mask = torch.ones(2, 2), torch.ones(2, 2, dtype=torch.bool)
    with pytest.raises(TypeError, match="mask must be a bool"):
        operation(values=values, mask=values)
    with pytest.raises(ValueError, match=r"values \(2, 2\), mask \(1, 2\)"):
        operation(values=values, mask=mask[:1])
    with pytest.raises(TypeError, match="values must be a floating"):
        operation(values=mask.long(), mask=mask)
    with pytest.raises(TypeError, match="positional"):
        operation(values, mask)
