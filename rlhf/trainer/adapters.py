"""`peft_config`: the trainer's models as roles on one base."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from peft import LoraConfig, TaskType
from torch import Tensor

from rlhf.config.peft import LoRAConfig
from rlhf.config.ppo import PPOConfig
from rlhf.errors import ConfigError
from rlhf.models.adapter_shape import new_settings
from rlhf.models.adapters import inject_adapter, is_adapter
from rlhf.models.loading import disable_dropout, load_tokenizer
from rlhf.models.paths import single_model
from rlhf.models.shared_base import Role, SharedBase, inject_value_of_policy
from rlhf.trainer.models import ModelArguments, language_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlhf.distributed.runtime import Runtime

# Settings of PEFT that our adapters have no counterpart for, with the values that mean nothing.
_PLAIN: Mapping[str, tuple[object, ...]] = {
    "bias": ("none",),
    "use_dora": (False,),
    "use_rslora": (False,),
    "modules_to_save": (None, [], ()),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "layers_to_transform": (None, [], ()),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, [], ()),
    "exclude_modules": (None, [], ()),
}


def lora_config(given: object) -> LoRAConfig:
    """`peft_config` as our section. PEFT's dropout has no effect here: PPO trains without.

    Raises `ConfigError` for another kind of adapter and for settings that ours do not have.
    """
    if isinstance(given, LoRAConfig):
        return given
    if not isinstance(given, LoraConfig):
        raise ConfigError(
            f"peft_config must be a LoRAConfig of rlhf or a LoraConfig of peft, not {type(given).__name__}: PPO trains "
            "LoRA adapters or whole models"
        )
    extra = [name for name, plain in _PLAIN.items() if getattr(given, name, plain[0]) not in plain]
    if extra:
        raise ConfigError(
            f"peft_config sets {', '.join(extra)}; only plain LoRA (r, lora_alpha, target_modules) works here"
        )
    targets = given.target_modules
    if targets is None or targets == "all-linear":
        return LoRAConfig(rank=given.r, alpha=float(given.lora_alpha))
    if isinstance(targets, str):
        raise ConfigError(
            f"peft_config.target_modules={targets!r} is a pattern; give the last names of the layers in a list, or "
            '"all-linear"'
        )
    return LoRAConfig(rank=given.r, alpha=float(given.lora_alpha), target_modules=tuple(sorted(targets)))


def shared_base(args: PPOConfig, models: ModelArguments, lora: LoRAConfig, runtime: Runtime, seed: int) -> SharedBase:
    """The base with the roles policy, reference, value, and reward where that is an adapter on it, on its device.

    The value starts from the reward model's adapter if there is one on the base, else from the policy with a head of
    zeros. Raises `ConfigError` for a reference or value that is not on the base.
    """
    if isinstance(models.model, str | Path):
        base = _from_folders(args, models, lora, runtime, seed)
    else:
        base = _from_instance(args, models, lora, runtime, seed)
    base.to(runtime.device)
    return base


def adapter_critic_tokenizer(
    args: PPOConfig, models: ModelArguments, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedTokenizerBase:
    """The tokenizer that a critic on the base is saved with: that of the adapter it starts as, else the policy's."""
    source: object = models.value_model
    if source is None and args.value_init == "reward_model":
        source = models.reward_model
    on_base = isinstance(source, str | Path) and isinstance(models.model, str | Path)
    adapted = on_base and is_adapter(single_model(str(source)))
    return load_tokenizer(str(source), key="value_model") if adapted else tokenizer


def _from_folders(args: PPOConfig, models: ModelArguments, lora: LoRAConfig, runtime: Runtime, seed: int) -> SharedBase:
    for name, source in (("ref_model", models.ref_model), ("value_model", models.value_model)):
        if source is not None and not isinstance(source, str | Path):
            raise ConfigError(
                f"with peft_config {name} is an adapter on the policy's base: pass its folder, or leave {name} out"
            )
    reward = models.reward_model
    adapter = str(reward) if isinstance(reward, str | Path) and is_adapter(single_model(str(reward))) else None
    return SharedBase.build(
        policy=str(models.model),
        reference=str(models.ref_model or models.model),
        reward_model=adapter,
        value_model=None if models.value_model is None else str(models.value_model),
        lora=lora,
        model_config=None,
        seed=seed,
        dtype=runtime.dtype,
        value_init=args.value_init,
        own_reference=args.reference_refresh_every is not None,
        with_value=args.value_network == "separate",
    )


def _from_instance(
    args: PPOConfig, models: ModelArguments, lora: LoRAConfig, runtime: Runtime, seed: int
) -> SharedBase:
    for name, source in (("ref_model", models.ref_model), ("value_model", models.value_model)):
        if source is not None and source is not models.model:
            raise ConfigError(
                f"with peft_config the {'reference' if name == 'ref_model' else 'critic'} lies on the policy's base: "
                f"leave {name} out, or pass model and {name} as folders"
            )
    model = language_model(models.model, "model", runtime.dtype)
    path = model.name_or_path
    if not path:
        raise ConfigError(
            "with peft_config the adapter that is saved names its base, and model was not loaded from anywhere. Save "
            "it (with its tokenizer) and pass the folder"
        )
    disable_dropout(model)
    wanted = new_settings(lora, model, base=path, task=TaskType.CAUSAL_LM, with_head=lora.output_head)
    of_value = new_settings(lora, model, base=path, task=TaskType.SEQ_CLS)
    adapters: dict[Role, str | None] = {"policy": "policy", "reference": None}
    heads: dict[Role, Tensor] = {}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter(model, wanted, "policy", None)
        if args.reference_refresh_every is not None:
            adapters["reference"] = "reference"
            inject_adapter(model, wanted, "reference", None)
        if args.value_network == "separate":
            adapters["value"] = "value"
            # A critic that starts as the policy, with a head of zeros.
            inject_value_of_policy(model, of_value)
            heads["value"] = torch.zeros(1, cast(int, model.config.hidden_size))
    return SharedBase(model, adapters, heads, base_path=path, policy_adapter_source=None)
