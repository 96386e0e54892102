"""Rollouts: sample responses, then score them with the reward model, the reference, and the policy and critic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlhf.batches import PromptBatch, Rollout, ScoredRollout
from rlhf.config.ppo import PPOConfig
from rlhf.models.scoring import response_logprobs_and_entropy
from rlhf.rewards.learned import LearnedReward
from rlhf.stages.ppo.models import ActorCritic, PPOModels
from rlhf.stages.sampling import EncodedPrompt, decode_responses, in_batches, sample_batch

if TYPE_CHECKING:
    from rlhf.distributed.runtime import Runtime


@dataclass(frozen=True)
class Row:
    """One response to sample: the prompt and which sample of it this is in this update."""

    prompt: EncodedPrompt
    sample_index: int


def choose_prompts(prompts: Sequence[EncodedPrompt], update: int, batch_size: int, seed: int) -> list[Row]:
    """The prompts of an update, a function of the update's number alone, so that a resumed run draws the same.

    The prompts are gone through in a new random order each pass. A prompt that comes twice in a batch (more rows than
    prompts) gets another sample index.
    """
    rows: list[Row] = []
    count: dict[int, int] = {}
    for position in range(update * batch_size, (update + 1) * batch_size):
        turn, place = divmod(position, len(prompts))
        prompt = prompts[_order(len(prompts), seed, turn)[place]]
        rows.append(Row(prompt, count.get(prompt.key, 0)))
        count[prompt.key] = count.get(prompt.key, 0) + 1
    return rows


_orders: dict[tuple[int, int, int], list[int]] = {}


def _order(num: int, seed: int, turn: int) -> list[int]:
    """The order of the prompts in a pass. The last one asked for is kept: a pass has thousands of positions."""
    key = (num, seed, turn)
    if key not in _orders:
        _orders.clear()
        generator = torch.Generator().manual_seed(seed * 1_000_003 + turn)
        _orders[key] = torch.randperm(num, generator=generator).tolist()
    return _orders[key]


def sample_rollouts(
    actor_critic: ActorCritic,
    models: PPOModels,
    rows: Sequence[Row],
    section: PPOConfig,
    runtime: Runtime,
    seed: int,
    update: int,
) -> list[Rollout]:
    """Responses to this rank's rows, in pieces of at most `rollout_batch_size` rows."""
    rollouts = []
    for piece in in_batches(rows, section.rollout_batch_size):
        sampled = sample_batch(
            actor_critic.policy,
            models.tokenizer,
            [row.prompt for row in piece],
            [row.sample_index for row in piece],
            seed=seed,
            purpose="ppo",
            step=update,
            temperature=section.temperature,
            max_response_tokens=section.max_response_tokens,
            device=runtime.device,
        )
        prompts = PromptBatch(
            prompt_ids=sampled.prompt_ids,
            prompt_mask=sampled.prompt_mask,
            prompt_keys=torch.tensor([row.prompt.key for row in piece], device=runtime.device),
            sample_index=torch.tensor([row.sample_index for row in piece], device=runtime.device),
        )
        rollout = Rollout(
            prompts=prompts,
            response_ids=sampled.response_ids,
            response_mask=sampled.response_mask,
            stopped=sampled.stopped,
            sampling_logprobs=sampled.logprobs,
        )
        if section.score_position == "after_eos":
            rollout = _widen_responses(rollout, section.max_response_tokens)
        rollouts.append(rollout)
    return rollouts


def _widen_responses(rollout: Rollout, width: int) -> Rollout:
    """Under `after_eos` the batch must be as wide as the longest allowed response (see `rlhf.ops.advantages`)."""
    missing = width - rollout.response_ids.shape[1]

    def widen(tensor: Tensor) -> Tensor:
        return torch.nn.functional.pad(tensor, (0, missing))

    return Rollout(
        prompts=rollout.prompts,
        response_ids=widen(rollout.response_ids),
        response_mask=widen(rollout.response_mask),
        stopped=rollout.stopped,
        sampling_logprobs=widen(rollout.sampling_logprobs),
    )


@torch.no_grad()
def score_rollout(
    actor_critic: ActorCritic,
    models: PPOModels,
    rollout: Rollout,
    rows: Sequence[Row],
    section: PPOConfig,
) -> tuple[ScoredRollout, Tensor]:
    """Scores, old log-probs and values of the models in training, the reference's log-probs at the same temperature.

    Also returns the reward model's raw scores (B,), before normalisation, clipping and the missing-EOS penalty.
    """
    input_ids, attention_mask = rollout.input_ids, rollout.attention_mask
    num_prompt = rollout.prompts.prompt_ids.shape[1]
    old_logprobs, _, old_values = actor_critic(input_ids, attention_mask, num_prompt, section.temperature)
    # The policy's own function, operation by operation, so that equal models give equal numbers.
    reference_logprobs, _ = response_logprobs_and_entropy(
        models.reference,
        input_ids=input_ids,
        attention_mask=attention_mask,
        num_prompt=num_prompt,
        temperature=section.temperature,
    )
    raw_scores = _reward_scores(models.reward, models, rollout, rows).to(old_logprobs.device)
    scored = ScoredRollout(
        rollout=rollout,
        scores=transform_scores(raw_scores, rollout.stopped, models.reward, section),
        old_logprobs=old_logprobs,
        reference_logprobs=reference_logprobs,
        old_values=old_values,
    )
    return scored, raw_scores


def _reward_scores(reward: LearnedReward, models: PPOModels, rollout: Rollout, rows: Sequence[Row]) -> Tensor:
    if reward.same_tokens:
        return reward.score_tokens(rollout.input_ids, rollout.attention_mask)
    texts = decode_responses(models.tokenizer, rollout.response_ids, rollout.response_mask)
    return torch.tensor(reward.score_texts([row.prompt.content for row in rows], texts, batch_size=len(rows)))


def transform_scores(raw_scores: Tensor, stopped: Tensor, reward: LearnedReward, section: PPOConfig) -> Tensor:
    """Normalise by the reward model's statistics, clip, then charge a response that never stopped. All shapes (B,)."""
    scores = raw_scores.float()
    if section.normalize_score and reward.statistics is not None:
        scores = (scores - reward.statistics.mean) / max(reward.statistics.std, 1e-6)
    if section.score_clip is not None:
        scores = scores.clamp(-section.score_clip, section.score_clip)
    if section.missing_eos_penalty is not None:
        scores = scores - section.missing_eos_penalty * (~stopped).float()
    return scores
