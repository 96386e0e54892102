"""`reward_report`: which reward model is looked at, on what, and how closely."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlhf.config.base import NonNegativeInt, PositiveInt, Probability, Section

ReportedSplit = Literal["train", "validation", "test"]


class RewardReportConfig(Section):
    """Report on a reward model. `reward_model.micro_batch_size` says how many comparisons are scored at a time."""

    reward_model: str | None = Field(
        None, description="reward model or ensemble to look at, folder or hub id; null is this run's"
    )
    comparisons: str | None = Field(
        None, description="folder of comparisons; null takes what this run's reward model learnt from"
    )
    benchmark: str | None = Field(
        None, description="file in the layout of RewardBench or RewardBench 2 to score as well"
    )
    benchmark_as_chat: bool | None = Field(
        None,
        description="the benchmark's prompts that are texts are what the user says in a chat; null: where the model's "
        "tokenizer has a chat template",
    )
    splits: Annotated[tuple[ReportedSplit, ...], Field(min_length=1)] = Field(
        ("test",), description="splits of the comparisons that are scored, together"
    )
    max_comparisons: PositiveInt | None = Field(None, description="score the first this many; null scores all")
    num_bins: PositiveInt = Field(10, description="most bins of the calibration curve")
    num_mistakes: NonNegativeInt = Field(50, description="worst mistakes listed with their texts")
    confidence: Probability = Field(0.95, description="level of the intervals")
    bootstrap_resamples: PositiveInt = Field(1000, description="resamples of the bootstrap intervals")

    @model_validator(mode="after")
    def _whole(self) -> RewardReportConfig:
        if not 0 < self.confidence < 1:
            raise ValueError("confidence must lie between 0 and 1, both excluded")
        if len(set(self.splits)) != len(self.splits):
            raise ValueError(f"splits lists a split twice: {', '.join(self.splits)}")
        return self
