"""A language model as a reward: it rates responses, or compares them with a reference. (Zheng et al. 2023.)"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from rlhf.chat.asking import Chat, make_chat
from rlhf.chat.local import LocalChat
from rlhf.chat.protocol import ChatReply, ChatRequest
from rlhf.chat.questions import (
    PAIR_CHOICES,
    pair_question,
    rating_choices,
    rating_question,
    reply_first_is_better,
    reply_rating,
)
from rlhf.config.rewards import JudgeReward
from rlhf.records import Message, PromptContent
from rlhf.rewards.judge_checks import judge_template
from rlhf.rewards.protocol import RewardBatch, RewardError
from rlhf.terminal import warn


@dataclass
class GenerativeJudge:
    """Asks a chat model about each response of a batch.

    A rating is the mean of 1 .. `scale` by the log-probs of the numbers, or the number in the reply. A comparison with
    the reference is the probability that the response is better, a tie counting half, by log-probs or as the verdict
    in the reply; the mean over both orders. A reply that cannot be read scores `unreadable`, or leaves the response
    unscored. A local model works where the batch is.
    """

    config: JudgeReward
    chat: Chat
    template: str | None
    name: str
    may_abstain: ClassVar[bool] = True
    _announced: bool = field(init=False, default=False)

    def score(self, batch: RewardBatch) -> Tensor:
        """Scores (B,), in [1, scale] or, against a reference, in [0, 1]; NaN where nothing can be read.

        Raises `RewardError` when the data lacks the reference column, `ChatError` when the model fails, `ConfigError`
        before anything is sent that may cost more than `max_cost`.
        """
        if isinstance(self.chat.model, LocalChat):
            self.chat.model.to(batch.input_ids.device)
        references = self._references(batch)
        requests = [
            self._requests(prompt, response, reference)
            for prompt, response, reference in zip(batch.prompts, batch.responses, references, strict=True)
        ]
        flat = [request for some in requests for request in some]
        if not self._announced:
            warn(f"reward {self.name}, the first {len(batch)} responses: {self.chat.estimate(flat)}")
            self._announced = True
        replies = iter(self.chat.ask(flat))
        scores = [self._score([next(replies) for _ in some]) for some in requests]
        return torch.tensor(scores, dtype=torch.float32)

    def _references(self, batch: RewardBatch) -> Sequence[str | None]:
        column = self.config.reference_column
        if column is None:
            return [None] * len(batch)
        if column not in batch.columns:
            raise RewardError(
                f"reward {self.name} compares with the column {column}, which the data does not have; its columns "
                f"are: {', '.join(batch.columns) or 'none'}. Set reference_column to the one with a response"
            )
        return [None if value is None else str(value) for value in batch.columns[column]]

    def _requests(self, prompt: PromptContent, response: str, reference: str | None) -> list[ChatRequest]:
        config = self.config
        if config.reference_column is None:
            choices = rating_choices(config.scale) if config.logprobs else ()
            text = rating_question(self.template, prompt, response, config.scale, by_number=bool(choices))
            return [self._request(text, choices)]
        if reference is None:
            return []
        choices = PAIR_CHOICES if config.logprobs else ()
        orders = [(response, reference), (reference, response)] if config.both_orders else [(response, reference)]
        return [
            self._request(pair_question(self.template, prompt, first, second, by_letter=config.logprobs), choices)
            for first, second in orders
        ]

    def _request(self, text: str, choices: tuple[str, ...]) -> ChatRequest:
        return ChatRequest((Message("user", text),), choices, self.config.max_tokens, self.config.temperature)

    def _score(self, replies: Sequence[ChatReply]) -> float:
        if not replies:
            # The row has no reference.
            return math.nan
        if self.config.reference_column is None:
            score = reply_rating(replies[0], self.config.scale)
        else:
            # One order that cannot be read would let the other one's bias in.
            values = [value for reply in replies if (value := reply_first_is_better(reply)) is not None]
            values[1:] = [1.0 - value for value in values[1:]]
            score = math.fsum(values) / len(values) if len(values) == len(replies) else None
        if score is None:
            score = self.config.unreadable
        return math.nan if score is None else score


def make_judge_reward(config: JudgeReward, name: str, key: str) -> GenerativeJudge:
    """The judge of a config; `key` is the config key of the section. Raises `ConfigError` for what cannot be had."""
    return GenerativeJudge(config, make_chat(config, key), judge_template(config, key), name)
