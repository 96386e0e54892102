"""Log-probs and entropies of given responses, for the policy and the reference alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from rlhf.errors import ConfigError
from rlhf.models.output_head import (
    KEY,
    captured_input,
    finish_logits,
    head_statistics,
    output_head,
    replaced_forward,
    transformers_model,
)
from rlhf.models.sampling import Suppressed
from rlhf.ops.logprobs import Excluded, logprobs_and_entropy, token_logprobs
from rlhf.ops.sequences import position_ids

if TYPE_CHECKING:
    from torch import nn

# How far the two ways to the same logits may lie apart, relative to the largest: rounding of another order of sums.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
_LOW_PRECISION_TOLERANCE = 3e-2


def response_logits(model: nn.Module, *, input_ids: Tensor, attention_mask: Tensor, num_prompt: int) -> Tensor:
    """Logits (B, R, V) that predict the response tokens; the head runs on those positions only.

    input_ids (B, T) int64 and attention_mask (B, T) bool with T = num_prompt + R: left-padded prompts, right-padded
    responses. `model` is a language model or an engine around one. A causal model reads prompt and response as one
    text; an encoder-decoder model encodes the prompt and decodes the response behind `decoder_start_token_id`. Raises
    `ValueError` for a mask that is not bool and for a `num_prompt` that leaves no response.
    """
    return _response_part(*_forward(model, input_ids, attention_mask, num_prompt), input_ids.shape[1] - num_prompt)


def response_hidden_states(model: nn.Module, *, input_ids: Tensor, attention_mask: Tensor, num_prompt: int) -> Tensor:
    """What the output head takes, (B, R, H), in the states before each response token; the head itself does not run.

    Arguments as in `response_logits`. Raises `ConfigError` for a model that does not name its head.
    """
    with captured_input(model) as inputs:
        _, causal = _forward(model, input_ids, attention_mask, num_prompt)
    return _response_part(inputs[0], causal, input_ids.shape[1] - num_prompt)


def logprobs_from_hidden(
    model: nn.Module,
    hidden: Tensor,
    tokens: Tensor,
    *,
    temperature: float,
    suppressed: Suppressed | None = None,
    response_mask: Tensor | None = None,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies (B, R) float32 of response tokens (B, R), from `response_hidden_states` (B, R, H).

    `suppressed` tokens have no probability in the first slots, except at padding if `response_mask` (B, R) bool tells
    where that is. Logits exist for `chunk_tokens` tokens at a time, for all at once without it.
    """
    excluded = _excluded(suppressed, tokens, response_mask)
    logprobs, entropy = head_statistics(
        model,
        hidden,
        tokens,
        temperature=temperature,
        excluded=excluded,
        chunk_tokens=chunk_tokens,
        with_entropy=True,
    )
    return logprobs, entropy


def response_logprobs(
    model: nn.Module,
    *,
    input_ids: Tensor,
    attention_mask: Tensor,
    num_prompt: int,
    temperature: float,
    suppressed: Suppressed | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Log-probs (B, R) float32 of the response tokens under softmax(logits / temperature), without their entropies.

    Bit-equal to those of `response_logprobs_and_entropy`. Arguments as in `response_logits`; `suppressed` tokens have
    no probability in the first slots; with `chunk_tokens` the logits exist for that many tokens at a time. Values at
    padding are finite and mean nothing: mask them.
    """
    return _statistics(
        model, input_ids, attention_mask, num_prompt, temperature, suppressed, chunk_tokens, with_entropy=False
    )[0]


def response_logprobs_and_entropy(
    model: nn.Module,
    *,
    input_ids: Tensor,
    attention_mask: Tensor,
    num_prompt: int,
    temperature: float,
    suppressed: Suppressed | None = None,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """As `response_logprobs`, with the entropies (B, R) float32 in nats of the same distributions."""
    logprobs, entropy = _statistics(
        model, input_ids, attention_mask, num_prompt, temperature, suppressed, chunk_tokens, with_entropy=True
    )
    return logprobs, entropy


def _statistics(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    num_prompt: int,
    temperature: float,
    suppressed: Suppressed | None,
    chunk_tokens: int | None,
    *,
    with_entropy: bool,
) -> tuple[Tensor, ...]:
    tokens = input_ids[:, num_prompt:]
    excluded = _excluded(suppressed, tokens, attention_mask[:, num_prompt:])
    if chunk_tokens is not None:
        hidden = response_hidden_states(
            model, input_ids=input_ids, attention_mask=attention_mask, num_prompt=num_prompt
        )
        return head_statistics(
            model,
            hidden,
            tokens,
            temperature=temperature,
            excluded=excluded,
            chunk_tokens=chunk_tokens,
            with_entropy=with_entropy,
        )
    logits, causal = _forward(model, input_ids, attention_mask, num_prompt)
    num_response = tokens.shape[1]
    if causal:
        # The position behind the response goes along, with any token: cutting it off would copy the logits' gradient.
        logits = logits if logits.shape[1] == num_response + 1 else logits[:, -(num_response + 1) :]
        tokens = pad(tokens, (0, 1))
        excluded = excluded and Excluded(excluded.token_ids, pad(excluded.slots, (0, 1)))
    if with_entropy:
        logprobs, entropy = logprobs_and_entropy(
            logits=logits, tokens=tokens, temperature=temperature, excluded=excluded
        )
        return logprobs[:, :num_response], entropy[:, :num_response]
    logprobs = token_logprobs(logits=logits, tokens=tokens, temperature=temperature, excluded=excluded)
    return (logprobs[:, :num_response],)


def _excluded(suppressed: Suppressed | None, tokens: Tensor, response_mask: Tensor | None) -> Excluded | None:
    """Which ids are left out in which slots. Padding is not affected, so that its log-probs stay finite."""
    if suppressed is None or suppressed.num_slots(0, tokens.shape[1]) == 0:
        return None
    slots = (torch.arange(tokens.shape[1], device=tokens.device) < suppressed.num_tokens).expand(tokens.shape)
    if response_mask is not None:
        slots = slots & response_mask
    return Excluded(torch.tensor(suppressed.token_ids, dtype=torch.long, device=tokens.device), slots)


def _forward(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, num_prompt: int) -> tuple[Tensor, bool]:
    """The model's logits and whether it is a causal model, whose logits include one position behind the response's."""
    num_response = input_ids.shape[1] - num_prompt
    if attention_mask.dtype != torch.bool:
        raise ValueError(f"attention_mask must be bool, not {attention_mask.dtype}")
    if num_prompt < 1 or num_response < 1:
        raise ValueError(f"num_prompt ({num_prompt}) must lie between 1 and {input_ids.shape[1] - 1}")
    if transformers_model(model).config.is_encoder_decoder:
        prompt_ids, prompt_mask = encoder_input(input_ids[:, :num_prompt], attention_mask[:, :num_prompt])
        decoder_ids, decoder_mask = decoder_input(model, input_ids[:, num_prompt:], attention_mask[:, num_prompt:])
        output = model(
            input_ids=prompt_ids,
            attention_mask=prompt_mask,
            decoder_input_ids=decoder_ids,
            decoder_attention_mask=decoder_mask,
            use_cache=False,
        )
        return output.logits, False
    output = model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids(attention_mask),
        use_cache=False,
        # The token before the response predicts its first token; what the last token predicts is not asked for.
        logits_to_keep=num_response + 1,
    )
    return output.logits, True


def _response_part(states: Tensor, causal: bool, num_response: int) -> Tensor:
    """Those of the model's positions that predict the response tokens."""
    return states[:, -(num_response + 1) : -1] if causal else states


def encoder_input(prompt_ids: Tensor, prompt_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Left-padded prompts (B, P) and their mask with the padding moved to the right, as encoders want it.

    Some encoders count positions from the first column and take no position ids, so left padding would shift them.
    """
    num_columns = prompt_ids.shape[1]
    first = num_columns - prompt_mask.sum(dim=1, keepdim=True)
    columns = (torch.arange(num_columns, device=prompt_ids.device) + first) % num_columns
    return prompt_ids.gather(1, columns), prompt_mask.gather(1, columns)


def decoder_input(model: nn.Module, response_ids: Tensor, response_mask: Tensor) -> tuple[Tensor, Tensor]:
    """What the decoder reads to predict the response (B, R), and its mask: the start token, then all but the last."""
    start_ids = torch.full_like(response_ids[:, :1], decoder_start(model))
    start_mask = torch.ones_like(response_mask[:, :1])
    return torch.cat([start_ids, response_ids[:, :-1]], dim=1), torch.cat([start_mask, response_mask[:, :-1]], dim=1)


def decoder_start(model: nn.Module) -> int:
    """The id a decoder starts from. Raises `ConfigError` when neither config of the model names one."""
    inner = transformers_model(model)
    for config in (inner.config, getattr(inner, "generation_config", None)):
        start = getattr(config, "decoder_start_token_id", None)
        if isinstance(start, int):
            return start
    raise ConfigError(
        f"{type(inner).__name__} is an encoder-decoder model, but neither its config.json nor its "
        "generation_config.json has decoder_start_token_id. Add it: for T5 it is the id of the pad token."
    )


@torch.no_grad()
def check_chunked(model: nn.Module) -> None:
    """Raises `ConfigError` unless scoring in pieces gives the model's own logits. Takes two forwards of a few tokens.

    The first compares logits; the second lets the head return numbers of a wide range, so that whatever the model does
    to its logits shows even where the weights make them small. Under ZeRO every rank must call it.
    """
    head = output_head(model)
    config = transformers_model(model).config.get_text_config(decoder=True)
    ids = torch.arange(10, device=next(model.parameters()).device).view(2, 5) % int(config.vocab_size)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids, dtype=torch.bool)}
    own = response_logits(model, **batch, num_prompt=2)
    raw = head(response_hidden_states(model, **batch, num_prompt=2))
    _compare(model, own, finish_logits(model, raw))
    probe = torch.linspace(-100.0, 100.0, raw.shape[-1], dtype=raw.dtype, device=raw.device)
    with replaced_forward(head, lambda hidden: probe.expand(*hidden.shape[:2], -1)):
        own = response_logits(model, **batch, num_prompt=2)
    _compare(model, own, finish_logits(model, probe.expand(*raw.shape)))


def _compare(model: nn.Module, own: Tensor, ours: Tensor) -> None:
    name = type(transformers_model(model)).__name__
    advice = f"so its log-probs cannot be computed in pieces. Set {KEY}=null."
    if own.shape != ours.shape:
        raise ConfigError(f"{name} gives {own.shape[-1]} logits where its head gives {ours.shape[-1]}, {advice}")
    tolerance = _TOLERANCE.get(ours.dtype, _LOW_PRECISION_TOLERANCE)
    difference = float((own.double() - ours.double()).abs().max())
    if not difference <= tolerance * max(1.0, float(own.abs().max())):
        raise ConfigError(f"{name} changes what its output head gives (logits differ by {difference:.2g}), {advice}")
