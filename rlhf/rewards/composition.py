"""Several weighted rewards as one score."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from rlhf.errors import ConfigError
from rlhf.rewards.protocol import DetailedReward, Reward, RewardBatch, RewardError, shown, shown_prompt

MIN_STD = 1e-6
STATISTICS_FILE = "rlhf_reward.json"


@dataclass(frozen=True)
class ScoreStatistics:
    """Mean and standard deviation of a reward's scores, to shift and scale by."""

    mean: float = 0.0
    std: float = 1.0

    @classmethod
    def read(cls, folder: str) -> ScoreStatistics | None:
        """What stage reward_model wrote beside the weights; None for a model that came from elsewhere."""
        path = Path(folder) / STATISTICS_FILE
        if not path.is_file():
            return None
        body = json.loads(path.read_text(encoding="utf-8"))
        return cls(mean=body["score_mean"], std=body["score_std"])

    def normalize(self, scores: Tensor) -> Tensor:
        """(score - mean) / std, elementwise. A standard deviation of (almost) nothing counts as `MIN_STD`."""
        return (scores - self.mean) / max(self.std, MIN_STD)


@dataclass(frozen=True)
class WeightedReward:
    """One reward of a set. Its scores are normalised by `statistics`, if there are any, before they are weighted."""

    name: str
    reward: Reward
    weight: float = 1.0
    statistics: ScoreStatistics | None = None


@dataclass(frozen=True)
class ScoredResponses:
    """Scores of B responses, float32, on the device of the batch's `input_ids`.

    `total` (B,) is the sum of what each reward contributes. `parts` are the raw scores (B,) by the reward's name,
    before normalisation and weight; `contributions` those after both. Both hold NaN where a reward does not apply.
    `details` (B,) are further numbers of a reward, under its name and theirs: `<reward>_spread`.
    """

    total: Tensor
    parts: dict[str, Tensor]
    contributions: dict[str, Tensor] = field(default_factory=dict)
    details: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class RewardSet:
    """Rewards by name, in the order of the config: the score is the sum of weight x (normalised) score.

    A reward of weight 0 is scored and logged, and changes nothing. Raises `ConfigError` without rewards, for a name
    that comes twice, for a weight that is not finite, and when every weight is 0.
    """

    rewards: tuple[WeightedReward, ...]

    def __post_init__(self) -> None:
        names = self.names
        if not names:
            raise ConfigError("there is no reward: PPO needs at least one")
        if len(set(names)) != len(names):
            raise ConfigError(f"two rewards have one name: {', '.join(names)}")
        wrong = [entry.name for entry in self.rewards if not math.isfinite(entry.weight)]
        if wrong:
            raise ConfigError(f"the weight of reward {wrong[0]} is not a finite number")
        if not any(entry.weight for entry in self.rewards):
            raise ConfigError(f"every reward has weight 0, so there is nothing to optimise: {', '.join(names)}")

    @property
    def names(self) -> tuple[str, ...]:
        """The rewards' names, in order."""
        return tuple(entry.name for entry in self.rewards)

    @property
    def weights(self) -> dict[str, float]:
        """The rewards' weights by name."""
        return {entry.name: entry.weight for entry in self.rewards}

    @torch.no_grad()
    def score(self, batch: RewardBatch, *, must_apply: bool = True) -> ScoredResponses:
        """Scores every response with every reward.

        What does not apply to a response is left out of its sum. Raises `RewardError` for scores of another shape, for
        one that is not finite and, with `must_apply`, for a response to which no reward with a weight applies.
        """
        device = batch.input_ids.device
        total = torch.zeros(len(batch), dtype=torch.float32, device=device)
        applied = torch.zeros(len(batch), dtype=torch.bool, device=device)
        parts: dict[str, Tensor] = {}
        contributions: dict[str, Tensor] = {}
        details: dict[str, Tensor] = {}
        for entry in self.rewards:
            scores, more = _scored(entry, batch)
            raw = scores.to(device=device, dtype=torch.float32)
            details |= {f"{entry.name}_{detail}": values.to(device) for detail, values in more.items()}
            normalized = raw if entry.statistics is None else entry.statistics.normalize(raw)
            contribution = entry.weight * normalized
            applies = ~raw.isnan()
            total = torch.where(applies, total + contribution, total)
            if entry.weight:
                applied |= applies
            parts[entry.name], contributions[entry.name] = raw, contribution
        for row in (~applied).nonzero().flatten().tolist() if must_apply else ():
            raise RewardError(
                f"none of the rewards {', '.join(self.names)} applies to the response {shown(batch.responses[row])} to "
                f"the prompt {shown_prompt(batch.prompts[row])}: it has no score. Add a reward that always applies, or "
                "return a number instead of None."
            )
        return ScoredResponses(total, parts, contributions, details)


def part_means(parts: Mapping[str, Tensor]) -> dict[str, float]:
    """The mean raw score of each reward over the responses to which it applies; without any, the reward is left out."""
    means = {}
    for name, scores in parts.items():
        scored = scores[~scores.isnan()]
        if len(scored):
            means[name] = float(scored.double().mean())
    return means


def concatenate(pieces: Sequence[ScoredResponses]) -> ScoredResponses:
    """The scores of several batches of one reward set, in order."""
    return ScoredResponses(
        torch.cat([piece.total for piece in pieces]),
        {name: torch.cat([piece.parts[name] for piece in pieces]) for name in pieces[0].parts},
        {name: torch.cat([piece.contributions[name] for piece in pieces]) for name in pieces[0].contributions},
        {name: torch.cat([piece.details[name] for piece in pieces]) for name in pieces[0].details},
    )


def _scored(entry: WeightedReward, batch: RewardBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """Scores (B,), and what else the reward says. Raises `RewardError` for scores that cannot be trained on."""
    details: dict[str, Tensor] = {}
    if isinstance(entry.reward, DetailedReward):
        scores, details = entry.reward.score_in_detail(batch)
    else:
        scores = entry.reward.score(batch)
    if scores.shape != (len(batch),):
        raise RewardError(
            f"reward {entry.name} gave scores of shape {tuple(scores.shape)} for {len(batch)} responses; expected one "
            "number for each"
        )
    wrong = scores.isinf() if entry.reward.may_abstain else ~scores.isfinite()
    for row in wrong.nonzero().flatten().tolist():
        raise RewardError(
            f"reward {entry.name} gave {float(scores[row])} for the response {shown(batch.responses[row])} to the "
            f"prompt {shown_prompt(batch.prompts[row])}; a score must be a finite number"
        )
    return scores, details
