"""Small models made from scratch: random weights of a known architecture, a BPE tokenizer trained on given texts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from rlhf.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from rlhf.config.model import ScratchConfig

PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] + ':\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
)


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, max_positions: int, *, encoder_decoder: bool = False
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer (Sennrich et al. 2016) whose texts begin with BOS and carry no EOS.

    That of an encoder-decoder model is as T5's: no BOS, an EOS behind every text. Equal texts give equal tokenizers.
    The vocabulary is smaller than `vocab_size` when the texts offer fewer merges.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    special = [(token, tokenizer.token_to_id(token)) for token in (BOS, EOS)]
    single, pair = (f"$A {EOS}", f"$A {EOS} $B {EOS}") if encoder_decoder else (f"{BOS} $A", f"{BOS} $A $B")
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=single, pair=pair, special_tokens=special),
        ]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=None if encoder_decoder else BOS,
        eos_token=EOS,
        model_max_length=max_positions,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def build_from_scratch(
    config: ScratchConfig, texts: Iterable[str], seed: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A randomly initialised model in float32 and its tokenizer; both follow from the arguments alone.

    The global random state is neither read nor changed. Raises `ConfigError` when the sizes do not fit each other.
    """
    check_sizes(config)
    encoder_decoder = config.architecture == "t5"
    tokenizer = train_tokenizer(texts, config.vocab_size, config.max_positions, encoder_decoder=encoder_decoder)
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if encoder_decoder:
        special["decoder_start_token_id"] = tokenizer.pad_token_id
    model_config = scratch_model_config(config, special)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        factory: Any = AutoModelForSeq2SeqLM if encoder_decoder else AutoModelForCausalLM
        model = factory.from_config(model_config, dtype=torch.float32)
    if encoder_decoder:
        # transformers' deviation of 1 would give logits of deviation sqrt(d), which AdamW takes long to bring down.
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(config.hidden_size**-0.5)
    model.generation_config = GenerationConfig(do_sample=True, **special)
    return model.eval(), tokenizer


def check_sizes(config: ScratchConfig) -> None:
    """Raises `ConfigError` when the sizes do not fit each other."""
    if config.hidden_size % config.num_heads:
        raise ConfigError(
            f"model.scratch.hidden_size ({config.hidden_size}) must be a multiple of model.scratch.num_heads "
            f"({config.num_heads})"
        )
    if config.architecture not in ("gpt2", "t5") and (config.hidden_size // config.num_heads) % 2:
        raise ConfigError(
            f"model.scratch.hidden_size / num_heads ({config.hidden_size // config.num_heads}) must be even for "
            f"{config.architecture}: rotary positions turn pairs of dimensions"
        )


def scratch_model_config(config: ScratchConfig, special: Mapping[str, int] | None = None) -> PreTrainedConfig:
    """The config of the model that `build_from_scratch` makes; `special` has the ids of the tokenizer's own tokens."""
    check_sizes(config)
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2} if special is None else special
    fields = {**ids, **_architecture_fields(config)}
    made: PreTrainedConfig = AutoConfig.for_model(config.architecture, vocab_size=config.vocab_size, **fields)
    return made


def _architecture_fields(config: ScratchConfig) -> dict[str, Any]:
    """Sizes under the names of each architecture; no dropout, windows as long as the longest sequence."""
    head_size = config.hidden_size // config.num_heads
    if config.architecture == "gpt2":
        return {
            "n_embd": config.hidden_size,
            "n_layer": config.num_layers,
            "n_head": config.num_heads,
            "n_positions": config.max_positions,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        }
    # The gated MLP has three matrices: 8/3 of the width gives the parameters of a plain one, rounded up to 16.
    gated_size = -(-8 * config.hidden_size // 3 // 16) * 16
    if config.architecture == "t5":
        # Version 1.1: gated GELU, logits that are not scaled, which transformers reads off the last field. The matrix
        # stays the embedding's all the same.
        return {
            "d_model": config.hidden_size,
            "d_kv": head_size,
            "d_ff": gated_size,
            "num_layers": config.num_layers,
            "num_decoder_layers": config.num_layers,
            "num_heads": config.num_heads,
            "feed_forward_proj": "gated-gelu",
            "dropout_rate": 0.0,
            "tie_word_embeddings": False,
        }
    fields: dict[str, Any] = {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "max_position_embeddings": config.max_positions,
    }
    if config.architecture == "gpt_neox":
        # Pythia turns a quarter of each head; a small head keeps at least one pair of dimensions.
        share = 0.25 if head_size % 8 == 0 else 1.0
        return fields | {
            "intermediate_size": 4 * config.hidden_size,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "classifier_dropout": 0.0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": share},
        }
    fields["intermediate_size"] = gated_size
    fields["num_key_value_heads"] = config.num_heads
    fields["head_dim"] = head_size
    if config.architecture == "llama":
        return fields
    if config.num_heads % 2 == 0:
        fields["num_key_value_heads"] = config.num_heads // 2
    if config.architecture == "mistral":
        fields["sliding_window"] = None
    if config.architecture == "gemma2":
        fields["sliding_window"] = config.max_positions
        fields["query_pre_attn_scalar"] = head_size
    return fields
