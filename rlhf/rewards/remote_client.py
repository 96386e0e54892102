"""Talks HTTP to a server of `rlhf serve`. Needs no torch: preflight asks the server who it is."""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import rlhf
from rlhf.config.rewards import RemoteReward
from rlhf.errors import ConfigError

if TYPE_CHECKING:
    import httpx

# What both sides must agree on; raised when a request or an answer changes its meaning.
PROTOCOL = 1
SERVICE = "rlhf-reward"
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.5, 20.0
# There is no room, or nobody behind a proxy: the same request may succeed later.
_PASSING = (429, 502, 503, 504)
_LOCAL = ("localhost", "127.0.0.1", "::1")


class ServerProblem(Exception):  # noqa: N818 - whoever asked makes it an error of the user's, or of the reward
    """What is wrong with a server or its answer; the text names the key and the address."""


@dataclass(frozen=True)
class ServerInfo:
    """What a server says of itself. `hash` stands for everything that decides its scores.

    `statistics` are mean and standard deviation where they are known and the client can apply them. `columns` are those
    that its rewards look at, None where they may look at any. `max_request_rows` is the most it takes at once.
    """

    hash: str
    version: str
    may_abstain: bool
    statistics: tuple[float, float] | None
    columns: tuple[str, ...] | None
    max_request_rows: int


class RewardServer:
    """The server of a `remote` reward. `key` names the reward's section of the config in messages.

    It may be used from several threads. `interrupt` ends waits between tries.
    """

    def __init__(self, config: RemoteReward, key: str) -> None:
        import httpx

        self.config = config
        self._key = key
        self._interrupted = threading.Event()
        headers = {"User-Agent": f"rlhf/{rlhf.__version__}"}
        if config.token_variable is not None:
            token = os.environ.get(config.token_variable)
            if not token:
                raise ConfigError(
                    f"{key}.token_variable={config.token_variable}: there is no such environment variable, or it is "
                    "empty; it must hold the server's token"
                )
            headers["Authorization"] = f"Bearer {token}"
        self._client = httpx.Client(
            headers=headers,
            timeout=config.timeout_seconds,
            limits=httpx.Limits(max_connections=config.concurrency),
            # A proxy of the environment knows nothing of this machine's own ports.
            trust_env=urlsplit(config.address).hostname not in _LOCAL,
        )

    def interrupt(self) -> None:
        """Nothing is tried again from here on."""
        self._interrupted.set()

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()

    def info(self) -> ServerInfo:
        """What the server says of itself. Raises `ServerProblem`."""
        body = self._json(self._request("GET", "/info"))
        if body.get("service") != SERVICE:
            raise self._problem("is no server of `rlhf serve`; check host, port and path")
        if body.get("protocol") != PROTOCOL:
            raise self._problem(
                f"speaks protocol {body.get('protocol')} (rlhf {body.get('version')}), and this is protocol {PROTOCOL} "
                f"(rlhf {rlhf.__version__}); install the same version on both sides"
            )
        try:
            statistics, columns = body["statistics"], body["columns"]
            return ServerInfo(
                hash=str(body["hash"]),
                version=str(body["version"]),
                may_abstain=bool(body["may_abstain"]),
                statistics=None if statistics is None else (float(statistics["mean"]), float(statistics["std"])),
                columns=None if columns is None else tuple(columns),
                max_request_rows=int(body["limits"]["max_request_rows"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise self._problem(f"gave an /info that cannot be read ({type(error).__name__}: {error})") from error

    def score(
        self,
        prompts: Sequence[Any],
        responses: Sequence[str],
        columns: Mapping[str, Sequence[Any]],
        *,
        normalized: bool,
        expected_hash: str,
    ) -> list[float]:
        """The scores of one request, NaN where none applies. `prompts` are texts or lists of messages.

        Raises `ServerProblem`, also when the server serves something else than it did (`expected_hash`).
        """
        task = {"prompts": prompts, "responses": responses, "columns": columns, "normalized": normalized}
        try:
            content = json.dumps(task, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise self._problem(f"cannot be sent the columns {', '.join(columns)}: {error}") from error
        body = self._json(self._request("POST", "/score", content))
        found = body.get("model", {}).get("hash") if isinstance(body.get("model"), dict) else None
        if found != expected_hash:
            raise self._problem(
                f"serves another reward than when this run began (hash {str(found)[:12]} instead of "
                f"{expected_hash[:12]}); start the server as it was, or start the stage anew"
            )
        scores = body.get("scores")
        if not isinstance(scores, list) or len(scores) != len(responses):
            count = f"{len(scores)} scores" if isinstance(scores, list) else "no list of scores"
            raise self._problem(f"gave {count} for {len(responses)} responses")
        return [self._number(score, row) for row, score in enumerate(scores)]

    def _number(self, score: Any, row: int) -> float:
        if score is None:
            return math.nan
        if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
            raise self._problem(f"gave {score!r} as the score of response {row}; expected a finite number or null")
        return float(score)

    def _request(self, method: str, path: str, content: bytes | None = None) -> httpx.Response:
        """An answer with status 200, tried again with longer and longer waits where that may help."""
        import httpx

        headers = {} if content is None else {"Content-Type": "application/json"}
        url = self.config.address.rstrip("/") + path
        for number in range(self.config.num_retries + 1):
            wait = min(FIRST_WAIT_SECONDS * 2**number, LONGEST_WAIT_SECONDS)
            try:
                answer = self._client.request(method, url, content=content, headers=headers)
            except httpx.TimeoutException:
                seconds = self.config.timeout_seconds
                reason = f"did not answer within {seconds:g} s; {self._key}.timeout_seconds is the limit"
            except httpx.TransportError as error:
                reason = f"cannot be reached: {error}; is `rlhf serve` running there?"
            else:
                if answer.status_code == 200:
                    return answer
                if answer.status_code not in _PASSING:
                    raise self._problem(self._refusal(answer, path))
                reason = self._refusal(answer, path)
            if number == self.config.num_retries or self._interrupted.wait(wait):
                break
        tries = "try" if self.config.num_retries == 0 else "tries"
        raise self._problem(f"{reason} ({self.config.num_retries + 1} {tries}, {self._key}.num_retries)")

    def _refusal(self, answer: httpx.Response, path: str) -> str:
        if answer.status_code == 401:
            if self.config.token_variable is None:
                return f"asks for a token; name the environment variable that holds it in {self._key}.token_variable"
            return f"refuses the token of {self.config.token_variable} ({self._key}.token_variable)"
        if answer.status_code in (404, 405) or answer.is_redirect:
            return f"has no {path} (status {answer.status_code}); is this the address of `rlhf serve`?"
        try:
            said = str(answer.json()["error"])
        except (ValueError, KeyError, TypeError):
            said = answer.text[:200]
        return f"answered with status {answer.status_code}: {said}"

    def _json(self, answer: httpx.Response) -> dict[str, Any]:
        try:
            body = answer.json()
        except ValueError as error:
            raise self._problem("gave an answer that is no JSON; is it a server of `rlhf serve`?") from error
        if not isinstance(body, dict):
            raise self._problem("gave an answer that is no JSON object; is it a server of `rlhf serve`?")
        return body

    def _problem(self, text: str) -> ServerProblem:
        return ServerProblem(f"{self._key}.address={self.config.address} {text}")


def ask_info(config: RemoteReward, key: str) -> ServerInfo:
    """What the server of a reward says of itself. Raises `ConfigError` when it cannot be asked."""
    server = RewardServer(config, key)
    try:
        return server.info()
    except ServerProblem as problem:
        raise ConfigError(str(problem)) from problem
    finally:
        server.close()
