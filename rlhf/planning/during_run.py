"""The prediction for a stage that is about to run, and what it needed in the end, for the terminal and the manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf.distributed.memory import Measured, MemoryMeter
from rlhf.planning.lengths import PLANNED_STAGES, TrainedStage
from rlhf.planning.memory import Setting
from rlhf.planning.phases import libraries_bytes, peak_of
from rlhf.planning.sources import find_sources
from rlhf.planning.stages import stage_phases
from rlhf.terminal import say

if TYPE_CHECKING:
    from rlhf.config import RLHFConfig
    from rlhf.distributed.runtime import Runtime


@dataclass(frozen=True)
class StageMemory:
    """Predicted bytes of a rank (None: not a stage that is planned, or no plan could be made), and the meter.

    `constant` bytes of the prediction are there whatever the model.
    """

    stage: str
    predicted: float | None
    meter: MemoryMeter
    constant: float = 0.0

    @classmethod
    def start(cls, config: RLHFConfig, stage: str, inputs: Mapping[str, str], runtime: Runtime) -> StageMemory:
        """Plans on rank 0, then starts to measure. Call it when the stage's libraries are imported."""
        predicted = None
        if runtime.is_main and stage in PLANNED_STAGES:
            predicted = _predict(config, stage, inputs, runtime)
        constant = libraries_bytes(running_setting(config, runtime)) if runtime.device.type == "cpu" else 0.0
        return cls(stage, predicted, MemoryMeter.start(runtime.device), constant)

    def summary(self, ranks: Sequence[Measured]) -> dict[str, float]:
        """Entries of the stage's result, of the rank that needed most; a line says so where there is a prediction."""
        growth = max(rank.growth for rank in ranks)
        entries: dict[str, float] = {
            "perf/peak_memory_bytes": max(rank.peak for rank in ranks),
            "perf/memory_growth_bytes": growth,
        }
        if self.predicted is not None:
            entries["perf/predicted_memory_bytes"] = round(self.predicted)
            on_cpu = self.meter.device.type == "cpu"
            above = f" above the {mebibytes(self.meter.before)} of libraries" if on_cpu else ""
            numbers = f"predicted {mebibytes(self.predicted)}, measured {mebibytes(growth)} per rank"
            too_small = self.constant > self.predicted / 2
            note = f" (a model so small says little: {mebibytes(self.constant)} of it are for libraries)"
            say(f"memory: {numbers}{above}{note if too_small else ''}")
        return entries


def _predict(config: RLHFConfig, stage: TrainedStage, inputs: Mapping[str, str], runtime: Runtime) -> float | None:
    try:
        setting = running_setting(config, runtime)
        phases = stage_phases(stage, config, find_sources(config, inputs), setting)
    except Exception as error:  # noqa: BLE001 - an extra: whatever is wrong with it must not end a training
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        say(f"memory: no prediction ({reason})")
        return None
    return peak_of(phases, setting)


def running_setting(config: RLHFConfig, runtime: Runtime) -> Setting:
    """The setting of the ranks that are running."""
    return Setting(
        num_ranks=runtime.world_size,
        ranks_per_node=config.distributed.num_processes,
        device="cpu" if runtime.device.type == "cpu" else "cuda",
        bfloat16=runtime.precision == "bf16",
        zero=config.zero,
    )


def mebibytes(value: float) -> str:
    """A number of bytes for people."""
    return f"{value / 2**20:,.0f} MiB"
