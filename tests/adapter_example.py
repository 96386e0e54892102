"""A tiny base model and adapters on it, as folders, for tests of adapters and of the roles on one base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import TaskType
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.config.model import ScratchConfig
from rlhf.config.peft import LoRAConfig
from rlhf.models import ScalarModel, build_from_scratch, ensure_distinct_pad, load_tokenizer, save_model
from rlhf.models.adapters import add_adapter, backbone_of
from rlhf.models.loading import load_policy

TEXTS = ["the film was good", "a film that was not good at all", "what a film this was"] * 10
LORA = LoRAConfig(rank=4, alpha=8.0)


def write_base(folder: Path, architecture: str = "llama", seed: int = 4) -> str:
    """A whole model of two layers of 32."""
    config = ScratchConfig.model_validate(
        {"architecture": architecture, "hidden_size": 32, "vocab_size": 270, "max_positions": 64}
    )
    model, tokenizer = build_from_scratch(config, TEXTS, seed)
    save_model(model, tokenizer, folder)
    return str(folder)


def adapted(
    source: str, lora: LoRAConfig = LORA, *, scores: bool = False, seed: int = 3
) -> tuple[PreTrainedModel, Any]:
    """The model of `source` with an adapter to train, as stages sft and reward_model make it, and its tokenizer."""
    backbone, tokenizer = backbone_of(source, "base"), load_tokenizer(source)
    model: Any = ScalarModel.from_policy(backbone, seed=seed).model if scores else load_policy(backbone)
    if scores:
        tokenizer = ensure_distinct_pad(tokenizer, model)
    task = TaskType.SEQ_CLS if scores else TaskType.CAUSAL_LM
    return add_adapter(model, source, lora, task=task, seed=seed, key="base"), tokenizer


def write_adapter(folder: Path, source: str, lora: LoRAConfig = LORA, *, scores: bool = False, seed: int = 3) -> str:
    """An adapter's folder, moved away from where it started as if it had been trained."""
    model, tokenizer = adapted(source, lora, scores=scores, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "score.modules_to_save" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    save_model(model, tokenizer, folder)
    return str(folder)


def fixed_batch(num_prompt: int = 5, num_response: int = 4) -> tuple[Tensor, Tensor]:
    """Ids (3, T) int64 and mask (3, T) bool: prompts padded on the left, responses on the right."""
    generator = torch.Generator().manual_seed(9)
    ids = torch.randint(5, 260, (3, num_prompt + num_response), generator=generator)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, :2] = False
    mask[1, -1:] = False
    mask[2, :3] = False
    mask[2, -2:] = False
    return torch.where(mask, ids, torch.zeros_like(ids)), mask
