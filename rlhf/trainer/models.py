"""The trainer's models: instances, folders or hub ids, put together as stage ppo does."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedModel

from rlhf.config.model import ModelConfig
from rlhf.config.ppo import PPOConfig
from rlhf.errors import ArtifactError, ConfigError
from rlhf.models.loading import (
    check_vocabulary,
    disable_dropout,
    load_policy,
    load_tokenizer,
    mend_generation_config,
    own_memory,
    place,
    train_every_embedding,
)
from rlhf.models.paths import is_ensemble
from rlhf.models.scalar import ScalarModel, ensure_distinct_pad
from rlhf.rewards.build import LoadedModel
from rlhf.rewards.composition import ScoreStatistics
from rlhf.rewards.ensemble import EnsembleReward
from rlhf.rewards.learned import LearnedReward, same_token_ids
from rlhf.stages.ppo.models import FrozenModel, SeparateActorCritic, SharedTrunkActorCritic
from rlhf.trainer.inputs import TokenizerSource, prepared_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlhf.config.zero import ZeroConfig
    from rlhf.distributed.runtime import Runtime

ModelSource = PreTrainedModel | str | Path
ScalarSource = PreTrainedModel | ScalarModel | str | Path


@dataclass(frozen=True)
class ModelArguments:
    """The trainer's arguments that are models, as they were given."""

    model: ModelSource
    ref_model: ModelSource | None = None
    reward_model: ScalarSource | None = None
    value_model: ScalarSource | None = None
    reward_processing_class: TokenizerSource | None = None


def check_arguments(args: PPOConfig, models: ModelArguments) -> None:
    """Raises `ConfigError` for models that are named twice, of a wrong type, or that nothing would use."""
    for field, argument in (
        ("policy", "model"),
        ("reference", "ref_model"),
        ("reward_model", "reward_model"),
        ("value_model", "value_model"),
    ):
        if getattr(args, field) is not None:
            raise ConfigError(
                f"args.{field} is for the rlhf command; give the trainer {argument}={getattr(args, field)!r}"
            )
    check_scalar_source(models.reward_model, "reward_model")
    check_scalar_source(models.value_model, "value_model")
    if args.value_network == "shared_trunk" and models.value_model is not None:
        raise ConfigError(
            "args.value_network=shared_trunk puts the critic on the policy's trunk: leave value_model out"
        )


def language_model(source: object, name: str, dtype: torch.dtype) -> PreTrainedModel:
    """The language model that argument `name` gives, in `dtype`: an instance itself, a folder's or hub id's loaded.

    Raises `ConfigError` for what is no language model with whole weights of its own; errors as of `load_policy`.
    """
    if isinstance(source, str | Path):
        return load_policy(source, None, dtype, key=name)
    if not isinstance(source, PreTrainedModel):
        hints = {
            "PeftModel": "; merge its adapter (merge_and_unload), or pass the base and a peft_config",
            "ValueHead": "; pass its .pretrained_model, the critic is made by itself",
        }
        hint = next((text for part, text in hints.items() if part in type(source).__name__), "")
        raise ConfigError(
            f"{name} must be a transformers model, or the folder or hub id of one, not {type(source).__name__}{hint}"
        )
    _check_whole(source, name)
    if source.get_output_embeddings() is None:
        raise ConfigError(
            f"{name} is a {type(source).__name__}, which does not write text; expected a …ForCausalLM, or a sequence "
            "to sequence model with its head"
        )
    # Else the trained model might be refused when it is saved.
    mend_generation_config(source)
    return _adopt(source, dtype)


def check_scalar_source(source: object, name: str) -> None:
    """Raises `ConfigError` when argument `name` can be no reward or value model."""
    if source is None or isinstance(source, str | Path | PreTrainedModel | ScalarModel):
        return
    function = callable(source) and not isinstance(source, nn.Module)
    raise ConfigError(
        f"{name} must be a sequence classifier of transformers with one label, or the folder or hub id of one, not "
        f"{type(source).__name__}" + ("; pass a Python function as reward_funcs" if function else "")
    )


def scalar_model(source: ScalarSource, name: str, dtype: torch.dtype) -> ScalarModel:
    """The sequence classifier with one label that argument `name` gives. Errors as of `ScalarModel.load`."""
    if isinstance(source, str | Path):
        return ScalarModel.load(source, None, dtype, key=name)
    model = _inner(source)
    _check_whole(model, name)
    if model.config.num_labels != 1:
        raise ArtifactError(
            f"{name} is a {type(model).__name__} with {model.config.num_labels} labels; a score is one number. Load it "
            "with num_labels=1, or write a reward function that makes one number of its labels"
        )
    scalar = ScalarModel(_adopt(model, dtype))
    scalar.eval()
    return scalar


def _check_whole(model: PreTrainedModel, name: str) -> None:
    if getattr(model, "is_quantized", False):
        raise ConfigError(
            f"{name} is quantised, and its weights cannot be trained or copied. Load it without quantisation"
        )
    if hasattr(model, "peft_config"):
        raise ConfigError(f"{name} carries adapters. Merge them into it, or pass the plain model and a peft_config")


def _adopt(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The caller's model as one that was loaded: same precision, same memory, nothing left out of training."""
    nn.Module.to(model, dtype)
    own_memory(model)
    train_every_embedding(model)
    model.eval()
    return model


def load_reference(
    models: ModelArguments,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    runtime: Runtime,
    zero: ZeroConfig,
) -> FrozenModel:
    """`ref_model`, else a frozen copy of the policy as it is now.

    Raises `ConfigError` when it has other tokens than the policy.
    """
    # Held as the policy will be, so that both round alike: see `rlhf.stages.ppo.prepare`.
    dtype = runtime.dtype if zero.stage > 0 else torch.float32
    source = models.ref_model
    if source is None or source is models.model:
        reference = copy.deepcopy(policy)
        nn.Module.to(reference, dtype)
    else:
        if isinstance(source, str | Path) and not same_token_ids(tokenizer, load_tokenizer(source, key="ref_model")):
            raise ConfigError(f"ref_model={source} has other tokens than the policy: there is no KL between them")
        reference = language_model(source, "ref_model", dtype)
        sizes = [int(part.config.get_text_config().vocab_size) for part in (policy, reference)]
        if sizes[0] != sizes[1]:
            raise ConfigError(
                f"ref_model writes {sizes[1]} tokens and the policy {sizes[0]}: there is no KL between them. Give both "
                "the same tokenizer and size of vocabulary"
            )
    disable_dropout(reference)
    return FrozenModel(place(reference, runtime.device))


def load_reward_model(
    models: ModelArguments, tokenizer: PreTrainedTokenizerBase, runtime: Runtime
) -> LoadedModel | None:
    """The reward model, frozen and on its device; None without one. Call it after `load_critic`, which copies it."""
    source = models.reward_model
    if source is None:
        return None
    if isinstance(source, str | Path) and is_ensemble(source):
        ensemble = EnsembleReward.of_folder(
            str(source),
            ModelConfig(),
            dtype=runtime.dtype,
            device=runtime.device,
            policy_tokenizer=tokenizer,
            key="reward_model",
        )
        return LoadedModel(ensemble)
    scalar = scalar_model(source, "reward_model", runtime.dtype)
    scalar.requires_grad_(False)
    disable_dropout(scalar)
    own = scalar_tokenizer(models, source, "reward_model", tokenizer)
    check_vocabulary(scalar.model, own, "reward_processing_class")
    folder = str(source) if isinstance(source, str | Path) else scalar.model.name_or_path
    statistics = ScoreStatistics.read(folder) if folder else None
    scalar.to(runtime.device).eval()
    learned = LearnedReward(scalar, own, statistics, runtime.device, same_token_ids(tokenizer, own))
    return LoadedModel(learned, statistics)


def scalar_tokenizer(
    models: ModelArguments, source: ScalarSource, name: str, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedTokenizerBase:
    """The tokenizer of a reward or value model: the one given for it, else its folder's, else the policy's."""
    if source is models.reward_model and models.reward_processing_class is not None:
        return prepared_tokenizer(models.reward_processing_class, "reward_processing_class")
    folder = str(source) if isinstance(source, str | Path) else _inner(source).name_or_path
    return load_tokenizer(folder, key=name) if folder else tokenizer


def load_critic(
    args: PPOConfig, models: ModelArguments, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int
) -> tuple[ScalarModel, PreTrainedTokenizerBase]:
    """A float32 critic, never the reward model's own instance, and the tokenizer it is saved with.

    `value_model`, else, with `args.value_init=reward_model`, a copy of the reward model, else the policy with a new
    head of zeros. Raises `ConfigError` when its tokens are not the policy's.
    """
    source, name = models.value_model, "value_model"
    if source is None and args.value_init == "reward_model":
        source, name = models.reward_model, "reward_model"
    if source is None:
        critic = ScalarModel.from_policy(policy, seed=seed, zero_head=True)
        train_every_embedding(critic.model)
        return critic, ensure_distinct_pad(tokenizer, critic.model)
    critic_tokenizer = scalar_tokenizer(models, source, name, tokenizer)
    if not same_token_ids(tokenizer, critic_tokenizer):
        raise ConfigError(
            f"the critic cannot start from {name}, whose tokens are not the policy's. Set args.value_init=policy, or "
            "value_model to a model with the policy's tokens"
        )
    if isinstance(source, str | Path):
        return scalar_model(source, name, torch.float32), critic_tokenizer
    critic = scalar_model(copy.deepcopy(source) if source is models.reward_model else source, name, torch.float32)
    return critic, ensure_distinct_pad(critic_tokenizer, critic.model)


def _inner(source: PreTrainedModel | ScalarModel) -> PreTrainedModel:
    return source.model if isinstance(source, ScalarModel) else source


def actor_critic_of(
    args: PPOConfig, models: ModelArguments, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int
) -> tuple[SeparateActorCritic | SharedTrunkActorCritic, PreTrainedTokenizerBase | None]:
    """The module to train, and the critic's tokenizer where it is a model of its own."""
    if args.value_network == "shared_trunk":
        return SharedTrunkActorCritic(policy), None
    critic, critic_tokenizer = load_critic(args, models, policy, tokenizer, seed)
    return SeparateActorCritic(policy, critic), critic_tokenizer
