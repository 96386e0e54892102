"""`best_of_n`: the best of n responses by a reward, and what a judge thinks of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field, model_validator

from rlhf.config.base import PositiveInt, Probability, Section
from rlhf.config.rewards import GoldReward, ModelReward, RewardConfig, Rewards
from rlhf.config.stages import SamplingConfig

if TYPE_CHECKING:
    from rlhf.config.root import RLHFConfig

PROXY, GOLD = "proxy", "gold"


class BestOfNConfig(Section):
    """Best-of-n sampling (Stiennon et al. 2020; Gao et al. 2023): N responses a prompt, scored by every reward.

    Each reward but the judge picks the best of n for every n of `sizes`; the judge says what that earned. The rewards
    are never added up, so each has weight 1.
    """

    policy: str | None = Field(None, description="policy that is sampled; null is this run's SFT model")
    num_prompts: PositiveInt = Field(200, description="held-out prompts, the first of the test split")
    num_samples: Annotated[int, Field(ge=2)] = Field(64, description="N: responses sampled to each prompt")
    sizes: tuple[PositiveInt, ...] | None = Field(
        None, description="the n of best-of-n, ascending, up to num_samples; null: 1, 2, 4, ... and num_samples"
    )
    rewards: Rewards = Field(
        {},
        description="what scores the responses, by name; none: this run's reward model as `proxy`; data=embedded adds "
        "its gold reward as `gold`",
    )
    judge: str = Field(GOLD, description="name of the reward that measures; all others pick")
    sampling: SamplingConfig = Field(SamplingConfig(), description="how the responses are sampled")
    confidence: Probability = Field(0.95, description="level of the intervals")
    bootstrap_resamples: PositiveInt = Field(2000, description="resamples of the bootstrap intervals over prompts")

    @model_validator(mode="after")
    def _parts_fit(self) -> BestOfNConfig:
        if not 0 < self.confidence < 1:
            raise ValueError("confidence must lie between 0 and 1, both excluded")
        sizes = self.sizes
        if sizes is not None and (not sizes or list(sizes) != sorted(set(sizes)) or sizes[-1] > self.num_samples):
            raise ValueError(
                f"sizes ascends, repeats nothing and does not go beyond num_samples ({self.num_samples}); got "
                f"{list(sizes)}"
            )
        weighted = [name for name, reward in self.rewards.items() if reward.weight != 1]
        if weighted:
            raise ValueError(
                f"rewards.{weighted[0]}.weight has no meaning here, since rewards are not added up: leave it at 1"
            )
        return self

    def all_sizes(self) -> list[int]:
        """The n of best-of-n, ascending."""
        if self.sizes is not None:
            return list(self.sizes)
        powers = [2**exponent for exponent in range(self.num_samples.bit_length())]
        return sorted({*powers, self.num_samples})


def best_of_n_rewards(config: RLHFConfig) -> dict[str, RewardConfig]:
    """The rewards of stage best_of_n by name: those of the config or the default, and gold where the data knows it."""
    rewards: dict[str, RewardConfig] = dict(config.best_of_n.rewards) or {PROXY: ModelReward()}
    if config.data.type == "embedded":
        rewards.setdefault(GOLD, GoldReward())
    return rewards
