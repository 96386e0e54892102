"""`closed_form`: the study that measures algorithms against the exact optimum of an enumerable problem."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlhf.config.base import PositiveFloat, PositiveInt, Probability, Section

Algorithm = Literal["ppo", "rloo", "grpo", "dpo"]
# Enumerating more than this is no longer a matter of milliseconds.
MAX_TABLE = 100_000


class OnlineBaseline(Section):
    """RLOO or GRPO by TRL's trainer: rollouts of `batch_size` responses, in groups of `num_generations` a prompt."""

    learning_rate: PositiveFloat = Field(3e-3, description="of Adam, linear to 0")
    batch_size: PositiveInt = Field(512, description="responses a rollout")
    num_generations: Annotated[int, Field(ge=2)] = Field(16, description="responses of a group, all to one prompt")
    num_minibatches: PositiveInt = Field(4, description="optimiser steps a pass over a rollout")
    num_iterations: PositiveInt = Field(2, description="passes over a rollout")

    @model_validator(mode="after")
    def _divides(self) -> OnlineBaseline:
        if self.batch_size % (self.num_generations * self.num_minibatches):
            raise ValueError(
                f"batch_size ({self.batch_size}) must be a multiple of num_generations x num_minibatches "
                f"({self.num_generations} x {self.num_minibatches})"
            )
        return self


class GRPOBaseline(OnlineBaseline):
    """GRPO: `scale_rewards` is the trainer's own option."""

    learning_rate: PositiveFloat = Field(1e-3, description="of Adam, linear to 0")
    scale_rewards: Literal["group", "batch", "none"] = Field(
        "group", description="divide advantages by the standard deviation of the group, of the batch, or not"
    )


class DPOBaseline(Section):
    """DPO by TRL's trainer on pairs of two responses of the reference, the preferred one drawn by Bradley-Terry.

    P(first preferred) = sigmoid(r(first) - r(second)), for which the optimum of the DPO loss at beta is the optimum of
    E[r] - beta * KL.
    """

    learning_rate: PositiveFloat = Field(3e-3, description="of Adam, linear to 0")
    batch_size: PositiveInt = Field(64, description="pairs an optimiser step")
    num_epochs: PositiveInt = Field(1, description="passes over the pairs")


class ClosedFormConfig(Section):
    """The exact optimality gap (J* - J) / (J* - J_ref) of J = E[r] - beta * KL along training.

    All responses to a prompt are enumerated, so that no number of the study is an estimate. PPO takes its settings from
    the section `ppo`; the study decides kl_coefficient, max_response_tokens and num_updates.
    """

    betas: tuple[PositiveFloat, ...] = Field((0.05, 0.2, 1.0), description="weights of the KL", min_length=1)
    algorithms: tuple[Algorithm, ...] = Field(("ppo", "rloo", "grpo", "dpo"), description="in this order", min_length=1)

    num_tokens: Annotated[int, Field(ge=3, le=27)] = Field(8, description="size of the vocabulary, EOS included")
    max_response_tokens: PositiveInt = Field(3, description="longest response, EOS included")
    num_prompts: PositiveInt = Field(4, description="prompts, of one token each")
    reward_scale: PositiveFloat = Field(1.0, description="standard deviation of the rewards")
    interaction_share: Probability = Field(
        0.1, description="share of the rewards' variance that belongs to whole responses; the rest to their tokens"
    )
    reference_scale: PositiveFloat = Field(0.5, description="standard deviation of the reference's logits")

    hidden_size: PositiveInt = Field(32, description="width of the model (GPT-2 architecture)")
    num_layers: PositiveInt = Field(2, description="its layers")
    num_heads: PositiveInt = Field(2, description="its attention heads")
    initializer_range: PositiveFloat = Field(0.2, description="standard deviation of its weights at first")

    num_responses: PositiveInt = Field(65_536, description="sampled responses each algorithm may use, for each beta")
    num_measurements: PositiveInt = Field(16, description="points of a curve, besides the start")

    rloo: OnlineBaseline = Field(OnlineBaseline(), description="settings of RLOO")
    grpo: GRPOBaseline = Field(GRPOBaseline(), description="settings of GRPO")
    dpo: DPOBaseline = Field(DPOBaseline(), description="settings of DPO")

    @model_validator(mode="after")
    def _no_doubles(self) -> ClosedFormConfig:
        for name, values in (("betas", self.betas), ("algorithms", self.algorithms)):
            if len(set(values)) != len(values):
                raise ValueError(f"{name} lists a value twice: {list(values)}")
        return self

    @model_validator(mode="after")
    def _can_be_enumerated(self) -> ClosedFormConfig:
        words = self.num_tokens - 1
        if self.num_prompts > words:
            raise ValueError(f"num_prompts ({self.num_prompts}) must be at most num_tokens - 1 ({words})")
        size = self.num_prompts * sum(words**length for length in range(self.max_response_tokens + 1))
        if size > MAX_TABLE:
            raise ValueError(
                f"{size:,} responses cannot be enumerated ({MAX_TABLE:,} at most): take fewer num_tokens, "
                "max_response_tokens or num_prompts"
            )
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size ({self.hidden_size}) must be a multiple of num_heads ({self.num_heads})")
        return self

    @model_validator(mode="after")
    def _budget_divides(self) -> ClosedFormConfig:
        sizes = (
            ("rloo.batch_size", self.rloo.batch_size),
            ("grpo.batch_size", self.grpo.batch_size),
            ("2 x dpo.batch_size", 2 * self.dpo.batch_size),
        )
        for name, size in sizes:
            if self.num_responses % size:
                raise ValueError(f"num_responses ({self.num_responses}) must be a multiple of {name} ({size})")
        return self
