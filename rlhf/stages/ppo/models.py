"""The models of PPO: one trainable module of policy and critic, a frozen reference, and the rewards."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor, nn

from rlhf.models.output_head import has_tied_head, untie_head
from rlhf.models.sampling import Suppressed, suppress_logits
from rlhf.models.scalar import ScalarModel
from rlhf.models.scoring import (
    logprobs_from_hidden,
    response_hidden_states,
    response_logits,
    response_logprobs,
    response_logprobs_and_entropy,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rlhf.distributed.frozen import FrozenShards
    from rlhf.models.shared_base import SharedBase
    from rlhf.rewards.composition import RewardSet
    from rlhf.stages.ppo.self_test import Facts
    from rlhf.stages.ppo.truncation import Truncation


@dataclass(frozen=True)
class Scoring:
    """How log-probs are computed, the same for old, new and reference ones and for sampling.

    `chunk_tokens`: logits exist for that many tokens at a time (None: for all of a micro-batch).
    """

    temperature: float
    suppressed: Suppressed | None = None
    chunk_tokens: int | None = None


@dataclass(frozen=True)
class TokenBatch:
    """Prompts left-padded to `num_prompt` columns, then responses: ids (B, T) int64 and mask (B, T) bool."""

    input_ids: Tensor
    attention_mask: Tensor
    num_prompt: int

    def of_policy(self, model: nn.Module, scoring: Scoring) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies (B, R) of the responses under a language model."""
        return response_logprobs_and_entropy(
            model,
            input_ids=self.input_ids,
            attention_mask=self.attention_mask,
            num_prompt=self.num_prompt,
            temperature=scoring.temperature,
            suppressed=scoring.suppressed,
            chunk_tokens=scoring.chunk_tokens,
        )

    def logprobs(self, model: nn.Module, scoring: Scoring) -> Tensor:
        """Log-probs (B, R) of the responses under a language model, without their entropies."""
        return response_logprobs(
            model,
            input_ids=self.input_ids,
            attention_mask=self.attention_mask,
            num_prompt=self.num_prompt,
            temperature=scoring.temperature,
            suppressed=scoring.suppressed,
            chunk_tokens=scoring.chunk_tokens,
        )

    def logits(self, model: nn.Module, scoring: Scoring) -> Tensor:
        """Logits (B, R, V) as they are sampled from, before the temperature."""
        logits = response_logits(
            model, input_ids=self.input_ids, attention_mask=self.attention_mask, num_prompt=self.num_prompt
        )
        return suppress_logits(logits, scoring.suppressed)


# Demonstrations are imitated as they are, whatever the sampling does.
IMITATION = Scoring(temperature=1.0)


class ActorCritic(nn.Module, ABC):
    """Policy and critic as one module, so that one engine shards both and one forward pass serves all losses."""

    def forward(
        self, batch: TokenBatch, scoring: Scoring, demonstrations: TokenBatch | None = None
    ) -> tuple[Tensor, ...]:
        """Log-probs and entropies of the response tokens and the values of the states they were chosen in, all (B, R).

        The value of response token t is that of its state: the prompt and the response up to, and without, t. With
        `demonstrations` a fourth tensor follows: the log-probs of their responses.
        """
        logprobs, entropy, values = self.evaluate(batch, scoring)
        if demonstrations is None:
            return logprobs, entropy, values
        with self.policy_role() as policy:
            return logprobs, entropy, values, demonstrations.logprobs(policy, IMITATION)

    @abstractmethod
    def evaluate(self, batch: TokenBatch, scoring: Scoring) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probs, entropies and values."""

    @abstractmethod
    def policy_role(self) -> AbstractContextManager[PreTrainedModel]:
        """The language model that is the policy, to sample from."""

    @abstractmethod
    def policy_parameters(self) -> list[nn.Parameter]:
        """What the policy's learning rate is for."""

    @abstractmethod
    def value_parameters(self) -> list[nn.Parameter]:
        """What the critic's learning rate is for."""

    @abstractmethod
    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass."""


class WholePolicy(ActorCritic):
    """A policy that is a transformer of its own, all of it trained."""

    def __init__(self, policy: PreTrainedModel) -> None:
        super().__init__()
        self.policy = policy

    @contextmanager
    def policy_role(self) -> Iterator[PreTrainedModel]:
        yield self.policy

    def policy_parameters(self) -> list[nn.Parameter]:
        return list(self.policy.parameters())


class SeparateActorCritic(WholePolicy):
    """Two transformers."""

    def __init__(self, policy: PreTrainedModel, critic: ScalarModel) -> None:
        super().__init__(policy)
        self.critic = critic

    def evaluate(self, batch: TokenBatch, scoring: Scoring) -> tuple[Tensor, Tensor, Tensor]:
        logprobs, entropy = batch.of_policy(self.policy, scoring)
        values = self.critic.response_values(batch.input_ids, batch.attention_mask, batch.num_prompt)
        return logprobs, entropy, values[:, :-1]

    def value_parameters(self) -> list[nn.Parameter]:
        return list(self.critic.parameters())

    def enable_gradient_checkpointing(self) -> None:
        _recompute_activations(self.policy)
        _recompute_activations(self.critic.model)


def _recompute_activations(model: PreTrainedModel) -> None:
    """Switches gradient checkpointing on, by the name that this version of transformers has for it."""
    newer = getattr(model, "activation_checkpointing_enable", None)
    (newer or model.gradient_checkpointing_enable)()


class SharedTrunkActorCritic(WholePolicy):
    """One transformer with two heads: its own for the tokens, and a linear one for the value, zero at the start."""

    def __init__(self, policy: PreTrainedModel) -> None:
        super().__init__(policy)
        weight = cast(nn.Embedding, policy.get_input_embeddings()).weight
        self.value_head = zero_head(hidden_size(policy), weight.device)

    def evaluate(self, batch: TokenBatch, scoring: Scoring) -> tuple[Tensor, Tensor, Tensor]:
        return _on_trunk(self.policy, self.value_head, batch, scoring)

    def value_parameters(self) -> list[nn.Parameter]:
        return list(self.value_head.parameters())

    def enable_gradient_checkpointing(self) -> None:
        _recompute_activations(self.policy)


class AdapterActorCritic(ActorCritic):
    """Roles on one base: the policy is an adapter; the critic another one with a head, or a head on the policy's."""

    def __init__(self, base: SharedBase, *, shared_trunk: bool) -> None:
        super().__init__()
        self.base = base
        model = base.model
        self.value_head = zero_head(hidden_size(model), model.device) if shared_trunk else None

    def evaluate(self, batch: TokenBatch, scoring: Scoring) -> tuple[Tensor, Tensor, Tensor]:
        if self.value_head is not None:
            with self.base.role("policy") as policy:
                return _on_trunk(policy, self.value_head, batch, scoring)
        with self.base.role("policy") as policy:
            logprobs, entropy = batch.of_policy(policy, scoring)
        values = self.base.response_values("value", batch.input_ids, batch.attention_mask, batch.num_prompt)
        return logprobs, entropy, values[:, :-1]

    @contextmanager
    def policy_role(self) -> Iterator[PreTrainedModel]:
        with self.base.role("policy") as policy:
            yield policy

    def policy_parameters(self) -> list[nn.Parameter]:
        return self.base.parameters_of("policy")

    def value_parameters(self) -> list[nn.Parameter]:
        if self.value_head is not None:
            return list(self.value_head.parameters())
        return self.base.parameters_of("value")

    def enable_gradient_checkpointing(self) -> None:
        self.base.enable_gradient_checkpointing()


def hidden_size(model: PreTrainedModel) -> int:
    """Width of the states that the output head takes."""
    config = model.config
    return int(getattr(config, "hidden_size", 0) or config.d_model)


def zero_head(width: int, device: torch.device) -> nn.Linear:
    """A linear map to one number that says 0 at the start: the first advantages are then the returns."""
    head = nn.Linear(width, 1, device=device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def _on_trunk(
    policy: PreTrainedModel, head: nn.Linear, batch: TokenBatch, scoring: Scoring
) -> tuple[Tensor, Tensor, Tensor]:
    hidden = response_hidden_states(
        policy, input_ids=batch.input_ids, attention_mask=batch.attention_mask, num_prompt=batch.num_prompt
    )
    logprobs, entropy = logprobs_from_hidden(
        policy,
        hidden,
        batch.input_ids[:, batch.num_prompt :],
        temperature=scoring.temperature,
        suppressed=scoring.suppressed,
        response_mask=batch.attention_mask[:, batch.num_prompt :],
        chunk_tokens=scoring.chunk_tokens,
    )
    values: Tensor = head(hidden.to(head.weight.dtype))
    return logprobs, entropy, values.squeeze(-1).float()


class Reference(Protocol):
    """The frozen model of the KL."""

    def role(self) -> AbstractContextManager[PreTrainedModel]:
        """The language model, called as the policy is."""
        ...

    def become(self, actor_critic: ActorCritic) -> None:
        """Takes over the policy's weights, which must be whole (within `TrainingEngine.modified`)."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Weights that no other checkpoint holds."""
        ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes back what `state_dict` gave."""
        ...


class FrozenModel:
    """A reference with weights of its own."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        model.requires_grad_(False)

    @contextmanager
    def role(self) -> Iterator[PreTrainedModel]:
        yield self.model

    def untie_like(self, policy: PreTrainedModel) -> None:
        """Makes room for the policy's weights, which has a head of its own after an adapter on it was merged."""
        if has_tied_head(self.model) and not has_tied_head(policy):
            untie_head(self.model)

    def become(self, actor_critic: ActorCritic) -> None:
        with actor_critic.policy_role() as policy:
            self.model.load_state_dict(policy.state_dict())

    def state_dict(self) -> dict[str, Tensor]:
        return {name: value.detach().to("cpu", copy=True) for name, value in self.model.state_dict().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.model.load_state_dict(state)


class ShardedModel:
    """A reference with weights of its own that no rank holds whole. All ranks call every method together."""

    def __init__(self, model: PreTrainedModel, shards: FrozenShards) -> None:
        self.model = model
        self._shards = shards

    @contextmanager
    def role(self) -> Iterator[PreTrainedModel]:
        with self._shards.ready():
            yield self.model

    def become(self, actor_critic: ActorCritic) -> None:
        with actor_critic.policy_role() as policy:
            self._shards.load_state_dict(policy.state_dict())

    def state_dict(self) -> dict[str, Tensor]:
        """On rank 0; on the others nothing."""
        return self._shards.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._shards.load_state_dict(state)


class ReferenceRole:
    """A reference on the shared base: the adapter switched off, or a frozen adapter. The engine's checkpoint has it."""

    def __init__(self, base: SharedBase) -> None:
        self.base = base

    @contextmanager
    def role(self) -> Iterator[PreTrainedModel]:
        with self.base.role("reference") as model:
            yield model

    def become(self, actor_critic: ActorCritic) -> None:
        self.base.copy_adapter("policy", "reference")

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        pass


@dataclass(frozen=True)
class PPOModels:
    """Everything PPO holds in memory. `critic_tokenizer` is None where the critic is not published by itself.

    `ranks_score_together`: a frozen model is sharded, so that no rank can score, or leave off, without the others.
    `truncation`: what is scored is cut; None: whole responses are.
    """

    tokenizer: PreTrainedTokenizerBase
    actor_critic: ActorCritic
    reference: Reference
    rewards: RewardSet
    critic_tokenizer: PreTrainedTokenizerBase | None
    facts: Facts
    stop_ids: tuple[int, ...]
    scoring: Scoring
    ranks_score_together: bool = False
    truncation: Truncation | None = None

    @property
    def policy(self) -> PreTrainedModel:
        """The language model the policy is made of, whatever adapter is active."""
        with self.actor_critic.policy_role() as policy:
            return policy

    @property
    def pad_id(self) -> int:
        """What fills padding; masks say where that is, so it may be EOS."""
        pad, eos = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        return int(eos if pad is None else pad)
