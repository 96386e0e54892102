"""The whole config. `RLHFConfig` is the only thing code sees."""

from __future__ import annotations

import math
from typing import Literal, get_args

from pydantic import Field, ValidationInfo, model_validator

from rlhf.config.active_selection import ActiveSelectionConfig
from rlhf.config.base import NonNegativeInt, Section
from rlhf.config.best_of_n import BestOfNConfig
from rlhf.config.closed_form import ClosedFormConfig
from rlhf.config.compare_arms import CompareArmsConfig
from rlhf.config.data import DataConfig, EmbeddedData
from rlhf.config.distributed import DistributedConfig
from rlhf.config.dpo import DPOConfig
from rlhf.config.frontier import FrontierConfig
from rlhf.config.iterated import IteratedConfig
from rlhf.config.launcher import LauncherConfig
from rlhf.config.model import ModelConfig
from rlhf.config.overoptimisation import NoisyLabelsConfig, OveroptimisationConfig
from rlhf.config.peft import NoPEFT, PEFTConfig, lora_of
from rlhf.config.plan import PlanConfig
from rlhf.config.ppo import PPOConfig
from rlhf.config.preferences import PreferencesConfig
from rlhf.config.reward_model import RewardModelConfig
from rlhf.config.reward_report import RewardReportConfig
from rlhf.config.run import RunConfig
from rlhf.config.serve import ServeConfig
from rlhf.config.stages import CollectConfig, EvaluateConfig, SFTConfig
from rlhf.config.tracking import TrackingConfig
from rlhf.config.zero import ZeroConfig

StageName = Literal[
    "sft",
    "collect",
    "reward_model",
    "reward_report",
    "ppo",
    "dpo",
    "best_of_n",
    "evaluate",
    "closed_form",
    "active_selection",
    "iterated",
    "overoptimisation",
    "noisy_labels",
    "compare_arms",
    "frontier",
    "report",
]
STAGES: tuple[StageName, ...] = get_args(StageName)
# What stands by itself. Those of the second kind run whole pipelines as their arms.
STUDIES_OF_RUNS: tuple[StageName, ...] = ("iterated", "overoptimisation", "noisy_labels", "compare_arms", "frontier")
STUDIES: tuple[StageName, ...] = ("closed_form", "active_selection", *STUDIES_OF_RUNS)
# Stages that a run has when its config says so.
OPTIONAL: tuple[StageName, ...] = ("reward_report", "dpo", "best_of_n")
PIPELINE: tuple[StageName, ...] = tuple(stage for stage in STAGES if stage not in (*STUDIES, *OPTIONAL))

# Key of pydantic's context: a config to plan may have batches that its ranks could not share.
UNEVEN_BATCHES = "uneven_batches"


class RLHFConfig(Section):
    """A run: its name, its stages in order and one section for each concern."""

    experiment: str = Field("default", description="name of the experiment; names the run folder", pattern=r"^[\w.-]+$")
    seed: NonNegativeInt = Field(1, description="seed of every random number of the run")
    stages: tuple[StageName, ...] = Field(PIPELINE, description="stages to run, in this order", min_length=1)
    model: ModelConfig = ModelConfig()
    peft: PEFTConfig = NoPEFT()
    data: DataConfig = EmbeddedData()
    zero: ZeroConfig = ZeroConfig()
    distributed: DistributedConfig = DistributedConfig()
    launcher: LauncherConfig = LauncherConfig()
    tracking: TrackingConfig = TrackingConfig()
    run: RunConfig = RunConfig()
    sft: SFTConfig = SFTConfig()
    collect: CollectConfig = CollectConfig()
    preferences: PreferencesConfig = PreferencesConfig()
    reward_model: RewardModelConfig = RewardModelConfig()
    reward_report: RewardReportConfig = RewardReportConfig()
    ppo: PPOConfig = PPOConfig()
    dpo: DPOConfig = DPOConfig()
    best_of_n: BestOfNConfig = BestOfNConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    closed_form: ClosedFormConfig = ClosedFormConfig()
    active_selection: ActiveSelectionConfig = ActiveSelectionConfig()
    iterated: IteratedConfig = IteratedConfig()
    overoptimisation: OveroptimisationConfig = OveroptimisationConfig()
    noisy_labels: NoisyLabelsConfig = NoisyLabelsConfig()
    compare_arms: CompareArmsConfig = CompareArmsConfig()
    frontier: FrontierConfig = FrontierConfig()
    serve: ServeConfig = ServeConfig()
    plan: PlanConfig = PlanConfig()

    @model_validator(mode="after")
    def _stages_once(self) -> RLHFConfig:
        if len(set(self.stages)) != len(self.stages):
            raise ValueError(f"stages lists a stage twice: {list(self.stages)}")
        order = [STAGES.index(stage) for stage in self.stages]
        if order != sorted(order):
            raise ValueError(f"stages must keep the order {', '.join(STAGES)}; got {', '.join(self.stages)}")
        return self

    @model_validator(mode="after")
    def _head_is_whole(self) -> RLHFConfig:
        lora = lora_of(self, "ppo")
        if self.zero.stage == 3 and self.ppo.logprob_chunk_tokens is not None and lora is not None and lora.output_head:
            raise ValueError(
                "peft.output_head, ppo.logprob_chunk_tokens and zero.stage=3 do not go together: ranks would gather "
                "the head's adapter unequally often. Set peft.output_head=false or ppo.logprob_chunk_tokens=null"
            )
        return self

    @model_validator(mode="after")
    def _ranks_share_batches(self, info: ValidationInfo) -> RLHFConfig:
        wrong = {} if (info.context or {}).get(UNEVEN_BATCHES) else uneven_batches(self)
        if wrong:
            sizes = {
                "sft": f"sft.batch_size ({self.sft.batch_size})",
                "reward_model": f"reward_model.batch_size ({self.reward_model.batch_size})",
                "dpo": f"dpo.batch_size ({self.dpo.batch_size})",
                "ppo": f"ppo.batch_size / ppo.num_minibatches ({self.ppo.batch_size // self.ppo.num_minibatches})",
            }
            names = "distributed.num_processes"
            if self.distributed.num_nodes > 1:
                names = f"distributed.num_nodes * {names}"
            raise ValueError(
                f"{' and '.join(sizes[stage] for stage in wrong)} must be a multiple of {names} "
                f"({self.distributed.world_size}). The next larger: "
                + ", ".join(f"{stage}.batch_size={size}" for stage, size in wrong.items())
            )
        return self


def uneven_batches(config: RLHFConfig) -> dict[str, int]:
    """The stages of the run whose batch its ranks cannot share, with the next larger batch that they can."""
    ranks = config.distributed.world_size
    steps = {
        "sft": ranks,
        "reward_model": ranks,
        "dpo": ranks,
        "ppo": math.lcm(ranks * config.ppo.num_minibatches, config.ppo.responses_per_prompt),
    }
    found: dict[str, int] = {}
    for stage, step in steps.items():
        size = getattr(config, stage).batch_size
        num_parts = config.ppo.num_minibatches if stage == "ppo" else 1
        if stage in config.stages and size // num_parts % ranks:
            found[stage] = -(-size // step) * step
    return found
