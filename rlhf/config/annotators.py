"""Who labels: `preferences.annotator`. Simulated annotators, people, LLM judges, rules, functions, and mixtures."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from rlhf.config.base import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Probability, Section
from rlhf.config.chat import ChatModelConfig
from rlhf.config.rewards import FiniteFloat, GoldReward, ModelReward, RewardConfig, RewardName

Share = Annotated[float, Field(gt=0, le=1)]
# What an annotator's function is given besides the data's columns, under these names.
ANNOTATOR_FUNCTION_INPUTS = ("prompts", "first", "second")


class _Named(Section):
    name: str | None = Field(None, description="name in the store; null takes one after the type", min_length=1)


def check_reward(reward: RewardConfig) -> None:
    """Raises `ValueError` for a reward that an annotator cannot go by: there is no reward model of the run yet."""
    if isinstance(reward, ModelReward) and reward.path is None:
        raise ValueError("reward.path is null: give the folder of a reward model, or choose another reward.type")
    if reward.weight == 0:
        raise ValueError("reward.weight is 0, so that every response would have the same score")


class SimulatedAnnotators(_Named):
    """A pool that sees a reward: P(a over b) = sigmoid((reward(a) - reward(b)) / temperature), Bradley-Terry."""

    type: Literal["simulated"] = "simulated"
    reward: RewardConfig = Field(GoldReward(), description="what the annotators want; its weight is a factor")
    temperature: NonNegativeFloat = Field(0.5, description="Bradley-Terry noise; 0 always takes the better response")
    num_annotators: PositiveInt = Field(3, description="size of the pool; each errs independently")
    weights: tuple[PositiveFloat, ...] = Field(
        (), description="how many tasks each annotator gets, relative to the others; empty: they take turns"
    )
    temperature_spread: NonNegativeFloat = Field(
        0.0, description="standard deviation, over the pool, of the logarithm of the temperature"
    )
    taste_spread: NonNegativeFloat = Field(
        0.0, description="standard deviation of an annotator's own, lasting opinion of a response, added to the reward"
    )
    flip_share: Probability = Field(0.0, description="share of the labels that are turned round")
    position_bias: FiniteFloat = Field(0.0, description="added to the log-odds of the response shown first")
    tie_margin: NonNegativeFloat | None = Field(
        None, description="responses whose rewards differ by no more are a tie; null: there are no ties"
    )
    both_bad_below: FiniteFloat | None = Field(
        None, description="two responses with rewards below this are both bad; null: they are compared"
    )
    abstain_share: Probability = Field(0.0, description="share of the tasks that an annotator does not answer")
    abstain_margin: NonNegativeFloat | None = Field(
        None, description="only responses whose rewards differ by no more are left unanswered; null: any"
    )
    strength_margins: tuple[PositiveFloat, ...] = Field(
        (), description="differences of the rewards from which a choice has strength 2 and 3; empty: strength is 1"
    )
    rating_low: FiniteFloat = Field(-2.0, description="reward that a rating of 1 stands for")
    rating_high: FiniteFloat = Field(2.0, description="reward that the best rating stands for")

    @model_validator(mode="after")
    def _lists_fit(self) -> SimulatedAnnotators:
        check_reward(self.reward)
        if self.weights and len(self.weights) != self.num_annotators:
            raise ValueError(
                f"weights has one number for each of num_annotators ({self.num_annotators}), not {len(self.weights)}"
            )
        margins = self.strength_margins
        if margins and (len(margins) != 2 or margins[0] > margins[1]):
            raise ValueError(f"strength_margins is empty or two ascending numbers, not {list(margins)}")
        if self.rating_low >= self.rating_high:
            raise ValueError(f"rating_low ({self.rating_low}) must be less than rating_high ({self.rating_high})")
        return self


class HumanAnnotators(Section):
    """People, who label on the page: the pipeline waits for them."""

    type: Literal["human"] = "human"
    serve: bool = Field(True, description="serve the labelling page while waiting; false: `rlhf label` serves it")
    host: str = Field("127.0.0.1", description="address that the page is served at")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(0, description="port of the page; 0 takes a free one")
    poll_seconds: PositiveFloat = Field(2.0, description="how often the store is looked at for labels")
    instructions: str | None = Field(None, description="markdown file with what annotators are told")
    lease_minutes: PositiveFloat = Field(10.0, description="how long a task is kept for who opened it")


class JudgeAnnotator(_Named, ChatModelConfig):
    """A language model that is asked which response is better."""

    type: Literal["judge"] = "judge"
    template: str | None = Field(
        None, description="text file of the question about pairs, with {prompt}, {first} and {second}; null: built in"
    )
    ranking_template: str | None = Field(
        None, description="text file of the question about rankings, with {prompt} and {responses}; null: built in"
    )
    rating_template: str | None = Field(
        None, description="text file of the question about ratings, with {prompt}, {response}, {scale}; null: built in"
    )
    both_orders: bool = Field(True, description="ask twice, the sides swapped; answers that disagree are a tie")
    comment_characters: NonNegativeInt = Field(2000, description="longest part of the reasons kept with a label")


class RuleAnnotator(_Named):
    """Prefers the response with the higher score of a reward."""

    type: Literal["rule"] = "rule"
    reward: RewardConfig = Field(ModelReward(), description="the rule, as in ppo.rewards; its weight is a factor")
    margin: NonNegativeFloat = Field(0.0, description="scores that differ by no more are a tie")
    rating_low: FiniteFloat = Field(0.0, description="score that a rating of 1 stands for")
    rating_high: FiniteFloat = Field(1.0, description="score that the best rating stands for")

    @model_validator(mode="after")
    def _range_is_one(self) -> RuleAnnotator:
        check_reward(self.reward)
        if self.rating_low >= self.rating_high:
            raise ValueError(f"rating_low ({self.rating_low}) must be less than rating_high ({self.rating_high})")
        return self


class FunctionAnnotator(_Named):
    """A Python function of yours for pairs: f(prompts, first, second, **columns) -> list of verdicts.

    A verdict is "first", "second", "tie", the probability with which the first response is chosen, or None to abstain.
    """

    type: Literal["function"] = "function"
    file: str = Field(description="Python file that defines the function")
    function: str = Field("annotate", description="name of the function")
    arguments: dict[str, Any] = Field({}, description="further keyword arguments of the function")

    @model_validator(mode="after")
    def _arguments_are_free(self) -> FunctionAnnotator:
        taken = [name for name in self.arguments if name in ANNOTATOR_FUNCTION_INPUTS]
        if taken:
            raise ValueError(f"arguments names {', '.join(taken)}, which every call gets already")
        return self


def _by_name(value: Any) -> Any:
    """The name of a type alone stands for a section with its defaults: annotator=human."""
    return {"type": value} if isinstance(value, str) else value


SingleAnnotatorConfig = Annotated[
    SimulatedAnnotators | HumanAnnotators | JudgeAnnotator | RuleAnnotator | FunctionAnnotator,
    Field(discriminator="type"),
    BeforeValidator(_by_name),
]


class MixturePart(Section):
    """Some of the tasks, and who labels them."""

    share: Share = Field(description="share of the prompts")
    annotator: SingleAnnotatorConfig = Field(description="who labels them")


def _shares_sum_to_one(parts: dict[str, MixturePart]) -> dict[str, MixturePart]:
    if len(parts) < 2:
        raise ValueError(f"a mixture has at least two parts, not {len(parts)}")
    total = math.fsum(part.share for part in parts.values())
    if not math.isclose(total, 1.0, abs_tol=1e-6):
        listed = ", ".join(f"{name} {part.share:g}" for name, part in parts.items())
        raise ValueError(f"the shares of a mixture's parts add up to 1, not {total:g}: {listed}")
    return parts


class MixtureAnnotators(Section):
    """Several annotators, each for a share of the prompts: people for 10 %, a judge for the rest."""

    type: Literal["mixture"] = "mixture"
    parts: Annotated[dict[RewardName, MixturePart], AfterValidator(_shares_sum_to_one)] = Field(
        {}, description="the parts, under names of your choice, each with share and annotator"
    )


AnnotatorConfig = Annotated[
    SimulatedAnnotators | HumanAnnotators | JudgeAnnotator | RuleAnnotator | FunctionAnnotator | MixtureAnnotators,
    Field(discriminator="type"),
    BeforeValidator(_by_name),
]
AnyAnnotatorConfig = (
    SimulatedAnnotators | HumanAnnotators | JudgeAnnotator | RuleAnnotator | FunctionAnnotator | MixtureAnnotators
)
