"""Rollouts: sample responses, then score them with the rewards, the reference, and the policy and critic."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from rlhf.batches import PromptBatch, Rollout, ScoredRollout
from rlhf.config.ppo import PPOConfig
from rlhf.distributed.stopping import StopPoll, WorkGivenUp
from rlhf.distributed.training_checkpoints import generator_states, set_generator_states
from rlhf.errors import Stopped
from rlhf.ops.kl import full_kl
from rlhf.ops.masked import masked_sum
from rlhf.ops.moments import RunningMoments
from rlhf.rewards.protocol import RewardBatch, columns_by_name
from rlhf.stages.ppo.models import PPOModels, TokenBatch
from rlhf.stages.sampling import EncodedPrompt, decode_responses, in_batches, sample_batch

if TYPE_CHECKING:
    from rlhf.distributed.engine import TrainingEngine
    from rlhf.distributed.runtime import Runtime

# A standard deviation below this is rounding, not spread.
_SMALLEST_STD = 1e-6


@dataclass(frozen=True)
class Row:
    """One response to sample: the prompt and which sample of it this is in this update."""

    prompt: EncodedPrompt
    sample_index: int


@dataclass(frozen=True)
class Experience:
    """One update's global batch, the same on every rank, in the rows' order.

    `raw_scores` (B,) are the rewards' weighted sum before `transform_scores`, `parts` the single rewards by name (NaN
    where one does not apply), `details` (B,) what else they say of a response. `exact_kl` (B,) is the exact KL to the
    reference of a response, in nats; NaN where it was not computed.
    """

    rows: list[Row]
    scored: ScoredRollout
    raw_scores: Tensor
    parts: dict[str, Tensor]
    exact_kl: Tensor
    details: dict[str, Tensor] = field(default_factory=dict)


def choose_prompts(
    prompts: Sequence[EncodedPrompt], update: int, batch_size: int, seed: int, responses_per_prompt: int = 1
) -> list[Row]:
    """The prompts of an update, a function of the update's number alone, so that a resumed run draws the same.

    The prompts are gone through in a new random order each pass; each stands `responses_per_prompt` times in a row. A
    prompt that comes again in a batch gets another sample index.
    """
    rows: list[Row] = []
    count: dict[int, int] = {}
    num_prompts = batch_size // responses_per_prompt
    for position in range(update * num_prompts, (update + 1) * num_prompts):
        turn, place = divmod(position, len(prompts))
        prompt = prompts[order_of_pass("prompts", len(prompts), seed, turn)[place]]
        for _ in range(responses_per_prompt):
            rows.append(Row(prompt, count.get(prompt.key, 0)))
            count[prompt.key] = count.get(prompt.key, 0) + 1
    return rows


@functools.lru_cache(maxsize=4)
def order_of_pass(purpose: Literal["prompts", "demonstrations"], num: int, seed: int, turn: int) -> list[int]:
    """The order in which a pass goes through `num` items. The last ones are kept: a pass has thousands of positions."""
    offset = {"prompts": 0, "demonstrations": 500_009}[purpose]
    generator = torch.Generator().manual_seed(seed * 1_000_003 + offset + turn)
    return torch.randperm(num, generator=generator).tolist()


def gather_experience(
    engine: TrainingEngine,
    models: PPOModels,
    prompts: Sequence[EncodedPrompt],
    section: PPOConfig,
    runtime: Runtime,
    seed: int,
    update: int,
    stop: StopPoll | None = None,
) -> Experience:
    """Each rank samples and scores its share; all get the whole batch, in the same order for any number of ranks.

    The scores are the raw ones: `transform_scores` needs the statistics of the whole batch. Where `stop` says so, the
    rollout is given up and `Stopped` raised on all ranks; the training is then as it was before the call.
    """
    stop = stop or StopPoll()
    rows = choose_prompts(prompts, update, section.batch_size, seed, section.responses_per_prompt)
    generators = generator_states(runtime.device)
    try:
        # Under ZeRO-3 the weights are gathered once for sampling and scoring together, then released.
        with engine.gathered():
            own = _own_share(models, rows, section, runtime, seed, update, stop)
        # A rank that gave up its share waits here for the others, which may not have been told to stop.
        stop.stop_if_agreed()
    except Stopped:
        # A reward of the user's may have drawn from them.
        set_generator_states(generators, runtime.device)
        raise
    gathered = runtime.gather_objects(own)
    # Rank r holds rows r, r + world_size, ...: undo the interleaving.
    order = torch.cat([torch.arange(rank, len(rows), runtime.world_size) for rank in range(runtime.world_size)])
    inverse = torch.argsort(order)
    everyone = ScoredRollout.concatenate([ScoredRollout.from_tensors(tensors) for tensors, _ in gathered])
    joined = {name: torch.cat([other[name] for _, other in gathered])[inverse] for name in gathered[0][1]}
    scored = everyone.select(inverse)
    details = _named(joined, "detail")
    return Experience(rows, scored, scored.scores, _named(joined, "reward"), joined["exact_kl"], details)


def _own_share(
    models: PPOModels,
    rows: Sequence[Row],
    section: PPOConfig,
    runtime: Runtime,
    seed: int,
    update: int,
    stop: StopPoll,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What this rank samples and scores, and what comes with the scores; nothing when a stop cut it short."""
    numbers = range(len(rows))[runtime.rank :: runtime.world_size]
    parts: list[ScoredRollout] = []
    others: list[dict[str, Tensor]] = []
    for piece in in_batches(numbers, section.rollout_batch_size):
        mine = [rows[number] for number in piece]
        try:
            rollout = sample_rollout(models, mine, section, runtime, seed, update, stop)
            stop.give_up_if_asked()
        except WorkGivenUp:
            if models.ranks_score_together:
                stop.stop_if_agreed()  # the others ask before they score
            return {}, {}
        if models.ranks_score_together:
            stop.stop_if_agreed()
        num_exact = sum(number < section.exact_kl_rows for number in piece)
        # What rank 0 has in this place: no rank has more, and a sharded reference is called equally often by all.
        num_passes = sum(number - runtime.rank < section.exact_kl_rows for number in piece)
        scored, other = score_rollout(models, rollout, mine, num_exact, num_passes)
        parts.append(scored.to("cpu"))
        others.append({name: tensor.cpu() for name, tensor in other.items()})
    return (
        ScoredRollout.concatenate(parts).to_tensors(),
        {name: torch.cat([other[name] for other in others]) for name in others[0]},
    )


def _named(tensors: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """The single rewards, or the details, among the tensors that were gathered."""
    start = f"{kind}/"
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def sample_rollout(
    models: PPOModels,
    rows: Sequence[Row],
    section: PPOConfig,
    runtime: Runtime,
    seed: int,
    update: int,
    stop: StopPoll | None = None,
) -> Rollout:
    """One response to each row. Raises `WorkGivenUp` as soon as this rank is asked to stop."""
    with models.actor_critic.policy_role() as policy:
        sampled = sample_batch(
            policy,
            models.tokenizer,
            [row.prompt for row in rows],
            [row.sample_index for row in rows],
            seed=seed,
            purpose="ppo",
            step=update,
            temperature=section.temperature,
            max_response_tokens=section.max_response_tokens,
            device=runtime.device,
            stop_ids=models.stop_ids,
            suppressed=models.scoring.suppressed,
            before_token=None if stop is None else stop.give_up_if_asked,
        )
    prompts = PromptBatch(
        prompt_ids=sampled.prompt_ids,
        prompt_mask=sampled.prompt_mask,
        prompt_keys=torch.tensor([row.prompt.key for row in rows], device=runtime.device),
        sample_index=torch.tensor([row.sample_index for row in rows], device=runtime.device),
    )
    rollout = Rollout(
        prompts=prompts,
        response_ids=sampled.response_ids,
        response_mask=sampled.response_mask,
        stopped=sampled.stopped,
        sampling_logprobs=sampled.logprobs,
    )
    return _widen_responses(rollout, section.max_response_tokens) if section.score_position == "after_eos" else rollout


def _widen_responses(rollout: Rollout, width: int) -> Rollout:
    """Under `after_eos` the batch must be as wide as the longest allowed response (see `rlhf.ops.advantages`)."""
    missing = width - rollout.response_ids.shape[1]

    def widen(tensor: Tensor) -> Tensor:
        return torch.nn.functional.pad(tensor, (0, missing))

    return replace(
        rollout,
        response_ids=widen(rollout.response_ids),
        response_mask=widen(rollout.response_mask),
        sampling_logprobs=widen(rollout.sampling_logprobs),
    )


def token_batch(rollout: Rollout) -> TokenBatch:
    """The rollout's tokens as the models take them."""
    return TokenBatch(rollout.input_ids, rollout.attention_mask, rollout.prompts.prompt_ids.shape[1])


@torch.no_grad()
def score_rollout(
    models: PPOModels, rollout: Rollout, rows: Sequence[Row], num_exact: int, num_passes: int | None = None
) -> tuple[ScoredRollout, dict[str, Tensor]]:
    """Raw scores, old log-probs and values of the models in training, the reference's log-probs, equally computed.

    Also returns tensors (B,) by name: `reward/<name>` of every single reward, `detail/<name>` of what else it says, and
    `exact_kl`, which is computed for the first `num_exact` rows and NaN in the others. The reference is called
    `num_passes` times for it (None: `num_exact`).
    """
    batch, scoring = token_batch(rollout), models.scoring
    old_logprobs, _, old_values = models.actor_critic.evaluate(batch, scoring)
    with models.reference.role() as reference:
        # The policy's own function, operation by operation, so that equal models give equal numbers.
        reference_logprobs, _ = batch.of_policy(reference, scoring)
    response_mask = rollout.response_mask
    if models.truncation is not None:
        # A response stops where it is cut; one that cannot be cut pays `missing_eos_penalty`.
        response_mask, found = models.truncation.scored_part(rollout.response_ids, rollout.response_mask)
        rollout = replace(rollout, stopped=found)
    texts = decode_responses(models.tokenizer, rollout.response_ids, response_mask)
    scores = models.rewards.score(
        RewardBatch(
            prompts=[row.prompt.content for row in rows],
            responses=texts,
            columns=columns_by_name([row.prompt.columns for row in rows]),
            input_ids=batch.input_ids,
            attention_mask=torch.cat([rollout.prompts.prompt_mask, response_mask], dim=1),
            num_prompt=batch.num_prompt,
            response_mask=response_mask,
            stopped=rollout.stopped,
        )
    )
    scored = ScoredRollout(
        rollout=rollout,
        scores=scores.total.to(old_logprobs.device),
        old_logprobs=old_logprobs,
        reference_logprobs=reference_logprobs,
        old_values=old_values,
    )
    exact = torch.full((len(rows),), torch.nan)
    exact[:num_exact] = exact_kl(models, rollout, num_exact, num_passes).cpu()
    parts = {f"reward/{name}": part for name, part in scores.parts.items()}
    return scored, {"exact_kl": exact, **parts, **{f"detail/{name}": part for name, part in scores.details.items()}}


def exact_kl(models: PPOModels, rollout: Rollout, num_rows: int, num_passes: int | None = None) -> Tensor:
    """KL(policy || reference) over the whole vocabulary, summed along each of the first responses: (num_rows,) nats.

    Its expectation is that of the sampled log-ratio, with far less variance. The reference is called `num_passes` times
    (None: as often as there are rows), idly where rows have run out.
    """
    sums = []
    # Row by row: the logits of two models are in memory at once.
    for row in range(max(num_rows, num_passes or 0)):
        part = rollout.select(torch.tensor([min(row, len(rollout) - 1)], device=rollout.response_ids.device))
        batch = token_batch(part)
        if row >= num_rows:
            with models.reference.role() as reference:
                batch.logits(reference, models.scoring)
            continue
        with models.actor_critic.policy_role() as policy:
            logits = batch.logits(policy, models.scoring)
        with models.reference.role() as reference:
            reference_logits = batch.logits(reference, models.scoring)
        kl = full_kl(logits=logits, reference_logits=reference_logits, temperature=models.scoring.temperature)
        sums.append(masked_sum(values=kl, mask=part.response_mask, dim=1))
    return torch.cat(sums) if sums else torch.zeros(0)


def transform_scores(
    raw_scores: Tensor, stopped: Tensor, lengths: Tensor, section: PPOConfig, moments: RunningMoments | None
) -> Tensor:
    """The scores (B,) that PPO works with. Pass the global batch: running statistics are those of all scores so far.

    Normalise by the running statistics (those of a reward model are the reward's own affair), clip, charge for length
    beyond `length_penalty_free_tokens`, then charge a response that never stopped.
    """
    scores = raw_scores.float()
    if moments is not None:
        moments.update(scores)
        scores = (scores - moments.mean) / max(moments.std, _SMALLEST_STD)
    if section.score_clip is not None:
        scores = scores.clamp(-section.score_clip, section.score_clip)
    if section.length_penalty:
        scores = scores - section.length_penalty * (lengths - section.length_penalty_free_tokens).clamp(min=0).float()
    if section.missing_eos_penalty is not None:
        charged = -section.missing_eos_penalty + (scores if section.missing_eos_mode == "subtract" else 0.0)
        scores = torch.where(stopped, scores, charged)
    return scores
