"""`reward_model`: what a reward model learns from, how many of them, and what its scores are measured against."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlhf.config.base import NonNegativeFloat, PositiveFloat, PositiveInt, Section
from rlhf.config.stages import SamplingConfig
from rlhf.config.training import TrainingConfig

TieRule = Literal["soft", "davidson", "rao_kupper", "leave_out"]


class _PairLoss(Section):
    """What the losses on pairs of responses have in common; m is the margin, d = score(chosen) - score(rejected) - m.

    A comparison's probability p (that chosen is better; 1 where nobody says) makes the loss the cross-entropy
    -p log P(chosen) - (1 - p) log P(rejected); without a tie model P(chosen) = sigmoid(d).
    """

    ties: TieRule = Field(
        "soft", description="ties (p = 0.5): a soft label of 1/2, an outcome of the tie model named here, or left out"
    )
    tie_parameter: PositiveFloat | None = Field(
        None, description="how common the model holds ties: nu of davidson, log theta of rao_kupper; null is 1"
    )
    use_margin: bool = Field(False, description="chosen must lead by the comparison's margin (0 where it has none)")
    label_smoothing: float = Field(
        0.0, description="probability that a label is flipped: p becomes (1 - s) p + s (1 - p)", ge=0, lt=0.5
    )
    weight_by_agreement: bool = Field(
        False, description="a comparison counts by the share of annotators who agree (1 where it does not say)"
    )

    @model_validator(mode="after")
    def _tie_parameter_has_a_model(self) -> _PairLoss:
        if self.tie_parameter is not None and self.ties not in ("davidson", "rao_kupper"):
            raise ValueError(f"tie_parameter belongs to ties=davidson or ties=rao_kupper; ties is {self.ties}")
        return self


class BradleyTerryLoss(_PairLoss):
    """A comparison is an example: -log sigmoid(score(chosen) - score(rejected)) where its label is certain."""

    type: Literal["bradley_terry"] = "bradley_terry"

    @property
    def num_responses(self) -> int:
        """Most responses that an example reads at once."""
        return 2


class KwiseLoss(_PairLoss):
    """All comparisons of a prompt are one example: the mean loss of its pairs, each response read once."""

    type: Literal["kwise"] = "kwise"
    max_responses: int = Field(9, description="most responses of a prompt; they are in memory together", ge=2)

    @property
    def num_responses(self) -> int:
        """Most responses that an example reads at once."""
        return self.max_responses


class PlackettLuceLoss(Section):
    """A ranking is an example: the log-probability of drawing its responses one after the other, best first."""

    type: Literal["plackett_luce"] = "plackett_luce"
    max_responses: int = Field(9, description="most responses of a prompt; they are in memory together", ge=2)

    @property
    def num_responses(self) -> int:
        """Most responses that an example reads at once."""
        return self.max_responses


class BestOfKLoss(Section):
    """A choice among K is an example: -log softmax of the scores at the response that won all others of its prompt.

    Ziegler et al. 2019 (arXiv 1909.08593), equation 1, with K = 4 there. Pairs between other responses do not count.
    """

    type: Literal["best_of_k"] = "best_of_k"
    max_responses: int = Field(9, description="most responses of a prompt; they are in memory together", ge=2)

    @property
    def num_responses(self) -> int:
        """Most responses that an example reads at once."""
        return self.max_responses


class RatingLoss(Section):
    """A rated response is an example: its score is fitted to its rating."""

    type: Literal["rating"] = "rating"
    form: Literal["squared", "logistic"] = Field(
        "squared",
        description="squared error of the standardised rating, or cross-entropy of the rating's place between the "
        "lowest and the highest",
    )

    @property
    def num_responses(self) -> int:
        """Most responses that an example reads at once."""
        return 1


RewardLossConfig = Annotated[
    BradleyTerryLoss | KwiseLoss | PlackettLuceLoss | BestOfKLoss | RatingLoss, Field(discriminator="type")
]


class _Normalization(Section):
    scale: bool = Field(True, description="divide by the standard deviation; false: shift the mean to 0 and no more")


class ComparisonsNormalization(_Normalization):
    """Scores of held-out comparisons, both sides (of held-out ratings where the loss is rating)."""

    type: Literal["comparisons"] = "comparisons"


class DemonstrationsNormalization(_Normalization):
    """Scores of the data's held-out demonstrations."""

    type: Literal["demonstrations"] = "demonstrations"


class ResponsesNormalization(_Normalization):
    """Scores of responses that `reward_model.base`, usually the SFT model, samples to training prompts."""

    type: Literal["sft_responses"] = "sft_responses"
    num_responses: PositiveInt = Field(512, description="responses sampled, one a prompt, again from the first prompt")
    sampling: SamplingConfig = Field(SamplingConfig(), description="how the responses are sampled")


NormalizationConfig = Annotated[
    ComparisonsNormalization | DemonstrationsNormalization | ResponsesNormalization, Field(discriminator="type")
]


class RewardModelConfig(TrainingConfig):
    """Reward model: its loss, its members, and the scores that have mean 0 and standard deviation 1 in PPO."""

    base: str | None = Field(
        None, description="folder or hub id to start from; null is this run's SFT model, else `model`"
    )
    comparisons: str | None = Field(
        None, description="folder of comparisons; null takes this run's collection, else the data's own"
    )
    num_comparisons: PositiveInt | None = Field(
        None, description="learn from the first so many comparisons of the training split; null: all"
    )
    ratings: str | None = Field(
        None, description="folder of rated responses for loss.type=rating; null takes the data's own"
    )
    loss: RewardLossConfig = Field(BradleyTerryLoss(), description="what the scores are fitted to")
    source_weights: dict[str, NonNegativeFloat] = Field(
        {}, description="how much examples of a source count, by its name; others count 1, and 0 leaves out"
    )
    center_coefficient: Annotated[float, Field(ge=0)] = Field(
        0.0, description="weight of the squared sum of a pair's scores, which keeps scores near zero"
    )
    num_members: PositiveInt = Field(
        1, description="reward models that are trained one after the other; more than one is an ensemble"
    )
    bootstrap: bool = Field(False, description="every member's examples are drawn anew from all, with replacement")
    normalization: NormalizationConfig = Field(
        ComparisonsNormalization(), description="the texts whose scores have mean 0 and standard deviation 1 in PPO"
    )

    @model_validator(mode="after")
    def _parts_fit(self) -> RewardModelConfig:
        if self.center_coefficient and self.loss.type in ("rating", "plackett_luce", "best_of_k"):
            raise ValueError(
                f"center_coefficient charges the sum of a pair's scores, and loss.type={self.loss.type} has no pairs: "
                "set it to 0"
            )
        if self.num_comparisons is not None and self.loss.type == "rating":
            raise ValueError(
                "num_comparisons counts comparisons, and loss.type=rating learns from ratings: set it to null"
            )
        if self.bootstrap and self.num_members == 1:
            raise ValueError("bootstrap makes the members of an ensemble differ; set num_members to 2 or more")
        if self.ratings is not None and self.loss.type != "rating":
            raise ValueError(f"ratings are read by loss.type=rating alone; loss.type is {self.loss.type}")
        return self
