"""LoRA adapters in PEFT's format: new ones, continued ones, and folders that plain PEFT loads.

An adapter's folder holds adapter_config.json, which names the base model, adapter_model.safetensors and the tokenizer;
a reward model's has its head too (`modules_to_save: ["score"]`).
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from peft import LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model, inject_adapter_in_model
from peft.utils.save_and_load import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from rlhf.errors import ArtifactError, ConfigError
from rlhf.models.adapter_shape import HEAD, check_same_shape, new_settings
from rlhf.models.loading import check_no_missing_weights, load_errors, load_policy, load_tokenizer, quiet
from rlhf.models.output_head import has_tied_head, untie_head
from rlhf.models.paths import base_of, check_model_path, is_adapter
from rlhf.models.scalar import load_classifier, use_pad_token

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rlhf.config import peft as peft_config
    from rlhf.config.model import ModelConfig

__all__ = [
    "add_adapter",
    "backbone_of",
    "base_of",
    "check_scorer",
    "head_weight",
    "in_transformer",
    "inject_adapter",
    "is_adapter",
    "is_of_adapter",
    "load_merged_policy",
    "load_merged_scorer",
    "lora_settings",
    "lora_weights",
    "read_settings",
    "write_adapter",
    "write_adapter_of",
]

T = TypeVar("T")

# The only adapter in memory while it is trained alone or merged.
_NAME = "default"
_PREFIX = "base_model.model."
HEAD_KEY = f"{_PREFIX}{HEAD}.weight"


@contextmanager
def _silence() -> Iterator[None]:
    """Without PEFT's warnings: what is of concern to the user, our own checks say."""
    with warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")
        yield


def load_merged_policy(path: str, config: ModelConfig | None, dtype: torch.dtype, key: str) -> PreTrainedModel:
    """The causal language model that the adapter in folder `path` makes of its base. Errors as of `load_policy`."""
    check_model_path(path, key)
    settings = read_settings(path, key)
    if settings.task_type not in (None, TaskType.CAUSAL_LM, TaskType.SEQ_2_SEQ_LM):
        raise ArtifactError(
            f"{key}: {path} holds an adapter for {settings.task_type}, which scores text and cannot write it. Expected "
            "one of a language model; is the path of the reward model given where the policy belongs?"
        )
    return _merge(load_policy(base_of(path, key), config, dtype, key), path, key)


def load_merged_scorer(path: str, config: ModelConfig | None, dtype: torch.dtype, key: str) -> PreTrainedModel:
    """The sequence classifier with one label that the adapter and head in folder `path` make of their base.

    Its pad token is that of the folder's tokenizer. Raises `ArtifactError` for an adapter without a head.
    """
    check_model_path(path, key)
    check_scorer(path, key)
    with torch.random.fork_rng():  # the head that a classifier gets at first is random
        model, missing = load_classifier(base_of(path, key), config, dtype, key)
        check_no_missing_weights([name for name in missing if not name.startswith(f"{HEAD}.")], base_of(path, key), key)
        use_pad_token(model, load_tokenizer(path, config, key).pad_token_id)
        return _merge(model, path, key)


def _merge(model: PreTrainedModel, path: str, key: str) -> PreTrainedModel:
    _untie_adapted_head(model, path, key)
    with load_errors(path, key), _silence():
        wrapped = PeftModel.from_pretrained(model, str(Path(path).expanduser()))
        expected = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
        _check_complete(set(expected), set(_read_weights(path, key)), path, key)
        merged: PreTrainedModel = cast(Any, wrapped).merge_and_unload()
    merged.requires_grad_(True)
    merged.eval()
    return merged


def _untie_adapted_head(model: PreTrainedModel, path: str, key: str) -> None:
    """Gives the head weights of its own where the adapter has matrices on it and it shares them with the embeddings.

    What is merged into the head would else change the embeddings too.
    """
    weights = lora_weights(path, key)
    if has_tied_head(model) and len(in_transformer(model, weights)) < len(weights):
        untie_head(model)


def read_settings(path: str, key: str) -> PeftConfig:
    """The adapter's own configuration. Raises `ArtifactError` when it cannot be read."""
    with load_errors(path, key):
        try:
            settings: PeftConfig = PeftConfig.from_pretrained(str(Path(path).expanduser()))
        except TypeError as error:
            raise ArtifactError(f"{key}: {path} has an adapter_config.json that PEFT cannot read: {error}") from error
    return settings


def check_scorer(path: str, key: str) -> None:
    """Raises `ArtifactError` when the adapter in folder `path` has no head that gives one number."""
    settings = read_settings(path, key)
    if settings.task_type != TaskType.SEQ_CLS:
        raise ArtifactError(
            f"{key}: {path} holds an adapter for {settings.task_type}, not a reward model. Expected one for SEQ_CLS "
            "with one label, as the reward-model stage writes it"
        )
    head = _read_weights(path, key).get(HEAD_KEY)
    if head is None or head.shape[0] != 1:
        found = "no head `score`" if head is None else f"a head with {head.shape[0]} labels"
        raise ArtifactError(f"{key}: {path} holds an adapter with {found}; a reward model has one with one label")


def lora_settings(path: str, key: str) -> LoraConfig:
    """The configuration of an adapter that can be trained further or be one of several on a base.

    Raises `ConfigError` for kinds of adapters other than plain LoRA.
    """
    settings = read_settings(path, key)
    extras = [name for name in ("use_dora", "trainable_token_indices", "layer_replication") if _is_set(settings, name)]
    if getattr(settings, "bias", "none") != "none":
        extras.append("bias")
    if set(getattr(settings, "modules_to_save", None) or ()) - {HEAD, "classifier"}:
        extras.append("modules_to_save")
    if not isinstance(settings, LoraConfig) or extras:
        kind = f"LoRA with {', '.join(extras)}" if isinstance(settings, LoraConfig) else str(settings.peft_type)
        raise ConfigError(
            f"{key}: {path} is {kind}; only plain LoRA can be trained further beside others. Merge it into its base, "
            "or set peft=none, which does that on loading"
        )
    return settings


def _is_set(settings: PeftConfig, name: str) -> bool:
    return bool(getattr(settings, name, None))


def lora_weights(path: str, key: str) -> dict[str, Tensor]:
    """The A and B matrices of the adapter in folder `path`, under PEFT's names in files, without a scorer's head."""
    return {name: value for name, value in _read_weights(path, key).items() if "lora_" in name}


def head_weight(path: str, key: str) -> Tensor:
    """The head (1, H) of the reward adapter in folder `path`, which `check_scorer` has passed."""
    return _read_weights(path, key)[HEAD_KEY]


def _read_weights(path: str, key: str) -> dict[str, Tensor]:
    with load_errors(path, key):
        weights: dict[str, Tensor] = load_peft_weights(str(Path(path).expanduser()), device="cpu")
    # Out of the mapped file: see `rlhf.models.loading.own_memory`.
    return {name: value.clone() for name, value in weights.items()}


def _check_complete(expected: set[str], found: set[str], path: str, key: str) -> None:
    missing = sorted(expected - found)
    if missing:
        raise ArtifactError(
            f"{key}: the adapter in {path} lacks {len(missing)} of its weights ({', '.join(missing[:3])}"
            f"{', …' if len(missing) > 3 else ''}); they would be random. Save it again"
        )


def in_transformer(model: PreTrainedModel, weights: Mapping[str, T]) -> dict[str, T]:
    """An adapter's matrices without those on the output head, for a role that has a head of its own.

    The names are those of files, with or without PEFT's prefix.
    """
    prefix = f"{model.base_model_prefix}."
    return {name: value for name, value in weights.items() if name.removeprefix(_PREFIX).startswith(prefix)}


def backbone_of(source: str, key: str) -> str:
    """The whole model below `source`: the base of an adapter's folder, else `source` itself."""
    return base_of(source, key) if is_adapter(source) else source


def add_adapter(
    model: PreTrainedModel,
    source: str,
    lora: peft_config.LoRAConfig,
    *,
    task: TaskType,
    seed: int,
    key: str,
    dropout: float = 0.0,
    revision: str | None = None,
) -> PreTrainedModel:
    """`model`, loaded from `backbone_of(source)`, with an adapter to train; a classifier's head is trained too.

    All else is frozen. A whole model as `source` gets a new adapter, which follows from `seed` alone; an adapter's
    folder is continued, also under a head: policy and reward model then have a base in common. What is returned is
    PEFT's wrapper, which passes for the model. Raises `ConfigError` where `lora` does not fit.
    """
    settings = new_settings(lora, model, base=backbone_of(source, key), task=task, dropout=dropout)
    settings.revision = revision
    weights: dict[str, Tensor] = {}
    if is_adapter(source):
        given, weights = lora_settings(source, key), lora_weights(source, key)
        if task == TaskType.SEQ_CLS:
            given, weights = _without_head(model, given, weights)
        elif len(in_transformer(model, weights)) < len(weights):
            raise ConfigError(
                f"{key}: the adapter {source} is on the output head too, which this stage cannot train. Start from a "
                "whole model or another adapter, or set peft=none, which merges it on loading"
            )
        check_same_shape(given, settings, source, key)
    with torch.random.fork_rng(), _silence():
        torch.manual_seed(seed)
        wrapped: Any = get_peft_model(cast(Any, model), settings, adapter_name=_NAME)
    if is_adapter(source):
        if task == TaskType.SEQ_CLS:
            weights[HEAD_KEY] = wrapped.state_dict()[f"{_PREFIX}{HEAD}.modules_to_save.{_NAME}.weight"]
        expected = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
        _check_complete(set(expected), set(weights), source, key)
        with load_errors(source, key):
            set_peft_model_state_dict(wrapped, weights, adapter_name=_NAME)
    adapted: PreTrainedModel = wrapped
    return adapted


def _without_head(
    model: PreTrainedModel, settings: LoraConfig, weights: dict[str, Tensor]
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """An adapter's configuration and matrices without what it has on the output head."""
    kept = in_transformer(model, weights)
    heads = {name.partition(".lora_")[0].rpartition(".")[2] for name in weights.keys() - kept.keys()}
    if not heads or HEAD in heads or isinstance(settings.target_modules, str):
        return settings, weights
    part = copy.copy(settings)
    part.target_modules = sorted(set(settings.target_modules or ()) - heads)
    return part, kept


def inject_adapter(
    model: PreTrainedModel,
    settings: LoraConfig,
    name: str,
    weights: dict[str, Tensor] | None,
    *,
    new_head: bool = False,
) -> None:
    """Puts one more adapter into `model`, float32 and without dropout: with `weights` (as in files) or new ones.

    `new_head`: what `settings` has on the output head is new beside `weights`. New matrices come from torch's global
    generator and add nothing at first. Raises `ValueError` when `weights` lack some or do not fit.
    """
    plain = LoraConfig(
        r=settings.r,
        lora_alpha=settings.lora_alpha,
        target_modules=settings.target_modules,
        rank_pattern=settings.rank_pattern,
        alpha_pattern=settings.alpha_pattern,
        use_rslora=settings.use_rslora,
        fan_in_fan_out=settings.fan_in_fan_out,
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=settings.base_model_name_or_path,
        revision=settings.revision,
    )
    with _silence():
        inject_adapter_in_model(plain, cast(Any, model), adapter_name=name)
    mine = {part: matrix for part, matrix in model.named_parameters() if is_of_adapter(part, name)}
    for matrix in mine.values():
        matrix.data = matrix.data.float()
    if weights is None:
        return
    given = {key.removeprefix(_PREFIX): value for key, value in weights.items()}
    names = {part: without_name(part, name) for part in mine}
    if new_head:
        kept = in_transformer(model, dict.fromkeys(names.values()))
        names = {part: own for part, own in names.items() if own in kept}
    missing = sorted(set(names.values()) - set(given))
    if missing or len(given) != len(names):
        raise ValueError(f"{len(given)} matrices do not fit an adapter of {len(names)}; missing: {missing[:3]}")
    with torch.no_grad():
        for part, own in names.items():
            value = given[own]
            if value.shape != mine[part].shape:
                raise ValueError(f"{own} has shape {tuple(value.shape)}, expected {tuple(mine[part].shape)}")
            mine[part].copy_(value)


def without_name(parameter: str, name: str) -> str:
    """The dotted name of an adapter's matrix as files have it: without the adapter's own name before `weight`."""
    return f"{parameter.removesuffix(f'.{name}.weight')}.weight"


def is_of_adapter(parameter: str, name: str) -> bool:
    """Whether a parameter's dotted name is that of the A or B matrix of the adapter called `name`."""
    return parameter.endswith((f".lora_A.{name}.weight", f".lora_B.{name}.weight"))


def write_adapter_of(model: PreTrainedModel, folder: Path, state_dict: dict[str, Tensor] | None = None) -> None:
    """Writes the adapter of a model that `add_adapter` made; `state_dict` has all weights where they are sharded."""
    wrapped: Any = model
    weights = get_peft_model_state_dict(wrapped, state_dict, adapter_name=_NAME, save_embedding_layers=False)
    write_adapter(wrapped.peft_config[_NAME], weights, folder)


def write_adapter(settings: LoraConfig, weights: dict[str, Tensor], folder: Path) -> None:
    """Writes adapter_config.json and adapter_model.safetensors, the same bytes for the same content."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {**cast(Any, settings).to_dict(), "inference_mode": True}
    # PEFT keeps names in sets, whose order changes from process to process.
    content = {name: sorted(value) if isinstance(value, set) else value for name, value in content.items()}
    (folder / "adapter_config.json").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    whole = {name: value.detach().cpu().contiguous() for name, value in sorted(weights.items())}
    save_file(whole, folder / "adapter_model.safetensors", metadata={"format": "pt"})
