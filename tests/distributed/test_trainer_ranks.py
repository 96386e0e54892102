"""A script with a `PPOTrainer` under torchrun gives what it gives alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.command import environment
from tests.ppo_example import write_models

pytestmark = pytest.mark.distributed

SCRIPT = Path(__file__).with_name("trainer_worker.py")
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "--local-addr=127.0.0.1")


def _run(folder: Path, name: str, stage: int, *launcher: str) -> dict[str, Any]:
    result = subprocess.run(
        [sys.executable, *launcher, str(SCRIPT), str(folder / "models"), str(folder / name), str(stage)],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    # Rank 0 alone shows progress.
    assert result.stdout.count("ppo 2/2") == 1, result.stdout
    body: dict[str, Any] = json.loads((folder / name / "seen.json").read_text())
    return body


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trainer_ranks")
    write_models(folder / "models")
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    return _run(folder, "alone", 0)


@pytest.mark.parametrize("stage", [0, 3])
def test_two_ranks_give_the_training_of_one(stage: int, folder: Path, alone: dict[str, Any]) -> None:
    together = _run(folder, f"stage{stage}", stage, *TORCHRUN)
    assert (alone["world_size"], together["world_size"]) == (1, 2)
    for metric in ("ppo/loss", "ppo/score_mean", "ppo/entropy", "eval/score_mean"):
        ours, theirs = ([line[metric] for line in body["history"]] for body in (together, alone))
        assert ours == pytest.approx(theirs, rel=1e-3), metric
    one = load_file(folder / "alone" / "model" / "model.safetensors")
    two = load_file(folder / f"stage{stage}" / "model" / "model.safetensors")
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-4, msg=name)
    assert len(together["texts"]) == 5
