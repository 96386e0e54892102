"""Log-probs and entropies of given responses, for the policy and the reference alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlhf.ops.logprobs import logprobs_and_entropy, token_logprobs
from rlhf.ops.sequences import position_ids

if TYPE_CHECKING:
    from torch import nn


def response_logits(model: nn.Module, *, input_ids: Tensor, attention_mask: Tensor, num_prompt: int) -> Tensor:
    """Logits (B, R, V) that predict the response tokens; the head runs on those positions only.

    input_ids (B, T) int64 and attention_mask (B, T) bool with T = num_prompt + R: left-padded prompts, right-padded
    responses. `model` is a causal language model or an engine around one. Raises `ValueError` for a mask that is not
    bool and for a `num_prompt` that leaves no response.
    """
    num_response = input_ids.shape[1] - num_prompt
    if attention_mask.dtype != torch.bool:
        raise ValueError(f"attention_mask must be bool, not {attention_mask.dtype}")
    if num_prompt < 1 or num_response < 1:
        raise ValueError(f"num_prompt ({num_prompt}) must lie between 1 and {input_ids.shape[1] - 1}")
    output = model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids(attention_mask),
        use_cache=False,
        # The token before the response predicts its first token; what the last token predicts is not asked for.
        logits_to_keep=num_response + 1,
    )
    logits: Tensor = output.logits[:, -(num_response + 1) : -1]
    return logits


def response_logprobs(
    model: nn.Module, *, input_ids: Tensor, attention_mask: Tensor, num_prompt: int, temperature: float
) -> Tensor:
    """Log-probs (B, R) float32 of the response tokens under softmax(logits / temperature).

    Arguments as in `response_logits`. Values at padding are finite and mean nothing: mask them.
    """
    logits = response_logits(model, input_ids=input_ids, attention_mask=attention_mask, num_prompt=num_prompt)
    return token_logprobs(logits=logits, tokens=input_ids[:, num_prompt:], temperature=temperature)


def response_logprobs_and_entropy(
    model: nn.Module, *, input_ids: Tensor, attention_mask: Tensor, num_prompt: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """As `response_logprobs`, with the entropies (B, R) float32 in nats of the same distributions."""
    logits = response_logits(model, input_ids=input_ids, attention_mask=attention_mask, num_prompt=num_prompt)
    return logprobs_and_entropy(logits=logits, tokens=input_ids[:, num_prompt:], temperature=temperature)
