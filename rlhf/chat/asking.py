"""Asking a chat model with a cache of replies, and with the cost known before anything is sent."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlhf.chat.cache import ReplyCache
from rlhf.chat.protocol import ChatModel, ChatReply, ChatRequest
from rlhf.config.chat import ChatModelConfig
from rlhf.errors import ConfigError

if TYPE_CHECKING:
    import torch

_MILLION = 1_000_000


@dataclass(frozen=True)
class CostEstimate:
    """What requests may cost: those in the cache cost nothing, each other one at most `max_tokens` received.

    `cost` is in the unit of the prices, None without them.
    """

    num_requests: int
    num_cached: int
    prompt_tokens: int
    max_response_tokens: int
    cost: float | None

    def __str__(self) -> str:
        text = f"{self.num_requests:,} requests"
        if self.num_cached:
            text += f", {self.num_cached:,} of them answered before"
        text += f"; about {self.prompt_tokens:,} tokens to send and at most {self.max_response_tokens:,} to receive"
        return text if self.cost is None else f"{text}; cost at most about {self.cost:.4g}"


class Chat:
    """A model, its cache and its prices. Counts what was asked, and stops before `max_cost` could be passed."""

    def __init__(self, model: ChatModel, config: ChatModelConfig, key: str) -> None:
        """`key` is the config key of the section, for errors."""
        self.model = model
        self.config = config
        self.key = key
        self._cache = None if config.cache is None else ReplyCache(config.cache, f"{key}.cache")
        self._lock = threading.Lock()
        self.num_requests = 0
        self.num_cached = 0
        self.prompt_tokens = 0
        self.response_tokens = 0

    def estimate(self, requests: Sequence[ChatRequest]) -> CostEstimate:
        """What the requests may cost, before any is sent; equal ones are asked once."""
        keys = [request.fingerprint(self.model.identity) for request in requests]
        known = self._known(keys)
        missing = {key: request for key, request in zip(keys, requests, strict=True) if key not in known}
        prompt_tokens = sum(self.model.count_tokens(request) for request in missing.values())
        response_tokens = sum(request.max_tokens for request in missing.values())
        num_cached = len(requests) - len(missing)
        cost = self._cost(prompt_tokens, response_tokens)
        return CostEstimate(len(requests), num_cached, prompt_tokens, response_tokens, cost)

    def check(self, estimate: CostEstimate) -> None:
        """Raises `ConfigError` when the estimate, on top of what has been spent, is over `max_cost`."""
        limit, spent = self.config.max_cost, self.cost or 0.0
        if limit is not None and estimate.cost is not None and spent + estimate.cost > limit:
            before = f" besides {spent:.4g} that is spent" if spent else ""
            raise ConfigError(
                f"{self.key}.max_cost={limit:g}: {estimate}{before}. Nothing of it was sent. Raise max_cost, lower "
                "max_tokens, or ask about less"
            )

    def ask(self, requests: Sequence[ChatRequest]) -> list[ChatReply]:
        """The replies, in order, from the cache where it has them; every other one is kept as it comes.

        Raises `ConfigError` before anything is sent when it may cost too much, `ChatError` when the model fails.
        """
        if self.config.max_cost is not None:
            self.check(self.estimate(requests))
        keys = [request.fingerprint(self.model.identity) for request in requests]
        replies = self._known(keys)
        self.num_requests += len(requests)
        missing = {key: request for key, request in zip(keys, requests, strict=True) if key not in replies}
        self.num_cached += len(requests) - len(missing)
        wanted = list(missing)

        def on_reply(index: int, reply: ChatReply) -> None:
            with self._lock:
                self.prompt_tokens += reply.prompt_tokens
                self.response_tokens += reply.response_tokens
            if self._cache is not None:
                self._cache.put(wanted[index], reply)

        if missing:
            replies |= dict(zip(wanted, self.model.ask(list(missing.values()), on_reply), strict=True))
        return [replies[key] for key in keys]

    @property
    def cost(self) -> float | None:
        """What has been spent so far, in the unit of the prices; None without them."""
        return self._cost(self.prompt_tokens, self.response_tokens)

    def figures(self) -> dict[str, Any]:
        """Requests, those that the cache answered, tokens and cost so far."""
        return {
            "requests": self.num_requests,
            "cached": self.num_cached,
            "prompt_tokens": self.prompt_tokens,
            "response_tokens": self.response_tokens,
            "cost": self.cost,
        }

    def _known(self, keys: Sequence[str]) -> dict[str, ChatReply]:
        return {} if self._cache is None else self._cache.get(set(keys))

    def _cost(self, prompt_tokens: int, response_tokens: int) -> float | None:
        prices = (self.config.input_price, self.config.output_price)
        if prices == (None, None):
            return None
        return (prompt_tokens * (prices[0] or 0.0) + response_tokens * (prices[1] or 0.0)) / _MILLION


def make_chat(
    config: ChatModelConfig, key: str, *, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> Chat:
    """The chat model of a config section. `key` is that of the section; a local model runs on `device` in `dtype`.

    Raises `ConfigError` or `ArtifactError` for a model, a key or a folder that cannot be had.
    """
    model: ChatModel
    if config.address is not None:
        from rlhf.chat.address import OpenAIChat

        model = OpenAIChat(config, key)
    else:
        from rlhf.chat.local import LocalChat

        model = LocalChat.load(config, key, device=device, dtype=dtype)
    return Chat(model, config, key)
