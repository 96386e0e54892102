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
    """
    folder.mkdir(parents=True, exist_ok=True)
    name, model.config._name_or_path = model.config._name_or_path, ""
    try:
        model.save_pretrained(folder, state_dict=state_dict, safe_serialization=True)
    finally:
        model.config._name_or_path = name
    written = copy.deepcopy(tokenizer)
    written.name_or_path = ""
    written.init_kwargs.pop("name_or_path", None)
    written.save_pretrained(folder)
    if not has_tokenizer(folder):
        raise ArtifactError(f"{type(tokenizer).__name__} wrote no tokenizer files into {folder}")
