"""A rank whose whole batch is masked takes part in every collective and adds nothing."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import rlhf
from rlhf.distributed.launch import launch
from tests.distributed.engine_worker import ROWS, Case, build
from tests.distributed.masked_rank_worker import BUILD_SEED, CASES, NUM_STEPS, loss
from tests.unit.ragged import backward

pytestmark = pytest.mark.distributed

ROOT = Path(rlhf.__file__).parent.parent


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What rank 0 found, by case. A rank that waited for the other for ever would end by its timeout, and fail."""
    folder = tmp_path_factory.mktemp("masked_rank")
    command = [sys.executable, "-m", "tests.distributed.masked_rank_worker", str(folder), "2"]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    result = launch(command, 2, env_extra={"PYTHONPATH": path}, num_threads=1, log_folder=folder)
    assert result.exit_code == 0, result
    found: dict[str, dict[str, Any]] = torch.load(folder / "results.pt", weights_only=True)
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_rank_without_a_real_token_gives_the_update_of_the_others_row_46(
    results: dict[str, dict[str, Any]], case: Case
) -> None:
    """Row 46: sharded or not, the update is that of one process on the real rows alone."""
    found = results[case.name]
    module, optimizer, scheduler = build(BUILD_SEED)
    for step in range(NUM_STEPS):
        optimizer.zero_grad()
        total = loss(module, torch.arange(ROWS // 2))
        backward(total)
        optimizer.step()
        scheduler.step()
        assert found["losses"][step] == pytest.approx(total.item(), rel=1e-5)
    for name, value in module.state_dict().items():
        torch.testing.assert_close(found["weights"][name], value, rtol=1e-4, atol=1e-5, msg=name)
