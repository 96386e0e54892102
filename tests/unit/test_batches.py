"""The typed batches and how a scored rollout becomes what PPO trains on."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlhf.batches import PPOBatch, PromptBatch, Rollout, ScoredRollout, make_ppo_batch
from rlhf.ops.losses import ppo_policy_loss
from tests.unit import oracles
from tests.unit.ragged import FILLS, backward, fill, prefix_mask

SETTINGS: dict[str, Any] = {
    "kl_coefficient": 0.1,
    "kl_estimator": "k1",
    "gamma": 0.9,
    "lam": 0.8,
    "whiten_advantages": True,
    "score_position": "last_token",
}


def scored_rollout(
    prompt_lengths: list[int], response_lengths: list[int], num_prompt: int = 4, num_response: int = 5, seed: int = 0
) -> ScoredRollout:
    """Random contents in float64; token ids are at least 1, so that a padded 0 shows."""
    generator = torch.Generator().manual_seed(seed)
    rows = len(prompt_lengths)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    prompts = PromptBatch(
        prompt_ids=torch.randint(1, 50, (rows, num_prompt), generator=generator),
        prompt_mask=prefix_mask(prompt_lengths, num_prompt).flip(1),
        prompt_keys=torch.arange(100, 100 + rows),
        sample_index=torch.arange(rows),
    )
    rollout = Rollout(
        prompts=prompts,
        response_ids=torch.randint(1, 50, (rows, num_response), generator=generator),
        response_mask=prefix_mask(response_lengths, num_response),
        stopped=torch.tensor([length < num_response for length in response_lengths]),
        sampling_logprobs=random(rows, num_response),
    )
    return ScoredRollout(
        rollout=rollout,
        scores=random(rows),
        old_logprobs=random(rows, num_response),
        reference_logprobs=random(rows, num_response),
        old_values=random(rows, num_response),
    )


def test_prompt_and_response_side_by_side() -> None:
    rollout = scored_rollout([2, 4], [1, 3], num_prompt=4, num_response=3).rollout
    assert rollout.input_ids.shape == (2, 7)
    assert torch.equal(rollout.input_ids[:, 4:], rollout.response_ids)
    assert rollout.attention_mask.tolist() == [[0, 0, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1]]
    assert rollout.position_ids.tolist() == [[0, 0, 0, 1, 2, 2, 2], [0, 1, 2, 3, 4, 5, 6]]
    assert rollout.response_lengths.tolist() == [1, 3]


def test_select_takes_whole_rows() -> None:
    scored = scored_rollout([1, 2, 3], [3, 4, 5])
    batch = make_ppo_batch(scored, **SETTINGS)
    some = batch.select(torch.tensor([2, 0]))
    assert len(some) == 2
    for name, tensor in some.to_tensors().items():
        assert torch.equal(tensor, batch.to_tensors()[name][[2, 0]]), name
    assert torch.equal(batch.select(torch.tensor([False, True, False])).scored.scores, scored.scores[1:2])


def test_concatenate_pads_prompts_left_and_responses_right() -> None:
    first = scored_rollout([2], [1], num_prompt=2, num_response=3, seed=1)
    second = scored_rollout([3], [2], num_prompt=4, num_response=2, seed=2)
    both = ScoredRollout.concatenate([first, second])
    assert both.rollout.prompts.prompt_mask.tolist() == [[0, 0, 1, 1], [0, 1, 1, 1]]
    assert both.rollout.response_mask.tolist() == [[1, 0, 0], [1, 1, 0]]
    assert torch.equal(both.rollout.prompts.prompt_ids[0, 2:], first.rollout.prompts.prompt_ids[0])
    assert torch.equal(both.rollout.response_ids[1, :2], second.rollout.response_ids[0])
    assert torch.equal(both.old_values[1, :2], second.old_values[0])
    assert torch.equal(both.scores, torch.cat([first.scores, second.scores]))
    with pytest.raises(ValueError, match="at least one batch"):
        ScoredRollout.concatenate([])


def test_trim_drops_only_columns_nobody_uses() -> None:
    batch = make_ppo_batch(scored_rollout([1, 2], [3, 1], num_prompt=4, num_response=5), **SETTINGS)
    trimmed = batch.trim()
    assert trimmed.rollout.prompts.prompt_ids.shape == (2, 2)
    assert trimmed.advantages.shape == (2, 3)
    for name, mask in (("prompt_ids", "prompt_mask"), ("response_ids", "response_mask"), ("returns", "response_mask")):
        wide, narrow = batch.to_tensors(), trimmed.to_tensors()
        assert torch.equal(wide[name][wide[mask]], narrow[name][narrow[mask]])
    # The slot after EOS is used by the value loss under after_eos, so it stays.
    with_slot = make_ppo_batch(batch.scored, **{**SETTINGS, "score_position": "after_eos"}).trim()
    assert with_slot.returns.shape == (2, 4)
    empty = scored_rollout([1], [0]).trim()
    assert empty.old_values.shape == (1, 1)
    assert scored_rollout([1, 3], [1, 1]).rollout.prompts.trim().prompt_ids.shape == (2, 3)


def test_tensors_go_out_and_come_back() -> None:
    batch = make_ppo_batch(scored_rollout([1, 2], [3, 1]), **SETTINGS)
    tensors = batch.to_tensors()
    again = PPOBatch.from_tensors(tensors)
    assert set(tensors) >= {"prompt_ids", "response_ids", "scores", "advantages", "value_mask"}
    assert all(torch.equal(tensor, again.to_tensors()[name]) for name, tensor in tensors.items())
    assert again.to("cpu").rollout.prompts.prompt_keys.tolist() == [100, 101]
    del tensors["scores"]
    with pytest.raises(KeyError, match="scores"):
        PPOBatch.from_tensors(tensors)


def test_batches_are_frozen_and_checked_rows_4_and_29() -> None:
    """Rows 4, 29: every field's shape and type is checked by name when a batch is made; nothing broadcasts later."""
    scored = scored_rollout([1, 2], [3, 1])
    rollout, prompts = scored.rollout, scored.rollout.prompts
    with pytest.raises(FrozenInstanceError):
        scored.scores = torch.zeros(2)  # type: ignore[misc]
    with pytest.raises(TypeError, match="prompt_mask must be a bool"):
        replace(prompts, prompt_mask=prompts.prompt_mask.long())
    with pytest.raises(ValueError, match="left-padded"):
        replace(prompts, prompt_mask=prompts.prompt_mask.flip(1))
    with pytest.raises(ValueError, match=r"PromptBatch.prompt_keys must have shape \(2,\), but has \(1,\)"):
        replace(prompts, prompt_keys=prompts.prompt_keys[:1])
    with pytest.raises(ValueError, match="right-padded"):
        replace(rollout, response_mask=rollout.response_mask.flip(1))
    with pytest.raises(TypeError, match="stopped must be a bool"):
        replace(rollout, stopped=rollout.stopped.long())
    with pytest.raises(ValueError, match=r"Rollout.response_ids must have shape \(2, 5\)"):
        replace(rollout, response_ids=rollout.response_ids[:1])
    with pytest.raises(ValueError, match="sampling_logprobs"):
        replace(rollout, sampling_logprobs=rollout.sampling_logprobs[:, :2])
    with pytest.raises(ValueError, match=r"ScoredRollout.scores must have shape \(2,\), but has \(2, 1\)"):
        replace(scored, scores=scored.scores.unsqueeze(1))
    with pytest.raises(ValueError, match="old_values"):
        replace(scored, old_values=scored.old_values[:, :2])
    with pytest.raises(TypeError, match="scores must be a floating"):
        replace(scored, scores=scored.scores.long())
    with pytest.raises(ValueError, match="advantages"):
        replace(make_ppo_batch(scored, **SETTINGS), advantages=torch.zeros(2, 1))
    with pytest.raises(ValueError, match="kl_estimator"):
        make_ppo_batch(scored, **{**SETTINGS, "kl_estimator": "k4"})


def test_against_oracle_row_28() -> None:
    """Row 28: rewards, whitened advantages and returns equal an implementation that shares no line with this one."""
    lengths = [3, 5, 0, 1]
    scored = scored_rollout([1, 2, 3, 4], lengths)
    batch = make_ppo_batch(scored, **SETTINGS)
    log_ratios = (scored.old_logprobs - scored.reference_logprobs).numpy()
    rewards, advantages, returns = oracles.ppo_advantages(
        scored.scores.numpy(), log_ratios, scored.old_values.numpy(), lengths, 0.1, 0.9, 0.8
    )
    mask = scored.rollout.response_mask
    np.testing.assert_allclose(batch.token_rewards, rewards, atol=1e-12)
    np.testing.assert_allclose(batch.returns, returns, atol=1e-12)
    whitened = oracles.whiten(advantages[mask.numpy()].tolist(), shift_mean=True)
    np.testing.assert_allclose(batch.advantages[mask], whitened, atol=1e-9)
    assert (batch.advantages[~mask] == 0).all()
    plain = make_ppo_batch(scored, **{**SETTINGS, "whiten_advantages": False})
    np.testing.assert_allclose(plain.advantages, advantages, atol=1e-12)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("position", ["last_token", "after_eos"])
def test_the_logged_kl_is_the_penalty_rows_2_and_6(estimator: str, position: str) -> None:
    """Rows 2, 6: `kl` holds what was charged: a row's rewards sum to score - beta * sum(kl), for every estimator."""
    scored = scored_rollout([1, 2, 3], [3, 5, 1])
    batch = make_ppo_batch(scored, **{**SETTINGS, "kl_estimator": estimator, "score_position": position})
    torch.testing.assert_close(batch.token_rewards.sum(1), scored.scores - 0.1 * batch.kl.sum(1))
    assert (batch.kl[~batch.response_mask] == 0).all()
    difference = scored.old_logprobs[0, 0].item() - scored.reference_logprobs[0, 0].item()
    by_hand = {"k1": difference, "k2": difference**2 / 2, "k3": np.exp(-difference) - 1 + difference}
    assert batch.kl[0, 0].item() == pytest.approx(by_hand[estimator])


def test_after_eos_trains_the_value_after_the_end() -> None:
    scored = scored_rollout([1, 1], [2, 5])
    batch = make_ppo_batch(scored, **{**SETTINGS, "score_position": "after_eos", "whiten_advantages": False})
    assert batch.value_mask.sum(1).tolist() == [3, 5]
    # The state after EOS ends the episode with the score, and no token is drawn in it.
    assert batch.returns[0, 2].item() == pytest.approx(scored.scores[0].item())
    assert batch.advantages[0, 2].item() == 0.0
    assert torch.equal(batch.advantages != 0, batch.response_mask)
    # Whitening counts tokens only: the slot after EOS has no token whose advantage it could be.
    whitened = make_ppo_batch(scored, **{**SETTINGS, "score_position": "after_eos"}).advantages
    assert whitened[batch.response_mask].mean().item() == pytest.approx(0.0, abs=1e-9)
    assert (whitened[~batch.response_mask] == 0).all()


@given(number=st.sampled_from(FILLS), position=st.sampled_from(["last_token", "after_eos"]), seed=st.integers(0, 99))
def test_padding_never_matters_rows_1_14(number: float, position: str, seed: int) -> None:
    """Rows 1, 14: garbage in padded slots of every field (past the value mask, for values) changes nothing."""
    settings = {**SETTINGS, "score_position": position}
    scored = scored_rollout([1, 2, 3], [3, 5, 1], seed=seed)
    expected = make_ppo_batch(scored, **settings)
    mask = scored.rollout.response_mask
    dirty = replace(
        scored,
        old_logprobs=fill(scored.old_logprobs, mask, number),
        reference_logprobs=fill(scored.reference_logprobs, mask, number),
        old_values=fill(scored.old_values, expected.value_mask, number),
    )
    found = make_ppo_batch(dirty, **settings)
    for name in ("token_rewards", "kl", "advantages", "returns"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


def test_excluded_rows_influence_nothing_rows_15_and_16() -> None:
    """Rows 15, 16: a row with an empty mask, whatever its score and values, leaves the other rows as they were."""
    scored = scored_rollout([1, 2, 3], [3, 0, 4])
    wild = replace(
        scored,
        scores=scored.scores.index_fill(0, torch.tensor([1]), float("nan")),
        old_values=scored.old_values.index_fill(0, torch.tensor([1]), 1e4),
    )
    whole = make_ppo_batch(wild, **SETTINGS)
    alone = make_ppo_batch(scored.select(torch.tensor([0, 2])), **SETTINGS)
    for name in ("token_rewards", "kl", "advantages", "returns"):
        torch.testing.assert_close(getattr(whole, name)[[0, 2]], getattr(alone, name))
        assert (getattr(whole, name)[1] == 0).all()


def _step(batch: PPOBatch, parts: list[Tensor]) -> Tensor:
    """The gradient of the mean policy loss with respect to a bias that is added to every log-prob, by parts."""
    bias = torch.full((50,), 0.05, dtype=torch.float64, requires_grad=True)
    total = batch.response_mask.sum()
    for rows in parts:
        part = batch.select(rows).trim()
        loss_sum, _, _ = ppo_policy_loss(
            logprobs=part.scored.old_logprobs + bias[part.rollout.response_ids],
            old_logprobs=part.scored.old_logprobs,
            advantages=part.advantages,
            mask=part.response_mask,
            clip_low=0.2,
            clip_high=0.2,
        )
        backward(loss_sum / total)
    assert bias.grad is not None
    return bias.grad


@given(seed=st.integers(0, 99), ranks=st.sampled_from([1, 2, 3]))
def test_ranks_and_micro_batches_change_nothing_rows_11_12(seed: int, ranks: int) -> None:
    """Rows 11, 12: rows that ranks of unequal widths exchange and train in uneven pieces give one process's update."""
    pieces = [
        scored_rollout([1, 3], [2, 4], num_prompt=3, num_response=4, seed=seed),
        scored_rollout([5], [6], num_prompt=5, num_response=6, seed=seed + 1),
        scored_rollout([2, 2, 1], [1, 1, 0], num_prompt=2, num_response=1, seed=seed + 2),
    ]
    whole = make_ppo_batch(ScoredRollout.concatenate(pieces), **SETTINGS)
    expected = _step(whole, [torch.arange(6)])
    sent = [ScoredRollout.concatenate(pieces[rank::ranks]).to_tensors() for rank in range(ranks)]
    received = ScoredRollout.concatenate([ScoredRollout.from_tensors(tensors) for tensors in sent])
    batch = make_ppo_batch(received, **SETTINGS)
    found = _step(batch, list(torch.split(torch.randperm(6), 4)))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_whitened_over_the_whole_batch_row_12() -> None:
    """Row 12: the mean is zero over the batch, not within a part of it."""
    scored = scored_rollout([1, 1, 1, 1], [3, 5, 2, 4])
    scored = replace(scored, scores=torch.tensor([10.0, 10.0, -10.0, -10.0], dtype=torch.float64))
    batch = make_ppo_batch(scored, **SETTINGS)
    mask = batch.response_mask
    assert batch.advantages[mask].mean().item() == pytest.approx(0.0, abs=1e-9)
    assert batch.advantages[mask].std(correction=0).item() == pytest.approx(1.0, abs=1e-6)
    assert batch.advantages[:2][mask[:2]].mean() > 0.5
