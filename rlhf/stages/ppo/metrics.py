"""What a training says of itself: numbers of the rollout, speeds, and samples to read."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlhf.batches import PPOBatch
from rlhf.config.ppo import PPOConfig
from rlhf.distributed.memory import peak_memory_bytes
from rlhf.ops.masked import explained_variance, masked_sum
from rlhf.records import prompt_to_json
from rlhf.rewards.composition import part_means
from rlhf.stages.ppo.rollout import Experience
from rlhf.stages.sampling import decode_responses

if TYPE_CHECKING:
    from rlhf.distributed.runtime import Runtime
    from rlhf.stages.ppo.models import PPOModels


def batch_metrics(
    batch: PPOBatch, experience: Experience, weights: dict[str, float], kl_coefficient: float
) -> dict[str, float]:
    """What the rollout says, from the very tensors that were trained on. KL is in nats per response."""
    mask, scored = batch.response_mask, batch.scored
    log_ratio = scored.old_logprobs - scored.reference_logprobs
    kl = float(masked_sum(values=log_ratio, mask=mask)) / len(batch)
    penalty = float(batch.kl.sum()) / len(batch)
    score = float(scored.scores.mean())
    resampled = (scored.old_logprobs - scored.rollout.sampling_logprobs).abs()
    metrics = {
        "ppo/score_mean": score,
        "ppo/score_std": float(scored.scores.std(correction=0)),
        "ppo/raw_score_mean": float(_raw_total(experience.parts, weights).mean()),
        "ppo/kl_to_reference": kl,
        "ppo/kl_penalty": penalty,
        "ppo/kl_coefficient": kl_coefficient,
        "ppo/objective": score - kl_coefficient * penalty,
        "ppo/explained_variance": float(
            explained_variance(predictions=scored.old_values, targets=batch.returns, mask=batch.value_mask)
        ),
        "ppo/response_length": float(scored.rollout.response_lengths.float().mean()),
        "ppo/stopped_fraction": float(scored.rollout.stopped.float().mean()),
        "ppo/sampling_logprob_error": float(torch.where(mask, resampled, 0.0).max()),
    }
    exact = experience.exact_kl[~experience.exact_kl.isnan()]
    if len(exact):
        metrics["ppo/exact_kl_to_reference"] = float(exact.mean())
    named = {**experience.parts, **experience.details}
    return metrics | {f"ppo/reward/{name}": mean for name, mean in part_means(named).items()}


def _raw_total(parts: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    """The weighted sum (B,) of the rewards before any normalisation."""
    return torch.stack([weights[name] * part.float().nan_to_num(nan=0.0) for name, part in parts.items()]).sum(0)


class Clock:
    """Seconds of one update, from its making."""

    def __init__(self) -> None:
        self._started = self._rollout = self._train = self._marked = time.monotonic()

    def rollout_ends(self) -> None:
        """Everything is sampled and scored."""
        self._rollout = time.monotonic() - self._started

    def training_begins(self) -> None:
        """The first epoch begins."""
        self._marked = time.monotonic()

    def training_ends(self) -> None:
        """The last epoch has ended."""
        self._train = time.monotonic() - self._marked

    def metrics(self, batch: PPOBatch, section: PPOConfig, runtime: Runtime, num_steps: int) -> dict[str, float]:
        """Tokens per second over all ranks, and this rank's peak memory. `num_steps` is what the optimiser did."""
        tokens = int(batch.response_mask.sum())
        return {
            "perf/rollout_tokens_per_second": tokens / self._rollout,
            "perf/train_tokens_per_second": tokens * num_steps / section.num_minibatches / self._train,
            "perf/step_seconds": time.monotonic() - self._started,
            "perf/peak_memory_bytes": float(peak_memory_bytes(runtime.device)),
        }


def sample_rows(experience: Experience, models: PPOModels, num: int) -> list[dict[str, Any]]:
    """The first samples of a rollout as text, with their scores."""
    rollout = experience.scored.rollout
    texts = decode_responses(models.tokenizer, rollout.response_ids[:num], rollout.response_mask[:num])
    return [
        {"prompt": prompt_to_json(row.prompt.content), "response": text, "score": float(score)}
        for row, text, score in zip(experience.rows, texts, experience.scored.scores, strict=False)
    ]
