"""Stages dpo (whole or adapters, ZeRO 1 and 3) and best_of_n on two ranks: what one process gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlhf.config.model import ScratchConfig
from rlhf.models import build_from_scratch
from rlhf.models.saving import save_model
from rlhf.models.scalar import ScalarModel, ensure_distinct_pad
from tests.distributed.dpo_worker import BEST, CASES, KILLED, case_config, run_best, run_dpo
from tests.distributed.ranks import run_worker
from tests.stage_example import metrics_of, weight_bytes, write_comparisons, write_demonstrations

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process's runs in `full`, `lora` and `best`, and those of two ranks beside them."""
    folder = tmp_path_factory.mktemp("dpo")
    write_demonstrations(folder / "data")
    write_comparisons(folder / "comparisons")
    config = ScratchConfig.model_validate({"num_layers": 2, "hidden_size": 32, "num_heads": 2, "vocab_size": 300})
    for name, seed in (("policy", 3), ("other", 4)):
        policy, tokenizer = build_from_scratch(config, ["the film was good and bad"] * 9, seed=seed)
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.mul_(1.5)
        save_model(policy, tokenizer, folder / name)
    reward = ScalarModel.from_policy(policy, seed=5)
    reward.save(folder / "reward", ensure_distinct_pad(tokenizer, reward.model))
    for layout in ("full", "lora"):
        run_dpo(case_config(folder, layout, {}, num_processes=1), folder, folder / layout)
    run_best(case_config(folder, BEST, {}, num_processes=1), folder, folder / BEST)
    run_worker("dpo_worker", folder)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_rows_11_and_42_two_ranks_train_and_save_what_one_process_does(runs: Path, case: str) -> None:
    lora = case.startswith("lora")
    file = f"stages/dpo/model/{'adapter_model' if lora else 'model'}.safetensors"
    layout = runs / ("lora" if lora else "full")
    expected, found = load_file(layout / file), load_file(runs / case / file)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == value.shape
        assert float((found[name] - value).abs().max()) < 1e-4 * max(1.0, float(value.abs().max())), name
    lines, wanted = metrics_of(runs / case, "dpo"), metrics_of(layout, "dpo")
    assert [line["step"] for line in lines] == [line["step"] for line in wanted] == [1, 2, 3]
    assert abs(wanted[0]["dpo/margin"]) > 1e-3
    for name in ("loss", "grad_norm", "accuracy", "margin", "chosen_reward", "rejected_reward", "chosen_logprob"):
        assert lines[0][f"dpo/{name}"] == pytest.approx(wanted[0][f"dpo/{name}"], rel=1e-4, abs=1e-6), name
    for name in ("validation_loss", "test_loss", "test_accuracy", "test_margin"):
        assert lines[-1][f"dpo/{name}"] == pytest.approx(wanted[-1][f"dpo/{name}"], rel=1e-3, abs=1e-5), name


def test_sharded_training_goes_on_bit_for_bit(runs: Path) -> None:
    assert weight_bytes(runs / "killed", "dpo") == weight_bytes(runs / KILLED, "dpo")
    assert metrics_of(runs / "killed", "dpo") == metrics_of(runs / KILLED, "dpo")


def test_two_ranks_sample_and_score_what_one_process_does(runs: Path) -> None:
    found, wanted = (
        [json.loads(line) for line in (runs / name / "stages/best_of_n/scores.jsonl").read_text().splitlines()]
        for name in ("best-two", BEST)
    )
    assert [row["prompt"] for row in found] == [row["prompt"] for row in wanted]
    assert [row["lengths"] for row in found] == [row["lengths"] for row in wanted]
    assert len(found) == 5
    for row, other in zip(found, wanted, strict=True):
        assert row["rewards"]["brief"] == other["rewards"]["brief"]
        assert row["rewards"]["proxy"] == pytest.approx(other["rewards"]["proxy"], rel=1e-4, abs=1e-5)
