"""What one rank does for `test_partition`: the first update of stage ppo in every case, its results kept by rank 0."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.config import RLHFConfig
from rlhf.distributed.runtime import Runtime
from rlhf.stages.ppo import loop
from rlhf.stages.ppo.prepare import prepare_job
from rlhf.stages.ppo.rollout import gather_experience
from rlhf.stages.ppo.state import TrainingState
from rlhf.stages.ppo.update import Updater
from rlhf.worker import leave
from tests.adapter_example import LORA, write_adapter
from tests.distributed.ranks import save_on_main
from tests.ppo_example import ppo_config, write_models
from tests.stage_example import make_context

ROWS = 8


@dataclass(frozen=True)
class Case:
    """A layout of the models, a ZeRO stage, the responses of a micro-batch on a rank, and a loss."""

    layout: str
    stage: int
    micro_batch_size: int | None
    aggregation: str = "token_mean"

    @property
    def name(self) -> str:
        """For the results and the test's id."""
        return f"{self.layout}-zero{self.stage}-{self.aggregation}-{self.micro_batch_size or 'whole'}"


CASES = [
    *(Case("two_models", stage, size) for stage in (0, 2, 3) for size in (None, 2, 1)),
    *(Case("adapters", stage, size) for stage in (0, 2, 3) for size in (None, 1)),
    *(Case("two_models", 0, size, "sequence_mean") for size in (None, 1)),
    *(Case("one_trunk", stage, None) for stage in (0, 3)),
]


def config_of(case: Case, num_processes: int) -> RLHFConfig:
    """All terms of the loss are on; one step, whose gradient norm is left as it is.

    Adam's first step divides a gradient by its own size plus epsilon. With the usual epsilon a gradient of 1e-6 moves
    its weight as far as one of 1, and its rounding error with it; with 1e-3 the step is that of the gradient.
    """
    body = ppo_config(
        learning_rate=1e-3,
        adam_epsilon=1e-3,
        batch_size=ROWS,
        num_epochs=1,
        num_minibatches=1,
        micro_batch_size=case.micro_batch_size,
        loss_aggregation=case.aggregation,
        value_network="shared_trunk" if case.layout == "one_trunk" else "separate",
        entropy_coefficient=0.01,
        ptx_coefficient=0.5,
        ptx_batch_size=5,
        kl_placement="loss",
        whiten_rewards=True,
        max_grad_norm=100.0,
    ).model_dump()
    peft = {"type": "lora", "rank": LORA.rank, "alpha": LORA.alpha} if case.layout == "adapters" else {"type": "none"}
    distributed = {"num_processes": num_processes, "device": "cpu", "timeout_seconds": 300}
    extra = {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if case.stage == 3 else {}
    zero = {"stage": case.stage, "extra": extra}
    return RLHFConfig.model_validate({**body, "peft": peft, "distributed": distributed, "zero": zero})


def run_case(case: Case, num_processes: int, folder: Path) -> dict[str, Any]:
    """The first update: advantages and returns, the loss's parts, and the weights after it."""
    config = config_of(case, num_processes)
    section = config.ppo
    runtime = Runtime.start(config.distributed, config.zero, config.seed)
    models = folder / "models"
    policy = str(models / ("sft" if case.layout == "adapters" else "policy"))
    reward = str(models / ("reward" if case.layout == "adapters" else "reward_model"))
    inputs = {"policy": policy, "reference": policy, "reward_model": reward, "value_model": reward}
    context = make_context(config, folder / f"run{num_processes}" / case.name, "ppo", inputs, runtime)
    job = prepare_job(context)
    engine, state = loop.make_engine(job), TrainingState.start(section)
    experience = gather_experience(engine, job.models, job.prompts, section, runtime, config.seed, 0)
    batch = loop.make_batch(experience, section, state, state.kl_coefficient)
    updater = Updater(engine, section, runtime, 1, job.models.scoring, job.demonstrations, job.models.pad_id)
    metrics = updater.optimise(batch, 0, state.kl_coefficient).means(runtime, section, state.kl_coefficient)
    return {
        "batch": {"advantages": batch.advantages, "returns": batch.returns, "rewards": batch.token_rewards},
        "lengths": batch.rollout.response_lengths,
        "metrics": metrics,
        "weights": engine.state_dict_for_saving(),
    }


def main(folder: Path, num_processes: int) -> None:
    results = {case.name: run_case(case, num_processes, folder) for case in CASES}
    save_on_main(results, folder / f"results{num_processes}.pt", num_processes)


def write_inputs(folder: Path) -> None:
    """Models of both layouts."""
    full = write_models(folder)
    sft = write_adapter(folder / "sft", full["policy"])
    write_adapter(folder / "reward", sft, scores=True, seed=5)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
    leave(0)  # as a rank does
