"""Optimisation settings that the stages trained by TRL share."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from rlhf.config.base import Decay, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section

# Keys that decide how often something is written and in what portions it is computed, not what comes out.
BOOKKEEPING = frozenset({"save_every", "keep_checkpoints", "micro_batch_size", "gradient_checkpointing"})
# Options that RMSprop has not, with their defaults.
_OF_ADAMW = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8}


class TrainingConfig(Section):
    """An optimiser over a global batch: `batch_size` counts examples an optimiser step over all ranks."""

    num_epochs: PositiveFloat = Field(1.0, description="passes over the training split")
    max_steps: PositiveInt | None = Field(None, description="optimiser steps; overrides num_epochs")
    batch_size: PositiveInt = Field(32, description="examples an optimiser step, all ranks together")
    micro_batch_size: PositiveInt | None = Field(
        None, description="examples a forward pass on a rank; null: no accumulation"
    )
    optimizer: Literal["adamw", "rmsprop"] = Field(
        "adamw", description="rmsprop is torch's with its own smoothing (0.99) and epsilon (1e-8), as DPO's authors use"
    )
    learning_rate: PositiveFloat = Field(1e-3, description="peak learning rate")
    schedule: Literal["constant", "linear", "cosine"] = Field("cosine", description="decay after the warm-up")
    warmup_steps: NonNegativeInt = Field(0, description="optimiser steps of linear warm-up")
    weight_decay: NonNegativeFloat = Field(0.0, description="weight decay, decoupled unless optimizer=rmsprop")
    adam_beta1: Decay = Field(0.9, description="decay of the first moment")
    adam_beta2: Decay = Field(0.999, description="decay of the second moment")
    adam_epsilon: PositiveFloat = Field(1e-8, description="epsilon outside the square root")
    max_grad_norm: PositiveFloat = Field(1.0, description="global gradient clipping")
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward pass")
    log_every: PositiveInt = Field(10, description="optimiser steps between metrics")
    save_every: PositiveInt = Field(100, description="optimiser steps between checkpoints")
    keep_checkpoints: PositiveInt = Field(2, description="newest checkpoints kept on disk")

    @model_validator(mode="after")
    def _optimizer_has_its_options(self) -> Self:
        if self.optimizer == "rmsprop":
            given = [name for name, default in _OF_ADAMW.items() if getattr(self, name) != default]
            if given:
                raise ValueError(f"{given[0]} is an option of optimizer=adamw; optimizer is rmsprop")
        return self
