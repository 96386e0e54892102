"""Workers on several ranks: how tests start them, and what the workers of stages have in common.

The ranks are forked from a server that has imported what they need, which takes a rank of its own seconds; how the
product starts its ranks is the matter of other tests (`test_runtime`, `test_nodes`, tests/pipeline).
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from collections.abc import Callable, Mapping
from functools import cache
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from rlhf.config import RLHFConfig
from rlhf.config.distributed import DistributedConfig
from rlhf.config.zero import ZeroConfig
from rlhf.distributed.launch import reserved_port
from rlhf.distributed.runtime import Runtime
from rlhf.stages import reward_model, sft
from tests.stage_example import make_context, write_comparisons, write_demonstrations

# Not DeepSpeed, which looks for its device when it is imported.
_PRELOADED = ["rlhf.stages.sft", "rlhf.stages.reward_model", "rlhf.stages.dpo", "rlhf.stages.ppo.loop"]
# Read by libraries and by Python itself when they start; the launcher gives ranks the same.
_AT_START = {"OMP_WAIT_POLICY": "PASSIVE", "PYTHONHASHSEED": "0"}
_TAIL_LINES = 30


def run_worker(name: str, folder: Path, *arguments: object, num_processes: int = 2) -> None:
    """Runs `tests.distributed.NAME FOLDER ARGUMENTS...` on that many ranks of one thread each.

    Each writes to FOLDER/rank<n>.log. When one fails the others are ended, and the end of its log is shown.
    """
    argv = [f"tests.distributed.{name}", str(folder), *map(str, arguments)]
    with reserved_port() as port:
        shared = {**os.environ, **_AT_START, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
        shared |= {"MASTER_PORT": str(port), "WORLD_SIZE": str(num_processes), "LOCAL_WORLD_SIZE": str(num_processes)}
        ranks = [
            _server().Process(
                target=_run_rank,
                args=(argv, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, folder / f"rank{rank}.log"),
                daemon=True,
            )
            for rank in range(num_processes)
        ]
        try:
            for process in ranks:
                process.start()
            running = set(range(num_processes))
            while running:
                wait([ranks[rank].sentinel for rank in running])
                for rank in [rank for rank in running if not ranks[rank].is_alive()]:
                    running.remove(rank)
                    log = (folder / f"rank{rank}.log").read_text().splitlines()[-_TAIL_LINES:]
                    assert ranks[rank].exitcode == 0, "\n".join([f"rank {rank}: {ranks[rank].exitcode}", *log])
        finally:
            for process in ranks:
                process.kill()
                process.join()


@cache
def _server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    with mock.patch.dict(os.environ, _AT_START):
        ensure_running()
    return context


def _run_rank(argv: list[str], environment: dict[str, str], log: Path) -> None:
    """In the forked process."""
    os.environ.clear()
    os.environ.update(environment)
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = argv
    runpy.run_module(argv[0], run_name="__main__", alter_sys=True)


def save_on_main(results: Mapping[str, Any], path: Path, num_processes: int) -> None:
    """Rank 0 writes what it found, and all ranks wait for it."""
    config = DistributedConfig(num_processes=num_processes, device="cpu", timeout_seconds=300)
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
