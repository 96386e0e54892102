"""PPO against the exact optimum: the gap that experiments/closed_form/README.md states."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf.config import RLHFConfig
from rlhf.studies import closed_form
from tests.command import rlhf_command
from tests.stage_example import make_context


def test_ppo_goes_most_of_the_way_to_the_optimum_in_seconds(tmp_path: Path) -> None:
    """Two words and EOS, two prompts: a tenth of the study's samples. A wrong sign, mask or KL leaves a gap near 1."""
    study = {
        "betas": (0.2,),
        "algorithms": ("ppo",),
        "num_tokens": 3,
        "num_prompts": 2,
        "num_responses": 8192,
        "num_measurements": 4,
    }
    ppo = {
        "batch_size": 256,
        "num_epochs": 4,
        "num_minibatches": 4,
        "learning_rate": 2e-3,
        "value_learning_rate": 4e-3,
        "max_grad_norm": 10.0,
        "lam": 1.0,
        "value_clip": None,
        "value_coefficient": 0.5,
    }
    config = RLHFConfig.model_validate(
        {"tracking": {"wandb": "disabled"}, "distributed": {"device": "cpu"}, "closed_form": study, "ppo": ppo}
    )
    output = closed_form.run(make_context(config, tmp_path, "closed_form"))
    assert output.summary["largest_gap_ppo"] < 0.1


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_ppo_comes_within_3_percent_of_the_exact_optimum_at_every_beta(tmp_path: Path, seed: int) -> None:
    result = rlhf_command(
        "run",
        "experiment=closed_form",
        "closed_form.algorithms=[ppo]",
        f"seed={seed}",
        "run.dir=run",
        "tracking.wandb=disabled",
        cwd=tmp_path,
        timeout=1100,
    )
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "run/stages/closed_form/result.json").read_text())["summary"]
    gaps = {row["beta"]: row["gap"] for row in summary["table"]}
    assert set(gaps) == {0.05, 0.2, 1.0}
    assert max(gaps.values()) <= 0.03, gaps
