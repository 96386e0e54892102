"""What the ranks of test_trl_stages.py run: stages sft and reward_model under every kind of sharding, in one process.

Usage: `trl_worker FOLDER`, where the data, the comparisons and the base of the reward model lie already. The run of
case NAME lands in FOLDER/NAME; one that was killed on the way and resumed in FOLDER/NAME-killed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

from torch import nn

from rlhf.config import RLHFConfig
from rlhf.distributed.runtime import Runtime
from rlhf.stages import reward_model, sft, trl_adapter
from rlhf.worker import leave
from tests.stage_example import make_context, recorded_resumes, require_resumed_from, tiny_config

# Not the default, under which every tensor of so small a model would stay whole at stage 3.
SHARD_ALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
CASES: dict[str, dict[str, Any]] = {
    "plain": {"stage": 0},
    "stage2": {"stage": 2},
    "stage3": {"stage": 3, "extra": SHARD_ALL},
}
RESUMED = ("stage3",)
KILLED_AT = 7


class Killed(BaseException):
    """Ends a stage on all ranks at the same step."""


class _KillingCallback(trl_adapter._TrackingCallback):
    def on_step_end(self, args: object, state: Any, control: Any, **kwargs: Any) -> Any:
        if state.global_step == KILLED_AT:
            raise Killed
        return super().on_step_end(args, state, control, **kwargs)


@contextmanager
def nothing_moved_whole() -> Iterator[None]:
    """Raises `RuntimeError` when weights go to a device before they are shared out, in training or in measuring."""
    move = nn.Module.to

    def checked(module: nn.Module, *arguments: Any, **keywords: Any) -> nn.Module:
        if any(parameter.numel() for parameter in module.parameters()):
            raise RuntimeError(f"{type(module).__name__} goes to a device whole")
        return move(module, *arguments, **keywords)

    with mock.patch.object(nn.Module, "to", checked):
        yield


def case_config(folder: Path, zero: dict[str, Any], num_processes: int) -> RLHFConfig:
    """The tiny configuration under one kind of sharding. Two ranks accumulate over two micro-batches in stage sft."""
    return tiny_config(folder, zero=zero, distributed={"num_processes": num_processes}, sft={"micro_batch_size": 2})


def run_stages(config: RLHFConfig, folder: Path, run: Path) -> None:
    """Both stages, each after a start of the runtime, as a rank under a foreign launcher runs them."""
    for module in (sft, reward_model):
        runtime = Runtime.start(config.distributed, config.zero, config.seed)
        stage = module.__name__.rpartition(".")[2]
        inputs = {}
        if stage == "reward_model":
            inputs = {"base": str(folder / "base/stages/sft/model"), "comparisons": str(folder / "comparisons")}
        module.run(make_context(config, run, stage, inputs, runtime))
        runtime.barrier()


def run_killed(config: RLHFConfig, folder: Path, run: Path) -> None:
    """The stages with an end at step KILLED_AT, then again."""
    whole = trl_adapter._TrackingCallback
    for module in (sft, reward_model):
        runtime = Runtime.start(config.distributed, config.zero, config.seed)
        stage = module.__name__.rpartition(".")[2]
        inputs = {"base": str(folder / "base/stages/sft/model"), "comparisons": str(folder / "comparisons")}
        trl_adapter._TrackingCallback = _KillingCallback  # type: ignore[misc]
        try:
            module.run(make_context(config, run, stage, {} if stage == "sft" else inputs, runtime))
        except Killed:
            pass
        else:
            raise RuntimeError("nothing killed the stage")
        finally:
            trl_adapter._TrackingCallback = whole  # type: ignore[misc]
    with recorded_resumes() as found:
        run_stages(config, folder, run)
    require_resumed_from(found, ["checkpoint-4", "checkpoint-4"])


def main(folder: Path) -> None:
    """All cases, one after the other."""
    for name, zero in CASES.items():
        config = case_config(folder, zero, num_processes=2)
        with nothing_moved_whole() if config.zero.stage == 3 else nullcontext():
            run_stages(config, folder, folder / name)
        if name in RESUMED:
            run_killed(config, folder, folder / f"{name}-killed")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave(0)  # as a rank does
