"""The quickstarts learn: the bands that the README.md of each folder experiments/quickstart* states."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.command import rlhf_command


@dataclass(frozen=True)
class Band:
    """What one run must reach; `max_kl` is in nats a response. Shares and rates lie in [0, 1]."""

    win_rate: float = 0.75
    win_rate_low: float = 0.70
    reward_model_accuracy: float = 0.80
    grammatical_share: float = 0.90
    max_kl: float = 15.0


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_quickstart_stays_within_its_band(seed: int, tmp_path: Path) -> None:
    _check_band("quickstart", seed, Band(), tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_quickstart_with_adapters_stays_within_its_band(seed: int, tmp_path: Path) -> None:
    _check_band("quickstart_lora", seed, Band(), tmp_path)
    for stage in ("reward_model", "ppo"):
        folder = tmp_path / "run" / "stages" / stage / "model"
        assert (folder / "adapter_model.safetensors").is_file(), f"{stage} published no adapter"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_quickstart_with_an_encoder_decoder_model_stays_within_its_band(tmp_path: Path) -> None:
    _check_band("quickstart_t5", 1, Band(reward_model_accuracy=0.70), tmp_path)


def _check_band(experiment: str, seed: int, band: Band, folder: Path) -> None:
    result = rlhf_command(
        "run",
        f"experiment={experiment}",
        f"seed={seed}",
        "run.dir=run",
        "distributed.device=cpu",
        cwd=folder,
        timeout=1700,
    )
    assert result.returncode == 0, result.stderr
    evaluation = _summary(folder / "run", "evaluate")
    assert evaluation["win_rate"]["value"] >= band.win_rate
    assert evaluation["win_rate"]["low"] > band.win_rate_low
    assert evaluation["grammatical_share_policy"]["value"] >= band.grammatical_share
    assert evaluation["kl_to_reference"]["value"] <= band.max_kl
    assert _summary(folder / "run", "reward_model")["accuracy"]["value"] >= band.reward_model_accuracy


def _summary(run: Path, stage: str) -> dict[str, Any]:
    body: dict[str, Any] = json.loads((run / "stages" / stage / "result.json").read_text())["summary"]
    return body
