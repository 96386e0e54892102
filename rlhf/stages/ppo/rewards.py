"""The rewards of stage ppo: what `ppo.rewards` names, the reward model on the policy's base where it lies there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlhf.models.shared_base import SharedBase
from rlhf.rewards.build import LoadedModel, build_rewards, folder_loader
from rlhf.rewards.composition import RewardSet, ScoreStatistics
from rlhf.rewards.learned import LearnedReward
from rlhf.rewards.protocol import RewardBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlhf.distributed.frozen import FrozenShards
    from rlhf.stages.context import StageContext


@dataclass(frozen=True)
class RewardRole:
    """The reward model as a role of the policy's base: it reads the tokens as they were sampled."""

    base: SharedBase
    may_abstain: bool = False

    @torch.no_grad()
    def score(self, batch: RewardBatch) -> Tensor:
        """Raw scores (B,) at the last real token."""
        return self.base.scores("reward", batch.input_ids, batch.attention_mask)


def make_rewards(context: StageContext, tokenizer: PreTrainedTokenizerBase, base: SharedBase | None) -> RewardSet:
    """The rewards by name; `base` is the one of the policy's adapters, which may carry the run's reward model too."""
    config, runtime = context.config, context.runtime
    run_model = context.inputs.get("reward_model")
    # What is going to be sharded is not placed whole before.
    device = torch.device("cpu") if config.zero.shard_frozen else runtime.device
    load_folder = folder_loader(run_model, config.model, dtype=runtime.dtype, device=device, policy_tokenizer=tokenizer)

    def load(path: str | None, key: str) -> LoadedModel:
        if path is None and run_model is not None and base is not None and base.has_role("reward"):
            return LoadedModel(RewardRole(base), ScoreStatistics.read(run_model))
        return load_folder(path, key)

    return build_rewards(
        config.ppo.rewards,
        load_model=load,
        use_statistics=config.ppo.score_normalization == "reward_model",
    )


def shard_rewards(
    rewards: RewardSet, shard: Callable[[torch.nn.Module], FrozenShards], device: torch.device
) -> RewardSet:
    """The same rewards with the reward models sharded, each once, to be called on `device`.

    `RewardRole` stays: the trained module has it.
    """
    sharded: dict[int, FrozenShards] = {}
    entries = []
    for entry in rewards.rewards:
        reward = entry.reward
        if isinstance(reward, LearnedReward):
            if id(reward.model) not in sharded:
                sharded[id(reward.model)] = shard(reward.model)
            entry = replace(entry, reward=replace(reward, ready=sharded[id(reward.model)].ready, device=device))
        entries.append(entry)
    return RewardSet(tuple(entries))
