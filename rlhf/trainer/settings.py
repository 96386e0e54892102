"""What must be equal for a training to be continued: `trainer.json` holds it, and every checkpoint its fingerprint."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rlhf.config.peft import LoRAConfig
from rlhf.config.ppo import BOOKKEEPING, PPOConfig
from rlhf.runs.files import fingerprint
from rlhf.trainer.assembly import frozen_parts

if TYPE_CHECKING:
    from rlhf.data.tokenization import EncodedPair
    from rlhf.stages.ppo.models import PPOModels
    from rlhf.stages.sampling import EncodedPrompt


def settings_of(
    args: PPOConfig,
    seed: int,
    lora: LoRAConfig | None,
    models: PPOModels,
    prompts: Sequence[EncodedPrompt],
    demonstrations: Sequence[EncodedPair],
) -> dict[str, Any]:
    """Everything that decides the result and can be compared, as JSON, before the first update.

    Of the policy and the critic it is the architecture: their weights are the checkpoint's. The base of adapters is
    compared where the checkpoint is read. What Python functions compute is not compared.
    """
    section = {name: value for name, value in args.model_dump(mode="json").items() if name not in BOOKKEEPING}
    rewards = models.rewards
    statistics = {entry.name: entry.statistics for entry in rewards.rewards if entry.statistics is not None}
    return {
        **{f"args.{name}": value for name, value in section.items()},
        "seed": seed,
        "train_dataset": fingerprint([prompt.key for prompt in prompts]),
        "ptx_dataset": fingerprint(list(demonstrations)) if args.ptx_coefficient else None,
        "peft_config": None if lora is None else lora.model_dump(mode="json", exclude={"stages", "dropout"}),
        "rewards": rewards.weights,
        **{f"rewards.{name}.statistics": dataclasses.asdict(value) for name, value in statistics.items()},
        "model": _describe(models),
        **{name: weights_fingerprint(part) for name, part in frozen_parts(models).items()},
    }


def weights_fingerprint(model: nn.Module) -> str:
    """Tells models apart, not adversaries: the sum of each tensor's bits, rounded to bf16 and read as integers.

    So it is the same on every device, whatever the order of adding up, and in fp32 as in bf16.
    """
    bits = (parameter.detach().to(torch.bfloat16).view(torch.int16) for parameter in model.parameters())
    return fingerprint([int(tensor.sum(dtype=torch.int64)) for tensor in bits])


def _describe(models: PPOModels) -> str:
    policy = models.policy
    return f"{type(policy).__name__} of {sum(parameter.numel() for parameter in policy.parameters())} weights"
