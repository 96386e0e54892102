"""Stage x ZeRO x {full, LoRA} on two ranks gives what one process gives without DeepSpeed.

A short form runs by default; `RLHF_MATRIX=full` runs every combination, with offload, accumulation, checkpointing,
bf16 and a user's own DeepSpeed JSON besides.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.distributed.matrix_worker import CELLS, SHORT, STAGES, TUNINGS, Cell, run_cell, write_inputs
from tests.distributed.ranks import run_worker
from tests.stage_example import metrics_of

pytestmark = pytest.mark.distributed

FORM = os.environ.get("RLHF_MATRIX", "short")
TIMEOUT = 1800  # of the full form; the short one takes a minute
BASES = tuple(dict.fromkeys(cell.base for cell in CELLS[FORM]))
PLAIN_BASES = tuple(base for base in BASES if not base.variant)
# bf16 keeps 8 bits: a step of it is compared with one of fp32.
LOW_PRECISION = 0.1


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process's runs in `one-<stage>-<tuning>`, and those of two ranks by the cells' names."""
    folder = tmp_path_factory.mktemp("matrix")
    write_inputs(folder)
    for base in BASES:
        run_cell(base, folder, folder / f"one-{base.name}")
    run_worker("matrix_worker", folder, FORM)
    return folder


def weights_of(run: Path, stage: str) -> dict[str, Tensor]:
    """Everything that the stage published, by part and name."""
    files = sorted((run / "stages" / stage).glob("*model/*.safetensors"))
    return {f"{file.parent.name}/{name}": value for file in files for name, value in load_file(file).items()}


def losses(line: dict[str, Any], cell: Cell) -> dict[str, float]:
    """The line's numbers that a wrong gradient, sum or score would change."""
    names = ["loss", "grad_norm", "learning_rate"]
    if cell.stage == "ppo":
        names += ["policy_loss", "value_loss", "entropy", "score_mean", "exact_kl_to_reference", "response_length"]
    return {name: float(line[f"{cell.stage}/{name}"]) for name in names}


def compare_fp32(runs: Path, cell: Cell) -> None:
    one, two = runs / f"one-{cell.base.name}", runs / cell.name
    expected, found = weights_of(one, cell.stage), weights_of(two, cell.stage)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == value.shape
        assert found[name].dtype == value.dtype
        assert float((found[name] - value).abs().max()) <= 1e-4 * float(value.abs().max()), name
    lines, expected_lines = metrics_of(two, cell.stage), metrics_of(one, cell.stage)
    assert [line["step"] for line in lines] == [line["step"] for line in expected_lines]
    assert losses(lines[0], cell) == pytest.approx(losses(expected_lines[0], cell), rel=1e-5, abs=1e-6)


@pytest.mark.timeout(TIMEOUT)
@pytest.mark.parametrize("cell", CELLS[FORM], ids=[cell.name for cell in CELLS[FORM]])
def test_two_ranks_give_what_one_process_gives(cell: Cell, runs: Path) -> None:
    if cell.variant != "bf16":
        compare_fp32(runs, cell)
        return
    line, expected = (metrics_of(runs / run, cell.stage)[0] for run in (cell.name, f"one-{cell.base.name}"))
    assert all(bool(value.isfinite().all()) for value in weights_of(runs / cell.name, cell.stage).values())
    if cell.stage == "ppo":  # it samples other responses, so that there is nothing to compare but what must hold
        assert line["ppo/kl_to_reference"] == pytest.approx(0.0, abs=1e-6)
        assert math.isfinite(line["ppo/loss"])
    else:
        loss = f"{cell.stage}/loss"
        assert line[loss] == pytest.approx(expected[loss], rel=LOW_PRECISION)


@pytest.mark.parametrize("cell", PLAIN_BASES, ids=[cell.name for cell in PLAIN_BASES])
def test_something_was_learned(cell: Cell, runs: Path) -> None:
    """Weights that stay where they were would agree too: they moved by far more than the cells may differ."""
    start = {
        "sft": "policy",
        "reward_model": "policy" if cell.tuning == "full" else "sft",
        "ppo": "policy" if cell.tuning == "full" else "sft",
    }[cell.stage]
    after = weights_of(runs / f"one-{cell.name}", cell.stage)
    if cell.stage == "sft" and cell.tuning == "lora":
        assert all(bool(value.any()) for value in after.values())  # a new adapter starts with a matrix of zeros
        return
    [file] = (runs / "models" / start).glob("*.safetensors")
    before = load_file(file)
    moved = [
        float((after[f"model/{name}"] - value).abs().max() / value.abs().max())
        for name, value in before.items()
        if f"model/{name}" in after
    ]
    assert len(moved) > 5
    assert max(moved) > 1e-2


def test_a_sharded_reference_is_refreshed_and_comes_back_from_a_checkpoint(runs: Path) -> None:
    name = "ppo-zero3-full-refresh"
    lines = metrics_of(runs / name, "ppo")
    # The reference becomes the policy after each update, so that every rollout begins at a KL of 0.
    assert [line["ppo/kl_to_reference"] for line in lines] == pytest.approx([0.0] * 3, abs=1e-6)
    moved = metrics_of(runs / f"one-{Cell('ppo', 0, 'full').name}", "ppo")
    assert moved[1]["ppo/kl_to_reference"] > 0.01  # without a refresh it is not
    assert metrics_of(runs / f"{name}-resumed", "ppo") == lines
    found, expected = weights_of(runs / f"{name}-resumed", "ppo"), weights_of(runs / name, "ppo")
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_the_short_form_has_every_stage_sharding_and_tuning() -> None:
    assert {(cell.stage, cell.tuning) for cell in SHORT} == {(stage, tuning) for stage in STAGES for tuning in TUNINGS}
    assert {cell.zero for cell in SHORT if cell.stage == "ppo"} == {0, 1, 2, 3}
    assert {cell.zero for cell in SHORT if cell.stage != "ppo"} == {0, 1, 2, 3}
