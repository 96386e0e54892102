"""`frontier`: how much reward PPO and DPO get at the same KL to the reference."""

from __future__ import annotations

from pydantic import Field, model_validator

from rlhf.config.base import PositiveFloat, PositiveInt, Section


class FrontierConfig(Section):
    """Sentiment against the KL of a response for PPO and DPO on the same labels (Rafailov et al. 2023, figure 2 left).

    Both start from one policy and learn from one collection: DPO from its comparisons, PPO from a reward model trained
    on them, and once more from the true sentiment. The labels are those of `preferences.annotator`.
    """

    policy: str | None = Field(None, description="policy that is optimised; null is this run's SFT model")
    ppo_targets: tuple[PositiveFloat, ...] = Field(
        (1.0, 2.0, 4.0), description="ppo.kl_target_nats_per_sequence; a training each", min_length=1
    )
    true_reward: bool = Field(True, description="PPO on the true sentiment too, at the same targets")
    dpo_betas: tuple[PositiveFloat, ...] = Field(
        (0.05, 0.1, 1.0, 5.0), description="dpo.beta; a training each", min_length=1
    )
    window: PositiveInt = Field(4, description="updates of PPO that are averaged to one point")

    @model_validator(mode="after")
    def _no_doubles(self) -> FrontierConfig:
        for name, values in (("ppo_targets", self.ppo_targets), ("dpo_betas", self.dpo_betas)):
            if len(set(values)) != len(values):
                raise ValueError(f"{name} lists a value twice: {list(values)}")
        return self
