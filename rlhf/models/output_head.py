"""The output head of a language model by itself: what it takes, and statistics of what it gives in small pieces.

The logits of a batch are by far its largest tensor. With `chunk_tokens` they exist for that many tokens at a time, in
the forward pass and in the backward pass, which computes each piece once more (Chen et al. 2016, "Training deep nets
with sublinear memory cost"). The head itself is called once, with its forward replaced by a loop over the pieces:
ZeRO-3 then gathers its weights once, on every rank alike, however many pieces the ranks have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlhf.errors import ConfigError
from rlhf.ops.logprobs import Excluded, Memo, logprobs_and_entropy, token_logprobs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KEY = "ppo.logprob_chunk_tokens"


def transformers_model(model: nn.Module) -> PreTrainedModel:
    """The language model itself, without an engine or adapters around it."""
    inner: Any = getattr(model, "module", model)
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    return cast("PreTrainedModel", inner)


def output_head(model: nn.Module) -> nn.Module:
    """The module that makes logits from hidden states. Raises `ConfigError` when the model names none."""
    inner = transformers_model(model)
    head = inner.get_output_embeddings()
    if head is None:
        raise ConfigError(
            f"{KEY} needs the output head of the model by itself, but {type(inner).__name__} does not say which of its "
            f"modules that is. Set {KEY}=null."
        )
    return cast(nn.Module, head)


def has_tied_head(model: PreTrainedModel) -> bool:
    """Whether output head and input embeddings are one tensor."""
    head, embeddings = cast(Any, model.get_output_embeddings()), cast(Any, model.get_input_embeddings())
    return head is not None and head.weight is embeddings.weight


def untie_head(model: PreTrainedModel) -> None:
    """Gives the output head weights of its own, equal to the input embeddings it shared."""
    head = cast(Any, model.get_output_embeddings())
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    model.config.tie_word_embeddings = False


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Calls of the module run `forward` instead of its own, with all hooks around it."""
    before = vars(module).get("forward")
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del vars(module)["forward"]
        else:
            vars(module)["forward"] = before


@contextmanager
def captured_input(model: nn.Module) -> Iterator[list[Tensor]]:
    """Forward passes of the model run up to the head, and put what the head would take into the list.

    This is exact for every architecture, whatever it does to the hidden states before the head (T5 scales them).
    """
    inputs: list[Tensor] = []

    def keep(hidden: Tensor, *args: object, **kwargs: object) -> Tensor:
        inputs.append(hidden)
        return hidden.new_zeros(1, 1, 1)  # the rest of the model's forward handles this instead of logits

    with replaced_forward(output_head(model), keep):
        yield inputs


def finish_logits(model: nn.Module, logits: Tensor) -> Tensor:
    """What the model itself does to the output of its head, for the architectures known to do something.

    `check_chunked` in `rlhf.models.scoring` finds out whether that is all a model does.
    """
    inner = transformers_model(model)
    config = inner.config.get_text_config(decoder=True)
    bias = getattr(inner, "final_logits_bias", None)  # BART and its relatives
    if bias is not None:
        logits = logits + bias
    for name in ("logit_scale", "lm_head_multiplier"):  # Cohere; Falcon-H1
        if (factor := getattr(config, name, None)) is not None:
            logits = logits * factor
    if config.model_type.startswith("granite"):
        logits = logits / config.logits_scaling
    for name in ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"):  # Gemma; RecurrentGemma; xLSTM
        if (cap := getattr(config, name, None)) is not None:
            logits = torch.tanh(logits / cap) * cap
    return logits


def head_statistics(
    model: nn.Module,
    hidden: Tensor,
    tokens: Tensor,
    *,
    temperature: float,
    excluded: Excluded | None,
    chunk_tokens: int | None,
    with_entropy: bool,
) -> tuple[Tensor, ...]:
    """Log-probs, and entropies if asked for, of tokens (B, R) from the head's input (B, R, H); each (B, R) float32."""
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be positive, but is {chunk_tokens}")
    if hidden.shape[:2] != tokens.shape:
        shapes = f"{tuple(hidden.shape)} and {tuple(tokens.shape)}"
        raise ValueError(f"hidden (B, R, H) and tokens (B, R) must agree, but came as {shapes}")
    head = output_head(model)
    if chunk_tokens is not None and _is_sharded_in_parts(head):
        raise ConfigError(
            f"{KEY} under zero.stage=3 needs an output head without adapters of its own, whose weights the ranks would "
            f"gather unequally often. Set peft.output_head=false, choose another zero.stage, or set {KEY}=null."
        )
    own_forward = _with_adapters_of_now(head)

    def piece(inputs: Tensor, targets: Tensor, slots: Tensor | None, memo: Memo | None) -> tuple[Tensor, ...]:
        logits = finish_logits(model, own_forward(inputs))
        left_out = Excluded(excluded.token_ids, slots) if excluded is not None and slots is not None else None
        if with_entropy:
            return logprobs_and_entropy(
                logits=logits, tokens=targets, temperature=temperature, excluded=left_out, memo=memo
            )
        return (token_logprobs(logits=logits, tokens=targets, temperature=temperature, excluded=left_out, memo=memo),)

    def pieces(inputs: Tensor) -> tuple[Tensor, ...]:
        slots = excluded.slots if excluded is not None else None
        if chunk_tokens is None or chunk_tokens >= tokens.numel():
            return piece(inputs, tokens, slots, None)
        parts = []
        flat = _in_pieces(inputs, chunk_tokens), _in_pieces(tokens, chunk_tokens)
        flags = [None] * len(flat[0]) if slots is None else _in_pieces(slots, chunk_tokens)
        for arguments in zip(*flat, flags, strict=True):
            if torch.is_grad_enabled():
                # Nothing here is random: dropout is off in all models.
                parts.append(checkpoint(piece, *arguments, Memo(), use_reentrant=False, preserve_rng_state=False))
            else:
                parts.append(piece(*arguments, None))
        return tuple(torch.cat(part, dim=1).view(tokens.shape) for part in zip(*parts, strict=True))

    with replaced_forward(head, pieces):
        return cast(tuple[Tensor, ...], head(hidden))


def _with_adapters_of_now(head: nn.Module) -> Callable[[Tensor], Tensor]:
    """The head's forward with the adapter that is active on it now, also when the backward pass calls it once more.

    By then another role may be active on the model.
    """
    forward: Callable[[Tensor], Tensor] = head.forward
    if not isinstance(head, BaseTunerLayer):
        return forward
    layer: Any = head
    disabled, active = layer._disable_adapters, layer._active_adapter

    def run(inputs: Tensor) -> Tensor:
        before = layer._disable_adapters, layer._active_adapter
        layer._disable_adapters, layer._active_adapter = disabled, active
        try:
            return forward(inputs)
        finally:
            layer._disable_adapters, layer._active_adapter = before

    return run


def _is_sharded_in_parts(head: nn.Module) -> bool:
    """Whether ZeRO-3 holds weights of the head in modules within it, each of which every piece would call."""
    within = any(True for _ in head.children())
    return within and any(hasattr(parameter, "ds_id") for parameter in head.parameters())


def _in_pieces(tensor: Tensor, num_tokens: int) -> Sequence[Tensor]:
    """A tensor (B, R, ...) as pieces (1, num_tokens, ...) of its tokens, the last one perhaps shorter."""
    return torch.split(tensor.reshape(1, -1, *tensor.shape[2:]), num_tokens, dim=1)
