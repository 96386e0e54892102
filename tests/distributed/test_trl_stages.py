"""Stages sft and reward_model on two ranks: sharded or not, whole or killed, they give what one process gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.distributed.ranks import run_trained_stages
from tests.distributed.trl_worker import CASES, RESUMED, case_config
from tests.stage_example import metrics_of, weight_bytes

pytestmark = pytest.mark.distributed

STAGES = ("sft", "reward_model")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process's run in `base`, and those of two ranks beside it."""
    folder = tmp_path_factory.mktemp("trl")
    run_trained_stages(folder, case_config, "trl_worker")
    return folder


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_give_what_one_process_gives(runs: Path, case: str, stage: str) -> None:
    expected = load_file(runs / "base/stages" / stage / "model/model.safetensors")
    weights = load_file(runs / case / "stages" / stage / "model/model.safetensors")
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        assert weights[name].shape == value.shape
        assert weights[name].dtype == value.dtype
        assert float((weights[name] - value).abs().max()) < 1e-4 * max(1.0, float(value.abs().max()))
    lines, expected_lines = metrics_of(runs / case, stage), metrics_of(runs / "base", stage)
    assert [line["step"] for line in lines] == [line["step"] for line in expected_lines]
    # The first line is of steps that rounding has had no time to grow in.
    for name in (f"{stage}/loss", f"{stage}/grad_norm", f"{stage}/learning_rate"):
        assert lines[0][name] == pytest.approx(expected_lines[0][name], rel=1e-5)
        assert lines[-1][name] == pytest.approx(expected_lines[-1][name], rel=1e-3)


@pytest.mark.parametrize("case", CASES)
def test_what_ranks_saved_loads_with_plain_transformers(runs: Path, case: str) -> None:
    """The head is there and gives the scores of one process."""
    ids = torch.arange(3, 23).reshape(2, 10)
    for stage, loader in (("sft", AutoModelForCausalLM), ("reward_model", AutoModelForSequenceClassification)):
        models = [loader.from_pretrained(runs / run / "stages" / stage / "model") for run in ("base", case)]
        with torch.no_grad():
            expected, found = (model(ids).logits for model in models)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
        assert {path.name for path in (runs / case / "stages" / stage / "model").iterdir()} == {
            path.name for path in (runs / "base/stages" / stage / "model").iterdir()
        }


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("case", RESUMED)
def test_killed_ranks_go_on_to_the_same_bytes(runs: Path, case: str, stage: str) -> None:
    assert weight_bytes(runs / f"{case}-killed", stage) == weight_bytes(runs / case, stage)
    assert metrics_of(runs / f"{case}-killed", stage) == metrics_of(runs / case, stage)
