"""What is asked of a chat model and what comes back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from rlhf.errors import UserError
from rlhf.records import Message, prompt_to_json


class ChatError(UserError):
    """A chat model gave no reply; the message says which one, what it said instead, and what to do."""


@dataclass(frozen=True)
class ChatRequest:
    """A conversation to go on from, ending with the user's turn.

    With `choices` (short texts, such as letters) the log-prob of each as the reply is wanted: a local model then
    writes nothing else, and its reply is the likeliest choice. `seed` keys the random numbers of a temperature above 0.
    """

    messages: tuple[Message, ...]
    choices: tuple[str, ...] = ()
    max_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0

    def fingerprint(self, identity: str) -> str:
        """A hash of the request and of the model that is asked: equal requests of one model have one reply."""
        seed = self.seed if self.temperature else None
        body = [identity, prompt_to_json(self.messages), self.choices, self.max_tokens, self.temperature, seed]
        return hashlib.sha256(json.dumps(body, ensure_ascii=False).encode()).hexdigest()


@dataclass(frozen=True)
class ChatReply:
    """A reply, with the tokens that it took.

    `choice_logprobs` has one number for each of the request's choices, their probabilities adding up to 1; None where
    the model does not tell.
    """

    text: str
    prompt_tokens: int
    response_tokens: int
    choice_logprobs: tuple[float, ...] | None = None


# Told of each reply as it comes, with the index of its request.
OnReply = Callable[[int, ChatReply], None]


class ChatModel(Protocol):
    """A model that replies."""

    @property
    def identity(self) -> str:
        """What tells this model from all others whose replies may differ: part of the key of cached replies."""

    def count_tokens(self, request: ChatRequest) -> int:
        """The tokens of the conversation, exactly or at least about."""

    def ask(self, requests: Sequence[ChatRequest], on_reply: OnReply) -> list[ChatReply]:
        """A reply to each request. Raises `ChatError` when one cannot be had; the others have been told then."""
