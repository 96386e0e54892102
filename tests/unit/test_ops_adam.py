"""Adam as TensorFlow 1 has it."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from rlhf.ops.adam import TensorFlowAdam
from tests.unit import oracles
from tests.unit.ragged import backward


def _path(gradients: list[float], start: float = 1.0, **settings: Any) -> list[float]:
    parameter = torch.tensor([start], dtype=torch.float64, requires_grad=True)
    optimizer = TensorFlowAdam([parameter], **settings)
    path = []
    for gradient in gradients:
        parameter.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
        path.append(parameter.item())
    return path


def test_golden_values_by_hand_row_30() -> None:
    """Row 30: epsilon stands beside sqrt(v), not beside the corrected one.

    beta1 = beta2 = 1/2, lr = 1, epsilon = 1, gradients 2 and 4, from 1:
    m = 1, v = 2: step size sqrt(1/2) / (1/2) = sqrt 2; 1 - sqrt 2 * 1 / (sqrt 2 + 1) = 1 - 2 + sqrt 2 = sqrt 2 - 1.
    m = 2.5, v = 9: step size sqrt(3/4) / (3/4) = 2 / sqrt 3; minus 2 / sqrt 3 * 2.5 / (3 + 1) = 1.25 / sqrt 3.
    torch would take 2 / (2 + 1) at the first step.
    """
    settings: dict[str, Any] = {"lr": 1.0, "betas": (0.5, 0.5), "eps": 1.0}
    first, second = _path([2.0, 4.0], **settings)
    assert first == pytest.approx(math.sqrt(2) - 1)
    assert second == pytest.approx(math.sqrt(2) - 1 - 1.25 / math.sqrt(3))
    parameter = torch.ones(1, dtype=torch.float64, requires_grad=True)
    parameter.grad = torch.full((1,), 2.0, dtype=torch.float64)
    torch.optim.Adam([parameter], **settings).step()
    assert parameter.item() == pytest.approx(1 - 2 / 3)


@given(
    gradients=st.lists(st.floats(-3, 3), min_size=1, max_size=12),
    decay=st.sampled_from([0.0, 0.1]),
    epsilon=st.sampled_from([1e-8, 1e-5, 0.1]),
)
def test_against_oracle_row_30(gradients: list[float], decay: float, epsilon: float) -> None:
    """Row 30: the averages written out as sums over all gradients give the same path."""
    expected = oracles.tensorflow_adam(0.7, gradients, 0.01, 0.9, 0.999, epsilon, decay)
    found = _path(gradients, start=0.7, lr=0.01, betas=(0.9, 0.999), eps=epsilon, weight_decay=decay)
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_early_updates_are_smaller_than_torchs_and_late_ones_equal_row_30() -> None:
    """Row 30: with a gradient the size of epsilon, the first update is a fraction of torch's; after 10^4 they agree."""
    parameters = [torch.zeros(1, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    settings: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-5}
    ours = TensorFlowAdam([parameters[0]], **settings)
    theirs = torch.optim.AdamW([parameters[1]], **settings, weight_decay=0.0)
    updates: list[list[float]] = []
    for _ in range(10_000):
        before = [parameter.item() for parameter in parameters]
        for parameter in parameters:
            parameter.grad = torch.full((1,), 1e-5, dtype=torch.float64)
        ours.step()
        theirs.step()
        updates.append([parameter.item() - old for parameter, old in zip(parameters, before, strict=True)])
    # At step 1: lr / (1 + 1 / sqrt(.001)) against lr / 2.
    assert updates[0] == pytest.approx([-1e-3 / (1 + 1 / math.sqrt(0.001)), -0.5e-3], rel=1e-6)
    assert updates[-1][0] == pytest.approx(updates[-1][1], rel=1e-3)


def test_decay_is_decoupled_and_comes_with_the_rate() -> None:
    # No gradient to speak of: each step multiplies by 1 - .1 * .5.
    assert _path([0.0, 0.0], start=8.0, lr=0.1, weight_decay=0.5) == pytest.approx([8 * 0.95, 8 * 0.95**2])


def _train(optimizer: torch.optim.Optimizer, weight: Tensor, steps: range, scheduler: LambdaLR) -> None:
    for step in steps:
        optimizer.zero_grad()
        backward(((weight - step) ** 2).sum())
        optimizer.step()
        scheduler.step()


def _setup() -> tuple[Tensor, Tensor, TensorFlowAdam, LambdaLR]:
    weight, other = torch.tensor([1.0, -2.0], requires_grad=True), torch.tensor([3.0], requires_grad=True)
    optimizer = TensorFlowAdam([{"params": [weight], "lr": 0.1}, {"params": [other], "lr": 0.01}], eps=1e-5)
    return weight, other, optimizer, LambdaLR(optimizer, lambda step: 1.0 / (step + 1))


def test_groups_schedulers_and_resuming() -> None:
    """Six steps equal three, a state that goes out and comes back, and three more, bit for bit."""
    weight, other, optimizer, scheduler = _setup()
    _train(optimizer, weight, range(6), scheduler)
    assert other.tolist() == [3.0]
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1 / 7, 0.01 / 7])
    whole = weight.detach().clone()

    weight, _, optimizer, scheduler = _setup()
    _train(optimizer, weight, range(3), scheduler)
    states = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
    assert set(states[0]["state"][0]) == {"step", "exp_avg", "exp_avg_sq"}
    assert all(isinstance(entry, Tensor) for entry in states[0]["state"][0].values())
    again, _, optimizer, scheduler = _setup()
    again.data.copy_(weight.data)
    optimizer.load_state_dict(states[0])
    scheduler.load_state_dict(states[1])
    _train(optimizer, again, range(3, 6), scheduler)
    assert torch.equal(again.detach(), whole)


def test_a_schedule_scales_the_update() -> None:
    """The rate of a group is read at every step: half the rate is half the first update."""
    first = [1.0 - _path([2.0], lr=rate)[0] for rate in (0.1, 0.05)]
    assert first[0] == pytest.approx(2 * first[1])


def test_a_closure_is_evaluated_with_gradients() -> None:
    weight = torch.ones(1, requires_grad=True)
    optimizer = TensorFlowAdam([weight], lr=0.1)

    def closure() -> float:
        optimizer.zero_grad()
        loss = (weight**2).sum()
        backward(loss)
        return loss.item()

    assert optimizer.step(closure) == 1.0
    assert weight.item() < 1.0


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"lr": -1.0}, "lr"),
        ({"eps": math.nan}, "eps"),
        ({"betas": (1.0, 0.9)}, "betas"),
        ({"weight_decay": -1}, "decay"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        TensorFlowAdam([torch.ones(1, requires_grad=True)], **settings)


def test_sparse_gradients_are_refused() -> None:
    weight = torch.ones(3, requires_grad=True)
    weight.grad = torch.zeros(3).to_sparse()
    with pytest.raises(TypeError, match="sparse"):
        TensorFlowAdam([weight]).step()


def test_every_group_has_its_own_rate() -> None:
    parameters = [torch.ones(1, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    optimizer = TensorFlowAdam([{"params": parameters[:1], "lr": 0.1}, {"params": parameters[1:], "lr": 0.01}])
    for parameter in parameters:
        parameter.grad = torch.full((1,), 2.0, dtype=torch.float64)
    optimizer.step()
    steps = [1.0 - parameter.item() for parameter in parameters]
    assert steps[0] == pytest.approx(10 * steps[1])
