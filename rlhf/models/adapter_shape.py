"""Which layers of a model get adapters, and of which size: the config section `peft` as PEFT's configuration."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from peft import LoraConfig, TaskType
from torch import nn
from transformers.pytorch_utils import Conv1D

from rlhf.errors import ConfigError
from rlhf.models.paths import is_local

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rlhf.config import peft as peft_config

# The module of a classifier that PEFT saves with its adapter.
HEAD = "score"


def new_settings(
    lora: peft_config.LoRAConfig,
    model: PreTrainedModel,
    *,
    base: str,
    task: TaskType,
    dropout: float = 0.0,
    with_head: bool = False,
) -> LoraConfig:
    """PEFT's configuration of an adapter on `model`, which was loaded from `base`; `with_head` on its output head too.

    The layers are named one by one, sorted. Raises `ConfigError` for names the transformer does not have and for
    encoder-decoder models.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise ConfigError(
            f"peft=lora cannot adapt {type(model).__name__}: only decoder-only models take adapters here. Set peft=none"
        )
    linear = _linear_layers(model)
    names = set(linear) if lora.target_modules == "all_linear" else set(lora.target_modules)
    unknown = sorted(names - set(linear))
    head = head_name(model) if with_head else None
    if unknown or not names:
        raise ConfigError(
            f"peft.target_modules: {type(model).__name__} has no linear layer {', '.join(unknown) or '(none given)'} "
            f"in its transformer; it has {', '.join(sorted(linear))}. The output head is "
            "no name here: peft.output_head=true (output_head=True in rlhf.LoRAConfig)"
        )
    if head in linear:
        raise ConfigError(
            f"peft.output_head: in {type(model).__name__} layers of the transformer are called {head} like the head, "
            "and PEFT could not tell them apart. Set it to false"
        )
    return LoraConfig(
        task_type=task,
        base_model_name_or_path=str(Path(base).expanduser().absolute()) if is_local(base) else base,
        r=lora.rank,
        lora_alpha=cast(Any, lora.alpha),
        lora_dropout=dropout,
        target_modules=sorted(names | ({head} if head else set())),
        fan_in_fan_out=any(linear[name] is Conv1D for name in names),
        modules_to_save=[HEAD] if task == TaskType.SEQ_CLS else None,
    )


def _linear_layers(model: PreTrainedModel) -> dict[str, type[nn.Module]]:
    """Last names of the linear layers below the output head, with their classes."""
    backbone: nn.Module = getattr(model, model.base_model_prefix)
    return {
        name.rpartition(".")[2]: type(module)
        for name, module in backbone.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }


def head_name(model: PreTrainedModel) -> str:
    """Last name of the output head. Raises `ConfigError` for a model without."""
    head = model.get_output_embeddings()
    names = [name for name, module in model.named_modules() if module is head]
    if head is None or not names:
        raise ConfigError(f"peft.output_head: {type(model).__name__} names no module as its head. Set it to false")
    last: str = names[0].rpartition(".")[2]
    return last


def check_same_shape(settings: LoraConfig, wanted: LoraConfig, path: str, key: str) -> None:
    """Raises `ConfigError` when the adapter in folder `path` is not of the shape that `peft` asks for."""
    pairs: dict[str, tuple[object, object]] = {
        "peft.rank": (settings.r, wanted.r),
        "peft.alpha": (float(settings.lora_alpha), float(wanted.lora_alpha)),
        "peft.target_modules": (_names(settings), _names(wanted)),
    }
    for name, (found, expected) in pairs.items():
        if found != expected:
            raise ConfigError(
                f"{key}: the adapter {path} goes on being trained, and it was made with {name}={found}; the config "
                f"says {expected}. Set {name} to the adapter's, or start from a whole model"
            )


def _names(settings: LoraConfig) -> str:
    """The adapted layers, in a form that can be compared and given as `peft.target_modules`."""
    names = settings.target_modules or ()
    return names if isinstance(names, str) else f"[{','.join(sorted(names))}]"
