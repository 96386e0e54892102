"""Workers on several ranks: how tests start them, and what the workers of stages have in common."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import rlhf
from rlhf.config import RLHFConfig
from rlhf.config.distributed import DistributedConfig
from rlhf.config.zero import ZeroConfig
from rlhf.distributed.launch import launch
from rlhf.distributed.runtime import Runtime
from rlhf.stages import reward_model, sft
from tests.stage_example import make_context, write_comparisons, write_demonstrations


def run_worker(name: str, folder: Path, *arguments: object, num_processes: int = 2) -> None:
    """Runs `tests.distributed.NAME FOLDER ARGUMENTS...` on that many ranks of one thread each."""
    path = os.pathsep.join([str(Path(rlhf.__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", f"tests.distributed.{name}", str(folder), *map(str, arguments)]
    result = launch(command, num_processes, env_extra={"PYTHONPATH": path}, num_threads=1, log_folder=folder)
    assert result.exit_code == 0, result


def save_on_main(results: Mapping[str, Any], path: Path, num_processes: int) -> None:
    """Rank 0 writes what it found, and all ranks wait for it."""
    config = DistributedConfig(num_processes=num_processes, device="cpu", timeout_seconds=60)
    runtime = Runtime.start(config, ZeroConfig(), seed=5)
    if runtime.is_main:
        torch.save(results, path)
    runtime.barrier()
    runtime.stop()


def run_trained_stages(folder: Path, case_config: Callable[..., RLHFConfig], worker: str) -> None:
    """One process's SFT and reward model in FOLDER/base, then the worker's on two ranks from the same data."""
    write_demonstrations(folder / "data")
    write_comparisons(folder / "comparisons")
    config = case_config(folder, {}, num_processes=1)
    sft.run(make_context(config, folder / "base", "sft"))
    inputs = {"base": str(folder / "base/stages/sft/model"), "comparisons": str(folder / "comparisons")}
    reward_model.run(make_context(config, folder / "base", "reward_model", inputs))
    run_worker(worker, folder)
