"""The plan of a config: every training stage with its phases, whether it fits, and what to change when it does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import yaml
from pydantic import ValidationError

from rlhf.config import RLHFConfig
from rlhf.config.peft import uses_lora
from rlhf.config.root import UNEVEN_BATCHES, uneven_batches
from rlhf.errors import ConfigError
from rlhf.planning.lengths import PLANNED_STAGES, TrainedStage
from rlhf.planning.memory import Setting
from rlhf.planning.phases import Phase, peak_of
from rlhf.planning.sources import Known, Source, Sources, find_sources
from rlhf.planning.speed import GPUS, Work, stage_work
from rlhf.planning.stages import rows_of_rollout, rows_of_training, rows_of_update, stage_phases
from rlhf.runs.machine import memory_bytes

GIB = 2**30
# GPUs of a usual host: how many ranks share its memory where distributed.num_nodes does not say.
_GPUS_PER_HOST = 8
# What a CPU rank takes before it loads a model: Python, torch, transformers, DeepSpeed.
_PROCESS_BYTES = 600 * 2**20


@dataclass(frozen=True)
class Change:
    """A change of the config, by the overrides that make it. `peak` is a rank's with it and all changes before it.

    `alone` is the peak with this change only; None where the config does not take it without those before it.
    """

    overrides: tuple[str, ...]
    peak: float
    fits: bool
    alone: float | None


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

    @property
    def estimated(self) -> bool:
        """Whether activations of the model could not be counted."""
        return any(phase.estimated for phase in self.phases)


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
    stages = [stage for stage in config.stages if stage in PLANNED_STAGES]
    if not stages:
        raise ConfigError(
            f"stages lists no training stage that is planned ({', '.join(PLANNED_STAGES)}; dpo is not); it lists "
            f"{', '.join(config.stages)}"
        )
    known: Known = {}
    sources, setting = find_sources(config, known=known), setting_of(config)
    made = [_plan_stage(stage, config, sources, setting, known) for stage in stages]
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


def _plan_stage(stage: TrainedStage, config: RLHFConfig, sources: Sources, setting: Setting, known: Known) -> StagePlan:
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
        changes=[] if peak <= limit else _changes(stage, config, peak, limit, known),
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


def _changes(stage: TrainedStage, config: RLHFConfig, peak: float, limit: float, known: Known) -> list[Change]:
    """The changes to make, one on top of the other, in the order of what they cost, until it fits."""
    made: list[Change] = []
    current = config
    for propose in _PROPOSALS:
        overrides = propose(stage, current, setting_of(current))
        tried = _try(stage, current, overrides, known) if overrides else None
        if tried is None:
            continue
        alone = _try(stage, config, tried.overrides, known)
        if tried.peak >= peak * 0.995 and (alone is None or alone.peak > limit):
            continue  # it would change nothing that matters here
        current, peak = tried.config, tried.peak
        made.append(Change(tried.overrides, peak, peak <= limit, alone.peak if alone is not None else None))
        if peak <= limit:
            break
    return made


class _Tried(NamedTuple):
    """A changed config, all overrides that make it, and the stage's peak."""

    config: RLHFConfig
    overrides: tuple[str, ...]
    peak: float


def _try(stage: TrainedStage, config: RLHFConfig, overrides: tuple[str, ...], known: Known) -> _Tried | None:
    """The stage with other values in the config, and batches that the ranks can share; None where that is refused."""
    try:
        wanted = _with(config, overrides)
        batches = tuple(f"{name}.batch_size={size}" for name, size in uneven_batches(wanted).items())
        wanted = _with(wanted, batches)
        peak = stage_peak(stage, wanted, find_sources(wanted, known=known), setting_of(wanted))
    except (ValidationError, ConfigError):
        return None
    return _Tried(wanted, (*overrides, *batches), peak)


def _with(config: RLHFConfig, overrides: tuple[str, ...]) -> RLHFConfig:
    """The config with other values, checked as a whole. Raises pydantic's `ValidationError`."""
    values = config.model_dump()
    for override in overrides:
        key, _, text = override.partition("=")
        section, _, name = key.partition(".")
        values[section][name] = yaml.safe_load(text)
    # Hundreds of these are tried, so pydantic alone looks at them: the values are a config's own.
    return RLHFConfig.model_validate(values, context={UNEVEN_BATCHES: True})


Propose = Callable[[TrainedStage, RLHFConfig, Setting], tuple[str, ...] | None]


def _smaller_micro_batch(stage: TrainedStage, config: RLHFConfig, setting: Setting) -> tuple[str, ...] | None:
    return None if _micro_batch(stage, config, setting) == 1 else (f"{stage}.micro_batch_size=1",)


def _smaller_rollout(stage: TrainedStage, config: RLHFConfig, setting: Setting) -> tuple[str, ...] | None:
    if stage != "ppo" or rows_of_rollout(config.ppo, setting) <= 4:
        return None
    return ("ppo.rollout_batch_size=4",)


def _checkpointing(stage: TrainedStage, config: RLHFConfig, setting: Setting) -> tuple[str, ...] | None:
    return None if getattr(config, stage).gradient_checkpointing else (f"{stage}.gradient_checkpointing=true",)


def _chunked(stage: TrainedStage, config: RLHFConfig, setting: Setting) -> tuple[str, ...] | None:
    if stage != "ppo" or config.ppo.logprob_chunk_tokens is not None:
        return None
    return ("ppo.logprob_chunk_tokens=512",)


def _higher_stage(stage: TrainedStage, config: RLHFConfig, setting: Setting) -> tuple[str, ...] | None:
    if setting.stage == 3 or setting.num_ranks == 1:
        return None
    return ("zero.stage=3", "zero.shard_frozen=true")  # by keys: a preset would not outdo keys that are set already


def _sharded_frozen(stage: TrainedStage, config: RLHFConfig, setting: Setting) -> tuple[str, ...] | None:
    if stage != "ppo" or setting.stage != 3 or config.zero.shard_frozen or setting.num_ranks == 1:
        return None
    return ("zero.shard_frozen=true",)


def _offload(stage: TrainedStage, config: RLHFConfig, setting: Setting) -> tuple[str, ...] | None:
    if setting.device == "cpu" or config.zero.offload_optimizer:
        return None
    return ("zero.offload_optimizer=true",) if setting.stage else ("zero.stage=2", "zero.offload_optimizer=true")


def _more_ranks(stage: TrainedStage, config: RLHFConfig, setting: Setting) -> tuple[str, ...] | None:
    if setting.device == "cpu" or setting.stage == 0:
        return None
    return (f"distributed.num_nodes={4 * config.distributed.num_nodes}",)


def _adapters(stage: TrainedStage, config: RLHFConfig, setting: Setting) -> tuple[str, ...] | None:
    if uses_lora(config, stage) or (stage == "sft" and config.sft.base is None and config.model.path is None):
        return None
    if config.peft.type == "lora":
        return (f"peft.stages=[{','.join([*(config.peft.stages or ()), stage])}]",)
    return ("peft.type=lora",)


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
