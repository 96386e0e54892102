"""`overoptimisation` and `noisy_labels`: what happens to the gold reward when a proxy is optimised hard."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlhf.config.base import NonNegativeFloat, PositiveFloat, PositiveInt, Section

Aggregation = Literal["mean", "worst", "mean_minus_variance"]


class OveroptimisationConfig(Section):
    """Gold and proxy reward against the KL for best-of-n, PPO and DPO (Gao et al. 2023).

    Every proxy learns from the first comparisons of one collection. All of them are optimised by best-of-n, with the
    sizes of section `best_of_n`, by PPO at the smallest beta, and by DPO on their comparisons; the proxy of
    `beta_comparisons` also by PPO at the other betas. The collection's size is that of the largest proxy.
    """

    policy: str | None = Field(None, description="policy that is optimised; null is this run's SFT model")
    num_comparisons: tuple[PositiveInt, ...] = Field(
        (100, 400, 1600), description="comparisons that the proxies learn from, ascending", min_length=1
    )
    num_epochs: tuple[PositiveFloat, ...] = Field((6.0, 3.0, 2.0), description="passes over them, for each proxy")
    ensemble_comparisons: PositiveInt | None = Field(
        400, description="comparisons of an ensemble, one of num_comparisons; null: no ensemble"
    )
    num_members: Annotated[int, Field(ge=2)] = Field(5, description="reward models of the ensemble")
    aggregation: Aggregation = Field("worst", description="one score of the ensemble's")
    betas: tuple[NonNegativeFloat, ...] = Field((0.0, 0.025, 0.1), description="ppo.kl_coefficient", min_length=1)
    beta_comparisons: PositiveInt = Field(400, description="the proxy that PPO optimises at every beta")
    dpo_betas: tuple[PositiveFloat, ...] = Field(
        (0.05, 0.2, 1.0), description="dpo.beta; every one is a point of DPO's curve; none: no DPO"
    )

    @model_validator(mode="after")
    def _sizes_fit(self) -> OveroptimisationConfig:
        sizes = self.num_comparisons
        if list(sizes) != sorted(set(sizes)):
            raise ValueError(f"num_comparisons ascends and repeats nothing; got {list(sizes)}")
        if len(self.num_epochs) != len(sizes):
            raise ValueError(f"num_epochs has one number a proxy ({len(sizes)}), not {len(self.num_epochs)}")
        for name, size in (("ensemble", self.ensemble_comparisons), ("beta", self.beta_comparisons)):
            if size is not None and size not in sizes:
                raise ValueError(f"{name}_comparisons ({size}) is one of num_comparisons: {list(sizes)}")
        for name, values in (("betas", self.betas), ("dpo_betas", self.dpo_betas)):
            if len(set(values)) != len(values):
                raise ValueError(f"{name} lists a value twice: {list(values)}")
        return self


class NoisyLabelsConfig(Section):
    """One reward model against an ensemble of them as the reward of PPO, on labels of which a share is wrong.

    Both learn from the same comparisons; the noise is that of `preferences.annotator`.
    """

    policy: str | None = Field(None, description="policy that is optimised; null is this run's SFT model")
    num_seeds: PositiveInt = Field(3, description="repetitions with the seeds seed, seed + 1, ...")
    num_members: Annotated[int, Field(ge=2)] = Field(5, description="reward models of the ensemble")
    bootstrap: bool = Field(True, description="each member learns from a bootstrap sample of the comparisons")
    aggregations: tuple[Aggregation, ...] = Field(
        ("worst",), description="scores of the ensemble that PPO optimises, each by itself", min_length=1
    )
