"""A rank whose whole batch is masked takes part in every collective and adds nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed.engine_worker import ROWS, Case, build
from tests.distributed.masked_rank_worker import BUILD_SEED, CASES, NUM_STEPS, loss
from tests.distributed.ranks import run_worker
from tests.unit.ragged import backward

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What rank 0 found, by case. A rank that waited for the other for ever would end by its timeout, and fail."""
    folder = tmp_path_factory.mktemp("masked_rank")
    run_worker("masked_rank_worker", folder, 2)
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
