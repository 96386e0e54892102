"""One base model in memory, four roles: policy, value and reward are LoRA adapters on it, the reference too or none.

A role is made active around a forward pass. What a role costs beyond the base is its adapter and its head.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, cast

import torch
from peft import TaskType
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlhf.errors import ArtifactError, ConfigError
from rlhf.models.adapter_shape import HEAD, check_same_shape, head_name, new_settings
from rlhf.models.adapters import (
    HEAD_KEY,
    backbone_of,
    check_scorer,
    head_weight,
    in_transformer,
    inject_adapter,
    is_adapter,
    is_of_adapter,
    lora_settings,
    lora_weights,
    without_name,
    write_adapter,
)
from rlhf.models.loading import disable_dropout, load_policy
from rlhf.models.paths import is_local, single_model
from rlhf.models.saving import save_tokenizer
from rlhf.models.scalar import sequence_scores
from rlhf.ops.sequences import position_ids

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rlhf.config.model import ModelConfig
    from rlhf.config.peft import LoRAConfig

Role = Literal["policy", "reference", "value", "reward"]
TRAINED: tuple[Role, ...] = ("policy", "value")


class ActiveRole:
    """Makes a role's adapter the active one and gives the model; on leaving, the one before is active again.

    May be entered several times, also within itself, and does not touch `requires_grad`.
    """

    def __init__(self, base: SharedBase, role: Role) -> None:
        self._base = base
        self._adapter = base.adapter_of(role)
        self._before: list[str | None] = []

    def __enter__(self) -> PreTrainedModel:
        self._before.append(self._base.active_adapter)
        self._base.activate(self._adapter)
        return self._base.model

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._base.activate(self._before.pop())


class SharedBase(nn.Module):
    """A causal language model with several adapters, and the heads of the roles that give numbers.

    `model` is transformers' model with PEFT's layers in it; `heads` has float32 maps (1, H) for `value` and `reward`,
    as far as these roles are on the base. Only the adapters of policy and value and the value's head are trainable.
    When no role is active the model is the base.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        adapters: Mapping[Role, str | None],
        heads: Mapping[Role, Tensor],
        *,
        base_path: str,
        policy_adapter_source: str | None,
    ) -> None:
        """`adapters`: each role's adapter in `model`, None for the base; `heads`: weights (1, H) of a role's head.

        `base_path` and `policy_adapter_source` (None: a new adapter) say where base and policy came from.
        """
        super().__init__()
        self.model = model
        self.heads = nn.ModuleDict({role: _linear(weight) for role, weight in heads.items()})
        self.base_path = base_path
        self.policy_adapter_source = policy_adapter_source
        self._adapters = dict(adapters)
        self._layers = tuple(module for module in model.modules() if isinstance(module, LoraLayer))
        self.active_adapter: str | None = None
        self.activate(None)
        self.requires_grad_(False)
        for role in TRAINED:
            for parameter in self.parameters_of(role) if self.has_role(role) else ():
                parameter.requires_grad_(True)
        self.eval()

    @classmethod
    def build(
        cls,
        *,
        policy: str,
        reference: str,
        reward_model: str | None,
        value_model: str | None,
        lora: LoRAConfig,
        model_config: ModelConfig | None,
        seed: int,
        dtype: torch.dtype = torch.float32,
        value_init: Literal["reward_model", "policy"] = "reward_model",
        own_reference: bool = False,
        with_value: bool = True,
    ) -> Self:
        """The roles of PPO from folders, each an adapter's on the policy's base or that base itself.

        The policy goes on from its adapter, or gets a new one that follows from `seed`; the value starts as
        `value_model`, else, with `value_init` reward_model, as the reward model, else as the policy with a head of
        zeros. A reward model that is no adapter on the base is left out: `has_role("reward")` is then False, and the
        caller loads it apart. `own_reference` gives the reference an adapter that `copy_adapter` can refresh;
        `with_value=False` leaves the value out. The base is held in `dtype`, adapters and heads in float32.

        Raises `ConfigError` where a reference or value is not on the base or a shape is not that of `lora`, and
        `ArtifactError` for folders that are not whole.
        """
        base = backbone_of(policy, "ppo.policy")
        if not _is_on(reference, base, "ppo.reference"):
            raise ConfigError(
                f"ppo.reference={reference} is neither the policy's base {base} nor an adapter on it, and with "
                "peft=lora both share one base in memory. Choose such a reference, or set peft=none"
            )
        model = load_policy(base, model_config, dtype, "ppo.policy")
        disable_dropout(model)
        wanted = new_settings(lora, model, base=base, task=TaskType.CAUSAL_LM, with_head=lora.output_head)
        head = head_name(model) if lora.output_head else None
        of_value = new_settings(lora, model, base=base, task=TaskType.SEQ_CLS)
        adapters: dict[Role, str | None] = {"policy": "policy", "reference": None}
        heads: dict[Role, Tensor] = {}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            _inject(model, "policy", policy, "ppo.policy", wanted, trained=True, head=head)
            if own_reference or is_adapter(reference):
                adapters["reference"] = "reference"
                key = "ppo.reference"
                _inject(model, "reference", reference, key, wanted, trained=own_reference, head=head)
            if with_value:
                source = value_model or (reward_model if value_init == "reward_model" else None)
                source = None if source is None else single_model(source, "ppo.value_model")
                adapters["value"] = "value"
                heads["value"] = _inject_value(model, source, base, of_value)
            if reward_model is not None and is_adapter(reward_model) and _is_on(reward_model, base, "ppo.reward_model"):
                adapters["reward"] = "reward"
                check_scorer(reward_model, "ppo.reward_model")
                _inject(model, "reward", reward_model, "ppo.reward_model", wanted, trained=False)
                heads["reward"] = head_weight(reward_model, "ppo.reward_model")
        source_of_policy = policy if is_adapter(policy) else None
        return cls(model, adapters, heads, base_path=base, policy_adapter_source=source_of_policy)

    # Where the roles came from.

    @property
    def reference_kind(self) -> Literal["adapter_off", "adapter_copy"]:
        """Whether the reference is the base, or a frozen adapter of its own."""
        return "adapter_off" if self._adapters["reference"] is None else "adapter_copy"

    # Roles.

    def has_role(self, role: Role) -> bool:
        """Whether the role is on this base; the caller loads one that is not by itself."""
        return role in self._adapters

    def adapter_of(self, role: Role) -> str | None:
        """The name of the role's adapter in the layers; None for the base. Raises `ValueError` without that role."""
        if role not in self._adapters:
            raise ValueError(f"this base has no role {role}; it has {', '.join(self._adapters)}")
        return self._adapters[role]

    def role(self, role: Role) -> ActiveRole:
        """A context in which `model` computes as `role`; it yields `model`. Raises `ValueError` without that role."""
        return ActiveRole(self, role)

    def activate(self, adapter: str | None) -> None:
        """Makes an adapter the active one in all layers; None switches all of them off.

        PEFT's own `set_adapter` would freeze all other adapters, whose backward pass may be still to come.
        """
        self.active_adapter = adapter
        for layer in self._layers:
            layer._disable_adapters = adapter is None
            if adapter is not None:
                layer._active_adapter = [adapter]

    def response_values(self, role: Role, input_ids: Tensor, attention_mask: Tensor, num_prompt: int) -> Tensor:
        """Values (B, R + 1) float32 of role `value` or `reward`; see `ScalarModel.response_values`."""
        if attention_mask.dtype != torch.bool:
            raise ValueError(f"attention_mask must be bool, not {attention_mask.dtype}")
        if not 1 <= num_prompt <= input_ids.shape[1]:
            raise ValueError(f"num_prompt ({num_prompt}) must lie between 1 and {input_ids.shape[1]}")
        return self._values(role, input_ids, attention_mask)[:, num_prompt - 1 :]

    def scores(self, role: Role, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The value (B,) float32 at each row's last real token. input_ids (B, T) int64, attention_mask (B, T) bool."""
        return sequence_scores(self._values(role, input_ids, attention_mask), attention_mask)

    def _values(self, role: Role, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        head = cast(nn.Linear, self.heads[role])
        with self.role(role) as model:
            backbone: nn.Module = getattr(model, model.base_model_prefix)
            output = backbone(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids(attention_mask),
                use_cache=False,
            )
        values: Tensor = head(output.last_hidden_state.to(head.weight.dtype))
        return values.squeeze(-1).float()

    # Weights.

    def parameters_of(self, role: Role) -> list[nn.Parameter]:
        """The role's adapter and head. Empty for a reference that is the base."""
        adapter = self.adapter_of(role)
        own = [] if adapter is None else [part for name, part in self._named_matrices(adapter)]
        return own + (list(self.heads[role].parameters()) if role in self.heads else [])

    def _named_matrices(self, adapter: str) -> list[tuple[str, nn.Parameter]]:
        return [(name, part) for name, part in self.model.named_parameters() if is_of_adapter(name, adapter)]

    @torch.no_grad()
    def copy_adapter(self, source_role: Role, target_role: Role) -> None:
        """Overwrites the target's A and B with the source's, heads apart. Sharded weights must be gathered.

        Raises `ValueError` when one of them is the base or the adapters differ in shape.
        """
        source, target = self.adapter_of(source_role), self.adapter_of(target_role)
        if source is None or target is None:
            base = source_role if source is None else target_role
            raise ValueError(f"role {base} is the base and has no adapter; build with own_reference=True")
        reason = self._why_not_interchangeable(source_role, target_role)
        if reason is not None:
            raise ValueError(f"the adapter of {source_role} cannot be copied to {target_role}: {reason}")
        pairs = zip(self._named_matrices(source), self._named_matrices(target), strict=True)
        for (_, given), (_, taken) in pairs:
            taken.copy_(given)

    def _why_not_interchangeable(self, one: Role, other: Role) -> str | None:
        """What of two roles' adapters differs besides their weights; None when nothing does."""
        first, second = (self._settings_of(role) for role in (one, other))
        for name in ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "use_rslora"):
            if getattr(first, name) != getattr(second, name):
                return f"{name} is {getattr(first, name)} and {getattr(second, name)}"
        return None

    def _settings_of(self, role: Role) -> LoraConfig:
        settings: LoraConfig = cast(Any, self.model).peft_config[self.adapter_of(role)]
        return settings

    def enable_gradient_checkpointing(self) -> None:
        """Recomputes activations in the backward pass, with the adapter that was active in the forward pass."""

        def checkpointed(function: Callable[..., Any], *arguments: Any) -> Any:
            adapter = self.active_adapter

            def run(*inputs: Any) -> Any:
                before = self.active_adapter
                self.activate(adapter)
                try:
                    return function(*inputs)
                finally:
                    self.activate(before)

            # The frozen embeddings give inputs without gradients, which only the non-reentrant kind takes.
            return checkpoint(run, *arguments, use_reentrant=False)

        cast(Any, self.model)._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=checkpointed)

    def save_role(
        self,
        role: Role,
        folder: Path,
        tokenizer: PreTrainedTokenizerBase,
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Writes a folder that plain PEFT loads: the role's adapter, its head as `score`, the tokenizer.

        `state_dict` has the keys of `self.state_dict()` and replaces it where the weights are sharded. Raises
        `ValueError` for a reference that is the base.
        """
        adapter = self.adapter_of(role)
        if adapter is None:
            raise ValueError(f"role {role} is the base {self.base_path}, which is a folder already")
        state = self.state_dict() if state_dict is None else state_dict
        weights = {
            f"base_model.{without_name(name, adapter)}": value
            for name, value in state.items()
            if is_of_adapter(name, adapter)
        }
        settings = copy.deepcopy(self._settings_of(role))
        if role in self.heads:
            settings.task_type = TaskType.SEQ_CLS
            settings.modules_to_save = [HEAD]
            weights[HEAD_KEY] = state[f"heads.{role}.weight"]
        write_adapter(settings, weights, folder)
        save_tokenizer(tokenizer, folder)


def _linear(weight: Tensor) -> nn.Linear:
    """A map to one number with these weights (1, H), float32."""
    head = nn.Linear(weight.shape[1], 1, bias=False, device="meta")  # which draws no random numbers
    head.weight = nn.Parameter(weight.detach().float().clone())
    return head


def _is_on(path: str, base: str, key: str) -> bool:
    """Whether `path` is the model `base` or an adapter on it."""
    path = backbone_of(path, key)
    if is_local(path) and is_local(base):
        return Path(path).expanduser().resolve() == Path(base).expanduser().resolve()
    return path == base


def _inject(
    model: PreTrainedModel,
    name: Role,
    source: str,
    key: str,
    wanted: LoraConfig,
    *,
    trained: bool,
    head: str | None = None,
) -> None:
    """Adds the adapter of folder `source`, or a new one where that is a whole model; one to train is like `wanted`.

    `head` is the name of the output head where `wanted` is on it; an adapter of stage sft gets new matrices there.
    """
    if not is_adapter(source):
        inject_adapter(model, wanted, name, None)
        return
    settings, weights = lora_settings(source, key), lora_weights(source, key)
    new_head = False
    if trained:
        has_head = len(in_transformer(model, weights)) < len(weights)
        if has_head and head is None:
            raise ConfigError(f"{key}: the adapter {source} is on the output head too. Set peft.output_head=true")
        new_head = head is not None and not has_head and not isinstance(settings.target_modules, str)
        if head is not None and new_head:
            settings.target_modules = sorted({*(settings.target_modules or ()), head})
        check_same_shape(settings, wanted, source, key)
    try:
        inject_adapter(model, settings, name, weights, new_head=new_head)
    except ValueError as error:
        raise ArtifactError(f"{key}: the adapter in {source} does not fit its base: {error}. Save it again") from error


def inject_value_of_policy(model: PreTrainedModel, wanted: LoraConfig) -> None:
    """Adds the adapter `value`, which starts as what adapter `policy` has in the transformer; `wanted` is its shape."""
    matrices = {name: part for name, part in model.named_parameters() if is_of_adapter(name, "policy")}
    weights = {without_name(name, "policy"): part.detach().clone() for name, part in matrices.items()}
    inject_adapter(model, wanted, "value", in_transformer(model, weights))


def _inject_value(model: PreTrainedModel, source: str | None, base: str, wanted: LoraConfig) -> Tensor:
    """Adds the value's adapter and returns its head (1, H): those of `source`, else the policy's and zeros."""
    key = "ppo.value_model"
    if source is None:
        inject_value_of_policy(model, wanted)
        return torch.zeros(1, int(model.config.hidden_size))
    if not is_adapter(source) or not _is_on(source, base, key):
        raise ConfigError(
            f"{key}: with peft=lora the critic is an adapter on the policy's base {base}, and {source} is not. Set "
            "ppo.value_init=policy, or train the reward model as an adapter on that base, or set peft=none"
        )
    check_scorer(source, key)
    _inject(model, "value", source, key, wanted, trained=True)
    return head_weight(source, key)
