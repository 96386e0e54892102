"""Optimisation settings that the stages trained by TRL share."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rlhf.config.base import Decay, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section

# Keys that decide how often something is written and in what portions it is computed, not what comes out.
BOOKKEEPING = frozenset({"save_every", "keep_checkpoints", "micro_batch_size", "gradient_checkpointing"})


class TrainingConfig(Section):
    """AdamW over a global batch: `batch_size` counts examples an optimiser step over all ranks."""

    num_epochs: PositiveFloat = Field(1.0, description="passes over the training split")
    max_steps: PositiveInt | None = Field(None, description="optimiser steps; overrides num_epochs")
    batch_size: PositiveInt = Field(32, description="examples an optimiser step, all ranks together")
    micro_batch_size: PositiveInt | None = Field(
        None, description="examples a forward pass on a rank; null: no accumulation"
    )
    learning_rate: PositiveFloat = Field(1e-3, description="peak learning rate")
    schedule: Literal["constant", "linear", "cosine"] = Field("cosine", description="decay after the warm-up")
    warmup_steps: NonNegativeInt = Field(0, description="optimiser steps of linear warm-up")
    weight_decay: NonNegativeFloat = Field(0.0, description="decoupled weight decay")
    adam_beta1: Decay = Field(0.9, description="decay of the first moment")
    adam_beta2: Decay = Field(0.999, description="decay of the second moment")
    adam_epsilon: PositiveFloat = Field(1e-8, description="epsilon outside the square root")
    max_grad_norm: PositiveFloat = Field(1.0, description="global gradient clipping")
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward pass")
    log_every: PositiveInt = Field(10, description="optimiser steps between metrics")
    save_every: PositiveInt = Field(100, description="optimiser steps between checkpoints")
    keep_checkpoints: PositiveInt = Field(2, description="newest checkpoints kept on disk")
