"""Curves of gold and proxy reward along PPO, read from the metrics of finished arms."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf.errors import ArtifactError
from rlhf.runs.folder import RunFolder
from rlhf.runs.jsonable import read_lines


@dataclass(frozen=True)
class PPOCurve:
    """One PPO training, an entry an update: `distances` are the square roots of the KL to the reference in nats.

    The rewards are means over the update's rollout; the KL is estimated from the same responses, and an estimate below
    0 counts as 0.
    """

    updates: tuple[int, ...]
    distances: tuple[float, ...]
    gold: tuple[float, ...]
    proxy: tuple[float, ...]

    def smoothed(self, width: int) -> PPOCurve:
        """Means over windows of `width` updates that do not overlap; the update is the window's last."""
        windows = [slice(start, start + width) for start in range(0, len(self.updates) - width + 1, width)]

        def means(values: Sequence[float]) -> tuple[float, ...]:
            return tuple(math.fsum(values[window]) / width for window in windows)

        ends = tuple(self.updates[window][-1] for window in windows)
        return PPOCurve(ends, means(self.distances), means(self.gold), means(self.proxy))


def ppo_curve(arm: RunFolder, *, proxy: str, gold: str) -> PPOCurve:
    """The curve of an arm whose PPO logged the rewards of these names. Raises `ArtifactError` when it did not."""
    names = ("ppo/kl_to_reference", f"ppo/reward/{gold}", f"ppo/reward/{proxy}")
    rows = [entry for entry in read_lines(arm.metrics) if entry.get("stage") == "ppo"]
    rows = [entry for entry in rows if all(isinstance(entry.get(name), (int, float)) for name in names)]
    if not rows:
        raise ArtifactError(f"{arm.metrics} has no line of stage ppo with {', '.join(names)}")
    kl, golds, proxies = ([float(entry[name]) for entry in rows] for name in names)
    return PPOCurve(
        tuple(int(entry["step"]) for entry in rows),
        tuple(math.sqrt(max(value, 0.0)) for value in kl),
        tuple(golds),
        tuple(proxies),
    )


@dataclass(frozen=True)
class Scores:
    """Scores of sampled responses by reward: `by_reward[name][prompt][sample]`, as stage best_of_n wrote them."""

    by_reward: dict[str, list[list[float]]]

    @classmethod
    def read(cls, path: Path) -> Scores:
        """Reads `scores.jsonl`. Raises `ArtifactError` when it holds nothing."""
        by_reward: dict[str, list[list[float]]] = {}
        for line in path.read_text(encoding="utf-8").splitlines():
            for name, scores in json.loads(line)["rewards"].items():
                by_reward.setdefault(name, []).append([float(score) for score in scores])
        if not by_reward:
            raise ArtifactError(f"{path} holds no scores")
        return cls(by_reward)

    def standard(self, name: str) -> tuple[float, float]:
        """Mean and standard deviation of a reward over all samples; of equal scores the deviation is 1."""
        values = [score for row in self.by_reward[name] for score in row]
        mean = math.fsum(values) / len(values)
        deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))
        return mean, deviation or 1.0

    def standardized(self, name: str) -> list[list[float]]:
        """The scores of a reward, shifted and scaled to mean 0 and standard deviation 1 over all samples."""
        mean, deviation = self.standard(name)
        return [[(score - mean) / deviation for score in row] for row in self.by_reward[name]]
