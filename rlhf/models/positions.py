"""The limit of positions that a model can place."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_positions(model: PreTrainedModel, num_tokens: int) -> None:
    """Raises `ConfigError` when a sequence of `num_tokens` is longer than the model's position limit."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and num_tokens > limit:
        raise ConfigError(
            f"prompt and response may reach {num_tokens} tokens, but the model has {limit} positions. Lower "
            "data.max_prompt_tokens or max_response_tokens, or take a model with more positions "
            "(model.scratch.max_positions for one made from scratch)"
        )
