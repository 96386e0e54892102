"""What the ranks of test_generation_ranks.py run: rollouts under ZeRO-3 in which the ranks have unequally much to do.

Usage: `generation_worker FOLDER`, where the models lie already; each rank writes FOLDER/rank<RANK>.pt.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor, nn

from rlhf.config import RLHFConfig
from rlhf.distributed import stopping
from rlhf.distributed.runtime import Runtime
from rlhf.errors import Stopped
from rlhf.rewards.learned import LearnedReward
from rlhf.stages.ppo import loop
from rlhf.stages.ppo.job import PPOJob
from rlhf.stages.ppo.models import FrozenModel, ShardedModel
from rlhf.stages.ppo.prepare import prepare_job
from rlhf.stages.ppo.rollout import Experience, gather_experience
from rlhf.worker import leave
from tests.adapter_example import fixed_batch
from tests.distributed.trl_worker import SHARD_ALL
from tests.ppo_example import ppo_config
from tests.stage_example import make_context

MAX_TOKENS = 8


def make_job(folder: Path, zero: dict[str, Any], num_processes: int) -> PPOJob:
    """Stage ppo on the models in FOLDER/models; two batches of responses a rank, of them five with an exact KL."""
    body = ppo_config(max_response_tokens=MAX_TOKENS, rollout_batch_size=2, exact_kl_rows=5).model_dump()
    distributed = {"num_processes": num_processes, "device": "cpu", "timeout_seconds": 300}
    config = RLHFConfig.model_validate({**body, "zero": zero, "distributed": distributed})
    policy, reward = str(folder / "models/policy"), str(folder / "models/reward_model")
    inputs = {"policy": policy, "reference": policy, "reward_model": reward, "value_model": reward}
    runtime = Runtime.start(config.distributed, config.zero, config.seed)
    return prepare_job(make_context(config, folder / "run", "ppo", inputs, runtime))


def stopping_at(job: PPOJob, step: int) -> PPOJob:
    """Responses end with their first token (`step` 1), whatever it is, or with none."""
    stop_ids = tuple(range(len(job.models.tokenizer))) if step == 1 else ()
    return replace(job, models=replace(job.models, stop_ids=stop_ids))


def responses(experience: Experience) -> dict[str, Tensor]:
    """What the rollout found, in the rows' order."""
    scored = experience.scored
    mask = scored.rollout.response_mask
    return {
        "mask": mask,
        "ids": torch.where(mask, scored.rollout.response_ids, -1),
        "sampling_logprobs": torch.where(mask, scored.rollout.sampling_logprobs, 0.0),
        "old_logprobs": torch.where(mask, scored.old_logprobs, 0.0),
        "reference_logprobs": torch.where(mask, scored.reference_logprobs, 0.0),
        "scores": experience.raw_scores,
        "exact_kl": experience.exact_kl,
    }


def fixed_logits(policy: nn.Module) -> Tensor:
    """What the policy says of a fixed batch."""
    ids, mask = fixed_batch()
    with torch.no_grad():
        logits: Tensor = policy(input_ids=ids, attention_mask=mask).logits
    return logits[mask]


def statuses(module: nn.Module) -> set[str]:
    """Whether the parameters are whole here (AVAILABLE) or shared out (NOT_AVAILABLE)."""
    names = {ZeroParamStatus.AVAILABLE: "AVAILABLE", ZeroParamStatus.NOT_AVAILABLE: "NOT_AVAILABLE"}
    return {names[parameter.ds_status] for parameter in _parameters(module)}


def num_resident(module: nn.Module) -> int:
    """Elements of the module's parameters that lie in this rank's memory: whole ones, or its share."""
    return sum(parameter.numel() + parameter.ds_tensor.numel() for parameter in _parameters(module))


def _parameters(module: nn.Module) -> list[Any]:
    """With what DeepSpeed gives them, of which no type knows."""
    return list(module.parameters())


@contextmanager
def counted_gathers(module: nn.Module) -> Iterator[list[int]]:
    """One entry for each time that parameters of `module` are gathered: how many of them."""
    import deepspeed

    original, found = deepspeed.zero.GatheredParameters, []
    watched = {id(parameter) for parameter in module.parameters()}

    class Counting(original):  # type: ignore[misc, valid-type]
        def __init__(self, params: Any, *args: Any, **kwargs: Any) -> None:
            params = list(params)
            number = sum(id(parameter) in watched for parameter in params)
            if number:
                found.append(number)
            super().__init__(params, *args, **kwargs)

    deepspeed.zero.GatheredParameters = Counting
    try:
        yield found
    finally:
        deepspeed.zero.GatheredParameters = original


class Told(stopping.StopPoll):
    """Rank 0 is told to stop at its third token."""

    def __init__(self, runtime: Runtime) -> None:
        super().__init__(runtime)
        self._is_told, self._num_tokens = runtime.is_main, 0

    def give_up_if_asked(self) -> None:
        self._num_tokens += 1
        if self._is_told and self._num_tokens == 3:
            stopping._requests.number = signal.SIGTERM
        super().give_up_if_asked()


def frozen_models(job: PPOJob) -> dict[str, nn.Module]:
    """Reference and reward model."""
    assert isinstance(job.models.reference, ShardedModel | FrozenModel)
    [entry] = job.models.rewards.rewards
    assert isinstance(entry.reward, LearnedReward)
    return {"reference": job.models.reference.model, "reward": entry.reward.model}


def main(folder: Path) -> None:
    zero = {"stage": 3, "shard_frozen": True, "extra": SHARD_ALL}
    job = make_job(folder, zero, num_processes=2)
    runtime, module = job.runtime, job.models.actor_critic
    engine = loop.make_engine(job)
    # Rank 0 runs one forward pass for a batch of responses, rank 1 eight.
    mine = stopping_at(job, 1 if runtime.is_main else MAX_TOKENS)
    seen: dict[str, Any] = {"before": statuses(module)}
    with counted_gathers(module) as gathers:
        experience = gather_experience(engine, mine.models, job.prompts, job.section, runtime, job.seed, 0)
    seen |= {"gathers": gathers, "after": statuses(module), "experience": responses(experience)}
    for name, model in frozen_models(job).items():
        whole = sum(parameter.ds_numel for parameter in _parameters(model))
        seen[name] = {"status": statuses(model), "resident": num_resident(model), "whole": whole}
    with engine.gathered(), job.models.actor_critic.policy_role() as policy:
        for _ in range(1 + 3 * runtime.rank):
            seen["logits"] = fixed_logits(policy)
        seen["within"] = statuses(module)
    try:
        gather_experience(engine, job.models, job.prompts, job.section, runtime, job.seed, 0, Told(runtime))
    except Stopped as stopped:
        seen["stopped"] = stopped.number
    stopping._requests.number = None
    seen["after stop"] = statuses(module)
    again = gather_experience(engine, mine.models, job.prompts, job.section, runtime, job.seed, 0)
    seen["again"] = responses(again)
    torch.save(seen, folder / f"rank{runtime.rank}.pt")
    runtime.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave(0)  # as a rank does
