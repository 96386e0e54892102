"""What the ranks of test_dpo_ranks.py run: stages dpo and best_of_n on two ranks, in one process.

Usage: `dpo_worker FOLDER`, where policies, comparisons, a reward model and one process's runs lie already. The run of
case NAME lands in FOLDER/NAME.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rlhf.config import RLHFConfig
from rlhf.distributed.runtime import Runtime
from rlhf.stages import best_of_n, dpo, trl_adapter
from rlhf.worker import leave
from tests.stage_example import make_context, recorded_resumes, require_resumed_from, tiny_config

SHARD_ALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
# How two ranks share the policy; with `lora` they train adapters.
CASES: dict[str, dict[str, Any]] = {
    "stage1": {"stage": 1},
    "stage3": {"stage": 3, "extra": SHARD_ALL},
    "lora-stage3": {"stage": 3, "extra": SHARD_ALL},
}
# Killed behind its third step, it goes on from its second.
KILLED = "stage3"
BEST = "best"


def case_config(folder: Path, name: str, zero: dict[str, Any], num_processes: int) -> RLHFConfig:
    """Three steps of four pairs; a rank accumulates over single pairs. Three held-out pairs a split at most."""
    section = {"batch_size": 4, "micro_batch_size": 1, "max_steps": 3, "learning_rate": 1e-3, "log_every": 1}
    rewards = {"proxy": {"type": "model", "path": str(folder / "reward")}, "brief": {"type": "length", "maximum": 1}}
    best = {
        "num_prompts": 5,
        "num_samples": 3,
        "rewards": rewards,
        "judge": "brief",
        "bootstrap_resamples": 20,
        "sampling": {"max_response_tokens": 4, "batch_size": 4},
    }
    peft = {"type": "lora", "rank": 2} if name.startswith("lora") else {"type": "none"}
    return tiny_config(
        folder,
        dpo={**section, "save_every": 2},
        best_of_n=best,
        peft=peft,
        zero=zero,
        distributed={"num_processes": num_processes},
    )


def run_dpo(config: RLHFConfig, folder: Path, run: Path, runtime: Runtime | None = None) -> None:
    """The stage from FOLDER's policy against another reference, so that no ratio is 1."""
    inputs = {
        "policy": str(folder / "policy"),
        "reference": str(folder / "other"),
        "comparisons": str(folder / "comparisons"),
    }
    dpo.run(make_context(config, run, "dpo", inputs, runtime))


def run_best(config: RLHFConfig, folder: Path, run: Path, runtime: Runtime | None = None) -> None:
    """Stage best_of_n with FOLDER's policy."""
    best_of_n.run(make_context(config, run, "best_of_n", {"policy": str(folder / "policy")}, runtime))


class _Killed(Exception):  # noqa: N818 - not an error
    pass


class _KillingCallback(trl_adapter._TrackingCallback):
    def on_step_end(self, args: object, state: Any, control: Any, **kwargs: Any) -> Any:
        if state.global_step == 3:
            raise _Killed
        return super().on_step_end(args, state, control, **kwargs)


def _run_killed(config: RLHFConfig, folder: Path, run: Path, runtime: Runtime) -> None:
    whole = trl_adapter._TrackingCallback
    trl_adapter._TrackingCallback = _KillingCallback  # type: ignore[misc]
    try:
        run_dpo(config, folder, run, runtime)
    except _Killed:
        pass
    finally:
        trl_adapter._TrackingCallback = whole  # type: ignore[misc]
    runtime.barrier()
    with recorded_resumes() as found:
        run_dpo(config, folder, run, runtime)
    require_resumed_from(found, ["checkpoint-2"])


def main(folder: Path) -> None:
    """All cases of dpo one after the other, one of them killed and resumed as well, then best_of_n."""
    for name, zero in CASES.items():
        config = case_config(folder, name, zero, num_processes=2)
        runtime = Runtime.start(config.distributed, config.zero, config.seed)
        run_dpo(config, folder, folder / name, runtime)
        if name == KILLED:
            _run_killed(config, folder, folder / "killed", runtime)
        runtime.barrier()
    config = case_config(folder, BEST, CASES["stage3"], num_processes=2)
    runtime = Runtime.start(config.distributed, config.zero, config.seed)
    run_best(config, folder, folder / "best-two", runtime)
    runtime.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave(0)  # as a rank does
