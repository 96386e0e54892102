"""`active_selection`: the study that counts how many labels a reward model needs when somebody chooses them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from rlhf.config.base import PositiveInt, Section
from rlhf.errors import ConfigError

if TYPE_CHECKING:
    from rlhf.config.root import RLHFConfig

Strategy = Literal["random", "best_worst", "near_tie", "disagreement", "diversity"]
Accuracy = Annotated[float, Field(gt=0.5, lt=1)]


class ActiveSelectionConfig(Section):
    """Accuracy of a reward model against the number of labels, for each way of choosing what is labelled.

    All strategies of a seed have the same pool of responses, the same first labels and the same test pairs. A strategy
    then chooses by the reward model that its labels so far have trained. Sampling is that of `collect.sampling`, the
    labels those of `preferences.annotator`, the reward model that of section `reward_model`.
    """

    policy: str | None = Field(None, description="model that writes the responses; null is this run's SFT model")
    strategies: tuple[Strategy, ...] = Field(
        ("random", "best_worst", "near_tie", "disagreement", "diversity"),
        description="ways of choosing; random, with which the others are compared, is one of them",
        min_length=1,
    )
    num_seeds: PositiveInt = Field(5, description="repetitions with the seeds seed, seed + 1, ...")
    num_labels: tuple[PositiveInt, ...] = Field(
        (50, 100, 200, 400, 800),
        description="labels after each round, ascending; those of the first round are chosen at random",
        min_length=2,
    )
    num_prompts: PositiveInt = Field(600, description="training prompts of the pool")
    num_responses: Annotated[int, Field(ge=2)] = Field(4, description="responses to a prompt; any two are a candidate")
    num_test_pairs: PositiveInt = Field(1000, description="pairs of test responses, whose better one is known")
    num_members: Annotated[int, Field(ge=2)] = Field(4, description="reward models that disagreement is measured with")
    bootstrap: bool = Field(True, description="each of those members learns from a bootstrap sample of the labels")
    target_accuracies: tuple[Accuracy, ...] = Field(
        (), description="accuracies to reach, besides what random reaches with all labels of the same seed"
    )

    @model_validator(mode="after")
    def _strategies_fit(self) -> ActiveSelectionConfig:
        for name, values in (("strategies", self.strategies), ("target_accuracies", self.target_accuracies)):
            if len(set(values)) != len(values):
                raise ValueError(f"{name} lists a value twice: {list(values)}")
        if "random" not in self.strategies:
            raise ValueError(f"strategies lacks random, with which the others are compared: {list(self.strategies)}")
        if "best_worst" in self.strategies and self.num_responses < 3:
            raise ValueError("best_worst chooses among at least 3 responses to a prompt; num_responses is 2")
        return self

    @model_validator(mode="after")
    def _labels_fit(self) -> ActiveSelectionConfig:
        if list(self.num_labels) != sorted(set(self.num_labels)):
            raise ValueError(f"num_labels ascends and repeats nothing; got {list(self.num_labels)}")
        num_candidates = self.num_prompts * math.comb(self.num_responses, 2)
        if self.num_labels[-1] > num_candidates:
            raise ValueError(
                f"num_labels ends with {self.num_labels[-1]}, and {self.num_prompts} prompts of {self.num_responses} "
                f"responses are {num_candidates} pairs: raise num_prompts or num_responses"
            )
        return self


def check_active_selection(config: RLHFConfig, world_size: int) -> None:
    """Raises `ConfigError`, naming the key, for settings of other sections that the study does not have."""
    preferences, reward_model, annotator = config.preferences, config.reward_model, config.preferences.annotator
    if config.data.type != "embedded":
        raise ConfigError(
            f"stage active_selection measures by the gold reward of data=embedded; data.type is {config.data.type}."
        )
    if annotator.type != "simulated" or annotator.reward.type != "gold" or annotator.reward.wants != "favourable":
        raise ConfigError(
            "stage active_selection asks simulated annotators who see the gold reward: leave preferences.annotator "
            f"out, or set preferences.annotator.type=simulated (it is {annotator.type})."
        )
    if world_size > 1:
        raise ConfigError(
            f"stage active_selection runs on one process, not on {world_size}: its models are tiny. Leave "
            "distributed.num_processes out."
        )
    if config.zero.stage > 0 or config.peft.type != "none":
        raise ConfigError("stage active_selection trains whole models without sharding: leave zero and peft out.")
    if reward_model.loss.type != "bradley_terry" or reward_model.num_members > 1:
        raise ConfigError(
            "stage active_selection trains single reward models on pairs; reward_model.loss.type="
            f"{reward_model.loss.type} with reward_model.num_members={reward_model.num_members} is something else. "
            "The ensemble that disagreement needs has active_selection.num_members."
        )
    for key, value, wanted in (
        ("kind", preferences.kind, "pairwise"),
        ("labels_per_task", preferences.labels_per_task, 1),
        ("selection.type", preferences.selection.type, "random"),
    ):
        if value != wanted:
            raise ConfigError(
                f"stage active_selection decides itself what is asked, one label a pair: set preferences.{key}={wanted}"
                f" (it is {value})."
            )
