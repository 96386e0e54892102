"""PPO on two ranks, plainly and under ZeRO, against one process; and under another launcher."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.command import ROOT, SMOKE, environment, rlhf_command
from tests.ppo_example import write_models
from tests.stage_example import metrics_of

pytestmark = pytest.mark.distributed

PPO = (
    *SMOKE,
    "stages=[ppo]",
    "data.max_prompt_tokens=100",
    "ppo.learning_rate=1e-3",
    "ppo.batch_size=16",
    "ppo.micro_batch_size=3",
)


def _arguments(folder: Path, *more: str) -> list[str]:
    models = folder / "models"
    return ["run", *PPO, f"ppo.policy={models}/policy", f"ppo.reward_model={models}/reward_model", *more]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models, and a run of one process beside them."""
    folder = tmp_path_factory.mktemp("ranks")
    write_models(folder / "models")
    result = rlhf_command(*_arguments(folder, "run.dir=one"), cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder


def _same(folder: Path, name: str) -> None:
    ours, theirs = metrics_of(folder / name, "ppo"), metrics_of(folder / "one", "ppo")
    assert len(ours) == len(theirs) == 3
    for metric in ("ppo/loss", "ppo/policy_loss", "ppo/value_loss", "ppo/score_mean", "ppo/grad_norm", "ppo/entropy"):
        assert ours[0][metric] == pytest.approx(theirs[0][metric], rel=1e-4), metric
    # Before the first step policy and reference are equal; where weights lie may change the last bit of each log-prob.
    for line in (ours[0], theirs[0]):
        assert line["ppo/kl_to_reference"] == pytest.approx(0.0, abs=1e-6)
    # After the first update the policies are equal up to rounding, and so is what they are charged.
    assert ours[1]["ppo/kl_to_reference"] == pytest.approx(theirs[1]["ppo/kl_to_reference"], rel=1e-3)
    for part in ("model", "value_model"):
        one = load_file(folder / f"one/stages/ppo/{part}/model.safetensors")
        two = load_file(folder / f"{name}/stages/ppo/{part}/model.safetensors")
        for key, value in one.items():
            torch.testing.assert_close(two[key], value, rtol=1e-3, atol=1e-4, msg=key)


def test_row_12_two_ranks_under_zero_3_give_the_update_of_one(folder: Path) -> None:
    """The other ZeRO stages: test_matrix. Here it is the command, with the preset that shards the frozen models too."""
    result = rlhf_command(
        *_arguments(folder, "run.dir=stage3", "distributed.num_processes=2", "zero=stage3"), cwd=folder
    )
    assert result.returncode == 0, result.stderr
    _same(folder, "stage3")


def test_under_torchrun_every_rank_works_in_its_own_process(folder: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    launcher += ["--local-addr=127.0.0.1", "-m", "rlhf"]
    result = subprocess.run(
        [*launcher, *_arguments(folder, "run.dir=torchrun", "stages=[ppo,report]")],
        cwd=folder,
        env=environment({"PYTHONPATH": str(ROOT)}),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    _same(folder, "torchrun")
    assert (folder / "torchrun/report.html").is_file()
