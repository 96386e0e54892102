"""Early stopping by W&B's variant of hyperband (Li et al. 2018, arXiv:1603.06560), trial by trial.

Iterations are counted in reports of the metric: the n-th line of `metrics.jsonl` that has it is iteration n. Brackets
lie at min_iter * eta^k, or at max_iter / eta^k for k = 1..s. At its latest bracket a trial goes on if it is among the
best 1/eta of all trials that have come so far (W&B's `hyperband_stop_runs`): `strict` compares its value at the
bracket, otherwise its best value up to now.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlhf.sweeps.file import EarlyTerminate, Metric

# min_iter * eta^k grows beyond any training long before.
MAX_BRACKETS = 100


@dataclass(frozen=True)
class Verdict:
    """Whether a trial goes on, and why: at `bracket` (iterations) its `value` is held against the `threshold`."""

    stop: bool
    bracket: int | None = None
    value: float = 0.0
    threshold: float = 0.0


def brackets(rule: EarlyTerminate) -> list[int]:
    """The iterations at which trials are compared, ascending."""
    if rule.max_iter is not None:
        found, at = [], float(rule.max_iter)
        for _ in range(rule.s or 0):
            at /= rule.eta
            if at < 1:
                break
            found.append(int(at))
        return sorted(found)
    assert rule.min_iter is not None
    return [int(rule.min_iter * rule.eta**power) for power in range(MAX_BRACKETS)]


def judge(rule: EarlyTerminate, metric: Metric, own: Sequence[float], everyone: Sequence[Sequence[float]]) -> Verdict:
    """Whether the trial with history `own` stops. `everyone` holds the histories of all trials, this one among them.

    Histories are the metric's finite values in the order of their reports.
    """
    reached = [bracket for bracket in brackets(rule) if bracket <= len(own)]
    if not reached:
        return Verdict(stop=False)
    bracket = reached[-1]
    sign = -1.0 if metric.goal == "maximize" else 1.0
    there = sorted(sign * history[bracket - 1] for history in everyone if len(history) >= bracket)
    # In this order, as the division decides ties: 1/3 of 3 is 1.
    threshold = there[int((1.0 / rule.eta) * len(there))]
    value = sign * own[bracket - 1] if rule.strict else min(sign * one for one in own)
    return Verdict(value > threshold, bracket, sign * value, sign * threshold)
