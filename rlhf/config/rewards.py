"""`ppo.rewards`: what a response is scored by, under names of the user's choice."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, model_validator

from rlhf.config.base import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section
from rlhf.config.chat import ChatModelConfig

FiniteFloat = Annotated[float, Field(allow_inf_nan=False)]
RewardName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_-]*$")]
LengthUnit = Literal["tokens", "words"]
# What a reward function is given besides the data's columns, under these names.
FUNCTION_INPUTS = ("prompts", "completions", "completion_ids")


class _Reward(Section):
    weight: FiniteFloat = Field(
        1.0, description="factor in the sum of rewards; negative to punish, 0 to log without effect"
    )


class ModelReward(_Reward):
    """A reward model's score."""

    type: Literal["model"] = "model"
    path: str | None = Field(None, description="folder or hub id of the reward model; null is this run's")
    normalize: bool = Field(
        True, description="shift and scale by the statistics stored beside the reward model, of an ensemble each member"
    )
    aggregation: Literal["mean", "worst", "mean_minus_variance"] = Field(
        "mean", description="one score of an ensemble: the members' mean, their least, or mean - lambda x variance"
    )
    variance_coefficient: NonNegativeFloat | None = Field(
        None, description="lambda of mean_minus_variance; null is 0.1"
    )

    @model_validator(mode="after")
    def _variance_is_used(self) -> ModelReward:
        if self.variance_coefficient is not None and self.aggregation != "mean_minus_variance":
            raise ValueError(
                f"variance_coefficient belongs to aggregation=mean_minus_variance; aggregation is {self.aggregation}"
            )
        return self


class FunctionReward(_Reward):
    """A Python function of yours with TRL's signature: f(prompts, completions, **columns) -> list[float | None]."""

    type: Literal["function"] = "function"
    file: str = Field(description="Python file that defines the function")
    function: str = Field("reward", description="name of the function")
    arguments: dict[str, Any] = Field({}, description="further keyword arguments of the function")

    @model_validator(mode="after")
    def _arguments_are_free(self) -> FunctionReward:
        taken = [name for name in self.arguments if name in FUNCTION_INPUTS]
        if taken:
            raise ValueError(f"arguments names {', '.join(taken)}, which every call gets already")
        return self


class LengthReward(_Reward):
    """0 between `minimum` and `maximum`, then falling in a straight line to -1 at `tolerance` beyond: in [-1, 0]."""

    type: Literal["length"] = "length"
    unit: LengthUnit = Field("tokens", description="what is counted; tokens include the end of the response")
    minimum: NonNegativeInt = Field(0, description="shortest response that costs nothing")
    maximum: PositiveInt | None = Field(16, description="longest response that costs nothing; null: no limit")
    tolerance: PositiveInt = Field(16, description="units beyond the limits at which the reward is -1")

    @model_validator(mode="after")
    def _limits_fit(self) -> LengthReward:
        if self.maximum is not None and self.minimum > self.maximum:
            raise ValueError(f"minimum ({self.minimum}) must not exceed maximum ({self.maximum})")
        return self


class RegexReward(_Reward):
    """`matched` where the response has the pattern in it, `unmatched` elsewhere."""

    type: Literal["regex"] = "regex"
    pattern: str = Field(description="Python regular expression")
    whole: bool = Field(False, description="the pattern must fit the whole response, white space around it aside")
    matched: FiniteFloat = Field(1.0, description="score of a response that fits")
    unmatched: FiniteFloat = Field(0.0, description="score of a response that does not")

    @model_validator(mode="after")
    def _pattern_compiles(self) -> RegexReward:
        check_pattern(self.pattern)
        return self


class KeywordReward(_Reward):
    """How many of the words are in the response, as whole words: in [0, 1]."""

    type: Literal["keywords"] = "keywords"
    words: tuple[str, ...] = Field(description="words to look for", min_length=1)
    count: Literal["share", "any", "all"] = Field(
        "share", description="share of the words that are there, or 1 when any or all of them are"
    )
    case_sensitive: bool = Field(False, description="capitals must agree")

    @model_validator(mode="after")
    def _words_are_words(self) -> KeywordReward:
        if not all(word.strip() for word in self.words):
            raise ValueError("words holds an empty word")
        return self


class ExactAnswerReward(_Reward):
    """`correct` where the response's answer equals a column's, `wrong` elsewhere; numbers are compared as numbers."""

    type: Literal["exact_answer"] = "exact_answer"
    column: str = Field("answer", description="column with the right answer; a row without one is not scored")
    pattern: str | None = Field(
        None, description="the answer is its first group, or all of it, where it fits last; null: the last number"
    )
    correct: FiniteFloat = Field(1.0, description="score of the right answer")
    wrong: FiniteFloat = Field(0.0, description="score of another answer, or of none")

    @model_validator(mode="after")
    def _pattern_compiles(self) -> ExactAnswerReward:
        if self.pattern is not None:
            check_pattern(self.pattern)
        return self


class MathReward(_Reward):
    """`correct` where the response's answer is mathematically the column's, by math-verify (LaTeX, fractions, sets)."""

    type: Literal["math"] = "math"
    column: str = Field("answer", description="column with the right answer; a row without one is not scored")
    correct: FiniteFloat = Field(1.0, description="score of the right answer")
    wrong: FiniteFloat = Field(0.0, description="score of another answer")
    unparsable: FiniteFloat = Field(0.0, description="score of a response without an answer, or that takes too long")
    timeout_seconds: PositiveFloat = Field(
        2.0, description="CPU seconds that reading and comparing one response may take"
    )
    max_characters: PositiveInt = Field(4096, description="characters at the end of a response that are looked at")
    num_workers: PositiveInt = Field(1, description="comparing processes of each rank")


class RemoteReward(_Reward):
    """Scores that a server of `rlhf serve` gives over HTTP."""

    type: Literal["remote"] = "remote"
    address: str = Field(description="where the server is, such as http://127.0.0.1:8010")
    normalize: bool = Field(True, description="shift and scale by the statistics that the server has of its models")
    token_variable: str | None = Field(None, description="environment variable with the server's token; null: none")
    timeout_seconds: PositiveFloat = Field(60.0, description="seconds that one request may take")
    num_retries: NonNegativeInt = Field(5, description="further tries where the server is away or has no room")
    batch_size: PositiveInt = Field(64, description="responses in one request")
    concurrency: PositiveInt = Field(4, description="requests of a rank at the same time")

    @model_validator(mode="after")
    def _address_is_one(self) -> RemoteReward:
        parts = urlsplit(self.address)
        # Asking for the port raises `ValueError` for one that is no number.
        if (
            parts.port == 0
            or parts.scheme not in ("http", "https")
            or not parts.hostname
            or parts.query
            or parts.fragment
        ):
            raise ValueError(f"address must look like http://HOST:PORT, got {self.address!r}")
        if parts.username or parts.password:
            raise ValueError("address must not hold a password: name an environment variable in token_variable")
        return self


class RepetitionReward(_Reward):
    """Minus the share of n-grams that have come before in the same response: in (-1, 0]."""

    type: Literal["repetition"] = "repetition"
    size: PositiveInt = Field(3, description="length of the n-grams")
    unit: LengthUnit = Field("words", description="what the n-grams are made of")


class GoldReward(_Reward):
    """The embedded corpus's gold reward, in [-2, 2]: for studies of over-optimisation, with data=embedded only."""

    type: Literal["gold"] = "gold"
    wants: Literal["favourable", "reserved"] = Field(
        "favourable", description="favourable opinions, which is the corpus's gold reward, or as few opinions as can be"
    )


class SentimentReward(_Reward):
    """P(positive) = (1 + the mean of the response's opinions) / 2 in [0, 1], of the words of data=embedded alone.

    Each opinion is 1 or -1, a sentence without one is 0: what a sentiment classifier that never errs says of the text.
    """

    type: Literal["sentiment"] = "sentiment"


class JudgeReward(_Reward, ChatModelConfig):
    """A language model's rating of the response, from 1 to `scale`; or how likely it beats the one of a column."""

    type: Literal["judge"] = "judge"
    logprobs: bool = Field(
        True, description="the mean rating by the log-probs of the numbers, where the model gives them; false: reasons"
    )
    scale: Annotated[int, Field(ge=2, le=100)] = Field(5, description="best rating; log-probs are for up to 9")
    reference_column: str | None = Field(
        None, description="column with a response to compare with; a row without one is not scored; null: rate"
    )
    both_orders: bool = Field(True, description="compare twice, the sides swapped, and take the mean")
    unreadable: FiniteFloat | None = Field(
        None, description="score where the reply says nothing that can be read; null: the response is not scored"
    )
    template: str | None = Field(
        None,
        description="text file of the question, with {prompt}, {response} and {scale}, or {prompt}, {first} and "
        "{second} to compare; null: built in",
    )


RewardConfig = Annotated[
    ModelReward
    | FunctionReward
    | LengthReward
    | RegexReward
    | KeywordReward
    | ExactAnswerReward
    | MathReward
    | RemoteReward
    | RepetitionReward
    | JudgeReward
    | GoldReward
    | SentimentReward,
    Field(discriminator="type"),
]


def check_pattern(pattern: str) -> None:
    """Raises `ValueError` for a text that is not a regular expression."""
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"pattern is not a regular expression: {error}") from error


def _some_weight(rewards: dict[str, Any]) -> dict[str, Any]:
    if rewards and not any(reward.weight for reward in rewards.values()):
        raise ValueError(f"every weight is 0, so there is nothing to optimise: {', '.join(rewards)}")
    return rewards


# The type of `ppo.rewards`. Without an entry the run's reward model is the reward (`effective_rewards`).
Rewards = Annotated[dict[RewardName, RewardConfig], AfterValidator(_some_weight)]
DEFAULT_REWARD_NAME = "reward_model"


def effective_rewards(rewards: dict[str, RewardConfig]) -> dict[str, RewardConfig]:
    """The rewards that count: those of the config, or the run's reward model alone where it names none."""
    return rewards or {DEFAULT_REWARD_NAME: ModelReward()}
