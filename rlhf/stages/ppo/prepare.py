"""From a stage's inputs to a `PPOJob`: loads the models in any of the three layouts, the rewards, prompts and data."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from rlhf.config import RLHFConfig
from rlhf.config.peft import LoRAConfig, uses_lora
from rlhf.config.ppo import PPOConfig
from rlhf.data import load_demonstrations
from rlhf.data.tokenization import EncodedPair, encode_pair, fit_lengths
from rlhf.errors import ConfigError, DataError
from rlhf.models.adapters import backbone_of, is_adapter
from rlhf.models.loading import disable_dropout, load_policy, load_tokenizer, place
from rlhf.models.positions import check_positions
from rlhf.models.sampling import Suppressed
from rlhf.models.scalar import ScalarModel, ensure_distinct_pad
from rlhf.models.scoring import check_chunked
from rlhf.models.shared_base import SharedBase
from rlhf.rewards.checks import check_columns
from rlhf.rewards.learned import same_token_ids
from rlhf.runs.tracking import Tracker
from rlhf.stages.ppo.job import PPOJob
from rlhf.stages.ppo.models import (
    ActorCritic,
    AdapterActorCritic,
    FrozenModel,
    PPOModels,
    Reference,
    ReferenceRole,
    Scoring,
    SeparateActorCritic,
    ShardedModel,
    SharedTrunkActorCritic,
)
from rlhf.stages.ppo.rewards import make_rewards, shard_rewards
from rlhf.stages.ppo.self_test import Facts, active_dropout, sampling_transforms
from rlhf.stages.ppo.truncation import Truncation
from rlhf.stages.sampling import EncodedPrompt, load_encoded_prompts, require_prompts, stop_token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlhf.config.zero import ZeroConfig
    from rlhf.distributed.runtime import Runtime
    from rlhf.rewards.composition import RewardSet
    from rlhf.stages.context import StageContext


def prepare_job(context: StageContext) -> PPOJob:
    """Everything stage ppo needs before its first update. Raises `ConfigError` when parts do not fit each other."""
    config, runtime, section = context.config, context.runtime, context.config.ppo
    models = load_models(context)
    notes: list[str] = []
    prompts = load_encoded_prompts(config.data, models.tokenizer, notes.append)["train"]
    check_prompts(prompts, models.policy, section)
    check_columns(section.rewards, prompts[0].columns)

    def open_tracker(done: int) -> Tracker:
        return context.open_tracker(section.num_updates, done)

    return PPOJob(
        section=section,
        models=models,
        prompts=prompts,
        runtime=runtime,
        open_tracker=open_tracker,
        checkpoints=context.stage.checkpoints,
        zero=config.zero,
        seed=config.seed,
        demonstrations=_load_demonstrations(config, models.tokenizer) if section.ptx_coefficient else (),
        notes=notes,
        provenance=context.provenance,
    )


def check_prompts(prompts: list[EncodedPrompt], policy: PreTrainedModel, section: PPOConfig) -> None:
    """Raises `DataError` without a prompt, `ConfigError` when prompt and response do not fit the model."""
    require_prompts(prompts, "train")
    check_positions(policy, max(len(prompt.ids) for prompt in prompts) + section.max_response_tokens)


def _load_demonstrations(config: RLHFConfig, tokenizer: PreTrainedTokenizerBase) -> list[EncodedPair]:
    splits = fit_lengths(load_demonstrations(config.data), tokenizer, config.data)
    if not splits.train:
        raise DataError(
            "ppo.ptx_coefficient mixes demonstrations into PPO, but the data has none: set it to 0, or give data with "
            "responses to imitate"
        )
    return [encode_pair(tokenizer, row.prompt, row.response) for row in splits.train]


def load_models(context: StageContext) -> PPOModels:
    """Loads the models. Dropout is off in all of them (a ratio of 1 in the first epoch needs that).

    Raises `ConfigError` when a model does not fit the others.
    """
    config, runtime, inputs, section = context.config, context.runtime, context.inputs, context.config.ppo
    tokenizer = load_tokenizer(inputs["policy"], config.model, key="ppo.policy")
    if not same_token_ids(tokenizer, load_tokenizer(inputs["reference"], config.model, key="ppo.reference")):
        raise ConfigError(
            f"ppo.reference={inputs['reference']} has other tokens than the policy {inputs['policy']}: there is no "
            "KL between them. Choose a reference with the policy's tokens."
        )
    base: SharedBase | None = None
    critic_tokenizer: PreTrainedTokenizerBase | None
    if uses_lora(config, "ppo"):
        base = _load_base(context)
        actor_critic: ActorCritic = AdapterActorCritic(base, shared_trunk=section.value_network == "shared_trunk")
        reference: Reference = ReferenceRole(base)
        critic_tokenizer = tokenizer
        if base.has_role("value") and "value_model" in inputs:
            critic_tokenizer = load_tokenizer(inputs["value_model"], config.model, key="ppo.value_model")
    else:
        policy = load_policy(inputs["policy"], config.model, torch.float32, key="ppo.policy")
        reference = FrozenModel(_load_reference(context))
        critic_tokenizer = None
        if section.value_network == "shared_trunk":
            actor_critic = SharedTrunkActorCritic(policy)
        else:
            critic, critic_tokenizer = _load_critic(context, tokenizer)
            actor_critic = SeparateActorCritic(policy, critic)
    rewards = make_rewards(context, tokenizer, base)
    models = assemble(
        section,
        runtime,
        tokenizer,
        actor_critic,
        reference,
        rewards,
        critic_tokenizer,
        same_artifact=_expect_same_start(inputs["policy"], inputs["reference"]),
        policy_has_adapter=is_adapter(inputs["policy"]),
    )
    return shard_frozen(models, runtime, config.zero) if config.zero.shard_frozen else models


def shard_frozen(models: PPOModels, runtime: Runtime, zero: ZeroConfig) -> PPOModels:
    """The models with the frozen ones sharded, those on the policy's base excepted: they are sharded with that.

    Scoring must then call every frozen model equally often on all ranks. It does: ranks have equally many rows, in
    equally many batches (`RLHFConfig` sees to that), and `exact_kl` fills up what is uneven.
    """
    from rlhf.distributed.frozen import FrozenShards

    def shard(model: torch.nn.Module) -> FrozenShards:
        return FrozenShards(model, runtime, zero)

    reference = models.reference
    if isinstance(reference, FrozenModel):
        reference = ShardedModel(reference.model, shard(reference.model))
    rewards = shard_rewards(models.rewards, shard, runtime.device)
    return replace(models, reference=reference, rewards=rewards, ranks_score_together=True)


def _expect_same_start(policy: str, reference: str) -> bool:
    """Whether the first KL must be 0: one artifact, or an adapter and the base below it.

    Nobody means the latter: the KL would then pull the policy back behind its own SFT. The self-test says so.
    """
    return reference in (policy, backbone_of(policy, "ppo.policy"))


def assemble(
    section: PPOConfig,
    runtime: Runtime,
    tokenizer: PreTrainedTokenizerBase,
    actor_critic: ActorCritic,
    reference: Reference,
    rewards: RewardSet,
    critic_tokenizer: PreTrainedTokenizerBase | None,
    *,
    same_artifact: bool,
    policy_has_adapter: bool = False,
) -> PPOModels:
    """The parts as one, with dropout off and the settings of sampling and scoring.

    `same_artifact` and `policy_has_adapter` (also one that was merged on loading): see `Facts`.
    """
    for part in actor_critic.modules():
        if isinstance(part, PreTrainedModel):
            disable_dropout(part)
    with actor_critic.policy_role() as policy:
        stop_ids = tuple(stop_token_ids(policy, tokenizer, section.stop_tokens))
        suppressed = Suppressed(stop_ids, section.min_response_tokens) if section.min_response_tokens else None
        if section.logprob_chunk_tokens is not None:
            check_chunked(policy)
        if section.reference_refresh_every is not None and isinstance(reference, FrozenModel):
            reference.untie_like(policy)
    base = actor_critic.base if isinstance(actor_critic, AdapterActorCritic) else None
    facts = Facts(
        same_artifact=same_artifact,
        precision=runtime.precision,
        temperature=section.temperature,
        policy_has_adapter=policy_has_adapter or (base is not None and base.policy_adapter_source is not None),
        reference_kind="own_model" if base is None else base.reference_kind,
        active_dropout=active_dropout(actor_critic),
        gradient_checkpointing=section.gradient_checkpointing,
        suppressed_slots=section.min_response_tokens,
        sampling_transforms=sampling_transforms(policy.generation_config),
        architecture=type(policy).__name__,
    )
    scoring = Scoring(section.temperature, suppressed, section.logprob_chunk_tokens)
    truncation = Truncation.of(section, tokenizer)
    return PPOModels(
        tokenizer, actor_critic, reference, rewards, critic_tokenizer, facts, stop_ids, scoring, truncation=truncation
    )


def _load_reference(context: StageContext) -> PreTrainedModel:
    config, runtime = context.config, context.runtime
    # In bf16 the policy runs as fp32 weights under autocast, or, under ZeRO, as bf16 weights. The reference is held the
    # same way and called in the same context, so that both round alike and the KL between equal models is 0.
    dtype = runtime.dtype if config.zero.stage > 0 else torch.float32
    reference = load_policy(context.inputs["reference"], config.model, dtype, key="ppo.reference")
    disable_dropout(reference)
    # What is going to be sharded is not placed whole before.
    return reference if config.zero.shard_frozen else place(reference, runtime.device)


def _load_base(context: StageContext) -> SharedBase:
    config, inputs, section = context.config, context.inputs, context.config.ppo
    assert isinstance(config.peft, LoRAConfig)
    base = SharedBase.build(
        policy=inputs["policy"],
        reference=inputs["reference"],
        reward_model=inputs.get("reward_model"),
        value_model=inputs.get("value_model"),
        lora=config.peft,
        model_config=config.model,
        seed=config.seed,
        dtype=context.runtime.dtype,
        value_init=section.value_init,
        own_reference=section.reference_refresh_every is not None,
        with_value=section.value_network == "separate",
    )
    if context.config.zero.stage < 3:  # else the engine shares it out, parameter by parameter
        base.to(context.runtime.device)
    return base


def _load_critic(
    context: StageContext, tokenizer: PreTrainedTokenizerBase
) -> tuple[ScalarModel, PreTrainedTokenizerBase]:
    config, inputs = context.config, context.inputs
    if "value_model" not in inputs:
        critic = ScalarModel.from_policy(
            inputs["policy"], seed=config.seed, zero_head=True, config=config.model, key="ppo.policy"
        )
        return critic, ensure_distinct_pad(tokenizer, critic.model)
    critic_tokenizer = load_tokenizer(inputs["value_model"], config.model, key="ppo.value_model")
    if not same_token_ids(tokenizer, critic_tokenizer):
        raise ConfigError(
            f"the critic cannot start from {inputs['value_model']}, whose tokenizer is not the policy's. "
            "Set ppo.value_init=policy, or ppo.value_model to a model with the policy's tokens."
        )
    return ScalarModel.load(inputs["value_model"], config.model, key="ppo.value_model"), critic_tokenizer
