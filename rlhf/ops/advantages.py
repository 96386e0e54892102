"""Rewards of tokens and generalised advantage estimation over right-padded responses.

A response of length L fills slots 0..L-1 of its row. Token t is drawn in the state before it, whose value is
`values[:, t]`; slot L, if the row is wider than L, is the state after the last token.

`score_position` says which slot gets the score:

* `last_token`: slot L-1, the end of the episode. Its advantage sees the score with weight 1.
* `after_eos`: slot L when L < R, else slot L-1, as the TL;DR lineage does (Huang et al. 2024, arXiv 2403.17031,
  which indexes it `sequence_length + 1`). The episode then has one more state, after the last token, with a value
  that is bootstrapped from and trained but without a token: the last token's advantage sees the score with weight
  gamma * lam and the value of slot L with weight gamma * (1 - lam). Whether slot L exists depends on the width R, so
  the batch must be as wide as the longest allowed response, or results depend on which responses share a batch.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf.ops._checks import check_bool, check_floating, check_prefix, check_rank, check_same_shape, kept
from rlhf.ops.sequences import last_token_index

ScorePosition = Literal["last_token", "after_eos"]


def value_mask(*, mask: Bool[Tensor, "B R"], score_position: ScorePosition) -> Bool[Tensor, "B R"]:
    """The slots whose state has a value: `mask`, and for `after_eos` also the slot after the last token, if it exists.

    An empty row stays empty. This mask goes to `gae` and to the value loss; the policy loss takes `mask`.
    """
    check_bool(mask=mask)
    check_rank(2, mask=mask)
    check_prefix(mask=mask)
    if score_position == "last_token":
        return mask
    if score_position != "after_eos":
        raise ValueError(f"score_position must be last_token or after_eos, but is {score_position!r}")
    extended = mask.clone()
    extended[:, 1:] |= mask[:, :-1]
    return extended


@torch.no_grad()
def token_rewards(
    *,
    scores: Float[Tensor, " B"],
    kl: Float[Tensor, "B R"],
    mask: Bool[Tensor, "B R"],
    kl_coefficient: float,
    score_position: ScorePosition = "last_token",
) -> Float[Tensor, "B R"]:
    """-kl_coefficient * kl on every real token, plus the row's score on the slot that `score_position` names.

    A row sums to score - kl_coefficient * (sum of its kl) for either position, whether or not it stopped. An empty
    row is all zero, score and all. Ziegler et al. 2019 (arXiv 1909.08593), equation 2, spread over tokens.
    """
    check_floating(scores=scores, kl=kl)
    check_bool(mask=mask)
    check_rank(1, scores=scores)
    check_same_shape(kl=kl, mask=mask)
    if scores.shape[0] != mask.shape[0]:
        raise ValueError(f"scores {tuple(scores.shape)} must have one entry for each row of mask {tuple(mask.shape)}")
    slot = last_token_index(value_mask(mask=mask, score_position=score_position))
    at_slot = torch.arange(mask.shape[1], device=mask.device).unsqueeze(0) == slot.unsqueeze(1)
    penalties = -kl_coefficient * kept(kl, mask)
    return penalties + kept(scores.unsqueeze(1).expand(mask.shape), at_slot)


@torch.no_grad()
def gae(
    *,
    rewards: Float[Tensor, "B R"],
    values: Float[Tensor, "B R"],
    mask: Bool[Tensor, "B R"],
    gamma: float,
    lam: float,
) -> tuple[Float[Tensor, "B R"], Float[Tensor, "B R"]]:
    """Advantages and returns, both zero outside `mask`; constants of the update, so no gradient flows through them.

    delta_t = r_t + gamma V_{t+1} - V_t and A_t = delta_t + gamma lam A_{t+1}, where V and A are 0 after the last True
    slot; returns_t = A_t + V_t. Schulman et al. 2016 (arXiv 1506.02438), equations 11 to 16. An empty row stays zero.
    Raises `ValueError` when a row of `mask` is not a prefix: a hole has no successor state.
    """
    check_floating(rewards=rewards, values=values)
    check_bool(mask=mask)
    check_rank(2, mask=mask)
    check_same_shape(rewards=rewards, values=values, mask=mask)
    check_prefix(mask=mask)
    rewards, values = kept(rewards, mask), kept(values, mask)
    advantages = torch.zeros_like(values)
    following_value = following_advantage = torch.zeros_like(values[:, 0])
    for slot in range(mask.shape[1] - 1, -1, -1):
        delta = rewards[:, slot] + gamma * following_value - values[:, slot]
        following_advantage = delta + gamma * lam * following_advantage
        advantages[:, slot] = following_advantage
        following_value = values[:, slot]
    return advantages, advantages + values
