"""Random numbers and token draws of the generator: a row's tokens depend on that row alone."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlhf.errors import ArtifactError


@dataclass(frozen=True)
class Suppressed:
    """Tokens that cannot be drawn in the first `num_tokens` response slots: stop tokens, for a least response length.

    Their logits are -inf there, in sampling and in scoring alike, so that scoring reproduces the sampled log-probs.
    Raises `ValueError` for negative numbers.
    """

    token_ids: tuple[int, ...]
    num_tokens: int

    def __post_init__(self) -> None:
        if self.num_tokens < 0 or any(token < 0 for token in self.token_ids):
            raise ValueError(f"token ids and num_tokens must not be negative, but came as {self}")

    def num_slots(self, first_slot: int, width: int) -> int:
        """How many of the `width` response slots from `first_slot` on are affected; they come first."""
        return min(max(self.num_tokens - first_slot, 0), width) if self.token_ids else 0


def suppress_logits(logits: Tensor, suppressed: Suppressed | None, *, first_slot: int = 0) -> Tensor:
    """The logits (B, R, V) with -inf at the suppressed tokens; `logits[:, 0]` belongs to response slot `first_slot`.

    Differentiable. The logits themselves, not a copy, where nothing is suppressed. A suppressed id beyond the
    vocabulary raises `IndexError`.
    """
    count = suppressed.num_slots(first_slot, logits.shape[1]) if suppressed is not None else 0
    if suppressed is None or count == 0:
        return logits
    ids = torch.tensor(suppressed.token_ids, dtype=torch.long, device=logits.device)
    result = logits.clone()
    result[:, :count] = result[:, :count].index_fill(-1, ids, -math.inf)
    return result


def row_uniforms(
    seed: int, purpose: str, step: int, prompt_keys: Sequence[int | str], sample_indices: Sequence[int] | int, num: int
) -> Tensor:
    """Uniform numbers in [0, 1) for every row, from a counter-based generator keyed by what the row is.

    The key is (seed, purpose, step, prompt key, sample index), so a row gets the same numbers in whatever batch and on
    whatever rank it stands. Rows that repeat a prompt must differ in `sample_indices` (one number serves all rows).
    Philox is from Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".

    Returns (B, num) float64 on the CPU. Raises `ValueError` when the two sequences differ in length.
    """
    samples = [sample_indices] * len(prompt_keys) if isinstance(sample_indices, int) else list(sample_indices)
    if len(samples) != len(prompt_keys):
        raise ValueError(f"{len(prompt_keys)} prompt keys came with {len(samples)} sample indices")
    rows = np.empty((len(prompt_keys), num), dtype=np.float64)
    for row, (prompt_key, sample) in enumerate(zip(prompt_keys, samples, strict=True)):
        text = repr((int(seed), purpose, int(step), prompt_key, int(sample))).encode()
        key = np.frombuffer(hashlib.blake2b(text, digest_size=16).digest(), dtype=np.uint64)
        rows[row] = np.random.Generator(np.random.Philox(key=key)).random(num)
    return torch.from_numpy(rows)


def draw_tokens(logits: Tensor, uniforms: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Draws one token a row from softmax(logits / temperature) by inverting its cumulative distribution.

    logits (B, V) of any floating dtype, -inf for a token that is excluded; uniforms (B,) float64. Returns the tokens
    (B,) int64 and their log-probs (B,) float32. The sum runs in float64: in float32 the far end of a large vocabulary
    would never be drawn.
    """
    scaled = logits.float()
    if temperature != 1.0:
        scaled = scaled / temperature
    largest = scaled.amax(dim=-1, keepdim=True)
    cumulative = (scaled - largest).exp_().cumsum(dim=-1, dtype=torch.float64)
    total = cumulative[:, -1:].contiguous()
    # side "right" finds the first token whose cumulative weight is beyond the number, so weight 0 is never drawn.
    tokens = torch.searchsorted(cumulative, uniforms.unsqueeze(-1) * total, right=True)
    # A number that rounds to the whole sum draws the last token that has any weight, not an excluded one behind it.
    tokens = torch.minimum(tokens, torch.searchsorted(cumulative, total))
    if not bool(total.isfinite().all()):
        raise ArtifactError(
            "the policy gives logits that are not finite, so nothing can be sampled: damaged weights, a training that "
            "ran away, or an overflow in low precision (try distributed.precision=fp32)"
        )
    logprobs = scaled.gather(-1, tokens) - largest - total.log().float()
    return tokens.squeeze(-1), logprobs.squeeze(-1)
