"""Losses as a sum and a count, so that one division over the whole optimiser step, on all ranks, gives the mean.

Each returns `(loss_sum, count, metrics)`. Metrics are sums over the same items as the loss, except those whose name
ends in `_max`, which are maxima; `merge_metrics` adds up those of micro-batches. They carry no gradient.

How the losses of tokens become one number is a choice, the *aggregation*. It has two parts, so that micro-batches and
ranks still only add up: `aggregation_weights` says what a token's loss is multiplied by, and `aggregation_count`,
summed over the whole optimiser step, is what the sum is divided by.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from rlhf.ops import kl
from rlhf.ops._checks import check_bool, check_floating, check_rank, check_same_shape, kept, working_dtype

Metrics = dict[str, Tensor]
LossSum = tuple[Float[Tensor, ""], Int[Tensor, ""], Metrics]
LossAggregation = Literal["token_mean", "sequence_mean", "fixed_length"]
KLLossEstimator = Literal["k1", "k2", "k3"]


def merge_metrics(first: Metrics, second: Metrics) -> Metrics:
    """Metrics of two batches as those of both: maxima for names that end in `_max`, sums for the others.

    Raises `ValueError` when the names differ.
    """
    if first.keys() != second.keys():
        raise ValueError(f"metrics of one loss must have the same names, but are {sorted(first)} and {sorted(second)}")
    return {
        name: torch.maximum(value, second[name]) if name.endswith("_max") else value + second[name]
        for name, value in first.items()
    }


def _check_aggregation(mask: Tensor, aggregation: str) -> None:
    check_bool(mask=mask)
    check_rank(2, mask=mask)
    if aggregation not in ("token_mean", "sequence_mean", "fixed_length"):
        raise ValueError(f"aggregation must be token_mean, sequence_mean or fixed_length, but is {aggregation!r}")


@torch.no_grad()
def aggregation_weights(
    *, mask: Bool[Tensor, "B R"], aggregation: LossAggregation, length: int
) -> Float[Tensor, "B R"]:
    """What each token's loss is multiplied by, in float32, zero outside `mask`; `aggregation_count` is the divisor.

    * `token_mean`: 1. Every token of the step counts alike, so a long response counts more than a short one.
    * `sequence_mean`: 1 / (real tokens of the row). Every response counts alike: the mean of its tokens' mean losses.
    * `fixed_length`: 1 / `length`, the longest allowed response in tokens: the mean over responses of their sums, on
      the scale of one token. "Dr. GRPO", Liu et al. 2025 (arXiv 2503.20783).

    `length` is read by `fixed_length` only. Raises `ValueError` for another aggregation or a length below 1.
    """
    _check_aggregation(mask, aggregation)
    if length < 1:
        raise ValueError(f"length must be the longest allowed response in tokens, at least 1, but is {length}")
    ones = mask.to(torch.float32)
    if aggregation == "token_mean":
        return ones
    if aggregation == "fixed_length":
        return ones / length
    return ones / ones.sum(1, keepdim=True).clamp(min=1.0)


def aggregation_count(*, mask: Bool[Tensor, "B R"], aggregation: LossAggregation) -> Int[Tensor, ""]:
    """What the weighted sum of losses is divided by, once it is summed over all micro-batches and ranks of the step.

    Real tokens for `token_mean`; for the others responses with at least one real token, so excluded rows are inert.
    """
    _check_aggregation(mask, aggregation)
    return mask.sum() if aggregation == "token_mean" else mask.any(1).sum()


def weighted_sum(
    *, values: Float[Tensor, "B R"], mask: Bool[Tensor, "B R"], weights: Float[Tensor, "B R"] | None = None
) -> Float[Tensor, ""]:
    """Sum of weights * values under `mask`; gradients flow to `values` only. Without weights, each counts 1.

    Any per-token term of the loss (entropy, a KL) is aggregated like the policy loss by giving it the same weights.
    """
    check_floating(values=values)
    check_bool(mask=mask)
    check_rank(2, mask=mask)
    check_same_shape(values=values, mask=mask)
    inside = kept(values, mask)
    if weights is None:
        return inside.sum()
    check_floating(weights=weights)
    check_same_shape(values=values, weights=weights)
    return (inside * kept(weights, mask).detach().to(inside.dtype)).sum()


def ppo_policy_loss(
    *,
    logprobs: Float[Tensor, "B R"],
    old_logprobs: Float[Tensor, "B R"],
    advantages: Float[Tensor, "B R"],
    mask: Bool[Tensor, "B R"],
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    weights: Float[Tensor, "B R"] | None = None,
) -> LossSum:
    """Sum over real tokens of -min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A); the count is of real tokens.

    ratio = exp(logprobs - old_logprobs). Schulman et al. 2017 (arXiv 1707.06347), equation 7. `dual_clip` c > 1 keeps
    the loss of a token with A < 0 at or below -c A, however large its ratio: Ye et al. 2020 (arXiv 1912.09729),
    dual-clip PPO. `weights` (of `aggregation_weights`) multiply each token's loss; metrics and count are unweighted.
    Gradients flow to `logprobs` only. Raises `ValueError` for a dual clip that is not above 1.

    Metrics: `clip_fraction`, tokens where the clipped term is the smaller one; `dual_clip_fraction`, tokens held at
    -c A; `approx_kl`, the k3 estimator (ratio - 1) - log ratio of KL(old || new), in nats; `ratio_max`, at least 0,
    and 0 without real tokens.
    """
    check_floating(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    check_bool(mask=mask)
    check_rank(2, mask=mask)
    check_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, mask=mask)
    if dual_clip is not None and not (1.0 < dual_clip < math.inf):
        raise ValueError(f"dual_clip must be above 1, but is {dual_clip}")
    # Padded entries are replaced before the exponential: masking its result would leave NaN in the gradient.
    log_ratio = kept(logprobs, mask) - kept(old_logprobs, mask).detach()
    advantages = kept(advantages, mask).detach()
    ratio = log_ratio.exp()
    plain = ratio * advantages
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages
    objective = torch.minimum(plain, clipped)
    held = torch.zeros_like(mask)
    if dual_clip is not None:
        held = (advantages < 0) & (objective < dual_clip * advantages)
        objective = torch.where(held, dual_clip * advantages, objective)
    loss_sum = -weighted_sum(values=objective, mask=mask, weights=weights)
    with torch.no_grad():
        metrics = {
            "clip_fraction": (clipped < plain).to(ratio.dtype).sum(),
            "dual_clip_fraction": held.to(ratio.dtype).sum(),
            "approx_kl": (torch.expm1(log_ratio) - log_ratio).sum(),
            "ratio_max": kept(ratio, mask).amax() if mask.numel() else ratio.new_zeros(()),
        }
    return loss_sum, mask.sum(), metrics


def kl_loss(
    *,
    logprobs: Float[Tensor, "B R"],
    reference_logprobs: Float[Tensor, "B R"],
    mask: Bool[Tensor, "B R"],
    estimator: KLLossEstimator,
    weights: Float[Tensor, "B R"] | None = None,
) -> LossSum:
    """A KL(policy || reference) term for the loss, in nats: the sum over real tokens, and their count.

    A good estimator of the value is not one of the gradient, since the tokens were drawn from the policy itself. With
    d = logprobs - reference_logprobs and g = the gradient of logprobs, on tokens of the current policy:

    * `k1`: value d, gradient d g. Differentiating d itself would give g, whose expectation is zero: a KL loss without
      effect. So the value is that of k1, unbiased, and the gradient that of k2 (a straight-through term).
    * `k2`: value d^2 / 2, biased; gradient d g. Its expectation is the gradient of KL(policy || reference) at each
      visited state, so it is the same step as `k1`.
    * `k3`: value exp(-d) - 1 + d, unbiased; gradient (1 - exp(-d)) g, as GRPO has it. Its expectation is the gradient
      of the other direction, KL(reference || policy); near d = 0 it agrees with d g to first order.

    None of them sees that a token also decides which states come next: only a penalty in the rewards does. In later
    epochs the tokens are the old policy's, and no ratio corrects for it. Estimators: J. Schulman, "Approximating KL
    divergence" (2020); their gradients as losses: Liu et al. 2025, "Rethinking KL regularization in RLHF: from value
    estimation to gradient optimization" (arXiv 2510.01555).

    `weights` as in `ppo_policy_loss`. Gradients flow to `logprobs` only. Metric: `reference_kl`, the sum of the
    estimator's values, unweighted. Raises `ValueError` for another estimator.
    """
    check_floating(logprobs=logprobs, reference_logprobs=reference_logprobs)
    check_bool(mask=mask)
    check_rank(2, mask=mask)
    check_same_shape(logprobs=logprobs, reference_logprobs=reference_logprobs, mask=mask)
    if estimator not in ("k1", "k2", "k3"):
        raise ValueError(f"estimator must be k1, k2 or k3, but is {estimator!r}")
    pair = {"logprobs": kept(logprobs, mask), "reference_logprobs": kept(reference_logprobs, mask).detach()}
    values = kl.k3(**pair) if estimator == "k3" else kl.k2(**pair)
    if estimator == "k1":
        # Zero plus k1: the value of k1 exactly, the gradient of k2.
        values = (values - values.detach()) + kl.k1(**pair).detach()
    metrics = {"reference_kl": values.detach().sum()}
    return weighted_sum(values=values, mask=mask, weights=weights), mask.sum(), metrics


def ppo_value_loss(
    *,
    values: Float[Tensor, "B R"],
    old_values: Float[Tensor, "B R"],
    returns: Float[Tensor, "B R"],
    mask: Bool[Tensor, "B R"],
    clip: float | None,
) -> LossSum:
    """Sum over `mask` of 0.5 * max((V - R)^2, (V_clipped - R)^2); the count is of the True slots.

    V_clipped stays within `clip` of `old_values`; `clip=None` leaves the plain 0.5 * (V - R)^2. The 0.5 is in the loss,
    as in OpenAI baselines' PPO2 and the TL;DR lineage, so their value coefficients carry over. Gradients flow to
    `values` only. Metric: `value_clip_fraction`, slots where the clipped error is the larger one.
    """
    check_floating(values=values, old_values=old_values, returns=returns)
    check_bool(mask=mask)
    check_rank(2, mask=mask)
    check_same_shape(values=values, old_values=old_values, returns=returns, mask=mask)
    values, old_values, returns = kept(values, mask), kept(old_values, mask).detach(), kept(returns, mask).detach()
    errors = (values - returns).square()
    if clip is None:
        return 0.5 * errors.sum(), mask.sum(), {"value_clip_fraction": errors.new_zeros(())}
    near = torch.maximum(torch.minimum(values, old_values + clip), old_values - clip)
    clipped_errors = (near - returns).square()
    clipped_more = (clipped_errors > errors).to(errors.dtype).sum()
    return 0.5 * torch.maximum(errors, clipped_errors).sum(), mask.sum(), {"value_clip_fraction": clipped_more}


def pairwise_loss(
    *, chosen: Float[Tensor, " B"], rejected: Float[Tensor, " B"], margin: Float[Tensor, " B"] | None = None
) -> LossSum:
    """Sum over pairs of -log sigmoid(chosen - rejected - margin); the count is of pairs.

    Bradley-Terry, Ouyang et al. 2022 (arXiv 2203.02155), equation 1; the margin as in Llama 2 (arXiv 2307.09288),
    equation 2. Metrics: `accuracy`, pairs with chosen > rejected, a tie counting half; `score_difference`, chosen -
    rejected; `chosen_score` and `rejected_score`.
    """
    tensors = {"chosen": chosen, "rejected": rejected} | ({} if margin is None else {"margin": margin})
    check_floating(**tensors)
    check_rank(1, **tensors)
    check_same_shape(**tensors)
    dtype = working_dtype(chosen.dtype)
    chosen, rejected = chosen.to(dtype), rejected.to(dtype)
    difference = chosen - rejected
    loss_sum = -F.logsigmoid(difference if margin is None else difference - margin.to(dtype)).sum()
    with torch.no_grad():
        metrics = {
            "accuracy": (0.5 + 0.5 * difference.sign()).sum(),
            "score_difference": difference.sum(),
            "chosen_score": chosen.sum(),
            "rejected_score": rejected.sum(),
        }
    return loss_sum, torch.tensor(chosen.shape[0], device=chosen.device), metrics
