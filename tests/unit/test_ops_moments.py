"""Running mean and deviation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.ops.moments import RunningMoments

NUMBERS = st.floats(-1e3, 1e3, width=32)


def _of(*batches: list[float]) -> RunningMoments:
    moments = RunningMoments()
    for batch in batches:
        moments.update(torch.tensor(batch, dtype=torch.float64))
    return moments


def test_by_hand() -> None:
    # 1, 2, 6: mean 3, squared deviations 4 + 1 + 9 = 14. With 7: mean 4, deviations 9 + 4 + 4 + 9 = 26.
    moments = _of([1.0, 2.0, 6.0])
    assert (moments.count, moments.mean, moments.std) == pytest.approx((3, 3.0, math.sqrt(14 / 3)))
    moments.update(torch.tensor([7.0]))
    assert (moments.count, moments.mean, moments.std) == pytest.approx((4, 4.0, math.sqrt(26 / 4)))
    one = _of([5.0])
    assert (one.count, one.mean, one.std) == (1, 5.0, 0.0)


def test_nothing_seen_has_no_moments_and_an_empty_batch_changes_nothing() -> None:
    nothing = _of([])
    assert nothing.count == 0
    assert math.isnan(nothing.mean)
    assert math.isnan(nothing.std)
    moments = _of([1.0, 3.0], [])
    moments.merge(nothing)
    assert (moments.count, moments.mean, moments.std) == (2, 2.0, 1.0)
    nothing.merge(moments)
    assert (nothing.count, nothing.mean, nothing.std) == (2, 2.0, 1.0)


@given(batches=st.lists(st.lists(NUMBERS, max_size=5), min_size=1, max_size=5).filter(any), seed=st.integers(0, 99))
def test_batches_in_any_order_and_on_any_rank_give_the_moments_of_all(batches: list[list[float]], seed: int) -> None:
    """Equal to numpy on everything at once, whatever the batches, their order, and the ranks they came from."""
    everything = np.array([number for batch in batches for number in batch], dtype=np.float64)
    order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(seed)).tolist()
    ranks = [_of(*[batches[index] for index in order[rank::2]]) for rank in range(2)]
    ranks[0].merge(ranks[1])
    for found in (_of(*batches), _of(*[batches[index] for index in order]), ranks[0]):
        assert found.count == len(everything)
        assert found.mean == pytest.approx(everything.mean(), rel=1e-9, abs=1e-9)
        assert found.std == pytest.approx(everything.std(ddof=0), rel=1e-7, abs=1e-6)


def test_float64_keeps_the_deviation_beside_a_large_mean() -> None:
    # In float32, 10^8 + 1 is 10^8; and the mean of squares minus the squared mean has no digit left even in float64.
    values = torch.tensor([1e8, 1e8 + 2.0], dtype=torch.float64)
    moments = RunningMoments()
    for _ in range(50):
        moments.update(values)
    assert moments.std == pytest.approx(1.0, rel=1e-6)


def test_bf16_scores_are_summed_in_float64() -> None:
    moments = RunningMoments()
    moments.update(torch.ones(3, 100, dtype=torch.bfloat16, requires_grad=True))
    assert (moments.count, moments.mean, moments.std) == (300, 1.0, 0.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_would_stay_for_ever_is_refused(bad: float) -> None:
    moments = _of([1.0, 3.0])
    with pytest.raises(ValueError, match="1 of 3 are NaN or infinite"):
        moments.update(torch.tensor([1.0, bad, 2.0]))
    assert (moments.count, moments.mean, moments.std) == (2, 2.0, 1.0)
    with pytest.raises(TypeError, match="floating-point"):
        moments.update(torch.tensor([1, 2]))


def test_state_goes_out_and_comes_back() -> None:
    moments, again = _of([1.0, 2.0], [4.0, 8.5]), RunningMoments()
    again.load_state_dict(moments.state_dict())
    for each in (moments, again):
        each.update(torch.tensor([0.1, 0.7]))
    assert again.state_dict() == moments.state_dict()
    with pytest.raises(ValueError, match="count, mean and squares"):
        again.load_state_dict({"count": 1, "mean": 0.0})
    for wrong in ({"count": -1}, {"mean": math.nan}, {"squares": -1.0}):
        with pytest.raises(ValueError, match="not the state"):
            again.load_state_dict(moments.state_dict() | wrong)
