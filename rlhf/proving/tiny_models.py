"""Tiny models of the architecture of a real one, saved as folders: policies, reward models, classifiers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rlhf.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerFast

Role = Literal["policy", "scorer", "classifier", "tokenizer"]
WIDTH, HEADS, LAYERS, VOCABULARY = 64, 4, 2, 512
END_OF_TEXT = "<|endoftext|>"
# What the configs of transformers call these sizes.
_SIZES: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"), WIDTH),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads"), HEADS),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff"), 2 * WIDTH),
    **dict.fromkeys(("head_dim", "d_kv"), WIDTH // HEADS),
}
# Special tokens of a family's tokenizer: beginning, end, padding (None: it has none), and whether it writes the first.
_TOKENS: dict[str, tuple[str, str, str | None, bool]] = {
    "gpt2": (END_OF_TEXT, END_OF_TEXT, None, False),
    "gpt_neox": (END_OF_TEXT, END_OF_TEXT, "<|padding|>", False),
    "opt": ("</s>", "</s>", "<pad>", True),
    "roberta": ("<s>", "</s>", "<pad>", False),
}
_OTHERS = ("<s>", "</s>", None, True)


def make_tokenizer(model_type: str, texts: Sequence[str], length: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with the special tokens of the family, trained on the texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    begin, end, pad, writes_begin = _TOKENS.get(model_type, _OTHERS)
    special = list(dict.fromkeys(token for token in (begin, end, pad) if token is not None))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    if writes_begin:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, tokenizer.token_to_id(begin))]
        )
    # Pythia has a padding token in its vocabulary that its tokenizer does not name.
    named = {} if pad is None or model_type == "gpt_neox" else {"pad_token": pad}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=begin,
        eos_token=end,
        model_max_length=length,
        clean_up_tokenization_spaces=False,
        **named,
    )


def tiny_config(real: PreTrainedConfig, tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    """The real config with tiny sizes: everything that is no size stays as it is."""
    config = copy.deepcopy(real)
    for name, size in _SIZES.items():
        if getattr(config, name, None) is not None:
            setattr(config, name, size)
    if getattr(config, "num_key_value_heads", None) is not None:
        shared = real.num_key_value_heads < real.num_attention_heads
        config.num_key_value_heads = HEADS // 2 if shared else HEADS
    for name in ("layer_types", "attention_layers"):
        if isinstance(getattr(config, name, None), list):
            setattr(config, name, getattr(config, name)[:LAYERS])
    # What adapts itself to the width comes out of the class again, whatever the real one had.
    config.vocab_size = len(tokenizer)
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    return config


def write_tiny(folder: Path, real: PreTrainedConfig, role: Role, texts: Sequence[str], seed: int) -> None:
    """A model folder as `from_pretrained` reads it. Raises `ConfigError` for an architecture that cannot be shrunk."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from rlhf.models.loading import quiet
    from rlhf.models.scalar import ScalarModel, ensure_distinct_pad

    length = int(getattr(real, "max_position_embeddings", None) or getattr(real, "n_positions", None) or 2048)
    tokenizer = make_tokenizer(real.model_type, texts, length)
    folder.mkdir(parents=True, exist_ok=True)
    if role == "tokenizer":
        tokenizer.save_pretrained(folder)
        tiny_config(real, tokenizer).save_pretrained(folder)
        return
    config = tiny_config(real, tokenizer)
    factory: Any = AutoModelForSequenceClassification if role == "classifier" else AutoModelForCausalLM
    try:
        with torch.random.fork_rng(), quiet():
            torch.manual_seed(seed)
            model = factory.from_config(config, dtype=torch.float32)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise ConfigError(f"no tiny model of architecture {real.model_type} can be made: {error}") from error
    with quiet():
        if role == "scorer":
            scalar = ScalarModel.from_policy(model, seed=seed)
            scalar.save(folder, ensure_distinct_pad(tokenizer, scalar.model))
            return
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
