"""The rewards of stage ppo: what `ppo.rewards` names, the reward model on the policy's base where it lies there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlhf.models.shared_base import SharedBase
from rlhf.rewards.composition import RewardSet, ScoreStatistics, WeightedReward
from rlhf.rewards.learned import LearnedReward
from rlhf.rewards.protocol import RewardBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlhf.stages.context import StageContext


@dataclass(frozen=True)
class RewardRole:
    """The reward model as a role of the policy's base. It reads the sampled tokens, which are its own."""

    base: SharedBase
    may_abstain: bool = False

    @torch.no_grad()
    def score(self, batch: RewardBatch) -> Tensor:
        """Raw scores (B,) at the last real token."""
        return self.base.scores("reward", batch.input_ids, batch.attention_mask)


@dataclass(frozen=True)
class _Simple:
    learned: LearnedReward
    may_abstain: bool = False

    def score(self, batch: RewardBatch) -> Tensor:
        return self.learned.score_tokens(batch.input_ids, batch.attention_mask, batch.num_prompt)


def make_rewards(context: StageContext, tokenizer: PreTrainedTokenizerBase, base: SharedBase | None) -> RewardSet:
    """The rewards by name."""
    learned = LearnedReward.load(
        context.inputs["reward_model"],
        context.config.model,
        dtype=context.runtime.dtype,
        device=context.runtime.device,
        policy_tokenizer=tokenizer,
    )
    normalize = context.config.ppo.score_normalization == "reward_model"
    stats = learned.statistics
    statistics = ScoreStatistics(stats.mean, stats.std) if normalize and stats is not None else None
    return RewardSet((WeightedReward("reward_model", _Simple(learned), 1.0, statistics),))
