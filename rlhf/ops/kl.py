"""KL(policy || reference): per-token estimators from sampled tokens, and the exact value from full logits.

For x sampled from the policy and log r = reference_logprob(x) - logprob(x), the estimators of J. Schulman,
"Approximating KL divergence" (2020) are k1 = -log r, k2 = (log r)^2 / 2 and k3 = (r - 1) - log r. k1 and k3 are
unbiased, k2 is biased and has low variance; k1 takes both signs, and clamping it at zero would bias it upwards.

These functions take no mask. Where a gradient flows through them, replace padded entries by finite numbers first.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf.ops._checks import check_floating, check_rank, check_same_shape, working_dtype
from rlhf.ops.logprobs import MAX_BLOCK_ENTRIES, check_temperature


def _log_ratio(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    check_floating(logprobs=logprobs, reference_logprobs=reference_logprobs)
    check_same_shape(logprobs=logprobs, reference_logprobs=reference_logprobs)
    dtype = working_dtype(logprobs.dtype)
    return logprobs.to(dtype) - reference_logprobs.to(dtype)


def k1(*, logprobs: Float[Tensor, "B R"], reference_logprobs: Float[Tensor, "B R"]) -> Float[Tensor, "B R"]:
    """logprobs - reference_logprobs, in nats: unbiased, either sign."""
    return _log_ratio(logprobs, reference_logprobs)


def k2(*, logprobs: Float[Tensor, "B R"], reference_logprobs: Float[Tensor, "B R"]) -> Float[Tensor, "B R"]:
    """Half the squared log-ratio, in nats: biased, never negative. Its gradient is an unbiased one of the KL."""
    return 0.5 * _log_ratio(logprobs, reference_logprobs).square()


def k3(*, logprobs: Float[Tensor, "B R"], reference_logprobs: Float[Tensor, "B R"]) -> Float[Tensor, "B R"]:
    """(r - 1) - log r with r = reference / policy, in nats: unbiased, never negative."""
    log_ratio = -_log_ratio(logprobs, reference_logprobs)
    # expm1 keeps the digits of r - 1 where r is near 1, which is where the policy starts.
    return torch.expm1(log_ratio) - log_ratio


def _exact(logits: Tensor, reference_logits: Tensor, temperature: float) -> Tensor:
    dtype = working_dtype(logits.dtype)
    logprobs = (logits.to(dtype) / temperature).log_softmax(-1)
    reference_logprobs = (reference_logits.to(dtype) / temperature).log_softmax(-1)
    probabilities = logprobs.exp()
    # A token that the policy excludes (logit -inf) contributes 0, not 0 * inf.
    difference = torch.where(probabilities > 0, logprobs - reference_logprobs, 0.0)
    return (probabilities * difference).sum(-1)


def full_kl(
    *, logits: Float[Tensor, "B R V"], reference_logits: Float[Tensor, "B R V"], temperature: float
) -> Float[Tensor, "B R"]:
    """Exact KL(policy || reference) in nats of each next-token distribution, both at `temperature`.

    Differentiable. Without gradients at most a few blocks of rows are held in float32 at a time.
    """
    check_temperature(temperature)
    check_floating(logits=logits, reference_logits=reference_logits)
    check_rank(3, logits=logits, reference_logits=reference_logits)
    check_same_shape(logits=logits, reference_logits=reference_logits)
    rows = max(1, MAX_BLOCK_ENTRIES // max(1, logits.shape[1] * logits.shape[2]))
    blocks = [slice(row, row + rows) for row in range(0, max(1, logits.shape[0]), rows)]
    return torch.cat([_exact(logits[block], reference_logits[block], temperature) for block in blocks])
