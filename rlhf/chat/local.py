"""A chat model in memory: a folder or hub id, asked in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from rlhf.chat.checks import folder_marks
from rlhf.chat.protocol import ChatReply, ChatRequest, OnReply
from rlhf.config.chat import ChatModelConfig
from rlhf.data.tokenization import decode_response, encode_continuation, encode_prompt
from rlhf.errors import ConfigError
from rlhf.models.generation import generate
from rlhf.models.loading import load_policy, load_tokenizer, place
from rlhf.models.paths import is_local
from rlhf.models.sampling import row_uniforms
from rlhf.models.scoring import response_logits
from rlhf.ops.sequences import left_pad, right_pad

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Dividing by it leaves the likeliest token alone with any weight; the largest logit stays far from overflow.
_GREEDY_TEMPERATURE = 1e-30


@dataclass
class LocalChat:
    """A causal or encoder-decoder model with its tokenizer.

    Conversations go through the chat template; without one the model reads the turns' texts, joined by blank lines.
    A reply depends on its request alone, not on the batch in which it stands: random numbers are keyed by the request.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: str
    batch_size: int
    key: str

    @property
    def identity(self) -> str:
        """The model's files and its precision."""
        return f"{self.source} {self.model.dtype}"

    @classmethod
    def load(
        cls, config: ChatModelConfig, key: str, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> LocalChat:
        """The model that the config names. Raises `ConfigError` or `ArtifactError`, naming `key`.model."""
        assert config.model is not None, "a config without a model is an address's"
        path = str(Path(config.model).expanduser()) if is_local(config.model) else config.model
        tokenizer = load_tokenizer(path, key=f"{key}.model")
        device = torch.device("cpu") if device is None else device
        model = load_policy(path, dtype=_precision(device) if dtype is None else dtype, key=f"{key}.model")
        model.requires_grad_(False)
        return cls(place(model, device), tokenizer, _source(path, model), config.batch_size, key)

    def to(self, device: torch.device) -> None:
        """Moves the model to another kind of device, in the precision that is usual there."""
        if self.model.device.type != device.type:
            for parameter in self.model.parameters():
                # The weights alone: buffers such as rotary frequencies stay in float32, as loading leaves them.
                parameter.data = parameter.data.to(_precision(device))
            place(self.model, device)

    def count_tokens(self, request: ChatRequest) -> int:
        """The tokens of the conversation, exactly."""
        return len(self._encode(request))

    def ask(self, requests: Sequence[ChatRequest], on_reply: OnReply) -> list[ChatReply]:
        """The replies, in order. Raises `ConfigError` for a conversation that is too long for the model."""
        replies: dict[int, ChatReply] = {}
        for batch in self._batches(requests):
            chosen = [requests[index] for index in batch]
            answered = self._choose(chosen) if chosen[0].choices else self._write(chosen)
            for index, reply in zip(batch, answered, strict=True):
                replies[index] = reply
                on_reply(index, reply)
        return [replies[index] for index in range(len(requests))]

    def _batches(self, requests: Sequence[ChatRequest]) -> Iterator[list[int]]:
        """Indices of requests of one kind, in batches."""
        kinds: dict[tuple[object, ...], list[int]] = {}
        for index, request in enumerate(requests):
            kind = ("choices",) if request.choices else ("text", request.max_tokens, request.temperature)
            kinds.setdefault(kind, []).append(index)
        for indices in kinds.values():
            for start in range(0, len(indices), self.batch_size):
                yield indices[start : start + self.batch_size]

    def _encode(self, request: ChatRequest) -> list[int]:
        if self.tokenizer.chat_template is None:
            return encode_prompt(self.tokenizer, "\n\n".join(message.content for message in request.messages))
        return encode_prompt(self.tokenizer, request.messages)

    def _write(self, requests: Sequence[ChatRequest]) -> list[ChatReply]:
        rows = [self._encode(request) for request in requests]
        max_tokens, temperature = requests[0].max_tokens, requests[0].temperature
        self._check_length(max(map(len, rows)), max_tokens)
        ids, mask = left_pad(rows, pad_id=self._pad_id)
        if temperature:
            keys = [request.fingerprint(self.identity) for request in requests]
            uniforms = row_uniforms(0, "chat", 0, keys, 0, max_tokens)
        else:
            uniforms = torch.zeros(len(rows), max_tokens, dtype=torch.float64)
        device = self.model.device
        result = generate(
            self.model,
            ids.to(device),
            mask.to(device),
            uniforms=uniforms.to(device),
            temperature=temperature or _GREEDY_TEMPERATURE,
            max_response_tokens=max_tokens,
            stop_ids=self._stop_ids(),
            pad_id=self._pad_id,
        )
        replies = []
        for row, written, real in zip(rows, result.response_ids.tolist(), result.response_mask.tolist(), strict=True):
            tokens = [token for token, is_real in zip(written, real, strict=True) if is_real]
            replies.append(ChatReply(decode_response(self.tokenizer, tokens), len(row), len(tokens)))
        return replies

    @torch.inference_mode()
    def _choose(self, requests: Sequence[ChatRequest]) -> list[ChatReply]:
        """One forward pass over each conversation, followed by each beginning that several tokens of a choice have."""
        rows: dict[tuple[int, tuple[int, ...]], int] = {}
        choices: list[list[list[int]]] = []
        prompts = [self._encode(request) for request in requests]
        for index, request in enumerate(requests):
            choices.append([encode_continuation(self.tokenizer, choice) for choice in request.choices])
            for ids in choices[-1]:
                rows.setdefault((index, tuple(ids[:-1])), len(rows))
        prompt_ids, prompt_mask = left_pad([prompts[index] for index, _ in rows], pad_id=self._pad_id)
        # The last token is only the place that the logits before it predict.
        response_ids, response_mask = right_pad([[*begin, self._pad_id] for _, begin in rows], pad_id=self._pad_id)
        self._check_length(max(map(len, prompts)), response_ids.shape[1])
        device = self.model.device
        logits = response_logits(
            self.model,
            input_ids=torch.cat([prompt_ids, response_ids], dim=1).to(device),
            attention_mask=torch.cat([prompt_mask, response_mask], dim=1).to(device),
            num_prompt=prompt_ids.shape[1],
        )
        logprobs = logits.float().log_softmax(-1)
        replies = []
        for index, request in enumerate(requests):
            scores = []
            for ids in choices[index]:
                row = rows[index, tuple(ids[:-1])]
                scores.append(sum(logprobs[row, place, token] for place, token in enumerate(ids)))
            normalized = torch.stack([torch.as_tensor(score) for score in scores]).log_softmax(0).tolist()
            best = max(range(len(normalized)), key=normalized.__getitem__)
            replies.append(ChatReply(request.choices[best], len(prompts[index]), 1, tuple(normalized)))
        return replies

    def _check_length(self, num_prompt: int, num_response: int) -> None:
        limit = getattr(self.model.config, "max_position_embeddings", None)
        if limit is not None and num_prompt + num_response > limit:
            raise ConfigError(
                f"{self.key}: a question has {num_prompt} tokens and its reply up to {num_response}, but the model has "
                f"{limit} positions; lower {self.key}.max_tokens, or take a model with more"
            )

    @property
    def _pad_id(self) -> int:
        return int(self.tokenizer.pad_token_id)

    def _stop_ids(self) -> list[int]:
        configured = getattr(self.model.generation_config, "eos_token_id", None)
        named = [] if configured is None else [configured] if isinstance(configured, int) else list(configured)
        special = set(self.tokenizer.all_special_ids)
        return sorted({int(self.tokenizer.eos_token_id), *(special & set(map(int, named)))})


def _precision(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def _source(path: str, model: PreTrainedModel) -> str:
    """The model's content as far as it is cheap to tell: a folder's files with size and time, a hub id's commit."""
    if not is_local(path):
        return f"hub:{path}@{getattr(model.config, '_commit_hash', None)}"
    return f"folder:{Path(path).absolute()}@{folder_marks(Path(path))}"
