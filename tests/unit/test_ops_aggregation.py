"""How the losses of tokens become one number, and the dual clip."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlhf.ops.losses import (
    LossAggregation,
    aggregation_count,
    aggregation_weights,
    merge_metrics,
    ppo_policy_loss,
    weighted_sum,
)
from tests.unit import oracles
from tests.unit.ragged import backward, normal, prefix_mask, ragged

AGGREGATIONS: tuple[LossAggregation, ...] = ("token_mean", "sequence_mean", "fixed_length")


def test_dual_clip_by_hand() -> None:
    # Clip .2 on both sides, dual clip 3. Ratios, advantages and the objective of each token:
    #   5 with -1: -5 without it, held at -3.     2 with -1: -2, above -3, left.       .5 with -1: clipped at .8: -.8
    #   5 with  1: clipped at 1.2, the dual clip never touches a positive advantage.   100 with 0: 0
    #   5 with -2: -10 without it, held at -6.
    ratios = torch.tensor([[5.0, 2.0, 0.5], [5.0, 100.0, 5.0]], dtype=torch.float64)
    old = torch.full((2, 3), -7.0, dtype=torch.float64)
    logprobs = (old + ratios.log()).requires_grad_()
    arguments: dict[str, Any] = {
        "old_logprobs": old,
        "advantages": torch.tensor([[-1.0, -1.0, -1.0], [1.0, 0.0, -2.0]], dtype=torch.float64),
        "mask": torch.ones(2, 3, dtype=torch.bool),
        "clip_low": 0.2,
        "clip_high": 0.2,
    }
    loss_sum, count, metrics = ppo_policy_loss(logprobs=logprobs, dual_clip=3.0, **arguments)
    assert loss_sum.item() == pytest.approx(3 + 2 + 0.8 - 1.2 - 0 + 6)
    assert count.item() == 6
    assert metrics["dual_clip_fraction"].item() == 2
    # The ordinary clip held .5 with -1 and 5 with 1.
    assert metrics["clip_fraction"].item() == 2
    backward(loss_sum)
    assert logprobs.grad is not None
    # Only 2 with -1 is inside every bound, so it alone pulls: d/d logprob of 2 is 2.
    assert logprobs.grad.flatten().tolist() == pytest.approx([0, 2.0, 0, 0, 0, 0])
    plain, _, metrics = ppo_policy_loss(logprobs=logprobs, **arguments)
    assert plain.item() == pytest.approx(5 + 2 + 0.8 - 1.2 - 0 + 10)
    assert metrics["dual_clip_fraction"].item() == 0


@pytest.mark.parametrize("bound", [1.0, 0.5, -3.0, math.nan, math.inf])
def test_a_dual_clip_that_is_not_above_one_is_refused(bound: float) -> None:
    ones = torch.ones(1, 1)
    with pytest.raises(ValueError, match="dual_clip must be above 1"):
        ppo_policy_loss(
            logprobs=ones,
            old_logprobs=ones,
            advantages=ones,
            mask=ones.bool(),
            clip_low=0.2,
            clip_high=0.2,
            dual_clip=bound,
        )


def test_weights_by_hand_row_13() -> None:
    """Row 13: a sequence's mean is over its own tokens, not over its padded width."""
    # Rows of 3, 1 and 0 tokens with losses 1, 2, 6 and 4; the longest allowed response has 4.
    mask = prefix_mask([3, 1, 0], 3)
    losses = torch.tensor([[1.0, 2.0, 6.0], [4.0, 99.0, 99.0], [99.0, 99.0, 99.0]])
    # Means: of the four tokens 13/4; of the row means 3 and 4: 3.5; of the row sums 9 and 4, each over 4: 13/8.
    expected = {"token_mean": (13.0, 4, 3.25), "sequence_mean": (7.0, 2, 3.5), "fixed_length": (3.25, 2, 1.625)}
    for aggregation in AGGREGATIONS:
        weights = aggregation_weights(mask=mask, aggregation=aggregation, length=4)
        total = weighted_sum(values=losses, mask=mask, weights=weights)
        count = aggregation_count(mask=mask, aggregation=aggregation)
        assert (total.item(), count.item(), (total / count).item()) == pytest.approx(expected[aggregation])
        assert weights.dtype == torch.float32
        assert (weights[~mask] == 0).all()
        assert count.ndim == 0
    assert weighted_sum(values=losses, mask=mask).item() == 13.0


def test_golden_loss_and_gradient_norm_row_47() -> None:
    """Row 47: what each aggregation makes of a fixed batch, so that none can change unnoticed.

    Rows of 3 and 1 tokens with advantages 1, 2, 2 and 4, ratios 1. Losses: -9/4; -(5/3 + 4)/2; -(5/4 + 4/4)/2 for a
    longest response of 4. Gradients: (1, 2, 2, 4)/4 of norm 5/4; ((1, 2, 2)/3, 4)/2 of norm sqrt(4.25); norm 5/8.
    """
    mask = prefix_mask([3, 1], 3)
    advantages = torch.tensor([[1.0, 2.0, 2.0], [4.0, 99.0, 99.0]], dtype=torch.float64)
    expected = {
        "token_mean": (-2.25, 1.25),
        "sequence_mean": (-17 / 6, math.sqrt(4.25)),
        "fixed_length": (-1.125, 0.625),
    }
    for aggregation in AGGREGATIONS:
        logprobs = torch.zeros_like(advantages, requires_grad=True)
        loss_sum, _, _ = ppo_policy_loss(
            logprobs=logprobs,
            old_logprobs=logprobs,
            advantages=advantages,
            mask=mask,
            clip_low=0.2,
            clip_high=0.2,
            weights=aggregation_weights(mask=mask, aggregation=aggregation, length=4).double(),
        )
        loss = loss_sum / aggregation_count(mask=mask, aggregation=aggregation)
        backward(loss)
        assert logprobs.grad is not None
        assert (loss.item(), logprobs.grad.norm().item()) == pytest.approx(expected[aggregation], rel=1e-6)


def _case(mask: Tensor, generator: torch.Generator) -> dict[str, Any]:
    old, difference, advantages = (normal(mask, generator) for _ in range(3))
    return {"logprobs": old + difference, "old_logprobs": old, "advantages": advantages, "mask": mask}


@given(
    case=ragged(),
    aggregation=st.sampled_from(AGGREGATIONS),
    dual_clip=st.sampled_from([None, 1.1, 2.0]),
    clip_high=st.sampled_from([0.2, 0.5]),
)
def test_aggregated_policy_loss_against_oracle(
    case: tuple[Tensor, torch.Generator], aggregation: LossAggregation, dual_clip: float | None, clip_high: float
) -> None:
    mask, generator = case
    arguments = _case(mask, generator)
    weights = aggregation_weights(mask=mask, aggregation=aggregation, length=9).double()
    loss_sum, count, metrics = ppo_policy_loss(
        **arguments, clip_low=0.2, clip_high=clip_high, dual_clip=dual_clip, weights=weights
    )
    ratios = np.exp((arguments["logprobs"] - arguments["old_logprobs"]).numpy())
    advantages = arguments["advantages"].numpy()
    rows, held = [], 0
    for row, length in enumerate(mask.sum(1).tolist()):
        pairs = [(float(ratios[row, slot]), float(advantages[row, slot])) for slot in range(length)]
        bound = math.inf if dual_clip is None else dual_clip
        rows.append([-oracles.dual_clipped_objective(*pair, 0.2, clip_high, bound) for pair in pairs])
        held += sum(advantage < 0 and ratio > bound for ratio, advantage in pairs)
    expected = oracles.aggregate(rows, aggregation, 9)
    found = loss_sum / aggregation_count(mask=mask, aggregation=aggregation)
    # The weights are made in float32.
    assert found.item() == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert count.item() == int(mask.sum())
    assert metrics["dual_clip_fraction"].item() == held


@given(case=ragged(max_rows=6), aggregation=st.sampled_from(AGGREGATIONS), ranks=st.sampled_from([1, 2, 3]))
def test_partition_invariance_rows_11_and_12(
    case: tuple[Tensor, torch.Generator], aggregation: LossAggregation, ranks: int
) -> None:
    """Rows 11, 12: any split into ranks and micro-batches of uneven widths gives the loss and gradient of the whole."""
    mask, generator = case
    arguments = _case(mask, generator)
    order = torch.randperm(len(mask), generator=generator)

    def step(parts: list[Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        leaf = arguments["logprobs"].clone().requires_grad_()
        count = sum(aggregation_count(mask=mask[rows], aggregation=aggregation) for rows in parts)
        total, merged = torch.zeros((), dtype=torch.float64), None
        for rows in parts:
            width = max(1, int(mask[rows].sum(1).max()))
            cut = {name: tensor[rows][:, :width] for name, tensor in arguments.items() if name != "logprobs"}
            weights = aggregation_weights(mask=cut["mask"], aggregation=aggregation, length=9)
            loss_sum, _, metrics = ppo_policy_loss(
                logprobs=leaf[rows][:, :width], clip_low=0.2, clip_high=0.2, dual_clip=1.5, weights=weights, **cut
            )
            backward(loss_sum / count)
            total = total + loss_sum.detach() / count
            merged = metrics if merged is None else merge_metrics(merged, metrics)
        assert leaf.grad is not None
        assert merged is not None
        return total, leaf.grad, merged

    whole, gradient, metrics = step([torch.arange(len(mask))])
    shares = [order[rank::ranks] for rank in range(ranks)]
    split, split_gradient, split_metrics = step(
        [piece for share in shares for piece in torch.split(share, 2) if len(piece)]
    )
    torch.testing.assert_close(split, whole, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(split_gradient, gradient, rtol=1e-9, atol=1e-12)
    for name, value in metrics.items():
        torch.testing.assert_close(split_metrics[name], value, rtol=1e-9, atol=1e-12)


def test_excluded_rows_count_nothing_rows_15_and_16() -> None:
    """Rows 15, 16: a row whose mask is empty is no response: it adds neither to the sum nor to the count."""
    with_excluded, without = prefix_mask([2, 0, 3], 3), prefix_mask([2, 3], 3)
    for aggregation in AGGREGATIONS:
        weights = aggregation_weights(mask=with_excluded, aggregation=aggregation, length=3)
        expected = aggregation_weights(mask=without, aggregation=aggregation, length=3)
        assert torch.equal(weights[[0, 2]], expected)
        assert (weights[1] == 0).all()
        counts = [aggregation_count(mask=mask, aggregation=aggregation).item() for mask in (with_excluded, without)]
        assert counts[0] == counts[1]


def test_only_values_get_a_gradient() -> None:
    values, weights = torch.ones(1, 2, requires_grad=True), torch.full((1, 2), 3.0, requires_grad=True)
    backward(weighted_sum(values=values, mask=torch.tensor([[True, False]]), weights=weights))
    assert values.grad is not None
    assert values.grad.tolist() == [[3.0, 0.0]]
    assert weights.grad is None


def test_refusals_rows_4_and_29() -> None:
    """Rows 4, 29: nothing broadcasts, masks are bool, and a mistyped aggregation is named."""
    ones, mask = torch.ones(2, 2), torch.ones(2, 2, dtype=torch.bool)
    with pytest.raises(TypeError, match="mask must be a bool"):
        aggregation_weights(mask=ones, aggregation="token_mean", length=2)
    with pytest.raises(TypeError, match="mask must be a bool"):
        weighted_sum(values=ones, mask=ones)
    with pytest.raises(ValueError, match=r"weights \(1, 2\)"):
        weighted_sum(values=ones, mask=mask, weights=ones[:1])
    with pytest.raises(TypeError, match="weights must be a floating"):
        weighted_sum(values=ones, mask=mask, weights=mask)
    with pytest.raises(ValueError, match=r"weights \(2, 1\)"):
        ppo_policy_loss(
            logprobs=ones,
            old_logprobs=ones,
            advantages=ones,
            mask=mask,
            clip_low=0.2,
            clip_high=0.2,
            weights=ones[:, :1],
        )
    with pytest.raises(ValueError, match="aggregation must be token_mean, sequence_mean or fixed_length"):
        aggregation_weights(mask=mask, aggregation="mean", length=2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="aggregation must be"):
        aggregation_count(mask=mask, aggregation="mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="length must be the longest allowed response"):
        aggregation_weights(mask=mask, aggregation="fixed_length", length=0)
