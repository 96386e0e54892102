"""A chat model behind an address with OpenAI's interface: POST {address}/chat/completions."""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from rlhf.chat.checks import secret
from rlhf.chat.protocol import ChatError, ChatReply, ChatRequest, OnReply
from rlhf.config.chat import ChatModelConfig
from rlhf.records import prompt_to_json

FIRST_WAIT_SECONDS = 0.5
LONGEST_WAIT_SECONDS = 60.0
# A server that wants to be left alone for longer has no quota left; waiting would look like hanging.
LONGEST_RETRY_AFTER_SECONDS = 600.0
_RETRIED_STATUS = (408, 429)
_NUM_TOP_LOGPROBS = 20
_SHOWN_CHARACTERS = 300
# Without the server's tokenizer: text has rarely more than a token for three bytes.
_BYTES_PER_TOKEN = 3
_TOKENS_PER_MESSAGE = 4


class _PassingError(Exception):
    """A failure that may be over at the next try; `wait` is what the server asks for, in seconds."""

    def __init__(self, message: str, wait: float | None = None) -> None:
        super().__init__(message)
        self.wait = wait


class _NotSentError(Exception):
    """Another request has failed for good meanwhile."""


@dataclass
class OpenAIChat:
    """Asks a server, `concurrency` requests at a time, and again after a passing failure.

    Timeouts, broken connections, replies that are no JSON, and status 408, 429 and 5xx are tried again after
    0.5, 1, 2, ... seconds times a random factor in [0.5, 1], at most a minute, or as long as `Retry-After` says.
    Everything else ends it at once. The key is in the header of the requests and nowhere else. `pause` waits for so
    many seconds; by default until then or until another request has failed for good.
    """

    config: ChatModelConfig
    key: str
    pause: Callable[[float], object] | None = None
    _secret: str | None = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        assert self.config.address is not None, "a config without an address is a local model's"
        self._url = f"{self.config.address.rstrip('/')}/chat/completions"
        self._secret = secret(self.config, self.key)
        # The waits only keep clients apart, so that they are not part of what a seed decides.
        self._random = random.Random()

    @property
    def identity(self) -> str:
        """The address and the model's name."""
        return f"address:{self._url} model:{self.config.model_name} logprobs:{self.config.logprobs}"

    def count_tokens(self, request: ChatRequest) -> int:
        """About as many as the server will count, rather more: a token for three bytes, and four a message."""
        return sum(approximate_tokens(message.content) + _TOKENS_PER_MESSAGE for message in request.messages)

    def ask(self, requests: Sequence[ChatRequest], on_reply: OnReply) -> list[ChatReply]:
        """The replies, in order. After the first failure for good nothing further is sent, and it is raised."""
        replies: dict[int, ChatReply] = {}
        # A future that is cancelled is not reported by `as_completed`; with this, each one ends by itself.
        stop = threading.Event()
        headers = {} if self._secret is None else {"Authorization": f"Bearer {self._secret}"}
        limits = httpx.Limits(max_connections=self.config.concurrency)
        with (
            httpx.Client(headers=headers, timeout=self.config.timeout_seconds, limits=limits) as client,
            ThreadPoolExecutor(self.config.concurrency) as pool,
        ):
            futures = {pool.submit(self._one, client, request, stop): index for index, request in enumerate(requests)}
            failure: ChatError | None = None
            try:
                for future in as_completed(futures):
                    try:
                        reply = future.result()
                    except _NotSentError:
                        continue
                    except ChatError as error:
                        failure = failure or error
                        stop.set()
                        continue
                    replies[futures[future]] = reply
                    on_reply(futures[future], reply)
            finally:
                # Also after Ctrl-C, or when a reply cannot be kept: what has not been sent is not sent.
                stop.set()
        if failure is not None:
            raise failure
        return [replies[index] for index in range(len(requests))]

    def _one(self, client: httpx.Client, request: ChatRequest, stop: threading.Event) -> ChatReply:
        body: dict[str, Any] = {
            "model": self.config.model_name,
            "messages": prompt_to_json(request.messages),
            "max_tokens": request.max_tokens,
            "temperature": request.temperature,
        }
        if request.temperature:
            body["seed"] = request.seed
        if request.choices and self.config.logprobs:
            body |= {"logprobs": True, "top_logprobs": _NUM_TOP_LOGPROBS}
        pause = self.pause or stop.wait
        for attempt in range(self.config.num_retries + 1):
            if stop.is_set():
                raise _NotSentError
            try:
                return self._try(client, body, request)
            except _PassingError as error:
                if attempt == self.config.num_retries:
                    raise ChatError(
                        f"{self.key}: {self._url} failed {attempt + 1} times; the last time: {error}. The replies so "
                        "far are kept; look at the server, or raise num_retries or timeout_seconds, and start again"
                    ) from error
                pause(self._wait(attempt) if error.wait is None else error.wait)
        raise AssertionError("the loop returns or raises")

    def _wait(self, attempt: int) -> float:
        wait = min(FIRST_WAIT_SECONDS * 2.0**attempt, LONGEST_WAIT_SECONDS)
        return wait * self._random.uniform(0.5, 1.0)

    def _try(self, client: httpx.Client, body: dict[str, Any], request: ChatRequest) -> ChatReply:
        try:
            response = client.post(self._url, json=body)
        except httpx.TimeoutException as error:
            raise _PassingError(f"no reply within {self.config.timeout_seconds:g} seconds") from error
        except httpx.TransportError as error:
            raise _PassingError(self._clean(f"{type(error).__name__}: {error}")) from error
        except (httpx.InvalidURL, ValueError) as error:
            raise ChatError(f"{self.key}.address={self.config.address} cannot be asked: {error}") from error
        status = response.status_code
        if status in _RETRIED_STATUS or status >= 500:
            raise _PassingError(f"status {status}: {self._clean(response.text)}", self._retry_after(response))
        if status != 200:
            raise ChatError(
                f"{self.key}: {self._url} refuses the request with status {status}: {self._clean(response.text)}. "
                "Check address, model_name and api_key_variable, and whether the server knows all that is sent "
                f"({', '.join(body)})"
            )
        try:
            return self._reply(response.json(), request)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise _PassingError(f"a reply that is no chat completion: {self._clean(response.text)}") from error

    def _reply(self, body: Any, request: ChatRequest) -> ChatReply:
        choice = body["choices"][0]
        # A refusal comes without content.
        text = choice["message"].get("content") or ""
        if not isinstance(text, str):
            raise TypeError(f"the content of the reply is a {type(text).__name__}, not a text")
        usage = body.get("usage") or {}
        logprobs = None
        if request.choices and self.config.logprobs:
            logprobs = choice_logprobs(choice.get("logprobs"), request.choices)
        return ChatReply(
            text,
            int(usage.get("prompt_tokens", self.count_tokens(request))),
            int(usage.get("completion_tokens", approximate_tokens(text))),
            logprobs,
        )

    def _retry_after(self, response: httpx.Response) -> float | None:
        """What the server asks for, as seconds or as a date. Raises `ChatError` for longer than anybody waits."""
        value = response.headers.get("Retry-After")
        if value is None:
            return None
        try:
            wait = float(value)
        except ValueError:
            try:
                date = parsedate_to_datetime(value)
            except ValueError:
                return None
            wait = ((date if date.tzinfo else date.replace(tzinfo=UTC)) - datetime.now(UTC)).total_seconds()
        if not math.isfinite(wait):
            return None
        if wait > LONGEST_RETRY_AFTER_SECONDS:
            raise ChatError(
                f"{self.key}: {self._url} has status {response.status_code} and wants to be asked again in {wait:.0f} "
                f"seconds: {self._clean(response.text)}. The replies so far are kept; start again then"
            )
        return max(wait, 0.0)

    def _clean(self, text: str) -> str:
        """What a server said, on one line and cut, without the key that it may repeat."""
        if self._secret:
            text = text.replace(self._secret, "***")
        line = " ".join(text.split())
        return line if len(line) <= _SHOWN_CHARACTERS else f"{line[:_SHOWN_CHARACTERS]}..."


def approximate_tokens(text: str) -> int:
    """About how many tokens a text has, rather more than less."""
    return math.ceil(len(text.encode(errors="replace")) / _BYTES_PER_TOKEN)


def choice_logprobs(logprobs: Any, choices: Sequence[str]) -> tuple[float, ...] | None:
    """Log-probs of the choices at the first token of a reply that is one of them, normalised over the choices.

    `logprobs` is OpenAI's object of that name. A choice that is not among the likeliest tokens there has -inf. None
    when there are no log-probs or no token is a choice.
    """
    for token in (logprobs or {}).get("content") or ():
        if token["token"].strip() not in choices:
            continue
        # " A" and "A" are both the choice A.
        weights = dict.fromkeys(choices, 0.0)
        top = token.get("top_logprobs") or [token]
        for entry in top:
            name = entry["token"].strip()
            if name in weights:
                weights[name] += math.exp(float(entry["logprob"]))
        total = math.fsum(weights.values())
        if total > 0:
            return tuple(math.log(weight / total) if weight else -math.inf for weight in weights.values())
    return None
