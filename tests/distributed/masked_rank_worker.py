"""What the ranks of test_masked_rank.py run: PPO's losses on a batch whose second half is masked, so one rank has none.

Usage: `masked_rank_worker.py FOLDER NUM_PROCESSES`; rank 0 writes FOLDER/results.pt.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.ops.logprobs import token_logprobs
from rlhf.ops.losses import aggregation_count, aggregation_weights, ppo_policy_loss, ppo_value_loss
from rlhf.worker import leave
from tests.distributed.engine_worker import ROWS, Case, fixed_batch, start
from tests.distributed.ranks import save_on_main

CASES = [Case(stage, 2, max_grad_norm=100.0) for stage in (0, 2, 3)]
NUM_STEPS = 2
BUILD_SEED = 3


def masked_batch() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, targets and a mask (ROWS, LENGTH) that is empty in the second half of the rows."""
    tokens, targets, mask = fixed_batch()
    return tokens, targets, mask & (torch.arange(ROWS) < ROWS // 2).unsqueeze(1)


def loss(module: nn.Module, rows: Tensor) -> Tensor:
    """The part that some rows have in the mean over all real responses. What stands in masked slots is NaN."""
    tokens, targets, mask = masked_batch()
    count = aggregation_count(mask=mask, aggregation="sequence_mean")
    mask, targets = mask[rows], targets[rows]
    logits, values = module(tokens[rows])
    logprobs = token_logprobs(logits=logits.float(), tokens=targets, temperature=1.0)
    wrong = torch.where(mask, 0.0, torch.nan)
    policy, _, _ = ppo_policy_loss(
        logprobs=logprobs + wrong,
        old_logprobs=torch.full_like(logprobs, -2.0),
        advantages=targets.float() - 5.0 + wrong,
        mask=mask,
        clip_low=0.9,
        clip_high=9.0,
        weights=aggregation_weights(mask=mask, aggregation="sequence_mean", length=9),
    )
    value, _, _ = ppo_value_loss(
        values=values.float() + wrong,
        old_values=torch.zeros_like(values.float()),
        returns=targets.float() + wrong,
        mask=mask,
        clip=None,
    )
    return (policy + 0.01 * value) / count


def run_case(case: Case, num_processes: int) -> dict[str, Any]:
    runtime, engine = start(case, num_processes, BUILD_SEED)
    # The first rank has the first half of the rows, which are the real ones.
    mine = torch.arange(ROWS).chunk(num_processes)[runtime.rank]
    losses = []
    for _ in range(NUM_STEPS):
        total = torch.zeros(())
        for rows in mine.chunk(case.accumulation_steps):
            part = loss(engine.module, rows)
            engine.backward(part)
            total += part.detach()
        engine.step()
        losses.append(float(runtime.sum_over_ranks(total)))
    return {"losses": losses, "weights": engine.state_dict_for_saving()}


def main(folder: Path, num_processes: int) -> None:
    results = {case.name: run_case(case, num_processes) for case in CASES}
    save_on_main(results, folder / "results.pt", num_processes)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
    leave(0)  # as a rank does
