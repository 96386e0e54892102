"""Stage ppo: the algorithm, read top to bottom (`run`).

Ziegler et al. 2019 (arXiv 1909.08593) with the details of Huang et al. 2024 (arXiv 2403.17031): the reward of a token
is -beta times the KL estimate to the frozen reference, plus, on the last token, the reward model's score.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from rlhf.batches import PPOBatch, ScoredRollout, make_ppo_batch
from rlhf.config.ppo import PPOConfig
from rlhf.distributed.checkpoints import checkpoint_folder, latest_checkpoint, prune_checkpoints
from rlhf.distributed.engine import TrainingEngine
from rlhf.distributed.memory import peak_memory_bytes
from rlhf.distributed.runtime import Runtime
from rlhf.models.positions import check_positions
from rlhf.ops.masked import explained_variance, masked_sum
from rlhf.records import prompt_to_json
from rlhf.runs.tracking import Tracker
from rlhf.stages.context import StageContext, StageOutput, publish, save_partial
from rlhf.stages.ppo.models import PPOModels, load_models
from rlhf.stages.ppo.rollout import Row, choose_prompts, sample_rollouts, score_rollout
from rlhf.stages.ppo.update import num_micro_batches, optimise
from rlhf.stages.sampling import EncodedPrompt, decode_responses, in_batches, load_encoded_prompts, require_prompts


@dataclass(frozen=True)
class _Experience:
    """One update's global batch, the same on every rank, with the raw scores (B,) in the rows' order."""

    rows: list[Row]
    scored: ScoredRollout
    raw_scores: Tensor


def run(context: StageContext) -> StageOutput:
    """Trains the policy. Resumes from the newest checkpoint of an interrupted attempt."""
    config, runtime, section = context.config, context.runtime, context.config.ppo
    # 1. Policy and critic to train; reference and reward model frozen.
    models = load_models(context)
    engine = _make_engine(context, models)
    # 2. Where an interrupted attempt stopped.
    newest = latest_checkpoint(context.stage.checkpoints) if runtime.is_main else None
    checkpoint = runtime.broadcast_object(newest)
    start = 0 if checkpoint is None else int(engine.load_checkpoint(checkpoint)["update"])
    with Tracker.open(
        context.run, config.tracking, "ppo", section.num_updates, start, config.model_dump(mode="json"), runtime.is_main
    ) as tracker:
        prompts = _load_prompts(context, models, tracker)
        for update in range(start, section.num_updates):
            started = time.monotonic()
            # 3. Sample a response to each prompt of the batch, and score it.
            experience = _gather_experience(context, engine, models, prompts, update)
            rollout_seconds = time.monotonic() - started
            # 4. Token rewards with the KL penalty, advantages, returns: over the global batch.
            batch = make_ppo_batch(
                experience.scored,
                kl_coefficient=section.kl_coefficient,
                kl_estimator=section.kl_estimator,
                gamma=section.gamma,
                lam=section.lam,
                whiten_advantages=section.whiten_advantages,
                score_position=section.score_position,
            )
            # 5. Several epochs of clipped policy and value losses.
            trained = time.monotonic()
            statistics = optimise(engine, batch, section, runtime, config.seed, update)
            # 6. Write down what happened; keep what is needed to go on.
            step = update + 1
            metrics = {
                **_batch_metrics(batch, experience.raw_scores, section),
                **statistics.means(runtime, section.value_coefficient),
                "ppo/learning_rate": section.learning_rate * learning_rate_factor(section, update),
                **_speed(
                    batch, section, runtime, rollout_seconds, time.monotonic() - trained, time.monotonic() - started
                ),
            }
            tracker.log(step, metrics)
            if update % section.samples_every == 0 or step == section.num_updates:
                tracker.log_samples(step, _sample_rows(experience, models, section.num_samples_shown))
            if step % section.save_every == 0 and step < section.num_updates:
                engine.save_checkpoint(checkpoint_folder(context.stage.checkpoints, step), {"update": step})
                if runtime.is_main:
                    prune_checkpoints(context.stage.checkpoints, section.keep_checkpoints)
    outputs = _publish(context, engine, models)
    return StageOutput(
        summary={name: value for name, value in metrics.items() if name.startswith("ppo/")}, outputs=outputs
    )


def learning_rate_factor(section: PPOConfig, update: int) -> float:
    """What both learning rates are multiplied with in an update: linear warm-up, then constant or linear to 0."""
    factor = min(1.0, (update + 1) / (section.warmup_updates + 1))
    if section.schedule == "linear":
        factor *= 1.0 - update / section.num_updates
    return factor


def _make_engine(context: StageContext, models: PPOModels) -> TrainingEngine:
    section = context.config.ppo
    module = models.actor_critic
    optimizer = torch.optim.AdamW(
        [
            {"params": list(module.policy.parameters()), "lr": section.learning_rate},
            {"params": list(module.critic.parameters()), "lr": section.value_learning_rate or section.learning_rate},
        ],
        betas=(section.adam_beta1, section.adam_beta2),
        eps=section.adam_epsilon,
        weight_decay=section.weight_decay,
    )
    accumulation = num_micro_batches(section, context.runtime.world_size)
    rows = section.batch_size // section.num_minibatches // context.runtime.world_size
    steps = section.num_epochs * section.num_minibatches
    return TrainingEngine.prepare(
        module,
        optimizer,
        LambdaLR(optimizer, lambda step: learning_rate_factor(section, step // steps)),
        runtime=context.runtime,
        zero=context.config.zero,
        micro_batch_size=-(-rows // accumulation),
        accumulation_steps=accumulation,
        max_grad_norm=section.max_grad_norm,
    )


def _load_prompts(context: StageContext, models: PPOModels, tracker: Tracker) -> list[EncodedPrompt]:
    prompts = load_encoded_prompts(context.config.data, models.tokenizer, tracker.message)["train"]
    require_prompts(prompts, "train")
    longest = max(len(prompt.ids) for prompt in prompts) + context.config.ppo.max_response_tokens
    check_positions(models.reference, longest)
    return prompts


def _gather_experience(
    context: StageContext, engine: TrainingEngine, models: PPOModels, prompts: list[EncodedPrompt], update: int
) -> _Experience:
    """Each rank samples and scores its share; all get the whole batch, in the same order for any number of ranks."""
    section, runtime, seed = context.config.ppo, context.runtime, context.config.seed
    rows = choose_prompts(prompts, update, section.batch_size, seed)
    mine = rows[runtime.rank :: runtime.world_size]
    parts: list[ScoredRollout] = []
    raw_parts: list[Tensor] = []
    # Under ZeRO-3 the weights are gathered once for sampling and scoring together, then released.
    with engine.gathered():
        actor_critic = models.actor_critic
        rollouts = sample_rollouts(actor_critic, models, mine, section, runtime, seed, update)
        for rollout, piece in zip(rollouts, in_batches(mine, section.rollout_batch_size), strict=True):
            scored, raw_scores = score_rollout(actor_critic, models, rollout, piece, section)
            parts.append(scored.to("cpu"))
            raw_parts.append(raw_scores.cpu())
    own = (ScoredRollout.concatenate(parts).to_tensors(), torch.cat(raw_parts))
    gathered = runtime.gather_objects(own)
    everyone = ScoredRollout.concatenate([ScoredRollout.from_tensors(tensors) for tensors, _ in gathered])
    # Rank r holds rows r, r + world_size, ...: undo the interleaving.
    order = torch.cat([torch.arange(rank, len(rows), runtime.world_size) for rank in range(runtime.world_size)])
    inverse = torch.argsort(order)
    return _Experience(rows, everyone.select(inverse), torch.cat([raw for _, raw in gathered])[inverse])


def _batch_metrics(batch: PPOBatch, raw_scores: Tensor, section: PPOConfig) -> dict[str, float]:
    """What the rollout says, from the very tensors that were trained on. KL is in nats per response."""
    mask, scored = batch.response_mask, batch.scored
    log_ratio = scored.old_logprobs - scored.reference_logprobs
    kl = float(masked_sum(values=log_ratio, mask=mask)) / len(batch)
    penalty = float(batch.kl.sum()) / len(batch)
    score = float(scored.scores.mean())
    resampled = (scored.old_logprobs - scored.rollout.sampling_logprobs).abs()
    return {
        "ppo/score_mean": score,
        "ppo/score_std": float(scored.scores.std(correction=0)),
        "ppo/raw_score_mean": float(raw_scores.float().mean()),
        "ppo/kl_to_reference": kl,
        "ppo/kl_penalty": penalty,
        "ppo/kl_coefficient": section.kl_coefficient,
        "ppo/objective": score - section.kl_coefficient * penalty,
        "ppo/explained_variance": float(
            explained_variance(predictions=scored.old_values, targets=batch.returns, mask=batch.value_mask)
        ),
        "ppo/response_length": float(scored.rollout.response_lengths.float().mean()),
        "ppo/stopped_fraction": float(scored.rollout.stopped.float().mean()),
        "ppo/sampling_logprob_error": float(torch.where(mask, resampled, 0.0).max()),
    }


def _speed(
    batch: PPOBatch, section: PPOConfig, runtime: Runtime, rollout: float, train: float, total: float
) -> dict[str, float]:
    tokens = int(batch.response_mask.sum())
    return {
        "perf/rollout_tokens_per_second": tokens / rollout,
        "perf/train_tokens_per_second": tokens * section.num_epochs / train,
        "perf/step_seconds": total,
        "perf/peak_memory_bytes": float(peak_memory_bytes(runtime.device)),
    }


def _sample_rows(experience: _Experience, models: PPOModels, num: int) -> list[dict[str, Any]]:
    rollout = experience.scored.rollout
    texts = decode_responses(models.tokenizer, rollout.response_ids[:num], rollout.response_mask[:num])
    return [
        {"prompt": prompt_to_json(row.prompt.content), "response": text, "score": float(score)}
        for row, text, score in zip(experience.rows, texts, experience.scored.scores, strict=False)
    ]


def _publish(context: StageContext, engine: TrainingEngine, models: PPOModels) -> list[str]:
    """Writes the policy to `model/` and the critic to `value_model/`; a half-written folder never has those names."""
    module = models.actor_critic
    parts = (
        ("model", module.policy, models.tokenizer, "policy."),
        ("value_model", module.critic.model, models.critic_tokenizer, "critic.model."),
    )
    for name, model, tokenizer, prefix in parts:
        state = engine.state_dict_for_saving(prefix)
        if context.runtime.is_main:
            save_partial(context, name, model, tokenizer, state)
    for name, *_ in parts:
        publish(context, name)
    return [name for name, *_ in parts]
