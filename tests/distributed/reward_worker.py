"""What the ranks of test_reward_ranks.py run: ensembles on K-wise comparisons under sharding, in one process.

Usage: `reward_worker FOLDER`, where the policy, the data, the comparisons and one process's runs `full` and `lora` lie
already. The run of case NAME lands in FOLDER/NAME, the scores that sharded members give in FOLDER/scores-LAYOUT.pt.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rlhf.config import RLHFConfig
from rlhf.distributed.frozen import FrozenShards
from rlhf.distributed.runtime import Runtime
from rlhf.models import load_tokenizer
from rlhf.rewards.ensemble import EnsembleReward
from rlhf.rewards.learned import LearnedReward
from rlhf.stages import reward_model
from rlhf.worker import leave
from tests.stage_example import make_context, tiny_config

SHARD_ALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
# Layout of the members, then how two ranks share them.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "full-stage3": ("full", {"stage": 3, "extra": SHARD_ALL}),
    "lora-stage3": ("lora", {"stage": 3, "extra": SHARD_ALL}),
}
PROMPTS = ("the film", "a film", "what a film", "the film")
RESPONSES = (" was good", " was bad and poor", " fine", " was bad")


def case_config(folder: Path, layout: str, zero: dict[str, Any], num_processes: int) -> RLHFConfig:
    """Two members, four prompts a step; a rank accumulates over single prompts, whose pairs are unequally many."""
    section = {
        "loss": {"type": "kwise"},
        "num_members": 2,
        "batch_size": 4,
        "micro_batch_size": 1,
        "max_steps": 2,
        "log_every": 1,
        "normalization": {"type": "sft_responses", "num_responses": 5, "sampling": {"max_response_tokens": 4}},
    }
    peft = {"type": "lora", "rank": 2} if layout == "lora" else {"type": "none"}
    return tiny_config(folder, reward_model=section, peft=peft, zero=zero, distributed={"num_processes": num_processes})


def run_case(config: RLHFConfig, folder: Path, run: Path, runtime: Runtime | None = None) -> None:
    """The stage from FOLDER's policy and comparisons."""
    inputs = {"base": str(folder / "policy"), "comparisons": str(folder / "comparisons")}
    reward_model.run(make_context(config, run, "reward_model", inputs, runtime))


def load(folder: Path, layout: str) -> EnsembleReward:
    """The ensemble that one process trained."""
    reward = LearnedReward.load(
        str(folder / layout / "stages/reward_model/model"),
        case_config(folder, layout, {}, 1).model,
        dtype=torch.float32,
        device=torch.device("cpu"),
        policy_tokenizer=load_tokenizer(folder / "policy"),
    )
    assert isinstance(reward, EnsembleReward)
    return reward


def main(folder: Path) -> None:
    """All cases, one after the other, then the sharded ensembles of one process's runs."""
    for name, (layout, zero) in CASES.items():
        config = case_config(folder, layout, zero, num_processes=2)
        runtime = Runtime.start(config.distributed, config.zero, config.seed)
        run_case(config, folder, folder / name, runtime)
        runtime.barrier()
    config = case_config(folder, "full", CASES["full-stage3"][1], num_processes=2)
    runtime = Runtime.start(config.distributed, config.zero, config.seed)
    for layout in ("full", "lora"):
        reward = load(folder, layout)
        sharded = replace(reward, ready=FrozenShards(reward.model, runtime, config.zero).ready)
        scores = sharded.member_scores(PROMPTS, RESPONSES, batch_size=2)
        if runtime.is_main:
            torch.save(torch.from_numpy(scores), folder / f"scores-{layout}.pt")
    runtime.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave(0)  # as a rank does
