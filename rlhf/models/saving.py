"""Writing model folders that plain transformers loads."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from rlhf.errors import ArtifactError
from rlhf.models.paths import has_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    state_dict: dict[str, Tensor] | None = None,
) -> None:
    """Writes weights (safetensors), config, generation config and tokenizer into `folder`, creating it.

    `state_dict` replaces the model's own weights where those are sharded. The name of where the model came from is
    left out: loaders would go back there. The caller publishes the folder atomically.

    Of a model with an adapter, the adapter alone is written, and that names the base it belongs to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if hasattr(model, "peft_config"):
        from rlhf.models.adapters import write_adapter_of

        write_adapter_of(model, folder, state_dict)
    else:
        _write_model(model, folder, state_dict)
    save_tokenizer(tokenizer, folder)


def _write_model(model: PreTrainedModel, folder: Path, state_dict: dict[str, Tensor] | None) -> None:
    name, model.config._name_or_path = model.config._name_or_path, ""
    try:
        model.save_pretrained(folder, state_dict=state_dict, safe_serialization=True)
    finally:
        model.config._name_or_path = name


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes the tokenizer without the name of where it came from. Raises `ArtifactError` when it writes nothing."""
    written = copy.deepcopy(tokenizer)
    written.name_or_path = ""
    written.init_kwargs.pop("name_or_path", None)
    written.save_pretrained(folder)
    if not has_tokenizer(folder):
        raise ArtifactError(f"{type(tokenizer).__name__} wrote no tokenizer files into {folder}")
