"""`iterated`: the closed loop of sampling, labelling, reward model and PPO, in rounds."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rlhf.config.base import PositiveInt, Section


class IteratedConfig(Section):
    """Rounds of collect, reward_model, ppo and evaluate, each with the labels and the updates that the config asks for.

    The labels of all rounds are in one store, and every round's reward model learns from all of them. For comparison
    the same number of labels is spent in one go, on responses of the first policy, with as many PPO updates.
    """

    policy: str | None = Field(None, description="policy of the first round; null is this run's SFT model")
    num_rounds: PositiveInt = Field(3, description="rounds")
    num_seeds: PositiveInt = Field(
        1, description="repetitions with the seeds seed, seed + 1, ...; intervals need three"
    )
    start_from: Literal["previous", "first"] = Field(
        "previous", description="policy from which a round's PPO starts: that of the round before, or the first one"
    )
    reward_model_from: Literal["previous", "first"] = Field(
        "first", description="what a round's reward model starts from: that of the round before, or the first policy"
    )
    one_batch: bool = Field(
        True, description="also spend all rounds' labels in one go, for comparison; never where people are asked"
    )
