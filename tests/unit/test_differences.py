"""The patterns by which the self-test tells mistakes apart, on numbers made by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlhf.batches import Rollout
from rlhf.stages.ppo.differences import Differences, Tolerance
from tests.unit.self_test_example import to_rollout

TOLERANCE = Tolerance(mean=0.125, largest=1.0)


def make_rollout(mask: Tensor, num_padded: int = 0) -> Rollout:
    """Responses of zeros under `mask` (B, R); the first `num_padded` rows have a padded prompt slot."""
    prompt_mask = torch.ones(len(mask), 2, dtype=torch.bool)
    prompt_mask[:num_padded, 0] = False
    zeros = torch.zeros(mask.shape)
    return to_rollout(prompt_mask.long(), prompt_mask, zeros.long(), mask, zeros, mask[:, 0])


def seen(differences: list[list[float]], num_padded: int = 0) -> Differences:
    """Log-probs that differ by these numbers (B, R), all of real tokens."""
    values = torch.tensor(differences)
    return Differences.of(values, torch.zeros_like(values), make_rollout(torch.ones_like(values).bool(), num_padded))


def test_rounding_has_a_mean_and_a_largest_size() -> None:
    assert seen([[0.125, -0.125], [0.125, -0.125]]).within(TOLERANCE)
    assert not seen([[0.25, -0.125], [0.125, -0.125]]).within(TOLERANCE)  # on average 0.156
    # On average 0.05, but one token by 1.1.
    one_large = [[0.0] * 11 + [1.1], [0.0] * 10 + [0.1, 0.0]]
    assert not seen(one_large).within(TOLERANCE)
    one_large[0][-1] = 0.9
    assert seen(one_large).within(TOLERANCE)
    assert not seen([[torch.nan, 0.0]]).within(TOLERANCE)


def test_differences_in_the_first_slots_only() -> None:
    assert seen([[0.5, 0.4, 0.0, 0.05]]).only_before(2, TOLERANCE)
    assert not seen([[0.5, 0.4, 0.3, 0.05]]).only_before(2, TOLERANCE)
    assert not seen([[0.0, 0.05, 0.0, 0.05]]).only_before(2, TOLERANCE)
    assert not seen([[0.5, 0.4]]).only_before(0, TOLERANCE)


def test_differences_from_the_second_slot_on() -> None:
    assert seen([[0.0, 0.5], [0.1, -0.5]]).grows_along_response(TOLERANCE)
    assert not seen([[0.5, 0.5], [0.1, -0.5]]).grows_along_response(TOLERANCE)
    assert not seen([[0.0, 0.1], [0.0, 0.0]]).grows_along_response(TOLERANCE)


def test_differences_in_padded_rows_only() -> None:
    assert seen([[0.5, 0.5], [0.0, 0.1], [0.1, 0.0]], num_padded=2).only_padded_rows(TOLERANCE)
    assert not seen([[0.5, 0.5], [0.0, 0.1], [0.5, 0.0]], num_padded=2).only_padded_rows(TOLERANCE)
    # One of three padded rows is too few to blame padding; without a row of either kind nothing can be said.
    assert not seen([[0.5, 0.5], [0.0, 0.1], [0.1, 0.0], [0.0, 0.0]], num_padded=3).only_padded_rows(TOLERANCE)
    assert not seen([[0.5, 0.5], [0.5, 0.1]], num_padded=2).only_padded_rows(TOLERANCE)
    assert not seen([[0.5, 0.5], [0.5, 0.1]]).only_padded_rows(TOLERANCE)


def test_differences_on_one_side() -> None:
    assert seen([[0.5, 0.0, 0.9, 0.0]]).one_sided(TOLERANCE)
    assert not seen([[0.5, 0.0, 0.9, -0.5]]).one_sided(TOLERANCE)
    assert not seen([[0.125, 0.0, 0.25, 0.0]]).one_sided(TOLERANCE)
    assert not seen([[9.0, 0.0, 9.0, 0.0]]).one_sided(TOLERANCE)  # more than any cut takes away


def test_rounding_is_centred_on_zero() -> None:
    noise = (0.08 * torch.randn(4, 50, generator=torch.Generator().manual_seed(0))).tolist()
    assert seen(noise).like_rounding(TOLERANCE)
    assert not seen([[value + 0.05 for value in row] for row in noise]).like_rounding(TOLERANCE)


def test_the_slope_by_hand() -> None:
    """second = 2 * first - 1 for the real tokens: slope 2, difference 1 - first, whose correlation with it is -1."""
    first = torch.tensor([[-1.0, -2.0], [-4.0, 9.0]])
    mask = torch.tensor([[True, True], [True, False]])
    rollout = make_rollout(mask)
    found = Differences.of(first, 2 * first - 1, rollout)
    assert found.slope == pytest.approx(2.0)
    assert found.correlation == pytest.approx(-1.0)
    assert found.mean == pytest.approx((2 + 3 + 5) / 3)
    assert found.sharper() == "second"
    with pytest.raises(ValueError, match="must be"):
        Differences.of(first[:1], first, rollout)
