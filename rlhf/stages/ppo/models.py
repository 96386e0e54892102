"""The models of PPO: one trainable module of policy and critic, a frozen reference, a frozen reward model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rlhf.errors import ConfigError
from rlhf.models.loading import disable_dropout, load_policy, load_tokenizer, place
from rlhf.models.scalar import ScalarModel, ensure_distinct_pad
from rlhf.models.scoring import response_logprobs_and_entropy
from rlhf.ops.sequences import position_ids
from rlhf.rewards.learned import LearnedReward, same_token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rlhf.stages.context import StageContext


class ActorCritic(nn.Module):
    """Policy and critic as one module, so that one engine shards both and one forward pass serves both losses."""

    def __init__(self, policy: PreTrainedModel, critic: ScalarModel) -> None:
        super().__init__()
        self.policy = policy
        self.critic = critic

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, num_prompt: int, temperature: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probs and entropies of the response tokens, and the values of the states they were chosen in.

        `input_ids` and `attention_mask` (bool) have shape (B, T), prompts left-padded to `num_prompt` tokens. All three
        results have shape (B, R). The value of response token t is read at the token before it: V(s_t), s_t being the
        prompt and the response up to, and without, t.
        """
        logprobs, entropy = response_logprobs_and_entropy(
            self.policy,
            input_ids=input_ids,
            attention_mask=attention_mask,
            num_prompt=num_prompt,
            temperature=temperature,
        )
        values = self.critic(input_ids, attention_mask, position_ids(attention_mask))[:, num_prompt - 1 : -1]
        return logprobs, entropy, values


@dataclass(frozen=True)
class PPOModels:
    """Everything PPO holds in memory."""

    tokenizer: PreTrainedTokenizerBase
    actor_critic: ActorCritic
    reference: PreTrainedModel
    reward: LearnedReward
    critic_tokenizer: PreTrainedTokenizerBase


def load_models(context: StageContext) -> PPOModels:
    """Loads the four models. Dropout is off in all of them (a ratio of 1 in the first epoch needs that).

    Raises `ConfigError` when a model does not fit the others.
    """
    config, runtime, inputs = context.config, context.runtime, context.inputs
    # In bf16 the policy runs as fp32 weights under autocast, or, under ZeRO, as bf16 weights. The reference is held the
    # same way and called in the same context, so that both round alike and the KL between equal models is 0.
    reference_dtype = runtime.dtype if config.zero.stage > 0 else torch.float32
    tokenizer = load_tokenizer(inputs["policy"], config.model, key="ppo.policy")
    policy = load_policy(inputs["policy"], config.model, torch.float32, key="ppo.policy")
    if not same_token_ids(tokenizer, load_tokenizer(inputs["reference"], config.model, key="ppo.reference")):
        raise ConfigError(
            f"ppo.reference={inputs['reference']} has other tokens than the policy {inputs['policy']}: there is no "
            "KL between them. Choose a reference with the policy's tokens."
        )
    reference = load_policy(inputs["reference"], config.model, reference_dtype, key="ppo.reference")
    reference = place(reference, runtime.device)
    reference.requires_grad_(False)
    reward = LearnedReward.load(
        inputs["reward_model"], config.model, dtype=runtime.dtype, device=runtime.device, policy_tokenizer=tokenizer
    )
    critic, critic_tokenizer = _load_critic(context, tokenizer)
    for model in (policy, reference, critic):
        disable_dropout(model)
    if config.ppo.gradient_checkpointing:
        policy.gradient_checkpointing_enable()
        critic.model.gradient_checkpointing_enable()
    return PPOModels(tokenizer, ActorCritic(policy, critic), reference, reward, critic_tokenizer)


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
