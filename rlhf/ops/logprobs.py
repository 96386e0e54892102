"""Log-probabilities of tokens and entropies from logits, at the sampling temperature.

The softmax runs in float32 over blocks of rows. For bf16 logits no float32 tensor of the size of the logits exists,
neither in the forward nor in the backward pass, which recomputes each block from the saved logits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf.ops._checks import check_bool, check_floating, check_integer, check_rank, working_dtype

# Entries of one float32 block: 16 MiB, small enough to stay near the caches and large enough to hide the loop.
MAX_BLOCK_ENTRIES = 2**22

Block = tuple[slice, slice]


class Excluded(NamedTuple):
    """Tokens whose logits count as -inf in some slots: they have no probability there, and get no gradient."""

    token_ids: Int[Tensor, " K"]
    slots: Bool[Tensor, "B R"]

    def fill(self, block: Block, entries: Tensor, value: float) -> None:
        """Writes `value` into the excluded entries of one block (b, r, V), in place."""
        slots = self.slots[block].unsqueeze(-1)
        entries[..., self.token_ids] = entries[..., self.token_ids].masked_fill_(slots, value)


def row_blocks(shape: torch.Size, max_entries: int) -> Iterator[Block]:
    """Slices over axes 0 and 1 of a (B, R, V) shape: each of at most `max_entries` entries, and at least one token."""
    num_rows, num_tokens, vocabulary = shape
    rows = max(1, max_entries // max(1, num_tokens * vocabulary))
    tokens = num_tokens if rows > 1 else max(1, min(num_tokens, max_entries // max(1, vocabulary)))
    for row in range(0, num_rows, rows):
        for token in range(0, num_tokens, max(1, tokens)):
            yield slice(row, row + rows), slice(token, token + tokens)


class _TokenStatistics(torch.autograd.Function):
    """log softmax(logits / temperature) at `tokens`, and the entropy of that softmax, with analytic gradients.

    With s = logits / temperature, p = softmax(s), H = entropy: d logp_a / d s_i = [i = a] - p_i and
    d H / d s_i = -p_i (log p_i + H). An excluded token has s = -inf, p = 0 and, with 0 log 0 = 0, no share in H.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, tokens: Tensor, temperature: float, with_entropy: bool, excluded: Excluded | None
    ) -> tuple[Tensor, Tensor | None]:
        dtype = working_dtype(logits.dtype)
        logprobs, normalizers, entropies = (
            torch.zeros(tokens.shape, dtype=dtype, device=logits.device) for _ in range(3)
        )
        for block in row_blocks(logits.shape, MAX_BLOCK_ENTRIES):
            scaled = logits[block].to(dtype) / temperature
            if excluded is not None:
                excluded.fill(block, scaled, -math.inf)
            normalizer = scaled.logsumexp(-1)
            normalizers[block] = normalizer
            logprobs[block] = scaled.gather(-1, tokens[block].unsqueeze(-1)).squeeze(-1) - normalizer
            if with_entropy:
                probabilities = scaled.sub_(normalizer.unsqueeze(-1)).exp_()
                entropies[block] = torch.special.entr(probabilities).sum(-1)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, tokens, normalizers, entropies)
        ctx.temperature = temperature
        ctx.excluded = excluded
        return logprobs, entropies.clone() if with_entropy else None

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor, None, None, None, None]:
        logits, tokens, normalizers, entropies = ctx.saved_tensors
        of_logprobs, of_entropies = gradients
        result = torch.zeros_like(logits)
        for block in row_blocks(logits.shape, MAX_BLOCK_ENTRIES):
            scaled = logits[block].to(normalizers.dtype) / ctx.temperature
            if ctx.excluded is not None:
                ctx.excluded.fill(block, scaled, -math.inf)
            probabilities = scaled.sub_(normalizers[block].unsqueeze(-1)).exp_()
            total = torch.zeros_like(probabilities)
            used = torch.zeros_like(tokens[block], dtype=torch.bool)
            if of_entropies is not None:
                gradient = of_entropies[block].unsqueeze(-1)
                slope = torch.special.entr(probabilities) - probabilities * entropies[block].unsqueeze(-1)
                total += slope * gradient
                used |= gradient.squeeze(-1) != 0
            if of_logprobs is not None:
                gradient = of_logprobs[block].unsqueeze(-1)
                total -= probabilities * gradient
                total.scatter_add_(-1, tokens[block].unsqueeze(-1), gradient)
                used |= gradient.squeeze(-1) != 0
            if ctx.excluded is not None:
                ctx.excluded.fill(block, total, 0.0)
            # A token that no loss looks at gets exactly zero, also when its logits are not finite.
            result[block] = torch.where(used.unsqueeze(-1), total / ctx.temperature, 0.0).to(logits.dtype)
        return result, None, None, None, None


def check_temperature(temperature: float) -> None:
    """Raises `ValueError` unless the temperature is positive."""
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, but is {temperature}")


def _statistics(
    logits: Tensor, tokens: Tensor, temperature: float, with_entropy: bool, excluded: Excluded | None
) -> tuple[Tensor, Tensor | None]:
    check_temperature(temperature)
    check_floating(logits=logits)
    check_integer(tokens=tokens)
    check_rank(3, logits=logits)
    check_rank(2, tokens=tokens)
    if logits.shape[:2] != tokens.shape:
        shapes = f"{tuple(logits.shape)} and {tuple(tokens.shape)}"
        raise ValueError(f"logits (B, R, V) and tokens (B, R) must agree, but came as {shapes}")
    if excluded is not None:
        check_integer(excluded_token_ids=excluded.token_ids)
        check_bool(excluded_slots=excluded.slots)
        if excluded.slots.shape != tokens.shape:
            shapes = f"{tuple(excluded.slots.shape)} and {tuple(tokens.shape)}"
            raise ValueError(f"excluded slots (B, R) and tokens (B, R) must agree, but came as {shapes}")
    logprobs, entropies = _TokenStatistics.apply(logits, tokens.long(), temperature, with_entropy, excluded)  # type: ignore[no-untyped-call]
    return logprobs, entropies


def token_logprobs(
    *, logits: Float[Tensor, "B R V"], tokens: Int[Tensor, "B R"], temperature: float, excluded: Excluded | None = None
) -> Float[Tensor, "B R"]:
    """Log-probability in nats of each token under softmax(logits / temperature), float32 (float64 for float64 logits).

    `logits[:, t]` must be those that predict `tokens[:, t]`. Every id lies in [0, V), padded ones too. A token that is
    itself `excluded` has log-probability -inf.
    """
    return _statistics(logits, tokens, temperature, False, excluded)[0]


def entropy(*, logits: Float[Tensor, "B R V"], temperature: float) -> Float[Tensor, "B R"]:
    """Entropy in nats of softmax(logits / temperature), float32 (float64 for float64 logits)."""
    check_rank(3, logits=logits)
    tokens = torch.zeros(logits.shape[:2], dtype=torch.long, device=logits.device)
    return logprobs_and_entropy(logits=logits, tokens=tokens, temperature=temperature)[1]


def logprobs_and_entropy(
    *, logits: Float[Tensor, "B R V"], tokens: Int[Tensor, "B R"], temperature: float, excluded: Excluded | None = None
) -> tuple[Float[Tensor, "B R"], Float[Tensor, "B R"]]:
    """`token_logprobs` and `entropy` from one pass over the logits."""
    logprobs, entropies = _statistics(logits, tokens, temperature, True, excluded)
    assert entropies is not None  # with_entropy=True always computes them
    return logprobs, entropies
