"""The batches of PPO: PromptBatch -> Rollout -> ScoredRollout -> PPOBatch, each wrapping the one before.

An update takes a `PPOBatch`, which only a `ScoredRollout` can become, so it cannot receive an unscored batch. Axes:
`B` rows, `P` prompt (left-padded), `R` response (right-padded), `T = P + R`. Row `b` is the same sample in every field.
What stands in padded slots is arbitrary; every reader goes through the masks. Log-probs and values of slot t belong
to response token t: they come from the state before it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self, get_type_hints

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf.ops import kl as kl_estimators
from rlhf.ops._checks import check_bool, check_floating, check_integer, check_prefix
from rlhf.ops.advantages import ScorePosition, gae, token_rewards, value_mask
from rlhf.ops.masked import masked_whiten
from rlhf.ops.sequences import position_ids

KLEstimator = Literal["k1", "k2", "k3"]
_ESTIMATORS = {"k1": kl_estimators.k1, "k2": kl_estimators.k2, "k3": kl_estimators.k3}


_schemas: dict[type[Batch], dict[str, type[Batch] | str]] = {}


def _schema_of(kind: type[Batch]) -> dict[str, type[Batch] | str]:
    """Each field of a batch: the class of the batch it wraps, or the axes of its tensor as its annotation has them."""
    if kind not in _schemas:
        _schemas[kind] = {
            name: hint if isinstance(hint, type) and issubclass(hint, Batch) else hint.dim_str.strip()
            for name, hint in get_type_hints(kind).items()
        }
    return _schemas[kind]


class Batch:
    """What all four batches can do. Tensors of the wrapped batches come along in every operation."""

    def __len__(self) -> int:
        """Number of rows."""
        return len(next(iter(self.to_tensors().values())))

    def _with_axes(self) -> dict[str, tuple[Tensor, str]]:
        """Every tensor by name, wrapped batches included, with its axes: `B`, `B P` or `B R`."""
        result: dict[str, tuple[Tensor, str]] = {}
        for name, kind in _schema_of(type(self)).items():
            value = getattr(self, name)
            result |= {name: (value, kind)} if isinstance(kind, str) else value._with_axes()
        return result

    def _map(self, function: Callable[[Tensor, str], Tensor]) -> Self:
        return self.from_tensors({name: function(tensor, axes) for name, (tensor, axes) in self._with_axes().items()})

    def _check_shapes(self, num_rows: int, num_columns: int) -> None:
        """Raises `ValueError` naming the first own tensor whose shape is neither (B,) nor (B, `num_columns`)."""
        for name, axes in _schema_of(type(self)).items():
            if not isinstance(axes, str):
                continue
            expected = (num_rows,) if axes == "B" else (num_rows, num_columns)
            found = tuple(getattr(self, name).shape)
            if found != expected:
                raise ValueError(f"{type(self).__name__}.{name} must have shape {expected}, but has {found}")

    def select(self, rows: Tensor) -> Self:
        """The rows of an index tensor, in its order, or those where a bool tensor is True."""
        return self._map(lambda tensor, _: tensor[rows])

    def to(self, device: torch.device | str) -> Self:
        """The batch on another device."""
        return self._map(lambda tensor, _: tensor.to(device))

    def to_tensors(self) -> dict[str, Tensor]:
        """Every tensor by its field's name, wrapped batches included: plain data that ranks can exchange."""
        return {name: tensor for name, (tensor, _) in self._with_axes().items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """The inverse of `to_tensors`. Raises `KeyError` naming a missing tensor."""
        return cls(
            **{
                name: tensors[name] if isinstance(kind, str) else kind.from_tensors(tensors)
                for name, kind in _schema_of(cls).items()
            }
        )

    @classmethod
    def concatenate(cls, batches: Sequence[Self]) -> Self:
        """All rows in order, padded to the widest prompt (on the left) and the widest response (on the right).

        New slots hold zeros and are False in every mask. Raises `ValueError` for an empty list.
        """
        if not batches:
            raise ValueError("concatenate needs at least one batch, but came an empty list")
        parts = [batch._with_axes() for batch in batches]
        joined = {}
        for name, (_, axes) in parts[0].items():
            tensors = [part[name][0] for part in parts]
            if axes != "B":
                width = max(tensor.shape[1] for tensor in tensors)
                tensors = [_widen(tensor, width, left=axes == "B P") for tensor in tensors]
            joined[name] = torch.cat(tensors)
        return cls.from_tensors(joined)

    def trim(self) -> Self:
        """Without the columns that are padding in every row: what a micro-batch of short rows need not compute.

        At least one column of each kind stays. Under `after_eos` trim a `PPOBatch`, never what comes before it: the
        width of the response is part of where the score lands.
        """
        tensors = self.to_tensors()
        num_prompt = _used_columns(tensors["prompt_mask"].flip(1))
        response = tensors.get("value_mask", tensors.get("response_mask"))
        num_response = 0 if response is None else _used_columns(response)

        def cut(tensor: Tensor, axes: str) -> Tensor:
            if axes == "B":
                return tensor
            return tensor[:, tensor.shape[1] - num_prompt :] if axes == "B P" else tensor[:, :num_response]

        return self._map(cut)


def _used_columns(mask: Tensor) -> int:
    """Number of leading columns up to the last that is True in some row; at least 1, at most all."""
    used = mask.any(0).nonzero()
    return int(used.max()) + 1 if len(used) else min(1, mask.shape[1])


def _widen(tensor: Tensor, width: int, left: bool) -> Tensor:
    padding = tensor.new_zeros(tensor.shape[0], width - tensor.shape[1])
    return torch.cat([padding, tensor] if left else [tensor, padding], dim=1)


@dataclass(frozen=True, eq=False)
class PromptBatch(Batch):
    """Prompts to answer. `prompt_keys` and `sample_index` name each row's random stream.

    `prompt_keys` is a 64-bit hash of the prompt; `sample_index` counts the responses to one prompt.
    """

    prompt_ids: Int[Tensor, "B P"]
    prompt_mask: Bool[Tensor, "B P"]
    prompt_keys: Int[Tensor, " B"]
    sample_index: Int[Tensor, " B"]

    def __post_init__(self) -> None:
        """Raises `TypeError` or `ValueError` naming the field that is not as declared, or not left-padded."""
        check_bool(prompt_mask=self.prompt_mask)
        check_integer(prompt_ids=self.prompt_ids, prompt_keys=self.prompt_keys, sample_index=self.sample_index)
        if self.prompt_ids.ndim != 2:
            raise ValueError(f"PromptBatch.prompt_ids must be (B, P), but has shape {tuple(self.prompt_ids.shape)}")
        self._check_shapes(*self.prompt_ids.shape)
        if bool((self.prompt_mask[:, :-1] & ~self.prompt_mask[:, 1:]).any()):
            raise ValueError("PromptBatch.prompt_mask must be left-padded, but has a False after a True")


@dataclass(frozen=True, eq=False)
class Rollout(Batch):
    """Sampled responses. `stopped` says which rows ended with a stop token, which is then their last real one, or,
    where what is scored is cut at a token (`ppo.truncate_token`), which rows have that token.

    `sampling_logprobs` are those the sampler drew from, at the sampling temperature.
    """

    prompts: PromptBatch
    response_ids: Int[Tensor, "B R"]
    response_mask: Bool[Tensor, "B R"]
    stopped: Bool[Tensor, " B"]
    sampling_logprobs: Float[Tensor, "B R"]

    def __post_init__(self) -> None:
        """Raises `TypeError` or `ValueError` naming the field that is not as declared, or not right-padded."""
        check_bool(response_mask=self.response_mask, stopped=self.stopped)
        check_integer(response_ids=self.response_ids)
        check_floating(sampling_logprobs=self.sampling_logprobs)
        if self.response_ids.ndim != 2:
            raise ValueError(f"Rollout.response_ids must be (B, R), but has shape {tuple(self.response_ids.shape)}")
        self._check_shapes(len(self.prompts), self.response_ids.shape[1])
        check_prefix(response_mask=self.response_mask)

    @property
    def input_ids(self) -> Int[Tensor, "B T"]:
        """Prompt and response ids side by side."""
        return torch.cat([self.prompts.prompt_ids, self.response_ids], dim=1)

    @property
    def attention_mask(self) -> Bool[Tensor, "B T"]:
        """Prompt and response masks side by side."""
        return torch.cat([self.prompts.prompt_mask, self.response_mask], dim=1)

    @property
    def position_ids(self) -> Int[Tensor, "B T"]:
        """Positions counted from each row's first real token."""
        return position_ids(self.attention_mask)

    @property
    def response_lengths(self) -> Int[Tensor, " B"]:
        """Real response tokens of each row, the stop token included."""
        return self.response_mask.sum(1)


@dataclass(frozen=True, eq=False)
class ScoredRollout(Batch):
    """A rollout with its sequence scores and what the models being trained say about it before the update.

    `scores` are after every transformation (normalisation, penalty, clip). `old_logprobs` and `old_values` come from
    the trainer's own policy and critic, so that the first ratio is 1; `reference_logprobs` from the frozen reference.
    """

    rollout: Rollout
    scores: Float[Tensor, " B"]
    old_logprobs: Float[Tensor, "B R"]
    reference_logprobs: Float[Tensor, "B R"]
    old_values: Float[Tensor, "B R"]

    def __post_init__(self) -> None:
        """Raises `TypeError` or `ValueError` naming the field that is not as declared."""
        check_floating(
            scores=self.scores,
            old_logprobs=self.old_logprobs,
            reference_logprobs=self.reference_logprobs,
            old_values=self.old_values,
        )
        self._check_shapes(len(self.rollout), self.rollout.response_ids.shape[1])


@dataclass(frozen=True, eq=False)
class PPOBatch(Batch):
    """What PPO trains on; `make_ppo_batch` is how a scored rollout becomes one.

    `kl` is the per-token estimate that `token_rewards` charged for. `advantages` and `kl` are zero outside the
    response mask; `returns` and `token_rewards` outside `value_mask`, which is the mask of the value loss (it differs
    from the response mask under `after_eos` only).
    """

    scored: ScoredRollout
    token_rewards: Float[Tensor, "B R"]
    kl: Float[Tensor, "B R"]
    advantages: Float[Tensor, "B R"]
    returns: Float[Tensor, "B R"]
    value_mask: Bool[Tensor, "B R"]

    def __post_init__(self) -> None:
        """Raises `TypeError` or `ValueError` naming the field that is not as declared."""
        check_bool(value_mask=self.value_mask)
        check_floating(token_rewards=self.token_rewards, kl=self.kl, advantages=self.advantages, returns=self.returns)
        self._check_shapes(len(self.scored), self.rollout.response_ids.shape[1])

    @property
    def rollout(self) -> Rollout:
        """The rollout inside."""
        return self.scored.rollout

    @property
    def response_mask(self) -> Bool[Tensor, "B R"]:
        """Mask of the policy loss and of token metrics."""
        return self.scored.rollout.response_mask


@torch.no_grad()
def make_ppo_batch(
    scored: ScoredRollout,
    *,
    kl_coefficient: float,
    kl_estimator: KLEstimator,
    gamma: float,
    lam: float,
    whiten_advantages: bool,
    score_position: ScorePosition,
    whiten_rewards: bool = False,
) -> PPOBatch:
    """Token rewards, advantages and returns of a scored rollout. Pass the global batch: whitening uses its statistics.

    `whiten_rewards` scales token rewards to unit variance and keeps their mean, as the TL;DR lineage does.

    Rows whose response mask is empty are inert: they change nothing in the other rows. With `after_eos`, `old_values`
    must be the critic's also on the slot after the last token, and the batch as wide as the longest allowed response.
    """
    mask = scored.rollout.response_mask
    if kl_estimator not in _ESTIMATORS:
        raise ValueError(f"kl_estimator must be one of {', '.join(_ESTIMATORS)}, but is {kl_estimator!r}")
    kl = _ESTIMATORS[kl_estimator](logprobs=scored.old_logprobs, reference_logprobs=scored.reference_logprobs)
    kl = torch.where(mask, kl, 0.0)
    rewards = token_rewards(
        scores=scored.scores, kl=kl, mask=mask, kl_coefficient=kl_coefficient, score_position=score_position
    )
    of_values = value_mask(mask=mask, score_position=score_position)
    if whiten_rewards:
        rewards = masked_whiten(values=rewards, mask=of_values, shift_mean=False)
    advantages, returns = gae(rewards=rewards, values=scored.old_values, mask=of_values, gamma=gamma, lam=lam)
    if whiten_advantages:
        advantages = masked_whiten(values=advantages, mask=mask)
    return PPOBatch(
        scored=scored,
        token_rewards=rewards,
        kl=kl,
        advantages=torch.where(mask, advantages, 0.0),
        returns=returns,
        value_mask=of_values,
    )
