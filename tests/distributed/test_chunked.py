"""Log-probs in pieces under ZeRO, on two ranks whose numbers of pieces differ, against one process without pieces."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rlhf.models.scoring import response_logprobs
from tests.distributed.chunked_worker import CASES, NUM_PROMPT, NUM_STEPS, ROWS, Case, build, fixed_batch, loss
from tests.distributed.ranks import run_worker
from tests.unit.ragged import backward

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What rank 0 found, by case."""
    folder = tmp_path_factory.mktemp("chunked")
    run_worker("chunked_worker", folder, 2)
    found: dict[str, dict[str, Any]] = torch.load(folder / "results.pt", weights_only=True)
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_ranks_in_pieces_train_as_one_process_at_once_row_34(results: dict[str, dict[str, Any]], case: Case) -> None:
    """Row 34: ranks of unequal widths do not wait for each other, and the update is the one of the whole batch."""
    found = results[case.name]
    module, optimizer, _ = build(case)
    initial = {name: value.clone() for name, value in module.state_dict().items()}
    ids, mask = fixed_batch()
    for step in range(NUM_STEPS):
        with torch.no_grad():
            logprobs = response_logprobs(
                module.policy, input_ids=ids, attention_mask=mask, num_prompt=NUM_PROMPT, temperature=0.7
            )
        optimizer.zero_grad()
        total = loss(module, torch.arange(ROWS), None)
        backward(total)
        optimizer.step()
        assert found["losses"][step] == pytest.approx(total.item(), rel=1e-5)
    real = mask[:, NUM_PROMPT:]
    torch.testing.assert_close(found["logprobs"][real], logprobs[real], rtol=1e-4, atol=1e-4)
    trained = module.state_dict()
    assert found["weights"].keys() == trained.keys()
    for name, value in trained.items():
        torch.testing.assert_close(found["weights"][name], value, rtol=1e-4, atol=1e-5, msg=name)
    head = "policy.lm_head.weight"
    assert (trained[head] - initial[head]).abs().max() > 1e-3
