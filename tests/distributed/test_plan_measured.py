"""The plan against what stages really need on the CPU: stage, ZeRO, adapters, length and the number of ranks differ."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command import environment

CASES = ("reward_model zero2", "ppo long, chunked", "sft lora zero2", "sft zero3 x2")


@pytest.mark.distributed
def test_prediction_is_within_a_fifth_of_the_growth(tmp_path: Path) -> None:
    """Every case in forks of one process; see docs/planning.md for all of them."""
    subprocess.run(
        [sys.executable, "-m", "tests.distributed.plan_worker", str(tmp_path), *CASES],
        env={**environment(), "HF_HUB_OFFLINE": "1", "PATH": os.environ["PATH"]},
        check=True,
        timeout=500,
    )
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results) == set(CASES)
    off = {
        name: result["perf/predicted_memory_bytes"] / result["perf/memory_growth_bytes"] - 1
        for name, result in results.items()
    }
    assert all(abs(value) <= 0.2 for value in off.values()), off
