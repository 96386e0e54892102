"""`ppo.pass_metrics_updates`: what the first updates say of each of their passes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from rlhf.stages.ppo import loop
from rlhf.stages.ppo.update import UpdateStatistics
from tests.ppo_example import ppo_config, ppo_context, write_models
from tests.stage_example import metrics_of, one_process


def test_means_of_a_pass_are_over_its_tokens() -> None:
    """Ratios 1/2, 1 and 4 over four tokens, one of them twice: by hand."""
    logs = torch.tensor([math.log(0.5), 0.0, math.log(4.0), 0.0])
    one = UpdateStatistics()
    for part in logs.chunk(2):
        ratio = part.exp()
        one.add(
            {
                "approx_kl": (ratio - 1 - part).sum(),
                "squared_log_ratio": part.square().sum(),
                "clip_fraction": torch.tensor(1.0),
                "ratio": ratio.sum(),
                "ratio_max": ratio.max(),
                "num_tokens": torch.tensor(2),
            }
        )
    found = UpdateStatistics(passes=[one]).pass_means(one_process())
    expected = {
        "ppo/pass_0/approx_kl": (0.5 - 1 + math.log(2) + 4 - 1 - math.log(4)) / 4,
        "ppo/pass_0/approx_kl_k2": (math.log(2) ** 2 + math.log(4) ** 2) / 8,
        "ppo/pass_0/clip_fraction": 0.5,
        "ppo/pass_0/ratio_mean": 6.5 / 4,
        "ppo/pass_0/ratio_max": 4.0,
    }
    assert found == pytest.approx(expected, abs=1e-6)


def test_the_first_update_says_how_far_each_pass_was(tmp_path: Path) -> None:
    """One step a pass: pass 0 has the policy that sampled, later ones are farther; together they are the update's."""
    inputs = write_models(tmp_path / "models")
    config = ppo_config(num_epochs=3, num_minibatches=1, pass_metrics_updates=1, micro_batch_size=4)
    loop.run(ppo_context(config, tmp_path / "run", inputs))
    first, second = metrics_of(tmp_path / "run", "ppo")
    kls = [first[f"ppo/pass_{number}/approx_kl"] for number in range(3)]
    assert kls[0] == pytest.approx(0.0, abs=1e-9)
    assert first["ppo/pass_0/ratio_mean"] == pytest.approx(1.0, abs=1e-5)
    assert first["ppo/pass_0/clip_fraction"] == 0
    assert kls[0] < kls[1] < kls[2]
    assert first["ppo/approx_kl"] == pytest.approx(sum(kls) / 3, rel=1e-5)
    fractions = [first[f"ppo/pass_{number}/clip_fraction"] for number in range(3)]
    assert first["ppo/clip_fraction"] == pytest.approx(sum(fractions) / 3, rel=1e-5)
    assert first["ppo/ratio_max"] == max(first[f"ppo/pass_{number}/ratio_max"] for number in range(3))
    # Half the mean square and k3 agree to first order where the steps are small.
    assert first["ppo/pass_1/approx_kl_k2"] == pytest.approx(kls[1], rel=0.5)
    assert not [name for name in second if name.startswith("ppo/pass_")]
