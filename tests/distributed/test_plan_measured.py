"""The plan against what stages really need on the CPU: stage, ZeRO, adapters, length and the number of ranks differ."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.command import environment

# They differ in stage, ZeRO, adapters, length and ranks, and their errors in the docs leave room for what a second run
# differs by.
CASES = ("sft long, accumulated", "reward_model x2", "ppo shared trunk", "sft lora zero2")


def _errors(folder: Path, cases: Sequence[str]) -> dict[str, float]:
    """Of each case: by how much the prediction is off, as a share of what was measured."""
    subprocess.run(
        [sys.executable, "-m", "tests.distributed.plan_worker", str(folder), *cases],
        env={**environment(), "HF_HUB_OFFLINE": "1", "PATH": os.environ["PATH"]},
        check=True,
        timeout=500,
    )
    results = json.loads((folder / "results.json").read_text())
    assert set(results) == set(cases)
    return {
        name: result["perf/predicted_memory_bytes"] / result["perf/memory_growth_bytes"] - 1
        for name, result in results.items()
    }


@pytest.mark.distributed
def test_prediction_is_within_a_fifth_of_the_growth(tmp_path: Path) -> None:
    """Every case in forks of one process; see docs/planning.md for all of them."""
    runs = [_errors(tmp_path / "first", CASES)]
    # What glibc keeps depends on the order in which threads free: of a case that is off, the median of three counts.
    doubtful = [name for name, value in runs[0].items() if abs(value) > 0.2]
    if doubtful:
        runs += [_errors(tmp_path / again, doubtful) for again in ("second", "third")]
    off = {name: statistics.median(run[name] for run in runs if name in run) for name in CASES}
    assert all(abs(value) <= 0.2 for value in off.values()), (off, runs)
