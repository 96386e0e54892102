"""The update: epochs of clipped policy and value losses over the minibatches of one global batch.

Every rank holds the whole batch and trains on its share of each minibatch. A loss is a sum divided by the number of
response tokens of the whole minibatch on all ranks, so neither micro-batches nor ranks change the step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlhf.batches import PPOBatch
from rlhf.config.ppo import PPOConfig
from rlhf.ops.losses import merge_metrics, ppo_policy_loss, ppo_value_loss
from rlhf.ops.masked import masked_sum

if TYPE_CHECKING:
    from rlhf.distributed.engine import TrainingEngine
    from rlhf.distributed.runtime import Runtime


@dataclass
class UpdateStatistics:
    """Sums over the micro-batches of an update on this rank; `totals` makes them metrics of all ranks."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    grad_norms: list[float] = field(default_factory=list)

    def add(self, metrics: dict[str, Tensor]) -> None:
        """Adds one micro-batch."""
        self.sums = merge_metrics(self.sums, metrics) if self.sums else metrics

    def means(self, runtime: Runtime, value_coefficient: float) -> dict[str, float]:
        """Means over all response tokens (value terms: value slots) that the update saw, on all ranks."""
        names = sorted(name for name in self.sums if not name.endswith("_max"))
        totals = runtime.sum_over_ranks(torch.stack([self.sums[name].double() for name in names]))
        total = dict(zip(names, totals.tolist(), strict=True))
        tokens, slots = total["num_tokens"], total["num_value_slots"]
        policy_loss, value_loss = total["policy_loss"] / tokens, total["value_loss"] / slots
        return {
            "ppo/loss": policy_loss + value_coefficient * value_loss,
            "ppo/policy_loss": policy_loss,
            "ppo/value_loss": value_loss,
            "ppo/entropy": total["entropy"] / tokens,
            "ppo/clip_fraction": total["clip_fraction"] / tokens,
            "ppo/value_clip_fraction": total["value_clip_fraction"] / slots,
            "ppo/approx_kl": total["approx_kl"] / tokens,
            "ppo/ratio_max": max(float(part) for part in runtime.gather_objects(float(self.sums["ratio_max"]))),
            "ppo/grad_norm": sum(self.grad_norms) / len(self.grad_norms),
        }


def minibatches(num_rows: int, section: PPOConfig, seed: int, update: int, epoch: int) -> list[Tensor]:
    """Row indices of each minibatch of an epoch: one global permutation, the same on every rank."""
    generator = torch.Generator().manual_seed(((seed * 1_000_003 + update) * 1_009 + epoch) % (1 << 62))
    return list(torch.randperm(num_rows, generator=generator).chunk(section.num_minibatches))


def num_micro_batches(section: PPOConfig, world_size: int) -> int:
    """Forward passes an optimiser step takes on each rank."""
    rows = section.batch_size // section.num_minibatches // world_size
    size = min(section.micro_batch_size or rows, rows)
    return -(-rows // size)


def optimise(
    engine: TrainingEngine, batch: PPOBatch, section: PPOConfig, runtime: Runtime, seed: int, update: int
) -> UpdateStatistics:
    """`num_epochs` passes over the global batch, `num_minibatches` optimiser steps each."""
    statistics = UpdateStatistics()
    # Dropout is off in either mode; gradient checkpointing works in training mode only, and rollouts need a cache.
    engine.module.train()
    for epoch in range(section.num_epochs):
        for rows in minibatches(len(batch), section, seed, update, epoch):
            mine = rows[runtime.rank :: runtime.world_size]
            num_tokens = int(batch.response_mask[rows].sum())
            num_value_slots = int(batch.value_mask[rows].sum())
            for piece in mine.chunk(num_micro_batches(section, runtime.world_size)):
                micro_batch = batch.select(piece).trim().to(runtime.device)
                loss, metrics = micro_batch_loss(engine, micro_batch, section, num_tokens, num_value_slots)
                engine.backward(loss)
                statistics.add(metrics)
            statistics.grad_norms.append(engine.step())
    engine.module.eval()
    return statistics


def micro_batch_loss(
    engine: TrainingEngine, batch: PPOBatch, section: PPOConfig, num_tokens: int, num_value_slots: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """This micro-batch's part of the loss, already divided by the counts of the whole optimiser step, and its sums."""
    rollout = batch.rollout
    logprobs, entropy, values = engine.module(
        rollout.input_ids, rollout.attention_mask, rollout.prompts.prompt_ids.shape[1], section.temperature
    )
    policy_sum, count, metrics = ppo_policy_loss(
        logprobs=logprobs,
        old_logprobs=batch.scored.old_logprobs,
        advantages=batch.advantages,
        mask=batch.response_mask,
        clip_low=section.clip_low,
        clip_high=section.clip_high,
    )
    value_sum, value_count, value_metrics = ppo_value_loss(
        values=values,
        old_values=batch.scored.old_values,
        returns=batch.returns,
        mask=batch.value_mask,
        clip=section.value_clip,
    )
    loss = policy_sum / num_tokens + section.value_coefficient * value_sum / num_value_slots
    sums = {
        **metrics,
        **value_metrics,
        "policy_loss": policy_sum.detach(),
        "value_loss": value_sum.detach(),
        "entropy": masked_sum(values=entropy.detach(), mask=batch.response_mask),
        "num_tokens": count,
        "num_value_slots": value_count,
    }
    return loss, sums
