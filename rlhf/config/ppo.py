"""`ppo`: proximal policy optimisation with a KL penalty against a frozen reference."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from rlhf.config.base import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Probability, Section
from rlhf.config.rewards import Rewards

# Fields that change what is written down, memory, rounding, or who watches, and not what comes out: a training may go
# on with other values of them.
BOOKKEEPING = frozenset(
    {
        "samples_every",
        "num_samples_shown",
        "pass_metrics_updates",
        "exact_kl_rows",
        "save_every",
        "keep_checkpoints",
        "self_test",
        "guards",
        "micro_batch_size",
        "rollout_batch_size",
        "gradient_checkpointing",
        "logprob_chunk_tokens",
    }
)


class PPOConfig(Section):
    """PPO (Schulman et al. 2017) on one-step episodes of tokens, as in Ziegler et al. 2019.

    One update: sample `batch_size` responses, score them, then `num_epochs` passes in `num_minibatches` steps each.
    All sizes count over all ranks unless the description says otherwise.
    """

    # Models.
    policy: str | None = Field(None, description="where the policy starts; null is this run's SFT model")
    reference: str | None = Field(None, description="frozen reference of the KL; null is where the policy starts")
    reward_model: str | None = Field(None, description="reward model; null is this run's")
    value_model: str | None = Field(None, description="where the critic starts; null follows `value_init`")
    value_init: Literal["reward_model", "policy"] = Field(
        "reward_model", description="critic from the reward model, or from the policy with a new zero head"
    )
    value_network: Literal["separate", "shared_trunk"] = Field(
        "separate", description="critic of its own, or a zero-initialised linear head on the policy's trunk"
    )
    reference_refresh_every: PositiveInt | None = Field(
        None, description="updates after which the reference becomes the policy, again and again; null: never"
    )
    ema_decay: Probability | None = Field(
        None, description="publish the moving average of the policy, with this decay an update; null: the policy", lt=1
    )

    # Sizes.
    num_updates: PositiveInt = Field(100, description="PPO updates, each with its own rollout")
    batch_size: PositiveInt = Field(128, description="responses an update")
    responses_per_prompt: PositiveInt = Field(1, description="responses to each prompt of an update")
    num_epochs: PositiveInt = Field(4, description="passes over a rollout")
    num_minibatches: PositiveInt = Field(1, description="optimiser steps a pass; divides batch_size")
    micro_batch_size: PositiveInt | None = Field(
        None, description="responses a training forward on a rank; null: no accumulation"
    )
    rollout_batch_size: PositiveInt = Field(128, description="responses sampled or scored at a time on a rank")

    # Responses.
    temperature: PositiveFloat = Field(1.0, description="of sampling, old, new and reference log-probs and entropies")
    max_response_tokens: PositiveInt = Field(32, description="longest response, EOS included")
    min_response_tokens: NonNegativeInt = Field(
        0, description="stop tokens cannot be drawn before this many tokens, in sampling and scoring alike"
    )
    stop_tokens: tuple[str, ...] = Field(
        (), description="tokens of the vocabulary that end a response, besides EOS and the model's own"
    )
    truncate_token: str | None = Field(
        None,
        description="rewards see a response up to this token; one without it counts as never stopped; null: all of it",
    )
    truncate_after: NonNegativeInt = Field(
        0, description="tokens at the start of a response among which truncate_token is not looked for"
    )

    # Optimiser.
    learning_rate: PositiveFloat = Field(3e-6, description="of the policy")
    value_learning_rate: PositiveFloat | None = Field(None, description="of the critic; null is learning_rate")
    schedule: Literal["constant", "linear"] = Field(
        "linear", description="decay of both learning rates over the updates"
    )
    warmup_updates: NonNegativeInt = Field(0, description="updates of linear warm-up")
    critic_warmup_updates: NonNegativeInt = Field(
        0, description="first updates in which the critic learns and the policy does not"
    )
    adam_beta1: Probability = Field(0.9, description="decay of the first moment", lt=1)
    adam_beta2: Probability = Field(0.999, description="decay of the second moment", lt=1)
    adam_epsilon: PositiveFloat = Field(1e-5, description="epsilon outside the square root")
    adam_epsilon_placement: Literal["torch", "tensorflow"] = Field(
        "torch", description="epsilon after or before the bias correction; tensorflow is lm-human-preferences'"
    )
    weight_decay: NonNegativeFloat = Field(0.0, description="decoupled weight decay")
    max_grad_norm: PositiveFloat = Field(1.0, description="global gradient clipping, policy and critic together")
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward pass")
    logprob_chunk_tokens: PositiveInt | None = Field(
        None, description="tokens whose logits exist at a time; null: those of the whole micro-batch"
    )

    # KL.
    kl_coefficient: NonNegativeFloat = Field(0.05, description="beta: weight of the per-token KL penalty")
    kl_estimator: Literal["k1", "k2", "k3"] = Field("k1", description="per-token KL estimator of the penalty")
    kl_placement: Literal["reward", "loss"] = Field(
        "reward", description="the penalty is part of the token rewards, or a differentiable term of the loss"
    )
    kl_target_nats_per_sequence: PositiveFloat | None = Field(
        None, description="adapt beta so that the KL of a response comes to this; null: beta is fixed"
    )
    kl_horizon_episodes: PositiveInt = Field(
        10_000, description="responses over which an adaptive beta may change by a factor of about e"
    )
    kl_stop_nats_per_token: PositiveFloat | None = Field(
        None, description="an update's passes end when its approximate KL exceeds this; null: never"
    )
    exact_kl_rows: NonNegativeInt = Field(
        4, description="responses an update over which the exact full-vocabulary KL is logged"
    )

    # Scores.
    rewards: Rewards = Field({}, description="rewards by name, with a type and a weight; none: the reward model alone")
    score_normalization: Literal["reward_model", "running", "none"] = Field(
        "reward_model",
        description="shift and scale by each reward model's own statistics, by those of all scores so far, or not",
    )
    score_clip: PositiveFloat | None = Field(None, description="scores are clipped to +- this after normalisation")
    missing_eos_penalty: NonNegativeFloat | None = Field(
        None, description="charged to a response that never stopped; null: nothing"
    )
    missing_eos_mode: Literal["subtract", "replace"] = Field(
        "subtract", description="subtract the penalty from the score, or put minus the penalty in its place"
    )
    length_penalty: NonNegativeFloat = Field(0.0, description="subtracted from the score for each token too many")
    length_penalty_free_tokens: NonNegativeInt = Field(0, description="tokens that length_penalty does not charge")
    score_position: Literal["last_token", "after_eos"] = Field(
        "last_token", description="token that gets the score; after_eos reproduces the TL;DR lineage"
    )
    whiten_rewards: bool = Field(False, description="scale token rewards to unit variance over the batch, mean kept")

    # Advantages.
    gamma: Probability = Field(1.0, description="discount")
    lam: Probability = Field(0.95, description="GAE lambda")
    whiten_advantages: bool = Field(True, description="zero mean, unit variance over the global batch")

    # Losses.
    clip_low: PositiveFloat = Field(0.2, description="the ratio is clipped below 1 - clip_low", lt=1)
    clip_high: PositiveFloat = Field(0.2, description="the ratio is clipped above 1 + clip_high")
    dual_clip: float | None = Field(
        None, description="bound of the loss in units of -advantage where that is negative; null: none", gt=1
    )
    loss_aggregation: Literal["token_mean", "sequence_mean", "fixed_length"] = Field(
        "token_mean",
        description="mean over tokens, over responses of token means, or over responses of sums / max_response_tokens",
    )
    entropy_coefficient: NonNegativeFloat = Field(0.0, description="weight of the entropy bonus")
    value_clip: PositiveFloat | None = Field(0.2, description="clip of the value's change; null: none")
    value_coefficient: PositiveFloat = Field(0.1, description="weight of the value loss")
    ptx_coefficient: NonNegativeFloat = Field(
        0.0, description="weight of the demonstrations' mean token loss, mixed into every optimiser step"
    )
    ptx_batch_size: PositiveInt = Field(32, description="demonstrations an optimiser step when ptx_coefficient > 0")

    # Watching over it.
    self_test: bool = Field(True, description="check the first rollout and stop with the cause when it cannot be right")
    guards: Literal["stop", "warn", "off"] = Field(
        "stop", description="watch the metrics: warn and stop on what cannot recover, warn only, or not at all"
    )

    pass_metrics_updates: NonNegativeInt = Field(
        0, description="first updates whose passes are logged each by itself, as ppo/pass_1/approx_kl and so on"
    )
    samples_every: PositiveInt = Field(10, description="updates between sample tables")
    num_samples_shown: NonNegativeInt = Field(4, description="rollouts in a sample table")
    save_every: PositiveInt = Field(10, description="updates between checkpoints")
    keep_checkpoints: PositiveInt = Field(2, description="newest checkpoints kept on disk")

    @model_validator(mode="after")
    def _batch_divides(self) -> PPOConfig:
        if self.batch_size % self.num_minibatches:
            raise ValueError(f"num_minibatches ({self.num_minibatches}) must divide batch_size ({self.batch_size})")
        if self.batch_size % self.responses_per_prompt:
            raise ValueError(
                f"responses_per_prompt ({self.responses_per_prompt}) must divide batch_size ({self.batch_size})"
            )
        return self

    @model_validator(mode="after")
    def _lengths_fit(self) -> PPOConfig:
        if self.min_response_tokens >= self.max_response_tokens:
            raise ValueError(
                f"min_response_tokens ({self.min_response_tokens}) must stay below max_response_tokens "
                f"({self.max_response_tokens})"
            )
        return self

    @model_validator(mode="after")
    def _truncation_fits(self) -> PPOConfig:
        if self.truncate_token is None and self.truncate_after:
            raise ValueError("truncate_after belongs to truncate_token, which is null")
        if self.truncate_after >= self.max_response_tokens:
            raise ValueError(
                f"truncate_after ({self.truncate_after}) must stay below max_response_tokens "
                f"({self.max_response_tokens})"
            )
        if self.truncate_token is not None and self.score_position == "after_eos":
            raise ValueError("truncate_token cuts what is scored, not the response: set score_position=last_token")
        return self

    @model_validator(mode="after")
    def _parts_fit(self) -> PPOConfig:
        if self.value_network == "shared_trunk" and self.value_model is not None:
            raise ValueError("value_network=shared_trunk puts the critic on the policy's trunk: value_model has no use")
        if self.kl_target_nats_per_sequence is not None and self.kl_coefficient == 0:
            raise ValueError(
                "kl_target_nats_per_sequence multiplies kl_coefficient, and 0 stays 0: start from 0.1, say"
            )
        if self.kl_target_nats_per_sequence is not None and self.batch_size >= 5 * self.kl_horizon_episodes:
            raise ValueError(
                f"kl_horizon_episodes ({self.kl_horizon_episodes}) must be more than a fifth of batch_size "
                f"({self.batch_size}), or one update could turn the sign of kl_coefficient"
            )
        if self.critic_warmup_updates >= self.num_updates:
            raise ValueError(
                f"critic_warmup_updates ({self.critic_warmup_updates}) must stay below num_updates ({self.num_updates})"
            )
        return self
