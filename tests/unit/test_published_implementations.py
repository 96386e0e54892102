"""Our maths against the formulas of published PPO implementations, on random ragged batches.

`published.py` holds their formulas and says which conventions differ; a test applies the documented conversion and
nothing else.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlhf.batches import PromptBatch, Rollout, ScoredRollout, make_ppo_batch
from rlhf.ops.adaptive_kl import AdaptiveKL
from rlhf.ops.advantages import gae, token_rewards, value_mask
from rlhf.ops.kl import k1, k2, k3
from rlhf.ops.losses import (
    LossAggregation,
    aggregation_count,
    aggregation_weights,
    kl_loss,
    ppo_policy_loss,
    ppo_value_loss,
)
from rlhf.ops.masked import masked_whiten
from tests.unit.published import TLDR, Array, Case, OpenRLHF, Verl, cases
from tests.unit.ragged import backward, fill

KLName = Literal["k1", "k2", "k3"]
ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}


def ours_policy(
    case: Case, advantages: Array, aggregation: LossAggregation, longest: int, **settings: float | None
) -> tuple[float, dict[str, float]]:
    """Our policy loss with NaN in all padding, aggregated, and its metrics as shares of the real tokens."""
    weights = aggregation_weights(mask=case.mask, aggregation=aggregation, length=longest).double()
    loss_sum, count, metrics = ppo_policy_loss(
        logprobs=fill(case.logprobs, case.mask, math.nan),
        old_logprobs=fill(case.old_logprobs, case.mask, math.nan),
        advantages=fill(torch.from_numpy(advantages), case.mask, math.nan),
        mask=case.mask,
        clip_low=settings["clip_low"] or 0.0,
        clip_high=settings["clip_high"] or 0.0,
        dual_clip=settings.get("dual_clip"),
        weights=weights,
    )
    divisor = aggregation_count(mask=case.mask, aggregation=aggregation)
    return float(loss_sum / divisor), {name: float(value / count) for name, value in metrics.items()}


CLIPS = st.sampled_from([(0.2, 0.2), (0.2, 0.28), (0.1, 0.5)])


@given(case=cases(), gamma=st.sampled_from([0.9, 1.0]), lam=st.sampled_from([0.0, 0.95, 1.0]))
def test_verl_advantages_rows_1_and_28(case: Case, gamma: float, lam: float) -> None:
    """Rows 1, 28: verl's recursion agrees on every real token, with NaN under our mask."""
    expected, expected_returns = Verl.gae(case, gamma, lam)
    advantages, returns = gae(
        rewards=fill(case.rewards, case.mask, math.nan),
        values=fill(case.values, case.mask, math.nan),
        mask=case.mask,
        gamma=gamma,
        lam=lam,
    )
    np.testing.assert_allclose(advantages, expected, atol=1e-12)
    np.testing.assert_allclose(returns, expected_returns, atol=1e-12)


@given(case=cases(), shift_mean=st.booleans())
def test_verl_whitening_is_ours_with_an_unbiased_variance_rows_31_and_32(case: Case, shift_mean: bool) -> None:
    """Rows 31, 32: the documented factor sqrt((n - 1) / n), on the centred part only, is the whole difference."""
    numbers = case.rewards[case.mask].tolist()
    ours = masked_whiten(values=case.rewards, mask=case.mask, shift_mean=shift_mean)[case.mask].numpy()
    mean = 0.0 if shift_mean else sum(numbers) / len(numbers)
    converted = (ours - mean) * math.sqrt((len(numbers) - 1) / len(numbers)) + mean
    np.testing.assert_allclose(converted, Verl.whiten(numbers, shift_mean), rtol=1e-5, atol=1e-5)


@given(case=cases(), clips=CLIPS, dual=st.sampled_from([1.2, 3.0]))
def test_verl_policy_loss(case: Case, clips: tuple[float, float], dual: float) -> None:
    """Symmetric, asymmetric and dual clip under each aggregation, and both clipped shares."""
    advantages = case.rewards.numpy()
    losses, clipped, held = Verl.policy_loss(case, advantages, *clips, dual)
    settings = {"clip_low": clips[0], "clip_high": clips[1], "dual_clip": dual}
    for mode, aggregation in (("token-mean", "token_mean"), ("seq-mean-token-mean", "sequence_mean")):
        found, shares = ours_policy(case, advantages, _named(aggregation), 99, **settings)
        assert found == pytest.approx(Verl.aggregate(losses, case.lengths, mode), rel=1e-6, abs=1e-6)
        assert shares["clip_fraction"] == pytest.approx(clipped)
        assert shares["dual_clip_fraction"] == pytest.approx(held)
    # Their norm: the batch's width, and a sum over responses.
    found, _ = ours_policy(case, advantages, "fixed_length", case.width, **settings)
    expected = Verl.aggregate(losses, case.lengths, "seq-mean-token-sum-norm") / len(case.lengths)
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-6)


def _named(aggregation: str) -> LossAggregation:
    names: dict[str, LossAggregation] = {name: name for name in ("token_mean", "sequence_mean", "fixed_length")}
    return names[aggregation]


@given(case=cases(), clip=st.sampled_from([0.1, 0.2, 1.0]))
def test_verl_value_loss(case: Case, clip: float) -> None:
    returns = case.rewards.numpy()
    expected, clipped = Verl.value_loss(case, returns, clip)
    loss_sum, count, metrics = ppo_value_loss(
        values=case.values, old_values=case.old_values, returns=case.rewards, mask=case.mask, clip=clip
    )
    assert float(loss_sum / count) == pytest.approx(expected, rel=1e-9)
    assert float(metrics["value_clip_fraction"] / count) == pytest.approx(clipped)


@given(case=cases(), name=st.sampled_from(["k1", "k2", "k3"]))
def test_verl_kl_estimators_and_their_gradients(case: Case, name: KLName) -> None:
    """The values of the estimators, as penalty and as loss, and the gradients of the loss."""
    pairs = list(zip(case.logprobs[case.mask].tolist(), case.reference_logprobs[case.mask].tolist(), strict=True))
    expected = [Verl.kl_penalty(mine, theirs, name) for mine, theirs in pairs]
    arguments = {"logprobs": case.logprobs, "reference_logprobs": case.reference_logprobs}
    found = ESTIMATORS[name](**arguments)[case.mask].tolist()
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)
    leaf = fill(case.logprobs, case.mask, math.nan).requires_grad_()
    loss_sum, _, _ = kl_loss(logprobs=leaf, reference_logprobs=case.reference_logprobs, mask=case.mask, estimator=name)
    backward(loss_sum)
    assert leaf.grad is not None
    assert loss_sum.item() == pytest.approx(sum(expected), rel=1e-9, abs=1e-9)
    slopes = [Verl.kl_slope(mine, theirs, name) for mine, theirs in pairs]
    assert leaf.grad[case.mask].tolist() == pytest.approx(slopes, rel=1e-9, abs=1e-12)


@given(case=cases(), clips=CLIPS, token_level=st.booleans())
def test_openrlhf_policy_loss(case: Case, clips: tuple[float, float], token_level: bool) -> None:
    advantages = case.rewards.numpy()
    expected, clipped = OpenRLHF.policy_loss(case, advantages, *clips, token_level)
    aggregation = _named("token_mean" if token_level else "sequence_mean")
    found, shares = ours_policy(case, advantages, aggregation, 99, clip_low=clips[0], clip_high=clips[1])
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert shares["clip_fraction"] == pytest.approx(clipped)


@given(case=cases(), clip=st.sampled_from([None, 0.2]))
def test_openrlhf_value_loss(case: Case, clip: float | None) -> None:
    loss_sum, count, _ = ppo_value_loss(
        values=case.values, old_values=case.old_values, returns=case.rewards, mask=case.mask, clip=clip
    )
    expected = OpenRLHF.value_loss(case, case.rewards.numpy(), clip)
    assert float(loss_sum / count) == pytest.approx(expected, rel=1e-9)


@given(case=cases())
def test_openrlhf_rewards_row_2(case: Case) -> None:
    """Row 2: the score on the last real token, the penalty on every one."""
    penalty = k1(logprobs=case.logprobs, reference_logprobs=case.reference_logprobs)
    found = token_rewards(scores=case.scores, kl=fill(penalty, case.mask, math.nan), mask=case.mask, kl_coefficient=0.3)
    np.testing.assert_allclose(found, OpenRLHF.rewards(case, 0.3), atol=1e-12)


def _scored(case: Case, slots: Tensor) -> ScoredRollout:
    """The case as a scored rollout, with NaN in every slot that must not count."""
    rows = len(case.lengths)
    prompts = PromptBatch(
        prompt_ids=torch.ones(rows, 1, dtype=torch.long),
        prompt_mask=torch.ones(rows, 1, dtype=torch.bool),
        prompt_keys=torch.arange(rows),
        sample_index=torch.zeros(rows, dtype=torch.long),
    )
    rollout = Rollout(
        prompts=prompts,
        response_ids=torch.ones_like(case.mask, dtype=torch.long),
        response_mask=case.mask,
        stopped=case.mask.sum(1) < case.width,
        sampling_logprobs=case.logprobs,
    )
    return ScoredRollout(
        rollout=rollout,
        scores=case.scores,
        old_logprobs=fill(case.logprobs, case.mask, math.nan),
        reference_logprobs=fill(case.reference_logprobs, case.mask, math.nan),
        old_values=fill(case.values, slots, math.nan),
    )


@given(
    case=cases(),
    gamma=st.sampled_from([0.95, 1.0]),
    lam=st.sampled_from([0.9, 1.0]),
    whiten_rewards=st.booleans(),
)
def test_tldr_batch_row_2(case: Case, gamma: float, lam: float, whiten_rewards: bool) -> None:
    """Row 2: score_position=after_eos is the TL;DR code: rewards, their whitening, advantages and returns."""
    slots = value_mask(mask=case.mask, score_position="after_eos")
    batch = make_ppo_batch(
        _scored(case, slots),
        kl_coefficient=0.3,
        kl_estimator="k1",
        gamma=gamma,
        lam=lam,
        whiten_advantages=True,
        score_position="after_eos",
        whiten_rewards=whiten_rewards,
    )
    rewards = TLDR.rewards(case, 0.3)
    if whiten_rewards:
        rewards = TLDR.whitened_rewards(case, rewards)
    advantages, returns = TLDR.advantages(case, rewards, gamma, lam)
    np.testing.assert_allclose(batch.token_rewards, rewards, atol=1e-7)
    np.testing.assert_allclose(batch.advantages, advantages, atol=1e-6)
    np.testing.assert_allclose(batch.returns, returns, atol=1e-6)


def test_adaptive_kl_of_lm_human_preferences_and_trl_row_36() -> None:
    """Row 36: the controller of lm-human-preferences (train_policy.py), which TRL and verl carry on.

    Convention: theirs reads a KL summed over the response (per sequence), as ours; OpenRLHF feeds the same formula a
    mean over tokens, so its targets are smaller by the length of a response.
    """
    ours = AdaptiveKL(coefficient=0.15, target_nats_per_sequence=6.0, horizon_episodes=10_000)
    theirs = 0.15
    for measured in (0.0, 3.0, 5.9, 6.0, 7.1, 100.0):
        error = min(max(measured / 6.0 - 1, -0.2), 0.2)
        theirs *= 1 + error * 512 / 10_000
        assert ours.update(measured, 512) == pytest.approx(theirs, rel=1e-12)
