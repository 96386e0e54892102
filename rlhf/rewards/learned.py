"""The learned reward: a reward model's score at the last response token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rlhf.data.tokenization import encode_pair, has_encoder_prompts
from rlhf.models.loading import disable_dropout, load_tokenizer
from rlhf.models.paths import is_ensemble
from rlhf.models.scalar import ScalarModel, pad_pairs, response_scores
from rlhf.records import PromptContent
from rlhf.rewards.composition import STATISTICS_FILE as STATISTICS_FILE
from rlhf.rewards.composition import ScoreStatistics as ScoreStatistics
from rlhf.rewards.protocol import RewardBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlhf.config.model import ModelConfig
    from rlhf.models.ensemble import ScalarEnsemble

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class LearnedReward:
    """A frozen reward model with its tokenizer.

    `same_tokens` tells whether a token id means the same in the policy's tokenizer, so that responses can be scored as
    they were sampled. Otherwise the text is tokenised again. The model is called within `ready`, which makes a sharded
    one's weights available; on several ranks all of them then score equally often.
    """

    model: ScalarModel | ScalarEnsemble
    tokenizer: PreTrainedTokenizerBase
    statistics: ScoreStatistics | None
    device: torch.device
    same_tokens: bool
    ready: Callable[[], AbstractContextManager[None]] = nullcontext
    may_abstain: ClassVar[bool] = False

    @classmethod
    def load(
        cls,
        path: str,
        config: ModelConfig,
        *,
        dtype: torch.dtype,
        device: torch.device,
        policy_tokenizer: PreTrainedTokenizerBase | None,
        key: str = "ppo.reward_model",
    ) -> LearnedReward:
        """Loads a reward model folder (or hub id) for scoring a policy's responses; `key` names it in errors.

        The folder of an ensemble gives an `EnsembleReward`.
        """
        if is_ensemble(path):
            from rlhf.rewards.ensemble import EnsembleReward

            return EnsembleReward.of_folder(
                path, config, dtype=dtype, device=device, policy_tokenizer=policy_tokenizer, key=key
            )
        model = ScalarModel.load(path, config, dtype=dtype, key=key).to(device).eval()
        model.requires_grad_(False)
        disable_dropout(model)
        tokenizer = load_tokenizer(path, config, key=key)
        same_tokens = policy_tokenizer is not None and same_token_ids(policy_tokenizer, tokenizer)
        return cls(model, tokenizer, ScoreStatistics.read(path), device, same_tokens)

    def score(self, batch: RewardBatch) -> Tensor:
        """Raw scores (B,): of the sampled tokens where they mean the same to this model, else of the text."""
        if self.same_tokens:
            return self.score_tokens(batch.input_ids, batch.attention_mask, batch.num_prompt)
        return torch.tensor(self.score_texts(batch.prompts, batch.responses, batch_size=len(batch)))

    @torch.no_grad()
    def score_tokens(self, input_ids: Tensor, attention_mask: Tensor, num_prompt: int | None = None) -> Tensor:
        """Raw scores (B,) of token sequences (B, T), read at the last real token: the mask decides, not the ids.

        `num_prompt` says where the responses begin; an encoder-decoder reward model needs it.
        """
        input_ids, attention_mask = self._own_tokens(input_ids, attention_mask)
        with self.ready():
            return self._scores(input_ids, attention_mask, num_prompt)

    def _own_tokens(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Ids and mask on this model's device, without what stands in a masked slot: padding of the policy's."""
        input_ids, attention_mask = input_ids.to(self.device), attention_mask.to(self.device)
        return torch.where(attention_mask, input_ids, torch.zeros_like(input_ids)), attention_mask

    def _scores(self, input_ids: Tensor, attention_mask: Tensor, num_prompt: int | None) -> Tensor:
        assert isinstance(self.model, ScalarModel)
        return response_scores(self.model, input_ids, attention_mask, num_prompt)

    def score_texts(
        self, prompts: Sequence[PromptContent], responses: Sequence[str], *, batch_size: int
    ) -> list[float]:
        """Raw scores of responses as text: tokenised by this model's tokenizer and ended with EOS, cut or not."""
        scores: list[float] = []
        for tokens in self._encoded(prompts, responses, batch_size):
            scores += self.score_tokens(*tokens).tolist()
        return scores

    def member_scores(
        self, prompts: Sequence[PromptContent], responses: Sequence[str], *, batch_size: int = 64
    ) -> Floats:
        """Raw scores (M, N) of N responses as text: of one reward model M is 1, of an ensemble see there."""
        return np.array([self.score_texts(prompts, responses, batch_size=batch_size)], dtype=np.float64)

    def _encoded(
        self, prompts: Sequence[PromptContent], responses: Sequence[str], batch_size: int
    ) -> Iterator[tuple[Tensor, Tensor, int | None]]:
        """Batches of texts as `score_tokens` takes them."""
        pad_id = int(self.tokenizer.pad_token_id)
        texts = list(zip(prompts, responses, strict=True))
        for start in range(0, len(texts), batch_size):
            rows = [encode_pair(self.tokenizer, *text) for text in texts[start : start + batch_size]]
            yield pad_pairs(self.model, rows, pad_id)


def same_token_ids(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> bool:
    """True when every token of `first` has the same id in `second`; `second` may add tokens (a padding token, say).

    False between the tokenizers of a causal and an encoder-decoder model, which frame a prompt in other ways.
    """
    if has_encoder_prompts(first) != has_encoder_prompts(second):
        return False
    other = second.get_vocab()
    return first.eos_token_id == second.eos_token_id and all(
        other.get(token) == index for token, index in first.get_vocab().items()
    )
