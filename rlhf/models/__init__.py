"""Models: loading, making from scratch, scalar heads, generation, scoring. torch is imported on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf.models.generation import Generation, generate
    from rlhf.models.loading import check_vocabulary, disable_dropout, load_policy, load_tokenizer
    from rlhf.models.paths import check_model_path
    from rlhf.models.positions import check_positions
    from rlhf.models.sampling import Suppressed, row_uniforms
    from rlhf.models.saving import save_model
    from rlhf.models.scalar import ScalarModel, ensure_distinct_pad, response_scores, sequence_scores
    from rlhf.models.scoring import response_logits, response_logprobs, response_logprobs_and_entropy
    from rlhf.models.scratch import build_from_scratch

_MODULES = {
    "Generation": "generation",
    "ScalarModel": "scalar",
    "Suppressed": "sampling",
    "build_from_scratch": "scratch",
    "check_model_path": "paths",
    "check_positions": "positions",
    "check_vocabulary": "loading",
    "disable_dropout": "loading",
    "ensure_distinct_pad": "scalar",
    "generate": "generation",
    "load_policy": "loading",
    "load_tokenizer": "loading",
    "response_logits": "scoring",
    "response_logprobs": "scoring",
    "response_logprobs_and_entropy": "scoring",
    "response_scores": "scalar",
    "row_uniforms": "sampling",
    "save_model": "saving",
    "sequence_scores": "scalar",
}

__all__ = [
    "Generation",
    "ScalarModel",
    "Suppressed",
    "build_from_scratch",
    "check_model_path",
    "check_positions",
    "check_vocabulary",
    "disable_dropout",
    "ensure_distinct_pad",
    "generate",
    "load_policy",
    "load_tokenizer",
    "response_logits",
    "response_logprobs",
    "response_logprobs_and_entropy",
    "response_scores",
    "row_uniforms",
    "save_model",
    "sequence_scores",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
