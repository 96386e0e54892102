"""The configs of models that papers name, by the sizes of their model cards: a proof needs neither hub nor weights.

A model that is not known here is read from its folder or the hub; where neither has it, it is taken to be like
`model.path`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.errors import ConfigError, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Layers, width, heads, vocabulary.
_PYTHIA = {
    "70m": (6, 512, 8, 50304),
    "160m": (12, 768, 12, 50304),
    "410m": (24, 1024, 16, 50304),
    "1b": (16, 2048, 8, 50304),
    "1.4b": (24, 2048, 16, 50304),
    "2.8b": (32, 2560, 32, 50304),
    "6.9b": (32, 4096, 32, 50432),
    "12b": (36, 5120, 40, 50688),
}
_GPT2 = {"": (12, 768, 12), "-medium": (24, 1024, 16), "-large": (36, 1280, 20), "-xl": (48, 1600, 25)}
# Layers, width, heads, key-value heads, MLP, vocabulary.
_LLAMA = {
    "7b": (32, 4096, 32, 32, 11008, 32000),
    "13b": (40, 5120, 40, 40, 13824, 32000),
    "30b": (60, 6656, 52, 52, 17920, 32000),
    "65b": (80, 8192, 64, 64, 22016, 32000),
}
_OPT = {"125m": (12, 768, 12), "350m": (24, 1024, 16), "1.3b": (24, 2048, 32), "2.7b": (32, 2560, 32)}
_OPT |= {"6.7b": (32, 4096, 32), "13b": (40, 5120, 40)}
# Ids that say neither family nor size.
_ALIASES = {
    "alpaca_farm_models/reward-model-human": "huggyllama/llama-7b",
    "alpaca_farm_models/reward-model-sim": "huggyllama/llama-7b",
}


def known_config(path: str) -> PreTrainedConfig | None:
    """The config of a model id by its name; None for one that is not known."""
    name = _ALIASES.get(path, path).rpartition("/")[2].lower()
    fields = _pythia(name) or _gpt2(name) or _mistral(name) or _llama(name) or _opt(name) or _roberta(name)
    if fields is None:
        return None
    from transformers import AutoConfig

    made: PreTrainedConfig = AutoConfig.for_model(fields.pop("model_type"), **fields)
    return made


def config_of(path: str, fallback: PreTrainedConfig | None, model: Any) -> tuple[PreTrainedConfig, str]:
    """A model's config and where it is from: its folder, the table here, the hub, or `fallback`.

    `model` is the config's section, which says how to read it. Raises `ConfigError` where all of that fails.
    """
    from rlhf.models.loading import load_config

    folder = Path(path).expanduser()
    if (folder / "config.json").is_file():
        return load_config(str(folder), model, "model.path"), "its folder"
    known = known_config(path)
    if known is not None:
        return known, "its model card"
    if path.count("/") == 1 and not folder.exists():
        try:
            return load_config(path, model, "model.path"), "the hub"
        except UserError as error:
            if fallback is None:
                raise ConfigError(f"model {path} is not known here and cannot be read: {error}") from error
    if fallback is None:
        raise ConfigError(f"model {path} is not known here, and there is no model.path to take it to be like")
    return fallback, "model.path, which it is taken to be like"


def _pythia(name: str) -> dict[str, Any] | None:
    found = re.search(r"pythia[-_](\d+(?:\.\d+)?[mb])", name)
    if found is None or found.group(1) not in _PYTHIA:
        return None
    layers, width, heads, vocabulary = _PYTHIA[found.group(1)]
    return {
        "model_type": "gpt_neox",
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "vocab_size": vocabulary,
        "max_position_embeddings": 2048,
    }


def _gpt2(name: str) -> dict[str, Any] | None:
    found = re.fullmatch(r"gpt2(-medium|-large|-xl)?", name)
    if found is None:
        return None
    layers, width, heads = _GPT2[found.group(1) or ""]
    return {"model_type": "gpt2", "n_layer": layers, "n_embd": width, "n_head": heads, "n_positions": 1024}


def _mistral(name: str) -> dict[str, Any] | None:
    if not re.search(r"mistral-7b", name):
        return None
    fields = _gated("mistral", (32, 4096, 32, 8, 14336, 32000))
    return {**fields, "max_position_embeddings": 32768, "sliding_window": None}


def _llama(name: str) -> dict[str, Any] | None:
    found = re.search(r"llama(?:-2)?-(\d+b)", name)
    if found is None or found.group(1) not in _LLAMA:
        return None
    return {**_gated("llama", _LLAMA[found.group(1)]), "max_position_embeddings": 2048}


def _gated(model_type: str, sizes: tuple[int, int, int, int, int, int]) -> dict[str, Any]:
    layers, width, heads, shared, inner, vocabulary = sizes
    return {
        "model_type": model_type,
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": shared,
        "intermediate_size": inner,
        "vocab_size": vocabulary,
    }


def _opt(name: str) -> dict[str, Any] | None:
    found = re.fullmatch(r"opt-(\d+(?:\.\d+)?[mb])", name)
    if found is None or found.group(1) not in _OPT:
        return None
    layers, width, heads = _OPT[found.group(1)]
    sizes = {"hidden_size": width, "word_embed_proj_dim": width, "ffn_dim": 4 * width}
    return {"model_type": "opt", "num_hidden_layers": layers, "num_attention_heads": heads, **sizes}


def _roberta(name: str) -> dict[str, Any] | None:
    """Classifiers of two labels, such as siebert/sentiment-roberta-large-english."""
    if "roberta-large" not in name:
        return None
    return {
        "model_type": "roberta",
        "num_hidden_layers": 24,
        "hidden_size": 1024,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "vocab_size": 50265,
        "max_position_embeddings": 514,
        "id2label": {0: "NEGATIVE", 1: "POSITIVE"},
    }
