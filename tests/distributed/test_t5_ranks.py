"""Stages sft and reward_model on T5 on two ranks: sharded or not, whole or killed, they give what one process gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM

from rlhf.models import ScalarModel, response_scores
from rlhf.models.scalar import pad_pairs
from tests.distributed.ranks import run_trained_stages
from tests.distributed.t5_worker import CASES, RESUMED, case_config
from tests.stage_example import metrics_of, weight_bytes

pytestmark = pytest.mark.distributed

STAGES = ("sft", "reward_model")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process's run in `base`, and those of two ranks beside it."""
    folder = tmp_path_factory.mktemp("t5")
    run_trained_stages(folder, case_config, "t5_worker")
    return folder


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("case", CASES)
def test_row_11_two_ranks_give_what_one_process_gives(runs: Path, case: str, stage: str) -> None:
    expected = load_file(runs / "base/stages" / stage / "model/model.safetensors")
    weights = load_file(runs / case / "stages" / stage / "model/model.safetensors")
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        assert weights[name].dtype == value.dtype
        assert float((weights[name] - value).abs().max()) < 1e-3 * max(1.0, float(value.abs().max())), name
    lines, expected_lines = metrics_of(runs / case, stage), metrics_of(runs / "base", stage)
    assert [line["step"] for line in lines] == [line["step"] for line in expected_lines]
    names = {"sft": ("token_accuracy", "entropy"), "reward_model": ("accuracy", "margin", "score_mean")}[stage]
    for name in ("loss", "grad_norm", "learning_rate", *names):
        assert lines[0][f"{stage}/{name}"] == pytest.approx(expected_lines[0][f"{stage}/{name}"], rel=1e-4), name


@pytest.mark.parametrize("case", CASES)
def test_row_42_what_ranks_saved_loads_and_scores_alike(runs: Path, case: str) -> None:
    batch = {"input_ids": torch.arange(3, 23).reshape(2, 10), "decoder_input_ids": torch.arange(2, 12).reshape(2, 5)}
    policies = [AutoModelForSeq2SeqLM.from_pretrained(runs / run / "stages/sft/model") for run in ("base", case)]
    scalars = [ScalarModel.load(runs / run / "stages/reward_model/model") for run in ("base", case)]
    with torch.no_grad():
        expected, found = (model(**batch).logits for model in policies)
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
        pairs = [([5, 6, 7, 2], [30, 31, 2]), ([8, 2], [32, 33, 34, 35, 2])]
        expected, found = (response_scores(scalar, *pad_pairs(scalar, pairs, 0)) for scalar in scalars)
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("case", RESUMED)
def test_killed_ranks_go_on_to_the_same_bytes(runs: Path, case: str, stage: str) -> None:
    assert weight_bytes(runs / f"{case}-killed", stage) == weight_bytes(runs / case, stage)
    assert metrics_of(runs / f"{case}-killed", stage) == metrics_of(runs / case, stage)
