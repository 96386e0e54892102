"""Rewards that are rules: a formula of the response's text or tokens. Each config class states the range."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any, ClassVar

import torch
from torch import Tensor

from rlhf.config.rewards import (
    ExactAnswerReward,
    GoldReward,
    KeywordReward,
    LengthReward,
    LengthUnit,
    RegexReward,
    RepetitionReward,
    SentimentReward,
)
from rlhf.data.embedded import GOLD_REWARDS, sentiment
from rlhf.rewards.protocol import Reward, RewardBatch, RewardError, shown

# A number as people write it: a sign, digits with or without commas between thousands, a fraction.
NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?![\w]|[.,]\d)|(?<![\w.])[-+]?\.\d+(?!\w)")


@dataclass(frozen=True)
class LengthRule:
    """-min(excess / tolerance, 1), the excess being the units below `minimum` or above `maximum`."""

    config: LengthReward
    may_abstain: ClassVar[bool] = False

    def score(self, batch: RewardBatch) -> Tensor:
        """Scores (B,) in [-1, 0]."""
        return _tensor([self._of(len(units)) for units in _units(batch, self.config.unit)])

    def _of(self, length: int) -> float:
        above = 0 if self.config.maximum is None else length - self.config.maximum
        excess = max(self.config.minimum - length, above, 0)
        return -min(excess / self.config.tolerance, 1.0)


@dataclass(frozen=True)
class RegexRule:
    """`matched` or `unmatched`."""

    config: RegexReward
    may_abstain: ClassVar[bool] = False

    def score(self, batch: RewardBatch) -> Tensor:
        """Scores (B,)."""
        pattern = re.compile(self.config.pattern)
        found = [
            pattern.fullmatch(text.strip()) if self.config.whole else pattern.search(text) for text in batch.responses
        ]
        return _tensor([self.config.unmatched if match is None else self.config.matched for match in found])


@dataclass(frozen=True)
class KeywordRule:
    """The share of the words that are in the response with no letter beside them, or whether any or all are."""

    config: KeywordReward
    may_abstain: ClassVar[bool] = False

    def score(self, batch: RewardBatch) -> Tensor:
        """Scores (B,) in [0, 1]."""
        flags = 0 if self.config.case_sensitive else re.IGNORECASE
        patterns = [re.compile(rf"(?<!\w){re.escape(word.strip())}(?!\w)", flags) for word in self.config.words]
        shares = [sum(p.search(text) is not None for p in patterns) / len(patterns) for text in batch.responses]
        if self.config.count == "any":
            shares = [float(share > 0) for share in shares]
        elif self.config.count == "all":
            shares = [float(share == 1) for share in shares]
        return _tensor(shares)


@dataclass(frozen=True)
class ExactAnswerRule:
    """`correct` where the answer in the response equals the column's. Rows without an answer in it are not scored."""

    config: ExactAnswerReward
    may_abstain: ClassVar[bool] = True

    def score(self, batch: RewardBatch) -> Tensor:
        """Scores (B,), NaN where the column is null. Raises `RewardError` when the data has no such column."""
        if self.config.column not in batch.columns:
            known = ", ".join(batch.columns) or "none"
            raise RewardError(
                f"an exact_answer reward compares with the column {self.config.column}, which the data does not have; "
                f"its columns are: {known}. Set `column` to the one with the answer."
            )
        right = batch.columns[self.config.column]
        return _tensor([self._of(text, value) for text, value in zip(batch.responses, right, strict=True)])

    def _of(self, response: str, value: Any) -> float:
        if value is None:
            return float("nan")
        expected = str(value)
        if self.config.pattern is None:
            numbers = NUMBER.findall(expected)
            if not numbers:
                raise RewardError(
                    f"the column {self.config.column} holds {shown(expected)}, in which there is no number. To compare "
                    "texts, set `pattern` to a regular expression whose first group is the answer in a response."
                )
            # A worked solution ends with its answer.
            expected = numbers[-1]
        given = self._answer(response)
        return self.config.correct if given is not None and same_answer(given, expected) else self.config.wrong

    def _answer(self, response: str) -> str | None:
        if self.config.pattern is None:
            numbers = NUMBER.findall(response)
            return numbers[-1] if numbers else None
        last = None
        for match in re.finditer(self.config.pattern, response):
            last = match
        if last is None:
            return None
        answer: str | None = last.group(1) if last.re.groups else last.group()
        return answer


@dataclass(frozen=True)
class RepetitionRule:
    """distinct / all - 1 over the n-grams of a response; 0 for a response shorter than one n-gram."""

    config: RepetitionReward
    may_abstain: ClassVar[bool] = False

    def score(self, batch: RewardBatch) -> Tensor:
        """Scores (B,) in (-1, 0]."""
        return _tensor([self._of(units) for units in _units(batch, self.config.unit)])

    def _of(self, units: Sequence[Hashable]) -> float:
        size = self.config.size
        grams = [tuple(units[start : start + size]) for start in range(len(units) - size + 1)]
        return len(set(grams)) / len(grams) - 1.0 if grams else 0.0


@dataclass(frozen=True)
class GoldRule:
    """A gold reward of the embedded corpus, of prompt and response."""

    config: GoldReward
    may_abstain: ClassVar[bool] = False

    def score(self, batch: RewardBatch) -> Tensor:
        """Scores (B,) in [-2, 2]."""
        reward = GOLD_REWARDS[self.config.wants]
        return _tensor([reward(p, r) for p, r in zip(batch.prompts, batch.responses, strict=True)])


@dataclass(frozen=True)
class SentimentRule:
    """How positive the response's opinions are, whatever else the text is."""

    config: SentimentReward
    may_abstain: ClassVar[bool] = False

    def score(self, batch: RewardBatch) -> Tensor:
        """Scores (B,) in [0, 1]."""
        return _tensor([0.5 * (1.0 + sentiment(response)) for response in batch.responses])


RuleConfig = (
    LengthReward | RegexReward | KeywordReward | ExactAnswerReward | RepetitionReward | GoldReward | SentimentReward
)


def make_rule(config: RuleConfig) -> Reward:
    """The rule that a config describes."""
    match config:
        case LengthReward():
            return LengthRule(config)
        case RegexReward():
            return RegexRule(config)
        case KeywordReward():
            return KeywordRule(config)
        case ExactAnswerReward():
            return ExactAnswerRule(config)
        case RepetitionReward():
            return RepetitionRule(config)
        case GoldReward():
            return GoldRule(config)
        case SentimentReward():
            return SentimentRule(config)


def same_answer(given: str, expected: str) -> bool:
    """Equal as numbers where both are numbers (1,000 is 1000.0), else equal as text, white space around it aside."""
    first, second = _number(given), _number(expected)
    if first is not None and second is not None:
        return first == second
    return " ".join(given.split()) == " ".join(expected.split())


def _number(text: str) -> Decimal | None:
    text = text.strip().removeprefix("$").replace(",", "")
    try:
        number = Decimal(text)
    except InvalidOperation:
        return None
    return number if number.is_finite() else None


def _units(batch: RewardBatch, unit: LengthUnit) -> list[list[int]] | list[list[str]]:
    """The token ids (EOS included) or the words of each response."""
    if unit == "tokens":
        return batch.response_tokens()
    return [text.split() for text in batch.responses]


def _tensor(scores: list[float]) -> Tensor:
    return torch.tensor(scores, dtype=torch.float32)
