"""The default generator: a plain loop over the model with a key-value cache, tuned for responses of unequal length.

Finished rows leave the batch, a row's tokens depend on that row alone (see `rlhf.models.sampling`), and no transform
touches the distribution but the temperature and `Suppressed`, which scoring knows, so that it reproduces the sampled
log-probs. Of an encoder-decoder model the encoder runs once and the loop is the decoder's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from rlhf.models.positions import check_positions
from rlhf.models.sampling import Suppressed, draw_tokens, suppress_logits
from rlhf.models.scoring import decoder_start
from rlhf.models.seq2seq import ENCODER_DECODER_TYPES, is_encoder_decoder
from rlhf.ops.sequences import position_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Architectures whose attention takes a prepared 4-D mask as it is. Others (ALiBi, state-space layers) get the 2-D mask.
_PREPARED_MASK_TYPES = ENCODER_DECODER_TYPES | {
    "llama",
    "gpt2",
    "gpt_neox",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "mistral",
}
# Rows are dropped once this share of the batch has stopped: dropping copies the cache, so it must pay for itself.
_COMPACT_SHARE = 0.25


class Generation(NamedTuple):
    """Sampled responses, right-padded to the longest: R is the number of tokens of the longest response."""

    response_ids: Tensor  # (B, R) int64; slots outside the mask hold `pad_id`
    response_mask: Tensor  # (B, R) bool; the stop token counts
    stopped: Tensor  # (B,) bool: ended with a stop token
    logprobs: Tensor  # (B, R) float32: log softmax(logits / temperature); 0 outside the mask


class _RoomyLayer(DynamicLayer):
    """A cache layer that writes into room reserved once, where `DynamicLayer` copies the whole cache every token."""

    keys: Tensor
    values: Tensor

    def __init__(self, capacity: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.capacity = capacity
        self.length = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        batch, heads, num_new, _ = key_states.shape
        if not self.is_initialized:
            self.dtype, self.device = key_states.dtype, key_states.device
            self.keys = key_states.new_empty(batch, heads, self.capacity, key_states.shape[-1])
            self.values = value_states.new_empty(batch, heads, self.capacity, value_states.shape[-1])
            self.is_initialized = True
        start, self.length = self.length, self.length + num_new
        self.keys[:, :, start : self.length] = key_states
        self.values[:, :, start : self.length] = value_states
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def get_seq_length(self) -> int:
        return self.length

    def batch_select_indices(self, indices: Tensor) -> None:
        # Only the used part is copied; the rest of the new room is written before it is read.
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_empty(len(indices), *old.shape[1:])
            new[:, :, : self.length] = old[indices, :, : self.length]
            setattr(self, name, new)


@dataclass
class _Decoder:
    """The model with the state of the rows that are still being written."""

    model: PreTrainedModel
    cache: DynamicCache
    mask: Tensor  # (b, T) bool over prompt and response slots
    additive: Tensor | None  # (b, 1, 1, T): 0 or the dtype's minimum, where the model takes a prepared mask
    positions: Tensor  # (b, 1) position of the next token
    length: int  # slots in the cache

    def prefill(self, prompt_ids: Tensor, prompt_mask: Tensor) -> Tensor:
        """Runs the prompts and returns the logits (b, V) of their last token."""
        return self._forward(prompt_ids, prompt_mask, position_ids(prompt_mask))

    def decode(self, tokens: Tensor) -> Tensor:
        """Appends one token (b,) to every row and returns the logits (b, V) of the next."""
        end = self.length + 1
        mask = self.mask[:, :end] if self.additive is None else self.additive[..., :end]
        logits = self._forward(tokens.unsqueeze(-1), mask, self.positions)
        self.positions = self.positions + 1
        return logits

    def _forward(self, input_ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        output = self.model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.length += input_ids.shape[1]
        logits: Tensor = output.logits[:, -1]
        return logits

    def keep(self, rows: Tensor) -> None:
        """Goes on with the rows (b',) given by their index in the present batch."""
        self.cache.batch_select_indices(rows)
        self.mask = self.mask[rows]
        self.additive = None if self.additive is None else self.additive[rows]
        self.positions = self.positions[rows]


@dataclass
class _Seq2SeqDecoder:
    """An encoder-decoder model with the state of the rows that are still being written. Prompts are encoded once."""

    model: PreTrainedModel
    cache: EncoderDecoderCache
    mask: Tensor  # (b, 1, 1, P) over the prompt: 0 or the dtype's minimum
    encoded: Tensor = field(
        init=False
    )  # (b, P, H) the encoder's states; the first step fills the cross cache from them

    def prefill(self, prompt_ids: Tensor, prompt_mask: Tensor) -> Tensor:
        """Encodes the prompts and returns the logits (b, V) of the first response token."""
        encoder: Any = self.model.get_encoder()
        self.encoded = encoder(input_ids=prompt_ids, attention_mask=prompt_mask).last_hidden_state
        return self.decode(prompt_ids.new_full((len(prompt_ids),), decoder_start(self.model)))

    def decode(self, tokens: Tensor) -> Tensor:
        """Appends one token (b,) to every row and returns the logits (b, V) of the next."""
        output = self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=self.encoded),
            attention_mask=self.mask,
            decoder_input_ids=tokens.unsqueeze(-1),
            past_key_values=self.cache,
            use_cache=True,
        )
        logits: Tensor = output.logits[:, -1]
        return logits

    def keep(self, rows: Tensor) -> None:
        """Goes on with the rows (b',) given by their index in the present batch."""
        self.cache.self_attention_cache.batch_select_indices(rows)
        self.cache.cross_attention_cache.batch_select_indices(rows)
        self.mask, self.encoded = self.mask[rows], self.encoded[rows]


def _new_cache(model: PreTrainedModel, capacity: int) -> tuple[DynamicCache, bool]:
    """A cache for `capacity` slots, and whether every layer attends to all of them (no window shorter than that)."""
    cache = DynamicCache(config=model.config)
    everywhere = bool(cache.layers)
    for index, layer in enumerate(cache.layers):
        whole = type(layer) is DynamicLayer
        whole = whole or (type(layer) is DynamicSlidingWindowLayer and layer.sliding_window >= capacity)
        if whole:
            cache.layers[index] = _RoomyLayer(capacity)
        everywhere = everywhere and whole
    return cache, everywhere


@contextmanager
def _inference(model: PreTrainedModel, *, eager: bool) -> Iterator[None]:
    """Evaluation mode without gradients and, if asked, the model's own matmul attention; restores all of it."""
    training = {module: module.training for module in model.modules()}
    attention = model.config._attn_implementation
    model.eval()
    try:
        if eager and attention != "eager":
            model.set_attn_implementation("eager")
        with torch.inference_mode():
            yield
    finally:
        if model.config._attn_implementation != attention:
            model.set_attn_implementation(attention)
        for module, mode in training.items():
            module.training = mode


def _start(model: PreTrainedModel, prompt_mask: Tensor, max_response_tokens: int) -> _Decoder | _Seq2SeqDecoder:
    """A decoder with room for the prompts and `max_response_tokens` more slots."""
    batch, num_prompt = prompt_mask.shape
    if is_encoder_decoder(model):
        num_layers = model.config.num_decoder_layers
        own, cross = DynamicCache(), DynamicCache()
        own.layers = [_RoomyLayer(max_response_tokens) for _ in range(num_layers)]
        cross.layers = [DynamicLayer() for _ in range(num_layers)]
        both = EncoderDecoderCache(own, cross)
        return _Seq2SeqDecoder(model, both, _additive(prompt_mask, model.dtype))
    cache, everywhere = _new_cache(model, num_prompt + max_response_tokens)
    mask = torch.cat([prompt_mask, prompt_mask.new_ones(batch, max_response_tokens)], dim=-1)
    additive = None
    flash = "flash" in model.config._attn_implementation
    if everywhere and not flash and model.config.model_type in _PREPARED_MASK_TYPES:
        additive = _additive(mask, model.dtype)
    positions = prompt_mask.sum(dim=-1, keepdim=True)
    return _Decoder(model, cache, mask, additive, positions, length=0)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to attention logits (b, 1, 1, T): 0 at real tokens, the dtype's minimum elsewhere. mask (b, T)."""
    added = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return added.masked_fill_(~mask, torch.finfo(dtype).min)[:, None, None, :]


def generate(
    model: PreTrainedModel,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    *,
    uniforms: Tensor,
    temperature: float,
    max_response_tokens: int,
    stop_ids: Sequence[int],
    pad_id: int = 0,
    suppressed: Suppressed | None = None,
    before_token: Callable[[], None] | None = None,
) -> Generation:
    """Samples one response a row from softmax(logits / temperature), until a stop token or `max_response_tokens`.

    prompt_ids (B, P) int64 and prompt_mask (B, P) bool are left-padded; uniforms (B, >= max_response_tokens) float64
    decide the tokens: the t-th number of a row draws its t-th token. `suppressed` tokens cannot be drawn in the first
    slots; log-probs are those of what can be. The model is left as it was found; dropout is off. The prompts of an
    encoder-decoder model go to its encoder, and its decoder begins with the config's `decoder_start_token_id`.
    `before_token` is called before each forward pass; what it raises ends the sampling and passes through.

    Raises `ValueError` for shapes or a mask that do not fit, `ConfigError` when prompt and response exceed the model's
    positions.
    """
    _check_arguments(model, prompt_ids, prompt_mask, uniforms, temperature, max_response_tokens)
    batch = prompt_ids.shape[0]
    device = prompt_ids.device
    uniforms = uniforms.to(device)
    stop_tokens = torch.tensor(sorted(set(stop_ids)), dtype=torch.long, device=device)
    ids = torch.full((batch, max_response_tokens), pad_id, dtype=torch.long, device=device)
    logprobs = torch.zeros(batch, max_response_tokens, device=device)
    lengths = torch.zeros(batch, dtype=torch.long, device=device)
    stopped = torch.zeros(batch, dtype=torch.bool, device=device)

    # On the CPU one query is faster through two matrix products than through scaled_dot_product_attention.
    with _inference(model, eager=device.type == "cpu" and model.config.model_type in _PREPARED_MASK_TYPES):
        decoder = _start(model, prompt_mask, max_response_tokens)
        rows = torch.arange(batch, device=device)  # which row of the result each row of the decoder writes
        writing = torch.ones(batch, dtype=torch.bool, device=device)  # (b,) rows of the decoder that have not stopped
        if before_token is not None:
            before_token()
        logits = decoder.prefill(prompt_ids, prompt_mask)
        for step in range(max_response_tokens):
            logits = suppress_logits(logits.unsqueeze(1), suppressed, first_slot=step).squeeze(1)
            tokens, token_logprobs = draw_tokens(logits, uniforms[rows, step], temperature)
            ids[rows, step] = torch.where(writing, tokens, pad_id)
            logprobs[rows, step] = torch.where(writing, token_logprobs, 0.0)
            lengths[rows] += writing
            writing = writing & ~torch.isin(tokens, stop_tokens)
            stopped[rows] = ~writing
            num_writing = int(writing.sum())
            if num_writing == 0 or step + 1 == max_response_tokens:
                break
            if num_writing <= len(rows) * (1 - _COMPACT_SHARE):
                kept = writing.nonzero().squeeze(-1)
                decoder.keep(kept)
                rows, tokens, writing = rows[kept], tokens[kept], writing[kept]
            if before_token is not None:
                before_token()
            logits = decoder.decode(tokens)

    longest = int(lengths.max()) if batch else 0
    mask = torch.arange(longest, device=device) < lengths.unsqueeze(-1)
    return Generation(ids[:, :longest], mask, stopped, logprobs[:, :longest])


def _check_arguments(
    model: PreTrainedModel,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    uniforms: Tensor,
    temperature: float,
    max_response_tokens: int,
) -> None:
    if prompt_mask.dtype != torch.bool or prompt_mask.shape != prompt_ids.shape:
        raise ValueError(
            f"prompt_mask must be bool of shape {tuple(prompt_ids.shape)}, not {prompt_mask.dtype} of shape "
            f"{tuple(prompt_mask.shape)}"
        )
    if not bool(prompt_mask[:, -1].all()) or bool((prompt_mask[:, :-1] & ~prompt_mask[:, 1:]).any()):
        raise ValueError("prompts must be left-padded and hold at least one token")
    if uniforms.dtype != torch.float64 or uniforms.shape[0] != prompt_ids.shape[0]:
        raise ValueError(f"uniforms must be float64 with {prompt_ids.shape[0]} rows")
    if uniforms.shape[1] < max_response_tokens:
        raise ValueError(f"uniforms has {uniforms.shape[1]} numbers a row for {max_response_tokens} tokens")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    if len(prompt_mask):
        check_positions(model, int(prompt_mask.sum(-1).max()) + max_response_tokens)
