"""What the ranks of `rlhf doctor` run: `python -m rlhf.doctor.rank_check {launch|rank} FOLDER`.

`launch` starts the ranks that FOLDER/check.json asks for. Each rank sums a number with the others and takes one step
of plain gradient descent under ZeRO, then writes what came out to FOLDER/rank<n>.json.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from rlhf.distributed.launch import die_with_parent, launch

# Rank r has the loss w·(1, 2)·(r + 1) / (1 + 2 + ... + n), so that the gradient of all n ranks is (1, 2) for any n.
START_WEIGHTS = (1.0, 2.0)
_LEARNING_RATE = 0.25
# (1, 2) - 0.25 * (1, 2), worked out by hand.
STEP_WEIGHTS = [0.75, 1.5]
_TIMEOUT_SECONDS = 30


def start(folder: Path) -> int:
    """Starts the ranks and waits for them. Returns the exit code; what a failing rank printed last is kept."""
    die_with_parent()
    check = json.loads((folder / "check.json").read_text())
    result = launch(
        [sys.executable, "-m", "rlhf.doctor.rank_check", "rank", str(folder)],
        check["num_processes"],
        num_threads=1,
        log_folder=folder / "logs",
        grace_seconds=1.0,
    )
    if result.log_tail:
        (folder / "failure.log").write_text(result.log_tail)
    return result.exit_code


def work(folder: Path) -> None:
    """One rank."""
    import torch
    from torch import nn

    from rlhf.config.distributed import DistributedConfig
    from rlhf.config.zero import ZeroConfig
    from rlhf.distributed.engine import TrainingEngine
    from rlhf.distributed.runtime import Runtime

    check: dict[str, Any] = json.loads((folder / "check.json").read_text())
    keys = ("num_processes", "device", "precision")
    config = DistributedConfig.model_validate(
        {key: check[key] for key in keys} | {"timeout_seconds": _TIMEOUT_SECONDS, "num_threads": 1}
    )
    zero = ZeroConfig.model_validate(check["zero"])
    runtime = Runtime.start(config, zero, seed=1)
    started = time.monotonic()
    share = runtime.rank + 1.0
    total = runtime.sum_over_ranks(torch.tensor([share], device=runtime.device)).item()
    module = nn.Linear(2, 1, bias=False)
    module.weight.data = torch.tensor([START_WEIGHTS])
    optimizer = torch.optim.SGD(module.parameters(), lr=_LEARNING_RATE)
    engine = TrainingEngine.prepare(
        module,
        optimizer,
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0),
        runtime=runtime,
        zero=zero,
        micro_batch_size=1,
        accumulation_steps=1,
        max_grad_norm=1e6,
    )
    inputs = torch.tensor([START_WEIGHTS], device=runtime.device, dtype=runtime.dtype)
    engine.backward((engine.module(inputs) * (share / total)).sum())
    norm = engine.step()
    with engine.gathered() as whole:
        (weight,) = whole.parameters()
        weights = weight.detach().float().cpu().flatten().tolist()
    told = {
        "world_size": runtime.world_size,
        "precision": runtime.precision,
        "sum": total,
        "weights": weights,
        "norm": [norm],
        "seconds": time.monotonic() - started,
    }
    (folder / f"rank{runtime.rank}.json").write_text(json.dumps(told))
    runtime.barrier()


def main(mode: str, folder: Path) -> int:
    """The exit code."""
    if mode == "launch":
        return start(folder)
    from rlhf.worker import explain

    try:
        work(folder)
    # The process boundary: every error becomes a message and an exit code.
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001
        return explain(error, None, debug=False)
    return 0


if __name__ == "__main__":
    from rlhf.worker import leave

    leave(main(sys.argv[1], Path(sys.argv[2])))
