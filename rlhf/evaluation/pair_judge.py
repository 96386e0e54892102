"""A language model that compares two responses, with what is known of its bias for the one it reads first.

Zheng et al. 2023 ("Judging LLM-as-a-judge with MT-Bench and Chatbot Arena"), section 3.3: judges prefer a position, so
each pair is asked in both orders; which order comes first, or alone, is random.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf.chat.asking import Chat
from rlhf.chat.protocol import ChatRequest
from rlhf.chat.questions import PAIR_CHOICES, pair_question, reply_first_is_better
from rlhf.config.stages import LanguageModelJudge
from rlhf.records import Message, PromptContent, prompt_to_json
from rlhf.statistics import wilson


@dataclass
class PairJudge:
    """Asks a chat model about pairs. Equal responses are a tie without being asked about."""

    config: LanguageModelJudge
    chat: Chat
    template: str | None
    seed: int
    name: str = "language_model"
    _asked: list[list[float | None]] = field(default_factory=list)

    def compare(self, prompts: Sequence[PromptContent], responses: Sequence[str], others: Sequence[str]) -> list[float]:
        """The probabilities that each of `responses` is better than its other one, a tie counting half.

        The mean over the orders asked, by log-probs or by verdict; 0.5 where a reply cannot be read. Raises `ChatError`
        when the model gives none, `ConfigError` before anything is sent that may cost more than `max_cost`.
        """
        triples = list(zip(prompts, responses, others, strict=True))
        orders = [self._orders(*triple) for triple in triples]
        requests = [
            self._request(triple, first_is_own)
            for triple, order in zip(triples, orders, strict=True)
            for first_is_own in order
        ]
        replies = iter(self.chat.ask(requests))
        found = []
        for order in orders:
            values = [reply_first_is_better(next(replies)) for _ in order]
            if order:
                # Kept in the order in which they were read, for the figures.
                self._asked.append(values)
            own = [
                value if first_is_own else 1.0 - value
                for value, first_is_own in zip(values, order, strict=True)
                if value is not None
            ]
            # One order that cannot be read would let the other one's bias in.
            found.append(math.fsum(own) / len(own) if own and len(own) == len(order) else 0.5)
        return found

    def figures(self, confidence: float) -> dict[str, Any]:
        """How far the verdicts can be trusted, each share as {"value", "low", "high"} where there is something.

        `judge_first_share`: of the choices, those for the response read first; without a bias one half, when both
        orders are asked. `judge_consistency`: of the pairs asked in both orders, those with the same verdict in both.
        `judge_unreadable_share`: of the pairs, those with a reply that says nothing; they count as ties.
        """
        whole = [values for values in self._asked if None not in values]
        choices = [value for values in whole for value in values if value is not None and value != 0.5]
        both = [(values[0], values[1]) for values in whole if len(values) == 2]
        agree = sum(_side(first) == -_side(second) for first, second in both)
        shares = {
            "judge_first_share": (sum(value > 0.5 for value in choices), len(choices)),
            "judge_consistency": (agree, len(both)),
            "judge_unreadable_share": (len(self._asked) - len(whole), len(self._asked)),
        }
        return {
            name: wilson(hits, count, confidence=confidence).to_json()
            for name, (hits, count) in shares.items()
            if count
        }

    def _orders(self, prompt: PromptContent, response: str, other: str) -> tuple[bool, ...]:
        """For each question whether the own response comes first."""
        if response == other:
            return ()
        body = json.dumps([self.seed, prompt_to_json(prompt)], ensure_ascii=False)
        first = bool(hashlib.sha256(body.encode(errors="backslashreplace")).digest()[0] & 1)
        return (first, not first) if self.config.both_orders else (first,)

    def _request(self, triple: tuple[PromptContent, str, str], first_is_own: bool) -> ChatRequest:
        prompt, own, other = triple
        first, second = (own, other) if first_is_own else (other, own)
        by_letter = self.config.logprobs
        text = pair_question(self.template, prompt, first, second, by_letter=by_letter)
        choices = PAIR_CHOICES if by_letter else ()
        return ChatRequest(
            (Message("user", text),), choices, self.config.max_tokens, self.config.temperature, self.seed
        )


def _side(value: float | None) -> int:
    """1 where the response read first is better, -1 where the second one is, 0 for a tie."""
    return 0 if value is None or value == 0.5 else 1 if value > 0.5 else -1
