"""`ppo`: proximal policy optimisation with a KL penalty against a frozen reference."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from rlhf.config.base import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Probability, Section


class PPOConfig(Section):
    """PPO (Schulman et al. 2017) on one-step episodes of tokens, as in Ziegler et al. 2019.

    One update: sample `batch_size` responses, score them, then `num_epochs` passes in `num_minibatches` steps each.
    All sizes count over all ranks unless the description says otherwise.
    """

    policy: str | None = Field(None, description="where the policy starts; null is this run's SFT model")
    reference: str | None = Field(None, description="frozen reference of the KL; null is where the policy starts")
    reward_model: str | None = Field(None, description="reward model; null is this run's")
    value_model: str | None = Field(None, description="where the critic starts; null follows `value_init`")
    value_init: Literal["reward_model", "policy"] = Field(
        "reward_model", description="critic from the reward model, or from the policy with a new zero head"
    )

    num_updates: PositiveInt = Field(100, description="PPO updates, each with its own rollout")
    batch_size: PositiveInt = Field(128, description="responses an update")
    num_epochs: PositiveInt = Field(4, description="passes over a rollout")
    num_minibatches: PositiveInt = Field(1, description="optimiser steps a pass; divides batch_size")
    micro_batch_size: PositiveInt | None = Field(
        None, description="responses a training forward on a rank; null: no accumulation"
    )
    rollout_batch_size: PositiveInt = Field(128, description="responses sampled or scored at a time on a rank")

    temperature: PositiveFloat = Field(1.0, description="of sampling, old, new and reference log-probs and entropies")
    max_response_tokens: PositiveInt = Field(32, description="longest response, EOS included")

    learning_rate: PositiveFloat = Field(3e-6, description="of the policy")
    value_learning_rate: PositiveFloat | None = Field(None, description="of the critic; null is learning_rate")
    schedule: Literal["constant", "linear"] = Field(
        "linear", description="decay of both learning rates over the updates"
    )
    warmup_updates: NonNegativeInt = Field(0, description="updates of linear warm-up")
    adam_beta1: Probability = Field(0.9, description="decay of the first moment")
    adam_beta2: Probability = Field(0.999, description="decay of the second moment")
    adam_epsilon: PositiveFloat = Field(1e-5, description="epsilon outside the square root")
    weight_decay: NonNegativeFloat = Field(0.0, description="decoupled weight decay")
    max_grad_norm: PositiveFloat = Field(1.0, description="global gradient clipping, policy and critic together")
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward pass")

    kl_coefficient: NonNegativeFloat = Field(0.05, description="beta: weight of the per-token KL penalty in the reward")
    kl_estimator: Literal["k1", "k2", "k3"] = Field("k1", description="per-token KL estimator of the penalty")
    gamma: Probability = Field(1.0, description="discount")
    lam: Probability = Field(0.95, description="GAE lambda")
    clip_low: PositiveFloat = Field(0.2, description="the ratio is clipped below 1 - clip_low", lt=1)
    clip_high: PositiveFloat = Field(0.2, description="the ratio is clipped above 1 + clip_high")
    value_clip: PositiveFloat | None = Field(0.2, description="clip of the value's change; null: none")
    value_coefficient: PositiveFloat = Field(0.1, description="weight of the value loss")
    whiten_advantages: bool = Field(True, description="zero mean, unit variance over the global batch")
    normalize_score: bool = Field(True, description="shift and scale scores by the reward model's own statistics")
    score_clip: PositiveFloat | None = Field(None, description="scores are clipped to +- this after normalisation")
    missing_eos_penalty: NonNegativeFloat | None = Field(
        None, description="subtracted from a response that never stopped"
    )
    score_position: Literal["last_token", "after_eos"] = Field(
        "last_token", description="token that gets the score; after_eos reproduces the TL;DR lineage"
    )

    samples_every: PositiveInt = Field(10, description="updates between sample tables")
    num_samples_shown: NonNegativeInt = Field(4, description="rollouts in a sample table")
    save_every: PositiveInt = Field(10, description="updates between checkpoints")
    keep_checkpoints: PositiveInt = Field(2, description="newest checkpoints kept on disk")

    @model_validator(mode="after")
    def _batch_divides(self) -> PPOConfig:
        if self.batch_size % self.num_minibatches:
            raise ValueError(f"num_minibatches ({self.num_minibatches}) must divide batch_size ({self.batch_size})")
        return self
