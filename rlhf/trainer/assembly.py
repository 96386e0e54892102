"""From the trainer's arguments to the models of a `PPOJob`, in the order and with the parts of stage ppo."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from rlhf.config.model import ModelConfig
from rlhf.config.peft import LoRAConfig
from rlhf.config.ppo import PPOConfig
from rlhf.errors import ConfigError
from rlhf.models.adapters import is_adapter
from rlhf.rewards.build import LoadedModel, LoadModel, folder_loader
from rlhf.rewards.composition import ScoreStatistics
from rlhf.rewards.learned import LearnedReward
from rlhf.stages.ppo.models import ActorCritic, AdapterActorCritic, FrozenModel, PPOModels, Reference, ReferenceRole
from rlhf.stages.ppo.prepare import assemble
from rlhf.stages.ppo.rewards import RewardRole
from rlhf.trainer.adapters import adapter_critic_tokenizer, shared_base
from rlhf.trainer.inputs import TokenizerSource, tokenizer_of
from rlhf.trainer.models import (
    ModelArguments,
    actor_critic_of,
    language_model,
    load_reference,
    load_reward_model,
)
from rlhf.trainer.rewards import NamedFunction, make_rewards

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rlhf.config.zero import ZeroConfig
    from rlhf.distributed.runtime import Runtime
    from rlhf.models.shared_base import SharedBase


@dataclass(frozen=True)
class Setting:
    """What the models depend on besides themselves."""

    args: PPOConfig
    runtime: Runtime
    zero: ZeroConfig
    seed: int
    lora: LoRAConfig | None


def load_models(
    setting: Setting,
    given: ModelArguments,
    processing_class: TokenizerSource | None,
    functions: Sequence[NamedFunction],
    weights: Sequence[float],
) -> PPOModels:
    """Loads or takes over everything, places it on this rank's device, and checks that the parts fit."""
    args, runtime = setting.args, setting.runtime
    base: SharedBase | None = None
    actor_critic: ActorCritic
    reference: Reference
    critic_tokenizer: PreTrainedTokenizerBase | None
    if setting.lora is not None:
        base = shared_base(args, given, setting.lora, runtime, setting.seed)
        tokenizer = _tokenizer(processing_class, given, base.model)
        actor_critic = AdapterActorCritic(base, shared_trunk=args.value_network == "shared_trunk")
        reference = ReferenceRole(base)
        critic_tokenizer = adapter_critic_tokenizer(args, given, tokenizer)
    else:
        policy = language_model(given.model, "model", torch.float32)
        tokenizer = _tokenizer(processing_class, given, policy)
        reference = load_reference(given, policy, tokenizer, runtime, setting.zero)
        actor_critic, critic_tokenizer = actor_critic_of(args, given, policy, tokenizer, setting.seed)
    model = _reward_model(given, tokenizer, runtime, base)
    loader = _loader(model, tokenizer, runtime)
    rewards = make_rewards(args, args.rewards, model, loader, functions, weights)
    actor_critic.to(runtime.device)
    models = assemble(
        args,
        runtime,
        tokenizer,
        actor_critic,
        reference,
        rewards,
        critic_tokenizer,
        same_artifact=_same_start(given),
        policy_has_adapter=isinstance(given.model, str | Path) and is_adapter(given.model),
    )
    actor_critic.eval()
    return models


def frozen_parts(models: PPOModels) -> dict[str, nn.Module]:
    """The reference and the reward models, by a name for messages, as far as they do not lie on the policy's base."""
    parts: dict[str, nn.Module] = {}
    if isinstance(models.reference, FrozenModel):
        parts["ref_model"] = models.reference.model
    for entry in models.rewards.rewards:
        if isinstance(entry.reward, LearnedReward):
            parts[f"rewards.{entry.name}"] = entry.reward.model
    return parts


def _tokenizer(
    source: TokenizerSource | None, given: ModelArguments, model: PreTrainedModel
) -> PreTrainedTokenizerBase:
    if source is None and isinstance(given.model, str | Path):
        source = given.model
    return tokenizer_of(source, model, "processing_class")


def _reward_model(
    given: ModelArguments, tokenizer: PreTrainedTokenizerBase, runtime: Runtime, base: SharedBase | None
) -> LoadedModel | None:
    if base is not None and base.has_role("reward"):
        return LoadedModel(RewardRole(base), ScoreStatistics.read(str(given.reward_model)))
    return load_reward_model(given, tokenizer, runtime)


def _loader(model: LoadedModel | None, tokenizer: PreTrainedTokenizerBase, runtime: Runtime) -> LoadModel:
    """Reward models that `args.rewards` names by their path; without a path it is the argument's."""
    load_folder = folder_loader(
        None, ModelConfig(), dtype=runtime.dtype, device=runtime.device, policy_tokenizer=tokenizer
    )

    def load(path: str | None, key: str) -> LoadedModel:
        if path is not None:
            return load_folder(path, key)
        if model is None:
            raise ConfigError("args.rewards has a reward of type model without a path, and there is no reward_model")
        return model

    return load


def _same_start(given: ModelArguments) -> bool:
    """Whether the first KL must be 0: the reference is the policy as it starts."""
    reference = given.ref_model
    if reference is None or reference is given.model:
        return True
    return (
        isinstance(reference, str | Path) and isinstance(given.model, str | Path) and str(reference) == str(given.model)
    )
