"""Token rewards and generalised advantage estimation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlhf.ops.advantages import ScorePosition, gae, token_rewards, value_mask
from rlhf.ops.kl import k1
from rlhf.ops.logprobs import token_logprobs
from rlhf.ops.losses import ppo_policy_loss
from tests.unit import oracles
from tests.unit.ragged import FILLS, backward, fill, normal, prefix_mask, ragged

NAN = float("nan")


def test_masked_value_does_not_leak_row_1() -> None:
    """Row 1: mask=[1,1,0] r=[0,1,0] V=[0,0,100], gamma 1, lambda .95: A = [.95, 1, 0], whatever the 100 is."""
    advantages, returns = gae(
        rewards=torch.tensor([[0.0, 1.0, 0.0]]),
        values=torch.tensor([[0.0, 0.0, 100.0]]),
        mask=torch.tensor([[True, True, False]]),
        gamma=1.0,
        lam=0.95,
    )
    assert advantages[0].tolist() == pytest.approx([0.95, 1.0, 0.0])
    assert returns[0].tolist() == pytest.approx([0.95, 1.0, 0.0])


def test_three_tokens_by_hand_row_17() -> None:
    """Row 17: log-probs to returns, and a padded fourth slot that would change every number if it counted."""
    mask = torch.tensor([[True, True, True, False]])
    kl = k1(
        logprobs=torch.tensor([[-1.0, -2.0, -0.5, -9.0]]), reference_logprobs=torch.tensor([[-1.5, -1.8, -0.5, NAN]])
    )
    # kl = .5, -.2, 0. At beta .1 the penalties are -.05, +.02, 0; the score 1 is added on the third.
    rewards = token_rewards(scores=torch.tensor([1.0]), kl=kl, mask=mask, kl_coefficient=0.1)
    assert rewards[0].tolist() == pytest.approx([-0.05, 0.02, 1.0, 0.0])
    # gamma .9, lambda .5, V = .2 .4 .6:
    #   delta = 1 - .6 = .4;   .02 + .54 - .4 = .16;   -.05 + .36 - .2 = .11
    #   A     = .4;            .16 + .45 * .4 = .34;   .11 + .45 * .34 = .263
    values = torch.tensor([[0.2, 0.4, 0.6, 50.0]])
    advantages, returns = gae(rewards=rewards, values=values, mask=mask, gamma=0.9, lam=0.5)
    assert advantages[0].tolist() == pytest.approx([0.263, 0.34, 0.4, 0.0], abs=1e-6)
    assert returns[0].tolist() == pytest.approx([0.463, 0.74, 1.0, 0.0], abs=1e-6)


def test_lambda_one_is_the_discounted_return_minus_the_value() -> None:
    rewards, values = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[0.5, -1.0, 3.0]])
    everything = torch.ones(1, 3, dtype=torch.bool)
    _, returns = gae(rewards=rewards, values=values, mask=everything, gamma=0.5, lam=1.0)
    # 1 + .5 * 2 + .25 * 4 = 3;  2 + .5 * 4 = 4;  4.
    assert returns[0].tolist() == pytest.approx([3.0, 4.0, 4.0])
    advantages, _ = gae(rewards=rewards, values=values, mask=everything, gamma=0.5, lam=0.0)
    # One step: 1 + .5 * -1 - .5 = 0;  2 + .5 * 3 + 1 = 4.5;  4 - 3 = 1.
    assert advantages[0].tolist() == pytest.approx([0.0, 4.5, 1.0])


@given(
    case=ragged(),
    gamma=st.sampled_from([0.0, 0.9, 1.0]),
    lam=st.sampled_from([0.0, 0.5, 0.95, 1.0]),
    number=st.sampled_from(FILLS),
)
def test_against_oracle_rows_1_3_28(
    case: tuple[Tensor, torch.Generator], gamma: float, lam: float, number: float
) -> None:
    """Rows 1, 3, 28: rewards, advantages and returns equal an independent one, exactly zero past the end."""
    mask, generator = case
    log_ratios, values = normal(mask, generator), normal(mask, generator)
    scores = torch.randn(len(mask), generator=generator, dtype=torch.float64)
    lengths = mask.sum(1).tolist()
    expected = oracles.ppo_advantages(scores.numpy(), log_ratios.numpy(), values.numpy(), lengths, 0.3, gamma, lam)
    rewards = token_rewards(scores=scores, kl=fill(log_ratios, mask, number), mask=mask, kl_coefficient=0.3)
    advantages, returns = gae(
        rewards=fill(rewards, mask, number), values=fill(values, mask, number), mask=mask, gamma=gamma, lam=lam
    )
    for found, right in zip((rewards, advantages, returns), expected, strict=True):
        np.testing.assert_allclose(found.numpy(), right, rtol=1e-9, atol=1e-9)
        assert (found[~mask] == 0).all()


def test_non_zero_advantages_are_the_mask_row_3() -> None:
    """Row 3: nothing past EOS has an advantage, and everything before it has."""
    mask = prefix_mask([3, 5, 1, 0], 5)
    kl, values = torch.rand(4, 5) + 0.1, torch.rand(4, 5)
    rewards = token_rewards(scores=torch.full((4,), 3.0), kl=kl, mask=mask, kl_coefficient=0.1)
    advantages, _ = gae(rewards=rewards, values=values, mask=mask, gamma=1.0, lam=0.95)
    assert torch.equal(advantages != 0, mask)


def _last_advantages(score: float, position: ScorePosition, mask: Tensor, gamma: float, lam: float) -> Tensor:
    rewards = token_rewards(
        scores=torch.full((len(mask),), score, dtype=torch.float64),
        kl=torch.full(mask.shape, 0.5, dtype=torch.float64),
        mask=mask,
        kl_coefficient=0.1,
        score_position=position,
    )
    values = torch.linspace(0, 1, mask.numel(), dtype=torch.float64).reshape(mask.shape)
    slots = value_mask(mask=mask, score_position=position)
    advantages, _ = gae(rewards=rewards, values=values, mask=slots, gamma=gamma, lam=lam)
    return advantages.gather(1, (mask.sum(1, keepdim=True) - 1))[:, 0]


def test_score_reaches_the_last_token_row_2() -> None:
    """Row 2: derivative 1 on the last real token for last_token, gamma * lambda for after_eos while the slot exists."""
    # Row 0 stopped early; row 1 fills the width, so it has no slot after the last token.
    mask = prefix_mask([2, 4], 4)
    cases: list[tuple[ScorePosition, list[float]]] = [("last_token", [1.0, 1.0]), ("after_eos", [0.9 * 0.5, 1.0])]
    for position, expected in cases:
        slope = _last_advantages(3.0, position, mask, 0.9, 0.5) - _last_advantages(2.0, position, mask, 0.9, 0.5)
        assert slope.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("position", ["last_token", "after_eos"])
def test_rewards_sum_to_score_minus_kl_row_2(position: ScorePosition) -> None:
    """Row 2: sum of a row's rewards == score - beta * KL, stopped or not; an empty row has neither."""
    mask = prefix_mask([2, 4, 0], 4)
    kl = torch.tensor([[0.5, -0.1, NAN, NAN], [1.0, 1.0, 1.0, 1.0], [NAN] * 4])
    scores = torch.tensor([2.0, -3.0, NAN])
    rewards = token_rewards(scores=scores, kl=kl, mask=mask, kl_coefficient=0.1, score_position=position)
    # 2 - .1 * .4 = 1.96;  -3 - .1 * 4 = -3.4;  an empty row gets nothing.
    assert rewards.sum(1).tolist() == pytest.approx([1.96, -3.4, 0.0])
    assert (rewards[~value_mask(mask=mask, score_position=position)] == 0).all()


def test_after_eos_by_hand() -> None:
    # Length 2 of width 4: the score 2 lands on slot 2, whose state has the value 4 and no token. gamma .9, lambda .5:
    #   delta = 2 - 4 = -2;   .9 * 4 - 3 = .6;          .9 * 3 - 1 = 1.7
    #   A     = -2;           .6 + .45 * -2 = -.3;      1.7 + .45 * -.3 = 1.565
    mask = prefix_mask([2], 4)
    rewards = token_rewards(
        scores=torch.tensor([2.0]), kl=torch.zeros(1, 4), mask=mask, kl_coefficient=0.1, score_position="after_eos"
    )
    assert rewards[0].tolist() == [0.0, 0.0, 2.0, 0.0]
    slots = value_mask(mask=mask, score_position="after_eos")
    assert slots[0].tolist() == [True, True, True, False]
    values = torch.tensor([[1.0, 3.0, 4.0, 99.0]])
    advantages, returns = gae(rewards=rewards, values=values, mask=slots, gamma=0.9, lam=0.5)
    assert advantages[0].tolist() == pytest.approx([1.565, -0.3, -2.0, 0.0])
    assert returns[0].tolist() == pytest.approx([2.565, 2.7, 2.0, 0.0])


def test_value_mask_extends_by_one_slot_that_exists() -> None:
    mask = prefix_mask([0, 1, 3, 4], 4)
    assert value_mask(mask=mask, score_position="after_eos").sum(1).tolist() == [0, 2, 4, 4]
    assert torch.equal(value_mask(mask=mask, score_position="last_token"), mask)
    with pytest.raises(ValueError, match="score_position"):
        value_mask(mask=mask, score_position="first_token")  # type: ignore[arg-type]


def test_penalty_alone_pulls_towards_the_reference_row_5() -> None:
    """Row 5: with a score of 0 the only reward is the penalty; a policy step on it lowers KL(policy, reference)."""
    reference = torch.zeros(1, 1, 4)
    policy = torch.tensor([[[2.0, 0.0, 0.0, -1.0]]], requires_grad=True)
    tokens = torch.multinomial(policy.detach()[0].softmax(-1), 4000, replacement=True).T
    logprobs = token_logprobs(logits=policy.expand(4000, 1, 4), tokens=tokens, temperature=1.0)
    old = logprobs.detach()
    theirs = token_logprobs(logits=reference.expand(4000, 1, 4), tokens=tokens, temperature=1.0)
    mask = torch.ones(4000, 1, dtype=torch.bool)
    kl = k1(logprobs=old, reference_logprobs=theirs)
    rewards = token_rewards(scores=torch.zeros(4000), kl=kl, mask=mask, kl_coefficient=1.0)
    advantages, _ = gae(rewards=rewards, values=rewards.mean().expand(4000, 1), mask=mask, gamma=1.0, lam=1.0)
    loss_sum, count, _ = ppo_policy_loss(
        logprobs=logprobs, old_logprobs=old, advantages=advantages, mask=mask, clip_low=0.2, clip_high=0.2
    )
    backward(loss_sum / count)
    assert policy.grad is not None
    after = policy.detach() - 0.1 * policy.grad
    before, lower = (oracles.kl(logits[0, 0].tolist(), [0.0] * 4, 1.0) for logits in (policy.detach(), after))
    assert lower < before


def test_advantages_are_constants() -> None:
    values = torch.zeros(1, 2, requires_grad=True)
    advantages, returns = gae(
        rewards=torch.ones(1, 2), values=values, mask=torch.ones(1, 2, dtype=torch.bool), gamma=1.0, lam=1.0
    )
    assert not advantages.requires_grad
    assert not returns.requires_grad


def test_refusals_rows_4_and_29() -> None:
    """Rows 4, 29: a mask that is not bool or not a prefix, a (B, 1) score, another shape."""
    ones, mask = torch.ones(2, 3), prefix_mask([2, 3], 3)
    with pytest.raises(TypeError, match="mask must be a bool"):
        gae(rewards=ones, values=ones, mask=ones, gamma=1.0, lam=1.0)
    with pytest.raises(ValueError, match="values"):
        gae(rewards=ones, values=ones[:1], mask=mask, gamma=1.0, lam=1.0)
    with pytest.raises(ValueError, match="mask must be a right-padded prefix"):
        gae(rewards=ones, values=ones, mask=torch.tensor([[True, False, True]] * 2), gamma=1.0, lam=1.0)
    with pytest.raises(ValueError, match="scores must have 1 axes"):
        token_rewards(scores=torch.ones(2, 1), kl=ones, mask=mask, kl_coefficient=0.1)
    with pytest.raises(ValueError, match="scores"):
        token_rewards(scores=torch.ones(3), kl=ones, mask=mask, kl_coefficient=0.1)
    with pytest.raises(TypeError, match="mask must be a bool"):
        token_rewards(scores=torch.ones(2), kl=ones, mask=ones, kl_coefficient=0.1)
