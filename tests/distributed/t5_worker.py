"""What the ranks of test_t5_ranks.py run: the trained stages on T5, as `trl_worker` runs them on a causal model.

Usage: `t5_worker FOLDER`, where the data, the comparisons and the base of the reward model lie already.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rlhf.config import RLHFConfig
from rlhf.worker import leave
from tests.distributed.trl_worker import CASES as ALL_CASES
from tests.distributed.trl_worker import run_killed, run_stages
from tests.stage_example import tiny_config

SCRATCH = {"architecture": "t5", "num_layers": 2, "hidden_size": 32, "num_heads": 2, "vocab_size": 300}
CASES = {name: ALL_CASES[name] for name in ("plain", "stage2", "stage3")}
RESUMED = ("stage3",)


def case_config(folder: Path, zero: dict[str, Any], num_processes: int) -> RLHFConfig:
    """The tiny configuration with a T5 under one kind of sharding; stage sft accumulates over two micro-batches."""
    sections = {"distributed": {"num_processes": num_processes}, "sft": {"micro_batch_size": 2}}
    return tiny_config(folder, zero=zero, model={"scratch": SCRATCH}, **sections)


def main(folder: Path) -> None:
    """All cases, one after the other."""
    for name, zero in CASES.items():
        config = case_config(folder, zero, num_processes=2)
        run_stages(config, folder, folder / name)
        if name in RESUMED:
            run_killed(config, folder, folder / f"{name}-killed")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave(0)  # as a rank does
