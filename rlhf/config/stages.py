"""`sft`, `collect`, `reward_model` and `evaluate`: one section a stage (PPO has its own module)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlhf.config.base import NonNegativeInt, PositiveFloat, PositiveInt, Probability, Section
from rlhf.config.chat import ChatModelConfig
from rlhf.config.training import TrainingConfig


class SFTConfig(TrainingConfig):
    """Supervised fine-tuning: the loss is the token mean of the response's cross-entropy, EOS included."""

    base: str | None = Field(None, description="folder or hub id to start from; null is `model`")
    train_on_prompt: bool = Field(False, description="the prompt's tokens count in the loss too")


class SamplingConfig(Section):
    """How responses are sampled. Scoring applies the same temperature; the distribution is never truncated."""

    temperature: PositiveFloat = Field(1.0, description="logits are divided by it, in sampling and in scoring")
    max_response_tokens: PositiveInt = Field(32, description="longest response, EOS included")
    min_response_tokens: NonNegativeInt = Field(0, description="stop tokens cannot be drawn before this many tokens")
    stop_tokens: tuple[str, ...] = Field((), description="tokens that end a response, besides EOS and the model's own")
    batch_size: PositiveInt = Field(128, description="responses sampled at a time on a rank")


class CollectConfig(Section):
    """Preference collection: what is sampled from the policy. `preferences` says what is asked about it, of whom."""

    policy: str | None = Field(None, description="policy that writes the responses; null is this run's SFT model")
    num_comparisons: PositiveInt = Field(4000, description="tasks about training prompts")
    num_validation_comparisons: PositiveInt = Field(200, description="tasks about validation prompts")
    num_test_comparisons: PositiveInt = Field(500, description="tasks about test prompts")
    sampling: SamplingConfig = Field(SamplingConfig(), description="how the responses are sampled")


class GoldJudge(Section):
    """The embedded corpus's gold reward: exact, and never seen by a trained model."""

    type: Literal["gold"] = "gold"


class ClassifierJudge(Section):
    """A TF-IDF and logistic-regression classifier trained on labelled texts that no other stage sees."""

    type: Literal["classifier"] = "classifier"
    ngram_max: PositiveInt = Field(2, description="longest word n-gram")
    inverse_regularization: PositiveFloat = Field(4.0, description="C of the logistic regression")


class RewardModelJudge(Section):
    """A reward model. This run's own is what PPO optimised, so it shows fit, not quality."""

    type: Literal["reward_model"] = "reward_model"
    path: str | None = Field(None, description="folder or hub id of the reward model; null is this run's")


class LanguageModelJudge(ChatModelConfig):
    """A language model that is asked which of the two responses is better, which one is shown first being random."""

    type: Literal["language_model"] = "language_model"
    template: str | None = Field(
        None, description="text file of the question, with {prompt}, {first} and {second}; null: built in"
    )
    both_orders: bool = Field(True, description="ask twice, the sides swapped, and take the mean of both verdicts")


JudgeConfig = Annotated[
    GoldJudge | ClassifierJudge | RewardModelJudge | LanguageModelJudge, Field(discriminator="type")
]


class EvaluateConfig(Section):
    """Evaluation of a policy against a baseline on the same held-out prompts."""

    policy: str | None = Field(None, description="policy to judge; null is this run's PPO model")
    baseline: str | None = Field(None, description="model to compare with; null is this run's SFT model")
    reference: str | None = Field(None, description="model of the KL; null is the baseline")
    reward_model: str | None = Field(None, description="reward model whose score is shown; null is this run's, if any")
    judge: JudgeConfig = Field(GoldJudge(), description="who decides which response is better")
    num_prompts: PositiveInt = Field(500, description="held-out prompts")
    num_demonstrations: NonNegativeInt = Field(
        0, description="held-out demonstrations whose loss is measured under policy and baseline"
    )
    num_samples_shown: NonNegativeInt = Field(20, description="prompts in the sample table")
    confidence: Probability = Field(0.95, description="level of the intervals")
    bootstrap_resamples: PositiveInt = Field(2000, description="resamples of the bootstrap intervals")
    sampling: SamplingConfig = Field(SamplingConfig(), description="how the responses are sampled")

    @model_validator(mode="after")
    def _confidence_is_open(self) -> EvaluateConfig:
        if not 0 < self.confidence < 1:
            raise ValueError("confidence must lie between 0 and 1, both excluded")
        return self
