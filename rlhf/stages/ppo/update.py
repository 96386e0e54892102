"""The update: epochs of clipped policy and value losses over the minibatches of one global batch.

Every rank holds the whole batch and trains on its share of each minibatch. A loss is a sum divided by what the whole
minibatch counts on all ranks, so neither micro-batches nor ranks change the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlhf.batches import PPOBatch, Rollout
from rlhf.config.ppo import PPOConfig
from rlhf.data.tokenization import EncodedPair
from rlhf.ops.losses import (
    aggregation_count,
    aggregation_weights,
    kl_loss,
    merge_metrics,
    ppo_policy_loss,
    ppo_value_loss,
    weighted_sum,
)
from rlhf.ops.masked import masked_sum
from rlhf.ops.sequences import left_pad, right_pad
from rlhf.stages.ppo.models import Scoring, TokenBatch
from rlhf.stages.ppo.rollout import order_of_pass, token_batch

if TYPE_CHECKING:
    from rlhf.distributed.engine import TrainingEngine
    from rlhf.distributed.runtime import Runtime


@dataclass(frozen=True)
class Counts:
    """What the sums of an optimiser step are divided by: those of all ranks and micro-batches together."""

    policy: float  # of the policy's terms, as `loss_aggregation` counts
    values: int
    demonstrations: int = 0


@dataclass(frozen=True)
class Demonstrations:
    """Responses to imitate, as a micro-batch: what `TokenBatch` has, and which response tokens count."""

    tokens: TokenBatch
    mask: Tensor

    @classmethod
    def collate(cls, pairs: Sequence[EncodedPair], pad_id: int, device: torch.device) -> Demonstrations:
        """Left-padded prompts, right-padded responses."""
        prompt_ids, prompt_mask = left_pad([pair.prompt_ids for pair in pairs], pad_id=pad_id)
        response_ids, mask = right_pad([pair.response_ids for pair in pairs], pad_id=pad_id)
        tokens = TokenBatch(
            torch.cat([prompt_ids, response_ids], 1).to(device),
            torch.cat([prompt_mask, mask], 1).to(device),
            prompt_ids.shape[1],
        )
        return cls(tokens, mask.to(device))


@dataclass
class UpdateStatistics:
    """Sums over the micro-batches of an update on this rank; `means` makes them metrics of all ranks.

    `passes` are those of each pass by itself, in the updates that log them.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    grad_norms: list[float] = field(default_factory=list)
    passes: list[UpdateStatistics] = field(default_factory=list)

    def add(self, metrics: dict[str, Tensor]) -> None:
        """Adds one micro-batch."""
        self.sums = merge_metrics(self.sums, metrics) if self.sums else metrics

    def means(self, runtime: Runtime, section: PPOConfig, kl_coefficient: float) -> dict[str, float]:
        """Means over what the update saw on all ranks: response tokens, value slots, demonstration tokens."""
        names = sorted(name for name in self.sums if not name.endswith("_max"))
        totals = runtime.sum_over_ranks(torch.stack([self.sums[name].double() for name in names]))
        total = dict(zip(names, totals.tolist(), strict=True))
        tokens, slots, counted = total["num_tokens"], total["num_value_slots"], total["num_counted"]
        parts = {
            "policy_loss": total["policy_loss"] / counted,
            "value_loss": total["value_loss"] / slots,
            "entropy_bonus": total["entropy_bonus"] / counted,
        }
        loss = parts["policy_loss"] + section.value_coefficient * parts["value_loss"]
        loss -= section.entropy_coefficient * parts["entropy_bonus"]
        metrics = {
            "ppo/policy_loss": parts["policy_loss"],
            "ppo/value_loss": parts["value_loss"],
            "ppo/entropy": total["entropy"] / tokens,
            "ppo/clip_fraction": total["clip_fraction"] / tokens,
            "ppo/value_clip_fraction": total["value_clip_fraction"] / slots,
            "ppo/approx_kl": total["approx_kl"] / tokens,
            "ppo/ratio_max": max(float(part) for part in runtime.gather_objects(float(self.sums["ratio_max"]))),
            "ppo/grad_norm": sum(self.grad_norms) / len(self.grad_norms),
            "ppo/optimizer_steps": float(len(self.grad_norms)),
        }
        if section.dual_clip is not None:
            metrics["ppo/dual_clip_fraction"] = total["dual_clip_fraction"] / tokens
        if section.kl_placement == "loss":
            metrics["ppo/kl_loss"] = total["kl_loss"] / counted
            loss += kl_coefficient * metrics["ppo/kl_loss"]
        if section.ptx_coefficient:
            metrics["ppo/ptx_loss"] = total["ptx_loss"] / total["num_ptx_tokens"]
            loss += section.ptx_coefficient * metrics["ppo/ptx_loss"]
        return {"ppo/loss": loss, **metrics}

    def pass_means(self, runtime: Runtime) -> dict[str, float]:
        """Of each pass by itself, counted from 0: how far the policy was from the one that sampled, over all tokens.

        The policy of a pass with one minibatch is that before its step, so that of pass 0 is the sampling policy.
        """
        metrics: dict[str, float] = {}
        names = ("approx_kl", "squared_log_ratio", "clip_fraction", "ratio")
        for number, one in enumerate(self.passes):
            sums = torch.stack([one.sums[name].double() for name in (*names, "num_tokens")])
            *totals, tokens = runtime.sum_over_ranks(sums).tolist()
            approx_kl, squares, clipped, ratio = (total / tokens for total in totals)
            largest = max(float(part) for part in runtime.gather_objects(float(one.sums["ratio_max"])))
            own = {
                "approx_kl": approx_kl,
                "approx_kl_k2": squares / 2,
                "clip_fraction": clipped,
                "ratio_mean": ratio,
                "ratio_max": largest,
            }
            metrics |= {f"ppo/pass_{number}/{name}": value for name, value in own.items()}
        return metrics


def minibatches(num_rows: int, section: PPOConfig, seed: int, update: int, epoch: int) -> list[Tensor]:
    """Row indices of each minibatch of an epoch: one global permutation, the same on every rank."""
    generator = torch.Generator().manual_seed(((seed * 1_000_003 + update) * 1_009 + epoch) % (1 << 62))
    return list(torch.randperm(num_rows, generator=generator).chunk(section.num_minibatches))


def num_micro_batches(section: PPOConfig, world_size: int) -> int:
    """Forward passes an optimiser step takes on each rank."""
    rows = section.batch_size // section.num_minibatches // world_size
    size = min(section.micro_batch_size or rows, rows)
    return -(-rows // size)


def choose_demonstrations(
    demonstrations: Sequence[EncodedPair], section: PPOConfig, seed: int, optimizer_step: int
) -> list[EncodedPair]:
    """The demonstrations of an optimiser step: the next `ptx_batch_size` of an endless stream of shuffled passes."""
    chosen = []
    size = section.ptx_batch_size
    for position in range(optimizer_step * size, (optimizer_step + 1) * size):
        turn, place = divmod(position, len(demonstrations))
        chosen.append(demonstrations[order_of_pass("demonstrations", len(demonstrations), seed, turn)[place]])
    return chosen


@dataclass(frozen=True)
class Updater:
    """What all updates of a training share. `demonstrations` is empty unless they are mixed in."""

    engine: TrainingEngine
    section: PPOConfig
    runtime: Runtime
    seed: int
    scoring: Scoring
    demonstrations: Sequence[EncodedPair]
    pad_id: int

    def optimise(self, batch: PPOBatch, update: int, kl_coefficient: float) -> UpdateStatistics:
        """All epochs of one update, or fewer when the approximate KL of an optimiser step exceeds its limit."""
        section, engine = self.section, self.engine
        statistics = UpdateStatistics()
        engine.module.train()
        steps_before = update * section.num_epochs * section.num_minibatches
        for epoch in range(section.num_epochs):
            if update < section.pass_metrics_updates:
                statistics.passes.append(UpdateStatistics())
            for number, rows in enumerate(minibatches(len(batch), section, self.seed, update, epoch)):
                step = UpdateStatistics()
                optimizer_step = steps_before + epoch * section.num_minibatches + number
                self._accumulate(batch, rows, optimizer_step, kl_coefficient, step)
                statistics.add(step.sums)
                if statistics.passes:
                    statistics.passes[-1].add(step.sums)
                statistics.grad_norms.append(engine.step(advance_schedule=False))
                if self._moved_too_far(step):
                    engine.module.eval()
                    return statistics
        engine.module.eval()
        return statistics

    def _accumulate(
        self, batch: PPOBatch, rows: Tensor, optimizer_step: int, kl_coefficient: float, statistics: UpdateStatistics
    ) -> None:
        """The gradient of one minibatch, this rank's share of it in micro-batches."""
        section, runtime = self.section, self.runtime
        mask = batch.response_mask[rows]
        pieces = num_micro_batches(section, runtime.world_size)
        demonstrations, num_tokens = self._demonstrations(optimizer_step, pieces)
        counts = Counts(
            policy=float(aggregation_count(mask=mask, aggregation=section.loss_aggregation)),
            values=int(batch.value_mask[rows].sum()),
            demonstrations=num_tokens,
        )
        mine = rows[runtime.rank :: runtime.world_size]
        for piece, imitated in zip(mine.chunk(pieces), demonstrations, strict=True):
            micro_batch = batch.select(piece).trim().to(runtime.device)
            loss, metrics = self._loss(micro_batch, imitated, counts, kl_coefficient)
            self.engine.backward(loss)
            statistics.add(metrics)

    def _demonstrations(self, optimizer_step: int, pieces: int) -> tuple[list[Demonstrations | None], int]:
        """This rank's demonstrations of an optimiser step, one batch a micro-batch, and all ranks' response tokens."""
        if not self.demonstrations:
            return [None] * pieces, 0
        chosen = choose_demonstrations(self.demonstrations, self.section, self.seed, optimizer_step)
        mine = chosen[self.runtime.rank :: self.runtime.world_size]
        batches: list[Demonstrations | None] = []
        for number in range(pieces):
            # Every rank runs every forward, or ranks would wait for each other under ZeRO-3.
            part = mine[number::pieces]
            collated = Demonstrations.collate(part or chosen[:1], self.pad_id, self.runtime.device)
            batches.append(
                collated if part else Demonstrations(collated.tokens, torch.zeros_like(collated.mask, dtype=torch.bool))
            )
        return batches, sum(len(pair.response_ids) for pair in chosen)

    def _loss(
        self, batch: PPOBatch, demonstrations: Demonstrations | None, counts: Counts, kl_coefficient: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """This micro-batch's part of the loss, already divided by the counts of the whole step, and its sums."""
        section, mask = self.section, batch.response_mask
        outputs = self.engine.module(
            token_batch(batch.rollout), self.scoring, None if demonstrations is None else demonstrations.tokens
        )
        logprobs, entropy, values = outputs[:3]
        weights = aggregation_weights(
            mask=mask, aggregation=section.loss_aggregation, length=section.max_response_tokens
        )
        policy_sum, count, metrics = ppo_policy_loss(
            logprobs=logprobs,
            old_logprobs=batch.scored.old_logprobs,
            advantages=batch.advantages,
            mask=mask,
            clip_low=section.clip_low,
            clip_high=section.clip_high,
            dual_clip=section.dual_clip,
            weights=weights,
        )
        value_sum, value_count, value_metrics = ppo_value_loss(
            values=values,
            old_values=batch.scored.old_values,
            returns=batch.returns,
            mask=batch.value_mask,
            clip=section.value_clip,
        )
        bonus = weighted_sum(values=entropy, mask=mask, weights=weights)
        loss = policy_sum / counts.policy + section.value_coefficient * value_sum / counts.values
        if section.entropy_coefficient:
            loss = loss - section.entropy_coefficient * bonus / counts.policy
        sums = {
            **metrics,
            **value_metrics,
            "policy_loss": policy_sum.detach(),
            "value_loss": value_sum.detach(),
            "entropy": masked_sum(values=entropy.detach(), mask=mask),
            "entropy_bonus": bonus.detach(),
            "num_tokens": count,
            "num_counted": aggregation_count(mask=mask, aggregation=section.loss_aggregation),
            "num_value_slots": value_count,
        }
        if section.pass_metrics_updates:
            with torch.no_grad():
                log_ratio = logprobs.float() - batch.scored.old_logprobs
                sums["squared_log_ratio"] = masked_sum(values=log_ratio.square(), mask=mask)
                sums["ratio"] = masked_sum(values=log_ratio.exp(), mask=mask)
        if section.kl_placement == "loss":
            kl_sum, _, _ = kl_loss(
                logprobs=logprobs,
                reference_logprobs=batch.scored.reference_logprobs,
                mask=mask,
                estimator=section.kl_estimator,
                weights=weights,
            )
            loss = loss + kl_coefficient * kl_sum / counts.policy
            sums["kl_loss"] = kl_sum.detach()
        if demonstrations is not None:
            imitation = -masked_sum(values=outputs[3], mask=demonstrations.mask)
            loss = loss + section.ptx_coefficient * imitation / counts.demonstrations
            sums |= {"ptx_loss": imitation.detach(), "num_ptx_tokens": demonstrations.mask.sum()}
        return loss, sums

    def _moved_too_far(self, step: UpdateStatistics) -> bool:
        """Whether the approximate KL of an optimiser step, in nats a token over all ranks, exceeds its limit."""
        limit = self.section.kl_stop_nats_per_token
        if limit is None:
            return False
        sums = torch.stack([step.sums["approx_kl"].double(), step.sums["num_tokens"].double()])
        approx_kl, tokens = self.runtime.sum_over_ranks(sums).tolist()
        return bool(approx_kl / tokens > limit)


@torch.no_grad()
def training_logprobs(engine: TrainingEngine, rollout: Rollout, scoring: Scoring, device: torch.device) -> Tensor:
    """Log-probs (B, R) of the rows as a training forward computes them, before any step: what the first ratio is of."""
    engine.module.train()
    try:
        logprobs: Tensor = engine.module(token_batch(rollout.to(device)), scoring)[0]
    finally:
        engine.module.eval()
    return logprobs.float().cpu()
