"""The mean reward of fresh responses to held-out prompts, as often as asked and at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlhf.config.ppo import PPOConfig
from rlhf.rewards.composition import part_means
from rlhf.rewards.protocol import RewardBatch, columns_by_name
from rlhf.stages.ppo.job import Callback, TrainingView
from rlhf.stages.sampling import EncodedPrompt, SampledBatch, decode_responses, in_batches, sample_batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rlhf.distributed.runtime import Runtime
    from rlhf.stages.ppo.models import PPOModels


class Evaluation(Callback):
    """Adds `eval/...` to the metrics every `every` updates, and after the last one."""

    def __init__(self, prompts: Sequence[EncodedPrompt], every: int, section: PPOConfig, seed: int) -> None:
        self.prompts = prompts
        self.every = every
        self.section = section
        self.seed = seed

    def on_update(self, view: TrainingView, step: int, metrics: Mapping[str, float]) -> Mapping[str, float] | None:
        if step % self.every and step != self.section.num_updates and not view.stop:
            return None
        with view.policy() as policy:
            return evaluate(policy, view.models, self.prompts, view.runtime, self.section, self.seed)


@torch.no_grad()
def evaluate(
    policy: PreTrainedModel,
    models: PPOModels,
    prompts: Sequence[EncodedPrompt],
    runtime: Runtime,
    section: PPOConfig,
    seed: int,
) -> dict[str, float]:
    """One response to each prompt, with the same random numbers each time, scored by the rewards: means by name.

    `eval/score_mean` is what PPO maximises before clipping and penalties, `eval/raw_score_mean` the rewards' weighted
    sum before any normalisation. Every rank calls it and takes its share of the prompts.
    """
    counts = sample_indices(prompts)
    mine = list(zip(prompts, counts, strict=True))[runtime.rank :: runtime.world_size]
    rows: list[dict[str, float]] = []
    for piece in in_batches(mine, section.rollout_batch_size):
        batch = [prompt for prompt, _ in piece]
        sampled = sample_responses(policy, models, batch, [count for _, count in piece], section, seed, "evaluate")
        scored = models.rewards.score(_reward_batch(models, batch, sampled))
        weights = models.rewards.weights
        raw = torch.stack([weights[name] * part.nan_to_num(nan=0.0) for name, part in scored.parts.items()]).sum(0)
        columns = {
            "score_mean": scored.total,
            "raw_score_mean": raw,
            "response_length": sampled.response_mask.sum(1),
            "stopped_fraction": sampled.stopped,
            **{f"reward/{name}": part for name, part in scored.parts.items()},
        }
        lists = {name: column.float().tolist() for name, column in columns.items()}
        rows += [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]
    everyone = [row for part in runtime.gather_objects(rows) for row in part]
    several = len(models.rewards.rewards) > 1
    wanted = {name: torch.tensor([row[name] for row in everyone]) for name in everyone[0]}
    if not several:
        wanted = {name: values for name, values in wanted.items() if not name.startswith("reward/")}
    return {f"eval/{name}": mean for name, mean in part_means(wanted).items()}


def sample_indices(prompts: Sequence[EncodedPrompt]) -> list[int]:
    """Which sample of its prompt each row is: 0 unless the prompt comes again."""
    seen: dict[int, int] = {}
    indices = []
    for prompt in prompts:
        indices.append(seen.get(prompt.key, 0))
        seen[prompt.key] = indices[-1] + 1
    return indices


def sample_responses(
    policy: PreTrainedModel,
    models: PPOModels,
    prompts: Sequence[EncodedPrompt],
    indices: Sequence[int],
    section: PPOConfig,
    seed: int,
    purpose: str,
) -> SampledBatch:
    """A response to each prompt, drawn as in training but from random numbers of its own `purpose`."""
    return sample_batch(
        policy,
        models.tokenizer,
        prompts,
        indices,
        seed=seed,
        purpose=purpose,
        step=0,
        temperature=section.temperature,
        max_response_tokens=section.max_response_tokens,
        device=policy.device,
        stop_ids=models.stop_ids,
        suppressed=models.scoring.suppressed,
    )


def _reward_batch(models: PPOModels, prompts: Sequence[EncodedPrompt], sampled: SampledBatch) -> RewardBatch:
    def join(prompt: Tensor, response: Tensor) -> Tensor:
        return torch.cat([prompt, response], dim=1)

    return RewardBatch(
        prompts=[prompt.content for prompt in prompts],
        responses=decode_responses(models.tokenizer, sampled.response_ids, sampled.response_mask),
        columns=columns_by_name([prompt.columns for prompt in prompts]),
        input_ids=join(sampled.prompt_ids, sampled.response_ids),
        attention_mask=join(sampled.prompt_mask, sampled.response_mask),
        num_prompt=sampled.prompt_ids.shape[1],
        response_mask=sampled.response_mask,
        stopped=sampled.stopped,
    )
