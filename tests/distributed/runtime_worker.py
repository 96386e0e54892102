"""What the ranks of test_runtime.py run. Usage: `runtime_worker.py {talk|die|wait} FOLDER STAGE`."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy
import torch

from rlhf.config.distributed import DistributedConfig
from rlhf.config.zero import ZeroConfig
from rlhf.distributed.runtime import Runtime
from rlhf.errors import UserError


def talk(runtime: Runtime) -> dict[str, Any]:
    """One of everything the ranks say to each other."""
    tensor = torch.tensor([1.0, runtime.rank], dtype=torch.float64)
    total = runtime.sum_over_ranks(tensor)
    return {
        "rank": runtime.rank,
        "world_size": runtime.world_size,
        "is_main": runtime.is_main,
        "gathered": runtime.gather_objects({"rank": runtime.rank}),
        "broadcast": runtime.broadcast_object(["from", runtime.rank]),
        "sum": total.tolist(),
        "dtype": str(total.dtype),
        "unchanged": tensor.tolist(),
        "threads": torch.get_num_threads(),
        "grouped": torch.distributed.is_initialized(),
        "draws": [torch.rand(()).item(), random.random(), float(numpy.random.rand())],
    }


def threads() -> list[str]:
    """The names of gloo's threads in this process."""
    names = []
    for path in Path("/proc/self/task").glob("*/comm"):
        with suppress(OSError):  # it has ended since
            names.append(path.read_text().strip())
    return [name for name in names if "gloo" in name]


def threads_left() -> list[str]:
    """Those that are there in two seconds' time: one that was waited for is listed a moment longer."""
    end = time.monotonic() + 2
    while (left := threads()) and time.monotonic() < end:
        time.sleep(0.01)
    return left


def main(mode: str, folder: Path, stage: int) -> None:
    config = DistributedConfig(num_processes=2, device="cpu", timeout_seconds=60)
    zero = ZeroConfig.model_validate({"stage": stage})
    runtime = Runtime.start(config, zero, seed=3)
    if mode == "talk":
        first = talk(runtime)
        runtime = Runtime.start(config, zero, seed=3)  # the next stage, in the same process
        answer = {"first": first, "second": talk(runtime), "threads": threads()}
        runtime.barrier()
        runtime.stop()
        (folder / f"rank{runtime.rank}.json").write_text(json.dumps({**answer, "left": threads_left()}))
        return
    (folder / f"ready{runtime.rank}").touch()
    if mode == "die" and runtime.rank == 1:
        while not (folder / "ready0").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    runtime.barrier()
    time.sleep(60)


if __name__ == "__main__":
    try:
        main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
    except UserError as error:
        print(error)
        sys.exit(error.exit_code)
