"""Padding never matters: whatever fills the padded slots, NaN included, outputs and gradients are unchanged."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlhf.ops.advantages import gae, token_rewards
from rlhf.ops.kl import k1, k2, k3
from rlhf.ops.logprobs import logprobs_and_entropy
from rlhf.ops.losses import (
    KLLossEstimator,
    LossAggregation,
    aggregation_weights,
    kl_loss,
    ppo_policy_loss,
    ppo_value_loss,
    weighted_sum,
)
from rlhf.ops.masked import explained_variance, masked_mean, masked_sum, masked_var, masked_whiten
from rlhf.ops.sequences import gather_last
from tests.unit.ragged import FILLS, backward, fill, normal, ragged

Operation = Callable[[Tensor, Tensor, Tensor, Tensor], list[Tensor]]


def _policy(first: Tensor, second: Tensor, third: Tensor, mask: Tensor) -> list[Tensor]:
    loss, count, metrics = ppo_policy_loss(
        logprobs=first, old_logprobs=second, advantages=third, mask=mask, clip_low=0.2, clip_high=0.3
    )
    return [loss, count, *metrics.values()]


def _dual_clip(aggregation: LossAggregation) -> Operation:
    """The policy loss with weights that have garbage in the padding themselves: what fills the advantages there."""

    def run(first: Tensor, second: Tensor, third: Tensor, mask: Tensor) -> list[Tensor]:
        weights = aggregation_weights(mask=mask, aggregation=aggregation, length=7)
        weights = torch.where(mask, weights, third.detach().to(weights.dtype))
        loss, count, metrics = ppo_policy_loss(
            logprobs=first,
            old_logprobs=second,
            advantages=third,
            mask=mask,
            clip_low=0.2,
            clip_high=0.3,
            dual_clip=1.5,
            weights=weights,
        )
        return [loss, count, *metrics.values()]

    return run


def _kl_term(estimator: KLLossEstimator) -> Operation:
    def run(first: Tensor, second: Tensor, third: Tensor, mask: Tensor) -> list[Tensor]:
        loss, count, metrics = kl_loss(
            logprobs=first, reference_logprobs=second, mask=mask, estimator=estimator, weights=third
        )
        return [loss, count, *metrics.values()]

    return run


def _value(first: Tensor, second: Tensor, third: Tensor, mask: Tensor) -> list[Tensor]:
    loss, count, metrics = ppo_value_loss(values=first, old_values=second, returns=third, mask=mask, clip=0.2)
    return [loss, count, *metrics.values()]


def _advantages(first: Tensor, second: Tensor, third: Tensor, mask: Tensor) -> list[Tensor]:
    kl = k1(logprobs=first, reference_logprobs=second)
    scores = torch.linspace(-1, 1, len(mask), dtype=first.dtype)
    rewards = token_rewards(scores=scores, kl=kl, mask=mask, kl_coefficient=0.3)
    advantages, returns = gae(rewards=rewards, values=third, mask=mask, gamma=0.9, lam=0.8)
    return [rewards, advantages, returns, masked_whiten(values=advantages, mask=mask)]


OPERATIONS: dict[str, Operation] = {
    "sum": lambda a, b, c, mask: [masked_sum(values=a, mask=mask), masked_sum(values=b * c, mask=mask, dim=1)],
    "mean": lambda a, b, c, mask: [masked_mean(values=a, mask=mask)],
    "variance": lambda a, b, c, mask: [masked_var(values=a, mask=mask)],
    "whiten": lambda a, b, c, mask: [masked_whiten(values=a, mask=mask)],
    "whiten_keep_mean": lambda a, b, c, mask: [masked_whiten(values=a, mask=mask, shift_mean=False)],
    "explained_variance": lambda a, b, c, mask: [explained_variance(predictions=a, targets=b, mask=mask)],
    "gather_last": lambda a, b, c, mask: [gather_last(a, mask)],
    "policy_loss": _policy,
    "dual_clip_token_mean": _dual_clip("token_mean"),
    "dual_clip_sequence_mean": _dual_clip("sequence_mean"),
    "dual_clip_fixed_length": _dual_clip("fixed_length"),
    "weighted_sum": lambda a, b, c, mask: [weighted_sum(values=a, mask=mask, weights=b)],
    "kl_loss_k1": _kl_term("k1"),
    "kl_loss_k2": _kl_term("k2"),
    "kl_loss_k3": _kl_term("k3"),
    "value_loss": _value,
    "advantages": _advantages,
}


@pytest.mark.parametrize("name", OPERATIONS)
@given(case=ragged(), number=st.sampled_from(FILLS))
def test_padding_never_matters_rows_1_14_18(name: str, case: tuple[Tensor, torch.Generator], number: float) -> None:
    """Rows 1, 14, 18: outputs, metrics and gradients with garbage in the padding equal those with zeros."""
    mask, generator = case
    plain = [normal(mask, generator) for _ in range(3)]

    def run(filling: float) -> tuple[list[Tensor], Tensor]:
        first, second, third = (fill(tensor, mask, filling) for tensor in plain)
        first.requires_grad_()
        outputs = OPERATIONS[name](first, second, third, mask)
        total = sum(((output * output).sum() for output in outputs if output.requires_grad), torch.zeros(()))
        if total.requires_grad:
            backward(total)
        return [output.detach() for output in outputs], torch.zeros(()) if first.grad is None else first.grad

    clean, clean_gradient = run(0.0)
    dirty, dirty_gradient = run(number)
    for expected, found in zip(clean, dirty, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=name == "explained_variance")
    torch.testing.assert_close(dirty_gradient, clean_gradient, rtol=0, atol=0, equal_nan=name == "explained_variance")
    if dirty_gradient.ndim and name != "explained_variance":
        assert (dirty_gradient[~mask] == 0).all()


@given(case=ragged(), number=st.sampled_from(FILLS))
def test_from_logits_to_loss_rows_14_and_18(case: tuple[Tensor, torch.Generator], number: float) -> None:
    """Rows 14, 18: garbage logits in padded slots change neither loss, entropy and KL, nor a gradient."""
    mask, generator = case
    shape = (*mask.shape, 5)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64)
    tokens = torch.randint(0, 5, mask.shape, generator=generator)
    old, advantages = normal(mask, generator), normal(mask, generator)

    def run(filling: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        leaf = torch.where(mask.unsqueeze(-1), logits, torch.full_like(logits, filling)).requires_grad_()
        logprobs, entropies = logprobs_and_entropy(logits=leaf, tokens=tokens, temperature=0.7)
        loss, _, _ = ppo_policy_loss(
            logprobs=logprobs, old_logprobs=old, advantages=advantages, mask=mask, clip_low=0.2, clip_high=0.2
        )
        entropy = masked_mean(values=entropies, mask=mask)
        estimates = [
            masked_sum(values=estimator(logprobs=logprobs.detach(), reference_logprobs=old), mask=mask)
            for estimator in (k1, k2, k3)
        ]
        backward(loss - 0.1 * entropy)
        assert leaf.grad is not None
        return loss.detach(), entropy.detach(), torch.stack(estimates), leaf.grad

    for expected, found in zip(run(0.0), run(number), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@given(case=ragged(), extra=st.integers(1, 3))
def test_pad_length_never_matters_row_18(case: tuple[Tensor, torch.Generator], extra: int) -> None:
    """Row 18: more padding on the right changes no loss, count, metric, advantage or whitened advantage."""
    mask, generator = case
    first, second, third = (normal(mask, generator) for _ in range(3))
    wide_mask = torch.nn.functional.pad(mask, (0, extra))
    wide_first, wide_second, wide_third = (
        torch.nn.functional.pad(tensor, (0, extra), value=1e4) for tensor in (first, second, third)
    )
    for operation in (_policy, _dual_clip("sequence_mean"), _dual_clip("fixed_length"), _kl_term("k3"), _value):
        narrow = operation(first, second, third, mask)
        for expected, found in zip(narrow, operation(wide_first, wide_second, wide_third, wide_mask), strict=True):
            torch.testing.assert_close(found, expected)
    narrow = _advantages(first, second, third, mask)
    wide = _advantages(wide_first, wide_second, wide_third, wide_mask)
    for expected, found in zip(narrow, wide, strict=True):
        torch.testing.assert_close(found[:, : mask.shape[1]], expected)
        assert (found[:, mask.shape[1] :] == 0).all()


@given(case=ragged(), seed=st.integers(0, 1000))
def test_row_order_never_matters(case: tuple[Tensor, torch.Generator], seed: int) -> None:
    """Rows in another order give the same sums, and the same advantages in that order."""
    mask, generator = case
    kl, values = normal(mask, generator), normal(mask, generator)
    scores = torch.randn(len(mask), generator=generator, dtype=torch.float64)
    order = torch.randperm(len(mask), generator=torch.Generator().manual_seed(seed))

    def run(rows: Tensor) -> tuple[Tensor, Tensor]:
        rewards = token_rewards(scores=scores[rows], kl=kl[rows], mask=mask[rows], kl_coefficient=0.3)
        advantages, returns = gae(rewards=rewards, values=values[rows], mask=mask[rows], gamma=0.9, lam=0.8)
        return masked_whiten(values=advantages, mask=mask[rows]), returns

    for expected, found in zip(run(torch.arange(len(mask))), run(order), strict=True):
        torch.testing.assert_close(found, expected[order], rtol=1e-9, atol=1e-9)
