"""`model`: which base model the pipeline starts from."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rlhf.config.base import PositiveInt, Section


class ScratchConfig(Section):
    """A small randomly initialised model and a byte-level BPE tokenizer trained on the run's own training texts."""

    architecture: Literal["llama", "gpt2", "gpt_neox", "qwen3", "gemma2", "mistral", "t5"] = Field(
        "llama", description="transformer family of the new model; t5 is an encoder-decoder model"
    )
    num_layers: PositiveInt = Field(2, description="number of transformer blocks; of t5, in each of its two stacks")
    hidden_size: PositiveInt = Field(128, description="width of the residual stream; a multiple of num_heads")
    num_heads: PositiveInt = Field(4, description="number of attention heads")
    vocab_size: int = Field(512, description="size of the BPE vocabulary, at least 262 (bytes and specials)", ge=262)
    max_positions: PositiveInt = Field(
        256, description="longest sequence, prompt and response together, in tokens; t5 has no limit"
    )


class ModelConfig(Section):
    """The base model: a folder or hub id in Hugging Face format, or, when `path` is null, one made from scratch."""

    path: str | None = Field(None, description="local folder or hub id; null makes a model from `scratch`")
    revision: str | None = Field(None, description="branch, tag or commit on the hub")
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")
    chat_template: str | None = Field(
        None, description="chatml, plain, a Jinja file or text; null keeps the tokenizer's"
    )
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = Field(
        "auto", description="attention kernel; auto lets transformers choose"
    )
    scratch: ScratchConfig = Field(ScratchConfig(), description="the model made when `path` is null")
