"""Losses as a sum and a count, so that one division over the whole optimiser step, on all ranks, gives the mean.

Each returns `(loss_sum, count, metrics)`. Metrics are sums over the same items as the loss, except those whose name
ends in `_max`, which are maxima; `merge_metrics` adds up those of micro-batches. They carry no gradient.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from rlhf.ops._checks import check_bool, check_floating, check_rank, check_same_shape, kept, working_dtype

Metrics = dict[str, Tensor]
LossSum = tuple[Float[Tensor, ""], Int[Tensor, ""], Metrics]


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


def ppo_policy_loss(
    *,
    logprobs: Float[Tensor, "B R"],
    old_logprobs: Float[Tensor, "B R"],
    advantages: Float[Tensor, "B R"],
    mask: Bool[Tensor, "B R"],
    clip_low: float,
    clip_high: float,
) -> LossSum:
    """Sum over real tokens of -min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A); the count is of real tokens.

    ratio = exp(logprobs - old_logprobs). Schulman et al. 2017 (arXiv 1707.06347), equation 7. Gradients flow to
    `logprobs` only. Metrics: `clip_fraction`, tokens where the clipped term is the smaller one; `approx_kl`, the k3
    estimator (ratio - 1) - log ratio of KL(old || new), in nats; `ratio_max`, at least 0, and 0 without real tokens.
    """
    check_floating(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    check_bool(mask=mask)
    check_rank(2, mask=mask)
    check_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, mask=mask)
    # Padded entries are replaced before the exponential: masking its result would leave NaN in the gradient.
    log_ratio = kept(logprobs, mask) - kept(old_logprobs, mask).detach()
    advantages = kept(advantages, mask).detach()
    ratio = log_ratio.exp()
    plain = ratio * advantages
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages
    loss_sum = -torch.minimum(plain, clipped).sum()
    with torch.no_grad():
        metrics = {
            "clip_fraction": (clipped < plain).to(ratio.dtype).sum(),
            "approx_kl": (torch.expm1(log_ratio) - log_ratio).sum(),
            "ratio_max": kept(ratio, mask).amax() if mask.numel() else ratio.new_zeros(()),
        }
    return loss_sum, mask.sum(), metrics


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
