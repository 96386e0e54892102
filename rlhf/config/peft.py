"""`peft`: train small adapters on a frozen base instead of whole models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, get_args

from pydantic import Field, model_validator

from rlhf.config.base import PositiveFloat, PositiveInt, Section

if TYPE_CHECKING:
    from rlhf.config.root import RLHFConfig

TrainingStage = Literal["sft", "reward_model", "ppo", "dpo"]
TRAINING_STAGES: tuple[TrainingStage, ...] = get_args(TrainingStage)


class NoPEFT(Section):
    """Every stage trains all weights of its model."""

    type: Literal["none"] = "none"


class LoRAConfig(Section):
    """Low-rank adapters (Hu et al. 2021, "LoRA"): y = W x + (alpha / rank) B A x with W frozen and B = 0 at first.

    A stage publishes its adapter alone. In PPO the policy, the critic and the reward model are adapters on one base,
    and the reference is the base itself or a frozen copy of the SFT adapter.
    """

    type: Literal["lora"] = "lora"
    rank: PositiveInt = Field(16, description="rows of A and columns of B")
    alpha: PositiveFloat = Field(32.0, description="the adapter's output is multiplied by alpha / rank")
    dropout: float = Field(0.0, description="dropout before A in stage sft; the other stages use none", ge=0, lt=1)
    target_modules: tuple[str, ...] | Literal["all_linear"] = Field(
        "all_linear", description="last names of the layers that get an adapter; all_linear is all of the transformer's"
    )
    output_head: bool = Field(
        False, description="in ppo the policy's adapter is on the output head too; what it has there starts at 0"
    )
    stages: tuple[TrainingStage, ...] | None = Field(
        None, description="stages that train adapters; null is all, without the SFT of a model from scratch"
    )

    @model_validator(mode="after")
    def _head_of_ppo(self) -> LoRAConfig:
        if self.output_head and self.stages is not None and "ppo" not in self.stages:
            raise ValueError("peft.output_head concerns stage ppo, which peft.stages leaves out: set it to false")
        return self


PEFTConfig = Annotated[NoPEFT | LoRAConfig, Field(discriminator="type")]


def lora_of(config: RLHFConfig, stage: str) -> LoRAConfig | None:
    """The adapters that `stage` trains; None where it trains whole models.

    The SFT of a model from scratch trains adapters only when `peft.stages` names it: random weights hold nothing to
    adapt.
    """
    peft = config.peft
    if peft.type != "lora":
        return None
    if peft.stages is not None:
        return peft if stage in peft.stages else None
    from_scratch = stage == "sft" and config.sft.base is None and config.model.path is None
    return peft if stage in TRAINING_STAGES and not from_scratch else None


def lora_content(config: RLHFConfig, stage: str) -> dict[str, object] | None:
    """What of section `peft` decides the stage's result; None where it trains whole models."""
    lora = lora_of(config, stage)
    if lora is None:
        return None
    others = {"stages"} | ({"output_head"} if stage != "ppo" else set()) | ({"dropout"} if stage != "sft" else set())
    return lora.model_dump(mode="json", exclude=others)


def uses_lora(config: RLHFConfig, stage: str) -> bool:
    """Whether `stage` trains an adapter: see `lora_of`."""
    return lora_of(config, stage) is not None
