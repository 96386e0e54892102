"""The quickstart learns, for three seeds: the band that experiments/quickstart/README.md states."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.command import rlhf_command


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_quickstart_stays_within_its_band(seed: int, tmp_path: Path) -> None:
    result = rlhf_command(
        "run",
        "experiment=quickstart",
        f"seed={seed}",
        "run.dir=run",
        "distributed.device=cpu",
        cwd=tmp_path,
        timeout=1700,
    )
    assert result.returncode == 0, result.stderr
    evaluation = _summary(tmp_path / "run", "evaluate")
    assert evaluation["win_rate"]["value"] >= 0.75
    assert evaluation["win_rate"]["low"] > 0.70
    assert evaluation["grammatical_share_policy"]["value"] >= 0.90
    assert evaluation["kl_to_reference"]["value"] <= 15
    assert _summary(tmp_path / "run", "reward_model")["accuracy"]["value"] >= 0.80


def _summary(run: Path, stage: str) -> dict[str, Any]:
    body: dict[str, Any] = json.loads((run / "stages" / stage / "result.json").read_text())["summary"]
    return body
