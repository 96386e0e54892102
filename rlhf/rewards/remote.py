"""The remote reward: a server of `rlhf serve` scores texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import torch
from torch import Tensor

from rlhf.config.rewards import RemoteReward
from rlhf.errors import ConfigError
from rlhf.records import prompt_to_json
from rlhf.rewards.composition import ScoreStatistics
from rlhf.rewards.protocol import RewardBatch, RewardError
from rlhf.rewards.remote_client import RewardServer, ServerInfo, ServerProblem


class RemoteScorer:
    """Asks a server for the scores of a batch, in requests of `batch_size` responses, `concurrency` of them at a time.

    The server reads texts: a response is tokenised again, and counts as ended whether or not it was cut off. With
    `statistics` the scores are raw and are normalised here; without, they are as normalised as the server makes them.
    Each rank asks for its own responses.
    """

    def __init__(self, config: RemoteReward, server: RewardServer, info: ServerInfo, *, normalized: bool) -> None:
        self._config = config
        self._server = server
        self._info = info
        wanted = config.normalize and normalized
        self.statistics = ScoreStatistics(*info.statistics) if wanted and info.statistics is not None else None
        self._normalized = wanted and self.statistics is None

    @classmethod
    def connect(cls, config: RemoteReward, key: str, *, normalized: bool = True) -> Self:
        """Asks the server who it is; `normalized=False` has raw scores whatever the config says.

        Raises `ConfigError` when it cannot be reached, is none of ours, or is of another version.
        """
        server = RewardServer(config, key)
        try:
            info = server.info()
        except ServerProblem as problem:
            server.close()
            raise ConfigError(str(problem)) from problem
        return cls(config, server, info, normalized=normalized)

    @property
    def may_abstain(self) -> bool:
        """Whether a reward behind the server may leave a response unscored."""
        return self._info.may_abstain

    @property
    def columns(self) -> tuple[str, ...] | None:
        """The columns that the server wants; None for all there are."""
        return self._info.columns

    def score(self, batch: RewardBatch) -> Tensor:
        """Scores (B,) on the CPU, NaN where no reward applies. Raises `RewardError` that names the server."""
        prompts = [prompt_to_json(prompt) for prompt in batch.prompts]
        wanted = list(batch.columns) if self._info.columns is None else self._info.columns
        columns = {name: batch.columns[name] for name in wanted if name in batch.columns}
        size = min(self._config.batch_size, self._info.max_request_rows)
        starts = range(0, len(batch), size)
        threads = ThreadPoolExecutor(min(self._config.concurrency, max(len(starts), 1)))
        try:
            pieces = threads.map(lambda start: self._ask(prompts, batch.responses, columns, start, size), starts)
            return torch.tensor([score for piece in pieces for score in piece], dtype=torch.float32)
        except ServerProblem as problem:
            self._server.interrupt()
            raise RewardError(str(problem)) from problem
        except BaseException:  # a signal as well: whatever it is rises, with the questions under way given up
            self._server.interrupt()
            raise
        finally:
            threads.shutdown(wait=False, cancel_futures=True)

    def _ask(
        self,
        prompts: Sequence[Any],
        responses: Sequence[str],
        columns: Mapping[str, Sequence[Any]],
        start: int,
        size: int,
    ) -> list[float]:
        rows = slice(start, start + size)
        return self._server.score(
            prompts[rows],
            responses[rows],
            {name: values[rows] for name, values in columns.items()},
            normalized=self._normalized,
            expected_hash=self._info.hash,
        )
