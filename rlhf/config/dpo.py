"""`dpo`: direct preference optimisation, a policy from comparisons without a reward model."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from rlhf.config.base import PositiveFloat, PositiveInt
from rlhf.config.training import TrainingConfig

DPOLoss = Literal["sigmoid", "hinge", "ipo", "robust", "exo_pair", "apo_zero", "apo_down", "sppo_hard"]
SMOOTHED: tuple[DPOLoss, ...] = ("robust", "exo_pair")


class DPOConfig(TrainingConfig):
    """Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290), by default equation 7.

    With h = beta (log pi(chosen) / ref(chosen) - log pi(rejected) / ref(rejected)), each a sum over the response's
    tokens, the loss is -log sigmoid(h). The paper's settings (appendix B) are beta 0.1, batches of 64 pairs, RMSprop at
    1e-6 with 150 steps of warm-up; the learning rate here is for AdamW and small models, so lower it for large ones.
    """

    policy: str | None = Field(None, description="policy to start from; null is this run's SFT model")
    reference: str | None = Field(None, description="frozen reference; null is the policy to start from")
    comparisons: str | None = Field(
        None, description="folder of comparisons; null takes this run's collection, else the data's own"
    )
    num_comparisons: PositiveInt | None = Field(
        None, description="learn from the first so many comparisons of the training split; null: all"
    )
    loss: DPOLoss = Field(
        "sigmoid",
        description="sigmoid (DPO), hinge (SLiC), ipo (beta is its tau, log-ratios are a token's mean), robust, "
        "exo_pair, apo_zero, apo_down, sppo_hard",
    )
    beta: PositiveFloat = Field(0.1, description="strength of the pull to the reference")
    label_smoothing: float = Field(
        0.0, description="share of labels held to be wrong; of loss=robust and exo_pair alone", ge=0, lt=0.5
    )
    learning_rate: PositiveFloat = Field(1e-4, description="peak learning rate")

    @model_validator(mode="after")
    def _smoothing_fits_the_loss(self) -> DPOConfig:
        if self.label_smoothing and self.loss not in SMOOTHED:
            raise ValueError(f"label_smoothing belongs to loss={' or '.join(SMOOTHED)}; loss is {self.loss}")
        if self.loss == "exo_pair" and not self.label_smoothing:
            raise ValueError("loss=exo_pair needs label_smoothing above 0; its paper takes 0.001")
        return self
