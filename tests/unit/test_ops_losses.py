"""Policy, value and pairwise losses: numbers by hand, oracles, partition invariance, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlhf.ops.losses import Metrics, merge_metrics, pairwise_loss, ppo_policy_loss, ppo_value_loss
from tests.unit import oracles
from tests.unit.ragged import backward, normal, prefix_mask, ragged


def test_policy_loss_by_hand() -> None:
    # Clip .2 below, .3 above. Ratios and advantages, and what each token contributes to the objective:
    #   1.0 *  2 =  2 (inside)      1.5 with  1: clipped at 1.3 ->  1.3      .5 with  1: not clipped -> .5
    #   1.5 with -1: not clipped -> -1.5      .5 with -1: clipped at .8 -> -.8      a padded token
    ratios = torch.tensor([[1.0, 1.5, 0.5], [1.5, 0.5, 77.0]])
    old = torch.full((2, 3), -2.0)
    loss_sum, count, metrics = ppo_policy_loss(
        logprobs=old + ratios.log(),
        old_logprobs=old,
        advantages=torch.tensor([[2.0, 1.0, 1.0], [-1.0, -1.0, 9.0]]),
        mask=torch.tensor([[True, True, True], [True, True, False]]),
        clip_low=0.2,
        clip_high=0.3,
    )
    assert loss_sum.item() == pytest.approx(-(2 + 1.3 + 0.5 - 1.5 - 0.8), abs=1e-6)
    assert count.item() == 5
    assert metrics["clip_fraction"].item() == 2
    assert metrics["ratio_max"].item() == pytest.approx(1.5)
    # (r - 1) - log r: 0, then twice .5 - log 1.5, twice -.5 - log .5.
    expected = 2 * (0.5 - math.log(1.5)) + 2 * (-0.5 - math.log(0.5))
    assert metrics["approx_kl"].item() == pytest.approx(expected, abs=1e-6)


def test_first_epoch_has_ratio_one() -> None:
    logprobs = -torch.rand(2, 3)
    arguments: dict[str, Any] = {"advantages": torch.randn(2, 3), "mask": torch.ones(2, 3, dtype=torch.bool)}
    loss_sum, _, metrics = ppo_policy_loss(
        logprobs=logprobs, old_logprobs=logprobs, clip_low=0.2, clip_high=0.2, **arguments
    )
    assert metrics["ratio_max"].item() == 1.0
    assert metrics["approx_kl"].item() == 0.0
    assert metrics["clip_fraction"].item() == 0.0
    assert loss_sum.item() == pytest.approx(-arguments["advantages"].sum().item(), abs=1e-6)


@given(case=ragged(), clip_low=st.sampled_from([0.1, 0.2]), clip_high=st.sampled_from([0.2, 0.5]))
def test_policy_loss_against_oracle(case: tuple[Tensor, torch.Generator], clip_low: float, clip_high: float) -> None:
    mask, generator = case
    old, difference, advantages = (normal(mask, generator) for _ in range(3))
    logprobs = (old + 0.5 * difference).requires_grad_()
    loss_sum, count, metrics = ppo_policy_loss(
        logprobs=logprobs, old_logprobs=old, advantages=advantages, mask=mask, clip_low=clip_low, clip_high=clip_high
    )
    ratios = (0.5 * difference)[mask].exp().tolist()
    pairs = list(zip(ratios, advantages[mask].tolist(), strict=True))
    objectives = [oracles.clipped_objective(ratio, advantage, clip_low, clip_high) for ratio, advantage in pairs]
    assert loss_sum.item() == pytest.approx(-sum(objectives), rel=1e-9, abs=1e-9)
    assert count.item() == len(pairs)
    clipped = [objective != ratio * advantage for objective, (ratio, advantage) in zip(objectives, pairs, strict=True)]
    # Comparing floats of two implementations: what is clipped differs by far more than rounding.
    assert metrics["clip_fraction"].item() == sum(
        flag and abs(objective - ratio * advantage) > 1e-9
        for flag, objective, (ratio, advantage) in zip(clipped, objectives, pairs, strict=True)
    )
    backward(loss_sum)
    # d/d logprob of -ratio * A is -ratio * A where the plain term counts, and 0 where the clip does.
    slopes = [0.0 if flag else -ratio * advantage for flag, (ratio, advantage) in zip(clipped, pairs, strict=True)]
    assert logprobs.grad is not None
    assert logprobs.grad[mask].tolist() == pytest.approx(slopes, rel=1e-9, abs=1e-9)
    assert (logprobs.grad[~mask] == 0).all()


def test_value_loss_by_hand() -> None:
    # Old value 1, clip .2. Value 1.5, return 1: errors .25 and (1.2 - 1)^2 = .04 -> .25, not clipped.
    # Value 1.5, return 2: errors .25 and (1.2 - 2)^2 = .64 -> .64, clipped. Value 1.1, return 0: 1.21 both.
    # Value .5, return 0: errors .25 and (.8 - 0)^2 = .64 -> .64, clipped. Half of everything.
    arguments = {
        "values": torch.tensor([[1.5, 1.5, 1.1], [0.5, 1e4, 1e4]]),
        "old_values": torch.ones(2, 3),
        "returns": torch.tensor([[1.0, 2.0, 0.0], [0.0, 1e4, -1e4]]),
        "mask": prefix_mask([3, 1], 3),
    }
    loss_sum, count, metrics = ppo_value_loss(clip=0.2, **arguments)
    assert loss_sum.item() == pytest.approx(0.5 * (0.25 + 0.64 + 1.21 + 0.64), rel=1e-6)
    assert count.item() == 4
    assert metrics["value_clip_fraction"].item() == 2
    plain, _, metrics = ppo_value_loss(clip=None, **arguments)
    assert plain.item() == pytest.approx(0.5 * (0.25 + 0.25 + 1.21 + 0.25), rel=1e-6)
    assert metrics["value_clip_fraction"].item() == 0


@given(case=ragged(), clip=st.sampled_from([0.05, 0.2, 1.0]))
def test_value_loss_against_oracle(case: tuple[Tensor, torch.Generator], clip: float) -> None:
    mask, generator = case
    values, old, returns = (normal(mask, generator) for _ in range(3))
    loss_sum, count, _ = ppo_value_loss(values=values, old_values=old, returns=returns, mask=mask, clip=clip)
    rows = zip(values[mask].tolist(), old[mask].tolist(), returns[mask].tolist(), strict=True)
    expected = sum(oracles.clipped_value_error(value, before, target, clip) for value, before, target in rows)
    assert loss_sum.item() == pytest.approx(expected, rel=1e-9)
    assert count.item() == int(mask.sum())


def test_pairwise_loss_by_hand() -> None:
    # Differences log 3, 0, -log 3: sigmoids 3/4, 1/2, 1/4; the product of the losses' exponentials is 4/3 * 2 * 4.
    chosen, rejected = torch.tensor([math.log(3.0) + 1, 2.0, 0.0]), torch.tensor([1.0, 2.0, math.log(3.0)])
    loss_sum, count, metrics = pairwise_loss(chosen=chosen, rejected=rejected)
    assert loss_sum.item() == pytest.approx(math.log(4 / 3 * 2 * 4), rel=1e-6)
    assert count.item() == 3
    assert metrics["accuracy"].item() == 1.5
    assert metrics["score_difference"].item() == pytest.approx(0.0, abs=1e-6)
    assert metrics["chosen_score"].item() == pytest.approx(math.log(3.0) + 3.0)
    assert metrics["rejected_score"].item() == pytest.approx(math.log(3.0) + 3.0)
    # A margin of log 3 makes the first pair even: 1/2, then 1/4, then 1/10.
    margin = torch.full((3,), math.log(3.0))
    with_margin, _, metrics = pairwise_loss(chosen=chosen, rejected=rejected, margin=margin)
    assert with_margin.item() == pytest.approx(math.log(2 * 4 * 10), rel=1e-6)
    assert metrics["accuracy"].item() == 1.5


def test_pairwise_loss_against_oracle_and_far_apart() -> None:
    chosen, rejected = torch.randn(6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    expected = sum(map(oracles.logistic_pair_loss, chosen.tolist(), rejected.tolist()))
    assert pairwise_loss(chosen=chosen, rejected=rejected)[0].item() == pytest.approx(expected)
    # -log sigmoid(-200) is 200, not infinity.
    far = pairwise_loss(chosen=torch.tensor([-100.0]), rejected=torch.tensor([100.0]))[0]
    assert far.item() == pytest.approx(200.0)
    raised = chosen.clone().requires_grad_()
    backward(pairwise_loss(chosen=raised, rejected=rejected)[0])
    assert raised.grad is not None
    assert (raised.grad < 0).all()


def _policy_case(mask: Tensor, generator: torch.Generator) -> dict[str, Any]:
    old, difference, advantages = (normal(mask, generator) for _ in range(3))
    return {"logprobs": old + 0.5 * difference, "old_logprobs": old, "advantages": advantages, "mask": mask}


@given(case=ragged(max_rows=6), seed=st.integers(0, 1000))
def test_partition_invariance_rows_11_and_18(case: tuple[Tensor, torch.Generator], seed: int) -> None:
    """Row 11: micro-batches of uneven lengths, in any order, add up to the whole batch: loss, count, gradient, metrics.

    Row 18: the metrics count real tokens only, so trailing padding that only some micro-batches have changes none.
    """
    mask, generator = case
    arguments = _policy_case(mask, generator)

    def run(leaf: Tensor, rows: Tensor, width: int) -> tuple[Tensor, Tensor, Metrics]:
        parts = {name: tensor[rows][:, :width] for name, tensor in arguments.items() if name != "logprobs"}
        return ppo_policy_loss(logprobs=leaf[rows][:, :width], clip_low=0.2, clip_high=0.2, **parts)

    everything = torch.arange(len(mask))
    whole = arguments["logprobs"].clone().requires_grad_()
    loss_sum, count, metrics = run(whole, everything, mask.shape[1])
    backward(loss_sum / count)

    order = torch.randperm(len(mask), generator=torch.Generator().manual_seed(seed))
    split = arguments["logprobs"].clone().requires_grad_()
    total, counted, merged = torch.zeros(()), torch.zeros((), dtype=torch.long), None
    for rows in torch.split(order, 2):
        part_sum, part_count, part_metrics = run(split, rows, max(1, int(mask[rows].sum(1).max())))
        backward(part_sum / count)
        total, counted = total + part_sum.detach(), counted + part_count
        merged = part_metrics if merged is None else merge_metrics(merged, part_metrics)
    torch.testing.assert_close(total.double(), loss_sum.detach(), rtol=1e-6, atol=1e-6)
    assert counted == count
    torch.testing.assert_close(split.grad, whole.grad, rtol=1e-12, atol=1e-12)
    assert merged is not None
    for name, value in metrics.items():
        torch.testing.assert_close(merged[name], value, rtol=1e-12, atol=1e-12)


def test_value_and_pairwise_losses_split() -> None:
    """Row 11 for the value loss and row 40 for pairs: a sum over parts is the sum over the whole."""
    mask = prefix_mask([3, 1, 2, 0], 3)
    tensors = {name: torch.randn(4, 3) for name in ("values", "old_values", "returns")}
    whole, count, _ = ppo_value_loss(**tensors, mask=mask, clip=0.2)
    parts = [
        ppo_value_loss(**{name: tensor[rows] for name, tensor in tensors.items()}, mask=mask[rows], clip=0.2)
        for rows in (slice(0, 1), slice(1, 4))
    ]
    assert float(sum(part[0] for part in parts)) == pytest.approx(whole.item(), rel=1e-6)
    assert sum(part[1] for part in parts) == count
    chosen, rejected = torch.randn(5), torch.randn(5)
    singles = [pairwise_loss(chosen=chosen[row : row + 1], rejected=rejected[row : row + 1])[0] for row in range(5)]
    assert float(sum(singles)) == pytest.approx(pairwise_loss(chosen=chosen, rejected=rejected)[0].item(), rel=1e-6)


def test_empty_batch_contributes_nothing() -> None:
    """A rank whose rows are all excluded adds zero to the sums, and its gradient is zero."""
    mask = torch.zeros(2, 3, dtype=torch.bool)
    nan = torch.full((2, 3), float("nan"), requires_grad=True)
    loss_sum, count, metrics = ppo_policy_loss(
        logprobs=nan, old_logprobs=nan.detach(), advantages=nan.detach(), mask=mask, clip_low=0.2, clip_high=0.2
    )
    backward(loss_sum)
    assert (loss_sum.item(), count.item()) == (0.0, 0)
    assert {name: value.item() for name, value in metrics.items()} == {
        "clip_fraction": 0.0,
        "dual_clip_fraction": 0.0,
        "approx_kl": 0.0,
        "ratio_max": 0.0,
    }
    assert nan.grad is not None
    assert (nan.grad == 0).all()


def test_only_what_is_trained_gets_a_gradient() -> None:
    mask = torch.ones(1, 2, dtype=torch.bool)
    new, old, third = (torch.randn(1, 2, requires_grad=True) for _ in range(3))
    policy = ppo_policy_loss(logprobs=new, old_logprobs=old, advantages=third, mask=mask, clip_low=0.2, clip_high=0.2)
    value = ppo_value_loss(values=new, old_values=old, returns=third, mask=mask, clip=0.2)
    backward(policy[0] + value[0])
    assert new.grad is not None
    assert old.grad is None
    assert third.grad is None
    assert not any(tensor.requires_grad for metrics in (policy[2], value[2]) for tensor in metrics.values())


def test_merge_metrics() -> None:
    first = {"a": torch.tensor(1.0), "b_max": torch.tensor(5.0)}
    second = {"a": torch.tensor(2.0), "b_max": torch.tensor(3.0)}
    assert {name: value.item() for name, value in merge_metrics(first, second).items()} == {"a": 3.0, "b_max": 5.0}
    with pytest.raises(ValueError, match="same names"):
        merge_metrics(first, {"a": torch.tensor(1.0)})


def test_refusals_rows_4_and_29() -> None:
    """Rows 4, 29: keyword-only, a bool mask, one shape; (B,) against (B, 1) or (1, B) never becomes (B, B)."""
    ones, mask = torch.ones(2, 2), torch.ones(2, 2, dtype=torch.bool)
    policy: dict[str, Any] = {"logprobs": ones, "old_logprobs": ones, "advantages": ones, "mask": mask}
    value: dict[str, Any] = {"values": ones, "old_values": ones, "returns": ones, "mask": mask}
    # The advantages where the mask belongs.
    with pytest.raises(TypeError, match="mask must be a bool"):
        ppo_policy_loss(**{**policy, "mask": ones}, clip_low=0.2, clip_high=0.2)
    with pytest.raises(TypeError, match="mask must be a bool"):
        ppo_value_loss(**{**value, "mask": mask.long()}, clip=0.2)
    for name in ("logprobs", "old_logprobs", "advantages", "mask"):
        with pytest.raises(ValueError, match=rf"{name} \(1, 2\)"):
            ppo_policy_loss(**{**policy, name: policy[name][:1]}, clip_low=0.2, clip_high=0.2)
    for name in ("values", "old_values", "returns", "mask"):
        with pytest.raises(ValueError, match=rf"{name} \(1, 2\)"):
            ppo_value_loss(**{**value, name: value[name][:1]}, clip=0.2)
    with pytest.raises(TypeError, match="positional"):
        ppo_policy_loss(ones, ones, ones, mask, 0.2, 0.2)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="rejected must have 1 axes"):
        pairwise_loss(chosen=torch.ones(2), rejected=torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"rejected \(3,\)"):
        pairwise_loss(chosen=torch.ones(2), rejected=torch.ones(3))
    with pytest.raises(ValueError, match="margin"):
        pairwise_loss(chosen=torch.ones(2), rejected=torch.ones(2), margin=torch.ones(2, 1))
