"""The reward of an ensemble: its members' scores, each on its own scale first, as one number that is harder to fool.

Coste et al. 2024, "Reward model ensembles help mitigate overoptimization" (arXiv 2310.02743), section 3.2: mean
optimisation, worst-case optimisation, and uncertainty-weighted optimisation, mean - lambda x variance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from rlhf.config.rewards import ModelReward
from rlhf.errors import ConfigError
from rlhf.models.ensemble import ScalarEnsemble
from rlhf.models.loading import disable_dropout, load_tokenizer
from rlhf.models.paths import member_folders
from rlhf.records import PromptContent
from rlhf.rewards.composition import ScoreStatistics
from rlhf.rewards.learned import Floats, LearnedReward, same_token_ids
from rlhf.rewards.protocol import Reward, RewardBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlhf.config.model import ModelConfig

Aggregation = Literal["mean", "worst", "mean_minus_variance"]
VARIANCE_COEFFICIENT = 0.1


@dataclass(frozen=True)
class EnsembleReward(LearnedReward):
    """A frozen ensemble with its tokenizer; `statistics` is None, since the members have their own.

    With `normalized` every member's scores are shifted and scaled by its own statistics before they are aggregated:
    scores of different trainings have no origin in common.
    """

    member_statistics: tuple[ScoreStatistics | None, ...] = ()
    aggregation: Aggregation = "mean"
    variance_coefficient: float = VARIANCE_COEFFICIENT
    normalized: bool = True

    @classmethod
    def of_folder(
        cls,
        path: str,
        config: ModelConfig,
        *,
        dtype: torch.dtype,
        device: torch.device,
        policy_tokenizer: PreTrainedTokenizerBase | None,
        key: str = "ppo.reward_model",
    ) -> EnsembleReward:
        """Loads the folder of an ensemble for scoring a policy's responses; `key` names it in errors."""
        model = ScalarEnsemble.load(path, config, dtype, key).to(device).eval()
        model.requires_grad_(False)
        disable_dropout(model)
        tokenizer = load_tokenizer(path, config, key=key)
        statistics = tuple(ScoreStatistics.read(folder) for folder in member_folders(path, key))
        same = policy_tokenizer is not None and same_token_ids(policy_tokenizer, tokenizer)
        return cls(model, tokenizer, None, device, same, member_statistics=statistics)

    def score_in_detail(self, batch: RewardBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The aggregated scores (B,), and `spread` (B,): the members' standard deviation on a response."""
        members = self.member_scores_of_batch(batch)
        return self.aggregate(members), {"spread": members.std(dim=0, correction=0)}

    def member_scores_of_batch(self, batch: RewardBatch) -> Tensor:
        """The members' scores (M, B) of a batch: of the sampled tokens where they mean the same, else of the text."""
        if self.same_tokens:
            return self._members(batch.input_ids, batch.attention_mask, batch.num_prompt)
        scores = self.member_scores(batch.prompts, batch.responses, batch_size=len(batch))
        return torch.from_numpy(scores).float()

    def member_scores(
        self, prompts: Sequence[PromptContent], responses: Sequence[str], *, batch_size: int = 64
    ) -> Floats:
        """The scores (M, N) of N responses as text by each of M members, on its own scale if `normalized`."""
        pieces = [
            self._members(*tokens).double().cpu().numpy() for tokens in self._encoded(prompts, responses, batch_size)
        ]
        return np.concatenate(pieces, axis=1) if pieces else np.zeros((len(self.member_statistics), 0))

    def aggregate(self, members: Tensor) -> Tensor:
        """One score (B,) a response from the members' (M, B). The variance is over the members, biased."""
        if self.aggregation == "worst":
            return members.amin(dim=0)
        mean = members.mean(dim=0)
        if self.aggregation == "mean":
            return mean
        return mean - self.variance_coefficient * members.var(dim=0, correction=0)

    def _scores(self, input_ids: Tensor, attention_mask: Tensor, num_prompt: int | None) -> Tensor:
        return self.aggregate(self._normalized(input_ids, attention_mask, num_prompt))

    @torch.no_grad()
    def _members(self, input_ids: Tensor, attention_mask: Tensor, num_prompt: int | None) -> Tensor:
        input_ids, attention_mask = self._own_tokens(input_ids, attention_mask)
        with self.ready():
            return self._normalized(input_ids, attention_mask, num_prompt)

    def _normalized(self, input_ids: Tensor, attention_mask: Tensor, num_prompt: int | None) -> Tensor:
        assert isinstance(self.model, ScalarEnsemble)
        scores = self.model.member_scores(input_ids, attention_mask, num_prompt)
        if not self.normalized:
            return scores
        rows = zip(scores, self.member_statistics, strict=True)
        return torch.stack([row if known is None else known.normalize(row) for row, known in rows])


def configured(reward: Reward, config: ModelReward, key: str) -> Reward:
    """A loaded reward model as the config's section `key` wants it; one in memory may serve several entries.

    Raises `ConfigError` for an aggregation of what is no ensemble.
    """
    if isinstance(reward, EnsembleReward):
        coefficient = VARIANCE_COEFFICIENT if config.variance_coefficient is None else config.variance_coefficient
        return replace(
            reward, aggregation=config.aggregation, variance_coefficient=coefficient, normalized=config.normalize
        )
    if config.aggregation != "mean":
        model = config.path or "this run's reward model"
        raise ConfigError(
            f"{key}.aggregation={config.aggregation} is for an ensemble, and {model} is one model. Train "
            "several with reward_model.num_members, or set it to mean"
        )
    return reward
