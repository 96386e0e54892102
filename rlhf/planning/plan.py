"""The plan of a config: every training stage with its phases, whether it fits, and what to change when it does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from rlhf.config import RLHFConfig
from rlhf.config.peft import TRAINING_STAGES, LoRAConfig, uses_lora
from rlhf.config.zero import ZeroConfig
from rlhf.errors import ConfigError
from rlhf.planning.memory import Setting
from rlhf.planning.phases import Phase, peak_of
from rlhf.planning.sources import Source, Sources, find_sources
from rlhf.planning.speed import GPUS, Work, stage_work
from rlhf.planning.stages import (
    TrainedStage,
    rows_of_rollout,
    rows_of_training,
    rows_of_update,
    stage_phases,
)
from rlhf.runs.machine import memory_bytes

GIB = 2**30
# GPUs of a usual host: how many ranks share its memory where distributed.num_nodes does not say.
_GPUS_PER_HOST = 8
# What a CPU rank takes before it loads a model: Python, torch, transformers, DeepSpeed.
_PROCESS_BYTES = 600 * 2**20


@dataclass(frozen=True)
class Change:
    """A change of the config, by the overrides that make it, and the peak of a rank with it and all before it."""

    overrides: tuple[str, ...]
    peak: float
    fits: bool
    alone: float


@dataclass(frozen=True)
class StagePlan:
    """One stage. `micro_batch_size` is the one of the config, `largest_micro_batch` the largest that fits (0: none)."""

    stage: TrainedStage
    source: Source
    phases: list[Phase]
    peak: float
    limit: float
    host: float
    micro_batch_size: int
    largest_micro_batch: int
    work: Work
    changes: list[Change]

    @property
    def fits(self) -> bool:
        """Whether the peak is within the limit."""
        return self.peak <= self.limit


@dataclass(frozen=True)
class Plan:
    """All training stages of a config."""

    setting: Setting
    device: str
    stages: list[StagePlan]

    @property
    def fits(self) -> bool:
        """Whether every stage does."""
        return all(stage.fits for stage in self.stages)


def make_plan(config: RLHFConfig) -> Plan:
    """Plans the training stages among `config.stages`.

    Raises `ConfigError` for models without a config.json, and where there is no training stage to plan.
    """
    stages = [stage for stage in config.stages if stage in TRAINING_STAGES]
    if not stages:
        raise ConfigError(
            f"stages lists no training stage ({', '.join(TRAINING_STAGES)}), and only those are planned; it lists "
            f"{', '.join(config.stages)}"
        )
    sources, setting = find_sources(config), setting_of(config)
    made = [_plan_stage(stage, config, sources, setting) for stage in stages]
    device = "this machine's CPU" if setting.device == "cpu" else config.plan.gpu
    return Plan(setting, device, made)


def setting_of(config: RLHFConfig) -> Setting:
    """What the config asks to run on. Without distributed.device=cpu that is GPUs, also where this machine has none."""
    distributed = config.distributed
    device: Literal["cpu", "cuda"] = "cpu" if distributed.device == "cpu" else "cuda"
    bfloat16 = distributed.precision == "bf16" or (distributed.precision == "auto" and device == "cuda")
    per_node = distributed.num_processes
    if distributed.num_nodes == 1 and device == "cuda":
        per_node = min(per_node, _GPUS_PER_HOST)
    return Setting(distributed.world_size, per_node, device, bfloat16, config.zero)


def limit_of(config: RLHFConfig, setting: Setting) -> float:
    """Bytes that a rank may take: of its GPU, or its share of this machine's memory."""
    if setting.device == "cuda":
        gib = config.plan.gpu_memory_gib or GPUS[config.plan.gpu].memory_gib
        if gib <= config.plan.reserved_gib:
            raise ConfigError(
                f"plan.reserved_gib ({config.plan.reserved_gib:g}) leaves nothing of the {gib:g} GiB of a GPU"
            )
        return (gib - config.plan.reserved_gib) * GIB
    total = memory_bytes()
    if total is None:
        raise ConfigError("this machine does not say how much memory it has. Plan for a GPU: distributed.device=cuda")
    return total / setting.ranks_per_node - _PROCESS_BYTES


def stage_peak(stage: TrainedStage, config: RLHFConfig, sources: Sources, setting: Setting) -> float:
    """Bytes of a rank at the worst moment of a stage."""
    return peak_of(stage_phases(stage, config, sources, setting), setting)


def _plan_stage(stage: TrainedStage, config: RLHFConfig, sources: Sources, setting: Setting) -> StagePlan:
    phases = stage_phases(stage, config, sources, setting)
    peak, limit = peak_of(phases, setting), limit_of(config, setting)
    source = {"sft": sources.base, "reward_model": sources.reward_base, "ppo": sources.policy}[stage]
    return StagePlan(
        stage=stage,
        source=source,
        phases=phases,
        peak=peak,
        limit=limit,
        host=max(phase.host for phase in phases),
        micro_batch_size=_micro_batch(stage, config, setting),
        largest_micro_batch=_largest_micro_batch(stage, config, sources, setting, limit),
        work=stage_work(stage, config, sources, setting),
        changes=[] if peak <= limit else _changes(stage, config, sources, setting, limit),
    )


def _micro_batch(stage: TrainedStage, config: RLHFConfig, setting: Setting) -> int:
    if stage == "ppo":
        return rows_of_update(config.ppo, setting)[0]
    return rows_of_training(getattr(config, stage), setting)[0]


def changed(config: RLHFConfig, section: str, **values: Any) -> RLHFConfig:
    """The config with other values in a section, unchecked."""
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def _largest_micro_batch(
    stage: TrainedStage, config: RLHFConfig, sources: Sources, setting: Setting, limit: float
) -> int:
    """The largest micro-batch of the stage whose peak fits, with the batch as large as it has to be; 0 for none."""

    def fits(rows: int) -> bool:
        batch = rows * setting.num_ranks * 2  # at least two forwards a step, so that gradients add up
        wanted = changed(config, stage, micro_batch_size=rows, batch_size=max(batch, getattr(config, stage).batch_size))
        if stage == "ppo":
            minibatches = config.ppo.num_minibatches
            wanted = changed(wanted, stage, batch_size=max(batch * minibatches, config.ppo.batch_size))
        return stage_peak(stage, wanted, sources, setting) <= limit

    if not fits(1):
        return 0
    low, high = 1, 2
    while high <= 2**16 and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _changes(stage: TrainedStage, config: RLHFConfig, sources: Sources, setting: Setting, limit: float) -> list[Change]:
    """The changes to make, one on top of the other, in the order of what they cost, until it fits."""
    made: list[Change] = []
    current, now = config, setting
    for propose in _PROPOSALS:
        proposal = propose(stage, current, now)
        if proposal is None:
            continue
        overrides, wanted, ranks = proposal
        other = Setting(ranks, now.ranks_per_node, now.device, now.bfloat16, wanted.zero)
        peak = _peak_with(stage, wanted, other, sources)
        alone_proposal = propose(stage, config, setting)
        alone = peak
        if alone_proposal is not None:
            own = Setting(
                alone_proposal[2], setting.ranks_per_node, setting.device, setting.bfloat16, alone_proposal[1].zero
            )
            alone = _peak_with(stage, alone_proposal[1], own, sources)
        before = made[-1].peak if made else stage_peak(stage, config, sources, setting)
        if peak >= before * 0.995 and alone > limit:
            continue  # it would change nothing that matters here
        made.append(Change(overrides, peak, peak <= limit, alone))
        current, now = wanted, other
        if peak <= limit:
            break
    return made


def _peak_with(stage: TrainedStage, config: RLHFConfig, setting: Setting, sources: Sources) -> float:
    """The peak with another config, of which adapters are the only change in what the stages hold."""
    lora = uses_lora(config, stage)
    if lora and stage == "ppo":
        sources = Sources(
            base=sources.base,
            reward_base=sources.reward_base,
            policy=sources.policy,
            reference=sources.reference,
            same_reference=sources.same_reference,
            critic=sources.critic,
            rewards=tuple(Source(source.architecture, adapter=True) for source in sources.rewards),
        )
    return stage_peak(stage, config, sources, setting)


Proposal = tuple[tuple[str, ...], RLHFConfig, int]
Propose = Callable[[TrainedStage, RLHFConfig, Setting], Proposal | None]


def _smaller_micro_batch(stage: TrainedStage, config: RLHFConfig, setting: Setting) -> Proposal | None:
    if _micro_batch(stage, config, setting) == 1:
        return None
    return (f"{stage}.micro_batch_size=1",), changed(config, stage, micro_batch_size=1), setting.num_ranks


def _smaller_rollout(stage: TrainedStage, config: RLHFConfig, setting: Setting) -> Proposal | None:
    if stage != "ppo" or rows_of_rollout(config.ppo, setting) <= 4:
        return None
    return ("ppo.rollout_batch_size=4",), changed(config, "ppo", rollout_batch_size=4), setting.num_ranks


def _checkpointing(stage: TrainedStage, config: RLHFConfig, setting: Setting) -> Proposal | None:
    if getattr(config, stage).gradient_checkpointing:
        return None
    wanted = changed(config, stage, gradient_checkpointing=True)
    return (f"{stage}.gradient_checkpointing=true",), wanted, setting.num_ranks


def _chunked(stage: TrainedStage, config: RLHFConfig, setting: Setting) -> Proposal | None:
    if stage != "ppo" or config.ppo.logprob_chunk_tokens is not None:
        return None
    return ("ppo.logprob_chunk_tokens=512",), changed(config, "ppo", logprob_chunk_tokens=512), setting.num_ranks


def _higher_stage(stage: TrainedStage, config: RLHFConfig, setting: Setting) -> Proposal | None:
    if setting.stage == 3 or setting.num_ranks == 1:
        return None
    return ("zero=stage3",), changed(config, "zero", stage=3), setting.num_ranks


def _sharded_frozen(stage: TrainedStage, config: RLHFConfig, setting: Setting) -> Proposal | None:
    if stage != "ppo" or setting.stage != 3 or config.zero.shard_frozen or setting.num_ranks == 1:
        return None
    return ("zero.shard_frozen=true",), changed(config, "zero", shard_frozen=True), setting.num_ranks


def _offload(stage: TrainedStage, config: RLHFConfig, setting: Setting) -> Proposal | None:
    if setting.device == "cpu" or config.zero.offload_optimizer:
        return None
    level: Any = config.zero.stage or 2
    zero: ZeroConfig = config.zero.model_copy(update={"stage": level, "offload_optimizer": True})
    overrides = (
        ("zero.offload_optimizer=true",) if config.zero.stage else ("zero=stage2", "zero.offload_optimizer=true")
    )
    return overrides, config.model_copy(update={"zero": zero}), setting.num_ranks


def _more_ranks(stage: TrainedStage, config: RLHFConfig, setting: Setting) -> Proposal | None:
    if setting.device == "cpu" or setting.stage == 0:
        return None
    ranks = 4 * setting.num_ranks
    batch = max(getattr(config, stage).batch_size, ranks * (config.ppo.num_minibatches if stage == "ppo" else 1))
    overrides = [f"distributed.num_nodes={4 * config.distributed.num_nodes}"]
    if batch != getattr(config, stage).batch_size:
        overrides.append(f"{stage}.batch_size={batch}")
    return tuple(overrides), changed(config, stage, batch_size=batch), ranks


def _adapters(stage: TrainedStage, config: RLHFConfig, setting: Setting) -> Proposal | None:
    if uses_lora(config, stage) or (stage == "sft" and config.sft.base is None and config.model.path is None):
        return None
    return ("peft=lora",), config.model_copy(update={"peft": LoRAConfig()}), setting.num_ranks


_PROPOSALS: tuple[Propose, ...] = (
    _smaller_micro_batch,
    _smaller_rollout,
    _checkpointing,
    _chunked,
    _higher_stage,
    _sharded_frozen,
    _offload,
    _more_ranks,
    _adapters,
)
