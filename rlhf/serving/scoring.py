"""The rewards behind the server: texts in, one number each out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from rlhf.config.rewards import ExactAnswerReward, FunctionReward, JudgeReward, MathReward, RemoteReward, RewardConfig
from rlhf.data.tokenization import encode_pair
from rlhf.errors import ArtifactError, ConfigError, DataError
from rlhf.records import PromptContent
from rlhf.rewards.composition import RewardSet, ScoredResponses
from rlhf.rewards.learned import LearnedReward
from rlhf.rewards.protocol import RewardBatch
from rlhf.serving.requests import RequestProblem, ScoreRequest

# Ids that a tokenizer may put around two texts: BOS, EOS, a leading space.
_FRAME = 8


def text_batch(
    prompts: Sequence[PromptContent],
    responses: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
    device: torch.device,
) -> RewardBatch:
    """Responses that are known as texts alone: without tokens, and taken to have ended by themselves."""
    rows = len(responses)
    return RewardBatch(
        prompts=prompts,
        responses=responses,
        columns=columns,
        input_ids=torch.zeros(rows, 1, dtype=torch.long, device=device),
        attention_mask=torch.ones(rows, 1, dtype=torch.bool, device=device),
        num_prompt=1,
        response_mask=torch.zeros(rows, 0, dtype=torch.bool, device=device),
        stopped=torch.ones(rows, dtype=torch.bool, device=device),
    )


@dataclass(frozen=True)
class ServedRewards:
    """A reward set that scores requests, at most `max_batch_size` rows in one forward pass."""

    rewards: RewardSet
    max_batch_size: int
    device: torch.device

    def check(self, request: ScoreRequest) -> None:
        """Raises `RequestProblem` for the first row that one of the models cannot read."""
        for reward in learned_rewards(self.rewards):
            limit = num_positions(reward)
            for row, (prompt, response) in enumerate(zip(request.prompts, request.responses, strict=True)):
                # A token is at least one byte of the text: most rows need not be looked at.
                if isinstance(prompt, str) and (
                    limit is None or len(prompt.encode()) + len(response.encode()) + _FRAME <= limit
                ):
                    continue
                try:
                    pair = encode_pair(reward.tokenizer, prompt, response)
                except (DataError, ConfigError) as error:
                    raise RequestProblem(422, f"row {row}: {error}", row) from error
                num_tokens = len(pair.prompt_ids) + len(pair.response_ids)
                if limit is not None and num_tokens > limit:
                    raise RequestProblem(
                        422,
                        f"row {row}: prompt and response have {num_tokens} tokens, and the model reads at most {limit}",
                        row,
                    )

    def score(self, requests: Sequence[ScoreRequest]) -> list[list[float | None]]:
        """The scores of several requests with the same columns, in order; None where no reward applies.

        Raises `UserError` as rewards do.
        """
        prompts = [prompt for request in requests for prompt in request.prompts]
        responses = [response for request in requests for response in request.responses]
        columns = {
            name: [value for request in requests for value in request.columns[name]] for name in requests[0].columns
        }
        normalized = [request.normalized for request in requests for _ in range(len(request))]
        scores: list[float | None] = []
        for start in range(0, len(responses), self.max_batch_size):
            part = slice(start, start + self.max_batch_size)
            given = {name: values[part] for name, values in columns.items()}
            batch = text_batch(prompts[part], responses[part], given, self.device)
            scores += self._numbers(self.rewards.score(batch, must_apply=False), normalized[part])
        rest = iter(scores)
        return [[next(rest) for _ in range(len(request))] for request in requests]

    def _numbers(self, scored: ScoredResponses, normalized: Sequence[bool]) -> list[float | None]:
        weights = self.rewards.weights
        raw = sum(torch.nan_to_num(weights[name] * part, nan=0.0) for name, part in scored.parts.items())
        assert isinstance(raw, torch.Tensor)
        applies = torch.stack([~part.isnan() for name, part in scored.parts.items() if weights[name]]).any(dim=0)
        chosen = torch.where(torch.tensor(normalized, device=raw.device), scored.total, raw)
        return [value if known else None for value, known in zip(chosen.tolist(), applies.tolist(), strict=True)]


def learned_rewards(rewards: RewardSet) -> Iterator[LearnedReward]:
    """The reward models of a set; an ensemble is one."""
    for entry in rewards.rewards:
        if isinstance(entry.reward, LearnedReward):
            yield entry.reward


def num_positions(reward: LearnedReward) -> int | None:
    """The longest text of a reward model, in tokens; None without a limit."""
    models = [module for module in reward.model.modules() if isinstance(module, PreTrainedModel)]
    limits = [getattr(model.config, "max_position_embeddings", None) for model in models]
    return min((limit for limit in limits if limit is not None), default=None)


def wanted_columns(rewards: Mapping[str, RewardConfig], known: RewardSet) -> list[str] | None:
    """The columns that the rewards look at; None where a function may look at any of them."""
    names: dict[str, None] = {}
    for name, config in rewards.items():
        if isinstance(config, ExactAnswerReward | MathReward):
            names[config.column] = None
        elif isinstance(config, JudgeReward) and config.reference_column is not None:
            names[config.reference_column] = None
        elif isinstance(config, FunctionReward):
            return None
        elif isinstance(config, RemoteReward):
            behind = next(entry.reward for entry in known.rewards if entry.name == name)
            asked = getattr(behind, "columns", None)
            if asked is None:
                return None
            names |= dict.fromkeys(asked)
    return list(names)


def only_statistics(rewards: RewardSet) -> dict[str, float] | None:
    """Mean and standard deviation of what is served when it is one reward of weight 1; None otherwise.

    The client can then shift and scale the raw scores itself, as it does with a model in memory.
    """
    entry = rewards.rewards[0]
    if len(rewards.rewards) > 1 or entry.weight != 1 or entry.statistics is None:
        return None
    return {"mean": entry.statistics.mean, "std": entry.statistics.std}


def warm_up(served: ServedRewards) -> None:
    """Scores one text with every reward model, so that the first request does not pay for loading kernels.

    Raises `ArtifactError` where a model gives what is no finite number.
    """
    for reward in learned_rewards(served.rewards):
        value = float(reward.score(text_batch(["a"], ["b"], {}, served.device))[0])
        if not math.isfinite(value):
            raise ArtifactError(f"the reward model scores a text with {value}: its weights are damaged, or overflow")
