"""Random numbers and token draws of the generator: a row's tokens depend on that row alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


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

    logits (B, V) of any floating dtype; uniforms (B,) float64. Returns the tokens (B,) int64 and their log-probs (B,)
    float32. The sum runs in float64: in float32 the far end of a large vocabulary would never be drawn.
    """
    scaled = logits.float()
    if temperature != 1.0:
        scaled = scaled / temperature
    largest = scaled.amax(dim=-1, keepdim=True)
    cumulative = (scaled - largest).exp_().cumsum(dim=-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    # side "right" finds the first token whose cumulative weight is beyond the number, so weight 0 is never drawn.
    tokens = torch.searchsorted(cumulative, uniforms.unsqueeze(-1) * total, right=True)
    tokens = tokens.clamp_(max=logits.shape[-1] - 1)
    logprobs = scaled.gather(-1, tokens) - largest - total.log().float()
    return tokens.squeeze(-1), logprobs.squeeze(-1)
