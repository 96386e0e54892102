"""Log-probabilities of tokens and entropies from logits, at the sampling temperature.

The softmax runs in float32 over blocks of rows. For bf16 logits no float32 tensor of the size of the logits exists,
neither in the forward nor in the backward pass, which recomputes each block from the saved logits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
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


@dataclass
class Memo:
    """What one pass over logits found, for a later pass over equal logits that serves the backward pass alone.

    The call that gets an empty memo fills it. A call that gets a filled one computes nothing, and its backward pass
    writes the gradient over the logits: they must be recomputed ones that nobody else holds.
    """

    found: tuple[Tensor, Tensor, Tensor] | None = None


class _TokenStatistics(torch.autograd.Function):
    """log softmax(logits / temperature) at `tokens`, and the entropy of that softmax, with analytic gradients.

    With s = logits / temperature, p = softmax(s), H = entropy: d logp_a / d s_i = [i = a] - p_i and
    d H / d s_i = -p_i (log p_i + H). An excluded token has s = -inf, p = 0 and, with 0 log 0 = 0, no share in H.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        tokens: Tensor,
        temperature: float,
        with_entropy: bool,
        excluded: Excluded | None,
        memo: Memo | None,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.overwrite = memo is not None and memo.found is not None
        found = memo.found if memo is not None else None
        if found is None:
            found = _pass_over(logits, tokens, temperature, with_entropy, excluded)
        if memo is not None:
            memo.found = found
        logprobs, normalizers, entropies = found
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, tokens, normalizers, entropies)
        ctx.temperature = temperature
        ctx.excluded = excluded
        return logprobs.clone(), entropies.clone() if with_entropy else None

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor, None, None, None, None, None]:
        logits, tokens, normalizers, entropies = ctx.saved_tensors
        of_logprobs, of_entropies = gradients
        result = logits if ctx.overwrite else torch.empty_like(logits)
        for block in row_blocks(logits.shape, MAX_BLOCK_ENTRIES):
            probabilities = _scaled(logits, block, normalizers.dtype, ctx.temperature, ctx.excluded)
            probabilities.sub_(normalizers[block].unsqueeze(-1)).exp_()
            total: Tensor | None = None
            used = torch.zeros_like(tokens[block], dtype=torch.bool)
            if of_entropies is not None:
                gradient = of_entropies[block].unsqueeze(-1)
                total = torch.special.entr(probabilities)
                total.sub_(probabilities * entropies[block].unsqueeze(-1)).mul_(gradient)
                used |= gradient.squeeze(-1) != 0
            if of_logprobs is not None:
                gradient = of_logprobs[block].unsqueeze(-1)
                weighted = probabilities.mul_(gradient)
                total = weighted.neg_() if total is None else total.sub_(weighted)
                total.scatter_add_(-1, tokens[block].unsqueeze(-1), gradient)
                used |= gradient.squeeze(-1) != 0
            if total is None:
                result[block] = 0.0
                continue
            if ctx.excluded is not None:
                ctx.excluded.fill(block, total, 0.0)
            # A token that no loss looks at gets exactly zero, also when its logits are not finite.
            result[block] = total.div_(ctx.temperature).masked_fill_(~used.unsqueeze(-1), 0.0)
        return result, None, None, None, None, None


def _scaled(logits: Tensor, block: Block, dtype: torch.dtype, temperature: float, excluded: Excluded | None) -> Tensor:
    """logits / temperature of one block, a new tensor."""
    scaled = logits[block].to(dtype) / temperature
    if excluded is not None:
        excluded.fill(block, scaled, -math.inf)
    return scaled


def _pass_over(
    logits: Tensor, tokens: Tensor, temperature: float, with_entropy: bool, excluded: Excluded | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, log-normalizers and entropies (zeros without `with_entropy`), each (B, R)."""
    dtype = working_dtype(logits.dtype)
    logprobs, normalizers, entropies = (torch.zeros(tokens.shape, dtype=dtype, device=logits.device) for _ in range(3))
    for block in row_blocks(logits.shape, MAX_BLOCK_ENTRIES):
        scaled = _scaled(logits, block, dtype, temperature, excluded)
        normalizer = scaled.logsumexp(-1)
        normalizers[block] = normalizer
        logprobs[block] = scaled.gather(-1, tokens[block].unsqueeze(-1)).squeeze(-1) - normalizer
        if with_entropy:
            probabilities = scaled.sub_(normalizer.unsqueeze(-1)).exp_()
            entropies[block] = torch.special.entr(probabilities, out=probabilities).sum(-1)
    return logprobs, normalizers, entropies


def check_temperature(temperature: float) -> None:
    """Raises `ValueError` unless the temperature is positive."""
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, but is {temperature}")


def _statistics(
    logits: Tensor,
    tokens: Tensor,
    temperature: float,
    with_entropy: bool,
    excluded: Excluded | None,
    memo: Memo | None,
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
    arguments = (logits, tokens.long(), temperature, with_entropy, excluded, memo)
    logprobs, entropies = _TokenStatistics.apply(*arguments)  # type: ignore[no-untyped-call]
    return logprobs, entropies


def token_logprobs(
    *,
    logits: Float[Tensor, "B R V"],
    tokens: Int[Tensor, "B R"],
    temperature: float,
    excluded: Excluded | None = None,
    memo: Memo | None = None,
) -> Float[Tensor, "B R"]:
    """Log-probability in nats of each token under softmax(logits / temperature), float32 (float64 for float64 logits).

    `logits[:, t]` must be those that predict `tokens[:, t]`. Every id lies in [0, V), padded ones too. A token that is
    itself `excluded` has log-probability -inf. `memo` is for logits that are computed twice.
    """
    return _statistics(logits, tokens, temperature, False, excluded, memo)[0]


def entropy(*, logits: Float[Tensor, "B R V"], temperature: float) -> Float[Tensor, "B R"]:
    """Entropy in nats of softmax(logits / temperature), float32 (float64 for float64 logits)."""
    check_rank(3, logits=logits)
    tokens = torch.zeros(logits.shape[:2], dtype=torch.long, device=logits.device)
    return logprobs_and_entropy(logits=logits, tokens=tokens, temperature=temperature)[1]


def logprobs_and_entropy(
    *,
    logits: Float[Tensor, "B R V"],
    tokens: Int[Tensor, "B R"],
    temperature: float,
    excluded: Excluded | None = None,
    memo: Memo | None = None,
) -> tuple[Float[Tensor, "B R"], Float[Tensor, "B R"]]:
    """`token_logprobs` and `entropy` from one pass over the logits."""
    logprobs, entropies = _statistics(logits, tokens, temperature, True, excluded, memo)
    assert entropies is not None  # with_entropy=True always computes them
    return logprobs, entropies
