"""Sampling responses to prompts, as the stages collect, ppo and evaluate share it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from rlhf.config.data import DataConfig
from rlhf.config.stages import SamplingConfig
from rlhf.data import load_prompts
from rlhf.data.splits import SPLITS, SplitName
from rlhf.data.tokenization import decode_response, encode_prompt, fit_lengths
from rlhf.errors import ConfigError, DataError
from rlhf.models.generation import generate
from rlhf.models.sampling import Suppressed, row_uniforms
from rlhf.ops.sequences import left_pad
from rlhf.records import PromptContent, prompt_hash

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ItemT = TypeVar("ItemT")


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt with its token ids, the hash that keys its random numbers, and the row's other fields by name."""

    content: PromptContent
    key: int
    ids: list[int]
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SampledBatch:
    """Responses (B, R) to left-padded prompts (B, P); `logprobs` are those of sampling, at the sampling temperature."""

    prompt_ids: Tensor
    prompt_mask: Tensor
    response_ids: Tensor
    response_mask: Tensor
    stopped: Tensor
    logprobs: Tensor


def load_encoded_prompts(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, report: Callable[[str], None]
) -> dict[SplitName, list[EncodedPrompt]]:
    """The data's prompts as token ids, by split; what was left out as broken or over-long goes to `report`.

    Every prompt has all columns that any prompt has, as None where its row lacks them. Raises `DataError` for such
    rows unless the config says to skip them.
    """
    splits = fit_lengths(load_prompts(config), tokenizer, config)
    splits.report(report)
    names = dict.fromkeys(column for name in SPLITS for prompt in splits.named(name) for column in prompt.columns)
    return {
        name: [
            encode_one(tokenizer, prompt.prompt, {column: prompt.columns.get(column) for column in names})
            for prompt in splits.named(name)
        ]
        for name in SPLITS
    }


def encode_one(
    tokenizer: PreTrainedTokenizerBase, prompt: PromptContent, columns: Mapping[str, Any] | None = None
) -> EncodedPrompt:
    """The prompt as this tokenizer's ids."""
    # One bit less than the hash has, so that it fits a signed 64-bit tensor.
    return EncodedPrompt(prompt, prompt_hash(prompt) >> 1, encode_prompt(tokenizer, prompt), columns or {})


def require_prompts(prompts: Sequence[EncodedPrompt], split: SplitName) -> None:
    """Raises `DataError` when a split that is to be sampled from has no prompt."""
    if not prompts:
        raise DataError(
            f"the data has no {split} prompt to sample from; look at data.path, data.splits and data.max_prompt_tokens"
        )


def stop_token_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, more: Sequence[str] = (), key: str = "ppo.stop_tokens"
) -> list[int]:
    """The ids that end a response: the tokenizer's EOS, the special tokens that the generation config names, `more`.

    A config that was made without its tokenizer names its class's default there, which may be any ordinary token.
    Raises `ConfigError`, naming `key`, for one of `more` that is not a single token of the vocabulary.
    """
    configured = getattr(model.generation_config, "eos_token_id", None)
    named = [] if configured is None else [configured] if isinstance(configured, int) else list(configured)
    added = tokenizer.added_tokens_decoder
    special = {*tokenizer.all_special_ids, *(index for index, token in added.items() if token.special)}
    return sorted(
        {
            int(tokenizer.eos_token_id),
            *(special & set(map(int, named))),
            *(single_token_id(tokenizer, token, key) for token in more),
        }
    )


def sampling_rules(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sampling: SamplingConfig, key: str
) -> tuple[list[int], Suppressed | None]:
    """The stop ids of a section `sampling`, named by `key`, and what its least length suppresses."""
    stop_ids = stop_token_ids(model, tokenizer, sampling.stop_tokens, f"{key}.stop_tokens")
    if not sampling.min_response_tokens:
        return stop_ids, None
    return stop_ids, Suppressed(tuple(stop_ids), sampling.min_response_tokens)


def single_token_id(tokenizer: PreTrainedTokenizerBase, token: str, key: str) -> int:
    """The id of a token given by its name in the vocabulary, or as the text that it alone stands for.

    Raises `ConfigError`, naming `key`, for a text of several tokens.
    """
    index = tokenizer.get_vocab().get(token)
    if index is not None:
        return int(index)
    ids = tokenizer.encode(token, add_special_tokens=False)
    if len(ids) != 1:
        raise ConfigError(
            f"{key} names {token!r}, which this tokenizer writes as {len(ids)} tokens. It must be one token of the "
            "vocabulary"
        )
    return int(ids[0])


def sample_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[EncodedPrompt],
    sample_indices: Sequence[int],
    *,
    seed: int,
    purpose: str,
    step: int,
    temperature: float,
    max_response_tokens: int,
    device: torch.device,
    stop_ids: Sequence[int] | None = None,
    suppressed: Suppressed | None = None,
    before_token: Callable[[], None] | None = None,
) -> SampledBatch:
    """A response to each row. Row i's random numbers are keyed by (seed, purpose, step, prompt, sample_indices[i]).

    `stop_ids=None` are those of `stop_token_ids`; `before_token`: see `generate`.
    """
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    prompt_ids, prompt_mask = left_pad([prompt.ids for prompt in prompts], pad_id=pad_id)
    prompt_ids, prompt_mask = prompt_ids.to(device), prompt_mask.to(device)
    uniforms = row_uniforms(
        seed, purpose, step, [prompt.key for prompt in prompts], list(sample_indices), max_response_tokens
    )
    result = generate(
        model,
        prompt_ids,
        prompt_mask,
        uniforms=uniforms.to(device),
        temperature=temperature,
        max_response_tokens=max_response_tokens,
        stop_ids=stop_token_ids(model, tokenizer) if stop_ids is None else list(stop_ids),
        pad_id=pad_id,
        suppressed=suppressed,
        before_token=before_token,
    )
    return SampledBatch(
        prompt_ids, prompt_mask, result.response_ids, result.response_mask, result.stopped, result.logprobs
    )


def decode_responses(tokenizer: PreTrainedTokenizerBase, response_ids: Tensor, response_mask: Tensor) -> list[str]:
    """The text of every response, without special tokens. Both tensors have shape (B, R)."""
    rows = zip(response_ids.tolist(), response_mask.tolist(), strict=True)
    return [decode_response(tokenizer, [i for i, real in zip(ids, mask, strict=True) if real]) for ids, mask in rows]


def in_batches(items: Sequence[ItemT], size: int) -> Iterator[Sequence[ItemT]]:
    """Consecutive pieces of at most `size` items."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
