"""What the ranks of test_matrix.py run: every stage under every kind of sharding, full and LoRA, in one process.

Usage: `matrix_worker FOLDER short|full`, where the data and the models lie already; the run of a cell lands in
FOLDER/<the cell's name>.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from rlhf.config import RLHFConfig
from rlhf.config.model import ScratchConfig
from rlhf.distributed.runtime import Runtime
from rlhf.models.saving import save_model
from rlhf.models.scalar import ScalarModel, ensure_distinct_pad
from rlhf.models.scratch import build_from_scratch
from rlhf.stages import reward_model, sft
from rlhf.stages.ppo import loop as ppo
from rlhf.worker import leave
from tests.adapter_example import LORA, TEXTS, write_adapter
from tests.distributed.trl_worker import SHARD_ALL
from tests.ppo_example import ppo_config, write_models
from tests.stage_example import make_context, tiny_config, write_comparisons, write_demonstrations

Stage = Literal["sft", "reward_model", "ppo"]
Tuning = Literal["full", "lora"]
MODULES: Mapping[Stage, ModuleType] = {"sft": sft, "reward_model": reward_model, "ppo": ppo}
STAGES: tuple[Stage, ...] = ("sft", "reward_model", "ppo")
TUNINGS: tuple[Tuning, ...] = ("full", "lora")
# Sharding beyond the stage, by the name of a variant; the others change what is computed, not where it lies.
SHARDING: Mapping[str, dict[str, Any]] = {
    "offload_optimizer": {"offload_optimizer": True},
    "offload_both": {"offload_optimizer": True, "offload_parameters": True, "shard_frozen": True},
    "whole_frozen": {},
    "file": {},
}
# Variants that are another training than the plain one, on one process too.
TRAININGS = ("refresh", "t5")


@dataclass(frozen=True)
class Cell:
    """One training. `variant` is what is special about it, "" for nothing."""

    stage: Stage
    zero: int
    tuning: Tuning
    variant: str = ""

    @property
    def name(self) -> str:
        """For the run's folder and the test's id."""
        return "-".join(filter(None, (self.stage, f"zero{self.zero}", self.tuning, self.variant)))

    @property
    def base(self) -> Cell:
        """The same training as one process does it, without DeepSpeed."""
        return Cell(self.stage, 0, self.tuning, self.variant if self.variant in TRAININGS else "")


PLAIN = tuple(Cell(stage, zero, tuning) for stage in STAGES for zero in (0, 1, 2, 3) for tuning in TUNINGS)
_MORE = {
    "offload_optimizer": (1, 2, 3),
    "offload_both": (3,),
    "accumulation": (0, 2, 3),
    "checkpointing": (0, 2, 3),
    "bf16": (0, 1, 2, 3),
    "file": (2, 3),
}
VARIANTS = tuple(
    Cell(stage, zero, tuning, variant)
    for stage in STAGES
    for variant, zeros in _MORE.items()
    for zero in zeros
    for tuning in TUNINGS
) + tuple(Cell("ppo", 3, "full", variant) for variant in ("whole_frozen", "refresh", "t5", "chunked"))
# Every stage, every ZeRO stage, both tunings, and each way a frozen model is held; the rest is for the full matrix.
SHORT = (
    Cell("sft", 1, "lora"),
    Cell("sft", 2, "full", "file"),
    Cell("sft", 3, "full", "offload_both"),
    Cell("reward_model", 0, "lora"),
    Cell("reward_model", 2, "full", "offload_optimizer"),
    Cell("reward_model", 3, "lora"),
    Cell("ppo", 0, "lora"),
    Cell("ppo", 1, "full"),
    Cell("ppo", 2, "lora", "accumulation"),
    Cell("ppo", 3, "full"),
    Cell("ppo", 3, "lora"),
    Cell("ppo", 3, "full", "bf16"),
    Cell("ppo", 3, "full", "refresh"),
)
CELLS: Mapping[str, tuple[Cell, ...]] = {"short": SHORT, "full": (*PLAIN, *VARIANTS)}


def write_inputs(folder: Path) -> None:
    """Data, models of both tunings, and a user's own JSON for each of two ZeRO stages."""
    write_demonstrations(folder / "data")
    write_comparisons(folder / "comparisons")
    full = write_models(folder / "models")
    adapter = write_adapter(folder / "models/sft", full["policy"])
    write_adapter(folder / "models/reward", adapter, scores=True, seed=5)
    write_t5(folder / "models")
    for stage in (2, 3):
        section = {"stage": stage, "overlap_comm": False, "reduce_bucket_size": "auto", "round_robin_gradients": True}
        if stage == 3:
            section["stage3_param_persistence_threshold"] = 0
        body = {"train_batch_size": "auto", "gradient_clipping": "auto", "zero_optimization": section}
        (folder / f"deepspeed{stage}.json").write_text(json.dumps(body))


def write_t5(folder: Path) -> None:
    """A policy and a reward model with an encoder and a decoder."""
    scratch = ScratchConfig.model_validate({"architecture": "t5", "hidden_size": 32, "num_heads": 2, "vocab_size": 300})
    policy, tokenizer = build_from_scratch(scratch, TEXTS, seed=3)
    save_model(policy, tokenizer, folder / "t5_policy")
    reward = ScalarModel.from_policy(folder / "t5_policy", seed=5)
    reward.head.weight.data *= 20.0
    reward.save(folder / "t5_reward", ensure_distinct_pad(tokenizer, reward.model))


def config_of(cell: Cell, folder: Path, num_processes: int) -> RLHFConfig:
    """Few steps of tiny models, with an epsilon of Adam under which rounding errors of gradients stay small."""
    zero: dict[str, Any] = {"stage": cell.zero, **SHARDING.get(cell.variant, {})}
    if cell.zero == 3:
        zero |= {"extra": SHARD_ALL, "shard_frozen": cell.variant != "whole_frozen"}
    if cell.variant == "file":
        zero = {"config": str(folder / f"deepspeed{cell.zero}.json"), "shard_frozen": cell.zero == 3}
    precision = "bf16" if cell.variant == "bf16" else "fp32"
    common = {
        "zero": zero,
        "peft": LORA.model_dump() if cell.tuning == "lora" else {"type": "none"},
        "distributed": {
            "device": "cpu",
            "num_processes": num_processes,
            "precision": precision,
            "timeout_seconds": 300,
        },
    }
    special: dict[str, Any] = {}
    if cell.variant == "accumulation":
        special["micro_batch_size"] = 1
    if cell.variant == "checkpointing":
        special["gradient_checkpointing"] = True
    if cell.stage == "ppo":
        # An odd number of exact KLs and batches of three: the ranks have unequally much to do.
        section = {"adam_epsilon": 1e-3, "exact_kl_rows": 3, "rollout_batch_size": 3, "save_every": 5, **special}
        if cell.variant == "chunked":
            section |= {"logprob_chunk_tokens": 5}
        if cell.variant == "refresh":
            section |= {"reference_refresh_every": 1, "num_updates": 3, "save_every": 1}
        return RLHFConfig.model_validate({**ppo_config(**section).model_dump(), **common})
    training = {"max_steps": 4, "log_every": 1, "save_every": 5, "learning_rate": 1e-3, "adam_epsilon": 1e-3, **special}
    model = {"path": str(folder / "models/policy")}
    return tiny_config(folder, model=model, sft=training, reward_model=training, **common)


def inputs_of(cell: Cell, folder: Path) -> dict[str, str]:
    """Full: the whole models. LoRA: stage sft starts from the whole model, the others from adapters."""
    models = folder / "models"
    policy, reward = ("policy", "reward_model") if cell.tuning == "full" else ("sft", "reward")
    if cell.variant == "t5":
        policy, reward = "t5_policy", "t5_reward"
    if cell.stage == "sft":
        return {"base": str(models / "policy")}
    if cell.stage == "reward_model":
        return {"base": str(models / policy), "comparisons": str(folder / "comparisons")}
    names = {"policy": policy, "reference": policy, "reward_model": reward, "value_model": reward}
    return {name: str(models / model) for name, model in names.items()}


def run_cell(cell: Cell, folder: Path, run: Path, runtime: Runtime | None = None) -> None:
    """The stage in run folder `run`; without a runtime as one process."""
    config = config_of(cell, folder, 1 if runtime is None else runtime.world_size)
    MODULES[cell.stage].run(make_context(config, run, cell.stage, inputs_of(cell, folder), runtime))


def main(folder: Path, form: str) -> None:
    for cell in CELLS[form]:
        config = config_of(cell, folder, 2)
        runtime = Runtime.start(config.distributed, config.zero, config.seed)
        run_cell(cell, folder, folder / cell.name, runtime)
        runtime.barrier()
        if cell.variant == "refresh":
            run_again(cell, folder, Runtime.start(config.distributed, config.zero, config.seed))


def run_again(cell: Cell, folder: Path, runtime: Runtime) -> None:
    """From the cell's newest checkpoint, in a run folder of its own, which holds what a killed run would have left."""
    again = folder / f"{cell.name}-resumed"
    if runtime.is_main:
        shutil.copytree(folder / cell.name, again, ignore=shutil.ignore_patterns("model", "value_model"))
    runtime.barrier()
    run_cell(cell, folder, again, runtime)
    runtime.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
    leave(0)  # as a rank does
