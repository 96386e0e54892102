"""What rewards see of a response that is cut at a token: Ziegler et al. 2019 score a text up to a full stop.

The policy is trained on everything it sampled; only what is scored is cut (lm-human-preferences, `lm_tasks.py`:
`truncate_token`, `truncate_after`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlhf.stages.sampling import single_token_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlhf.config.ppo import PPOConfig


@dataclass(frozen=True)
class Truncation:
    """Cuts behind the first token `token_id` at a place of at least `after`, the first token's being 0."""

    token_id: int
    after: int

    @classmethod
    def of(cls, section: PPOConfig, tokenizer: PreTrainedTokenizerBase) -> Truncation | None:
        """What the section asks for; raises `ConfigError` when its token is none of the vocabulary."""
        if section.truncate_token is None:
            return None
        return cls(single_token_id(tokenizer, section.truncate_token, "ppo.truncate_token"), section.truncate_after)

    def scored_part(self, response_ids: Tensor, response_mask: Tensor) -> tuple[Tensor, Tensor]:
        """`(mask, found)` of responses (B, R): the tokens (B, R) to score, and which rows (B,) were cut.

        A row without the token keeps all of its tokens.
        """
        places = torch.arange(response_ids.shape[1], device=response_ids.device)
        hits = response_mask & (response_ids == self.token_id) & (places >= self.after)
        hits_before = hits.long().cumsum(1) - hits.long()
        return response_mask & (hits_before == 0), hits.any(1)
