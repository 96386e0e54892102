"""Encoder-decoder models (T5, Flan-T5, mT5): the prompt is the encoder's text, the response is the decoder's.

The decoder reads the start token of the model's config and then the response, so its state t has seen the prompt and
t response tokens: it predicts response token t, and a scalar head on it gives that state's value. Positions are
relative in these models, so padding on the left of a prompt shifts nothing (Raffel et al. 2020, "Exploring the limits
of transfer learning with a unified text-to-text transformer", section 2.1).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rlhf.errors import ArtifactError
from rlhf.models.scoring import decoder_start

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# Others (BART, Pegasus, Marian …) number their positions from the left end, padding included.
ENCODER_DECODER_TYPES = frozenset({"t5", "mt5", "umt5"})


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether prompt and response are read by two stacks. An engine around a model tells by the model's config."""
    config = getattr(model, "config", None)
    return bool(getattr(config, "is_encoder_decoder", False))


def check_encoder_decoder(config: PreTrainedConfig, path: str, key: str) -> None:
    """Raises `ArtifactError` for an encoder-decoder architecture that left padding would shift."""
    if config.is_encoder_decoder and config.model_type not in ENCODER_DECODER_TYPES:
        raise ArtifactError(
            f"{key}: {path} is an encoder-decoder model of type {config.model_type}, whose positions count from the "
            f"left end of a padded prompt. Supported are those with relative positions: "
            f"{', '.join(sorted(ENCODER_DECODER_TYPES))}"
        )


def decoder_inputs(model: nn.Module, response_ids: Tensor, response_mask: Tensor) -> tuple[Tensor, Tensor]:
    """What the decoder reads: the start token, then the response. Ids (B, R + 1) int64 and mask (B, R + 1) bool.

    response_ids (B, R) and response_mask (B, R) are right-padded. The mask keeps attention off padding only where it
    makes no difference to real tokens: attention looks back.
    """
    start = response_ids.new_full((len(response_ids), 1), decoder_start(model))
    return torch.cat([start, response_ids], dim=1), nn.functional.pad(response_mask, (1, 0), value=True)


def decoder_values(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    decoder_input_ids: Tensor,
    decoder_attention_mask: Tensor,
) -> Tensor:
    """The numbers (B, R + 1) float32 that a sequence classifier's head gives to all the decoder's states.

    `model` is a `T5ForSequenceClassification` or a relation of it with one label. Its own forward pass reads one state,
    found by comparing the encoder's ids with EOS, which presumes that both stacks read the same text.
    """
    classifier: Any = model
    states = classifier.transformer(
        input_ids=input_ids,
        attention_mask=attention_mask,
        decoder_input_ids=decoder_input_ids,
        decoder_attention_mask=decoder_attention_mask,
        use_cache=False,
    ).last_hidden_state
    head = classifier.classification_head
    values: Tensor = head(states.to(head.out_proj.weight.dtype))
    return values.squeeze(-1).float()


def language_model_backbone(model: PreTrainedModel) -> dict[str, Tensor]:
    """The weights of an encoder-decoder language model but its output head, under the names of a plain `T5Model`."""
    return {name: weight for name, weight in model.state_dict().items() if not name.startswith("lm_head.")}
