"""How a reward model's scores go with the length of responses. numpy only."""

from __future__ import annotations

from typing import Any

import numpy as np

from rlhf.evaluation.reward_rows import Figure, Floats, ScoredRows, figure, not_defined, over_prompts, share
from rlhf.statistics.annotations import Resampling


def weighted_correlation(weights: Floats, first: Floats, second: Floats) -> Floats:
    """Pearson's correlation under weights (R, N), shape (R,); NaN where one side does not vary.

    `first` and `second` have shape (N,), or (R, N) where they depend on the resample.
    """
    totals = weights.sum(axis=1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        centred = [values - (weights * values).sum(axis=1, keepdims=True) / totals for values in (first, second)]
        one, other = ((weights * values**2).sum(axis=1) for values in centred)
        both = (weights * centred[0] * centred[1]).sum(axis=1)
        size = np.maximum(np.abs(first).max(initial=0.0), 1.0) * np.maximum(np.abs(second).max(initial=0.0), 1.0)
        norm = np.sqrt(one * other)
        # Rounding keeps a sum of squares of equal numbers from being 0.
        varies = norm > 1e-12 * size * totals[:, 0]
        found: Floats = np.where(varies, both / norm, np.nan)
    return found


def weighted_ranks(weights: Floats, values: Floats) -> Floats:
    """The middle ranks of `values` (N,) in each resample, shape (R, N), from 0: half of what equals it lies below."""
    distinct, place = np.unique(values, return_inverse=True)
    order = np.argsort(place, kind="stable")
    starts = np.searchsorted(place[order], np.arange(len(distinct)))
    totals = np.add.reduceat(weights[:, order], starts, axis=1)
    middle: Floats = (np.cumsum(totals, axis=1) - totals / 2)[:, place]
    return middle


def length_figures(rows: ScoredRows, resampling: Resampling) -> dict[str, Any]:
    """Correlations of scores with lengths, and what a rule that prefers the longer response would reach.

    Pearson's and Spearman's, each response counted as often as it is compared; of a prompt's two responses against each
    other (`difference_...`), which leaves out what the prompt does to both, and of all responses. Intervals by
    bootstrap over prompts. The shares are over comparisons, no ties, of unequal lengths.
    """
    scores = np.concatenate([rows.chosen_scores.mean(axis=0), rows.rejected_scores.mean(axis=0)])
    lengths = np.concatenate([rows.chosen_lengths, rows.rejected_lengths])
    # Every comparison from both sides: which response is called first, that of a tie above all, must not matter.
    differences = np.concatenate([rows.differences, -rows.differences])
    gaps = np.concatenate([rows.gaps, -rows.gaps])

    def of_resamples(weights: Floats) -> Floats:
        twice = np.concatenate([weights, weights], axis=1)
        return np.stack(
            [
                weighted_correlation(twice, first, second)
                for one, other in ((scores, lengths), (differences, gaps))
                for first, second in (
                    (one, other),
                    (weighted_ranks(twice, one), weighted_ranks(twice, other)),
                )
            ],
            axis=1,
        )

    names = ("pearson", "spearman", "difference_pearson", "difference_spearman")
    found = over_prompts(rows, of_resamples, resampling)
    reason = "scores or lengths do not vary"
    figures: dict[str, Any] = {name: figure(one, reason) for name, one in zip(names, found, strict=True)}
    return {"unit": rows.length_unit, **figures, **_longer(rows, resampling.confidence)}


def _longer(rows: ScoredRows, confidence: float) -> dict[str, Any]:
    """How often annotators and model prefer the longer response, and the model's accuracy on the same comparisons."""
    counted = ~rows.ties & (rows.gaps != 0)
    num = int(counted.sum())
    longer = rows.gaps[counted] > 0
    right = rows.right[counted]
    prefers = np.where(longer, right, 1 - right)
    reason = "no comparison has responses of unequal lengths"

    def part(successes: Any) -> Figure:
        return share(float(np.sum(successes)), num, reason, confidence) if num else not_defined(reason)

    return {
        "num_unequal": num,
        "num_equal": int((~rows.ties & (rows.gaps == 0)).sum()),
        "longer_wins": part(longer),
        "model_prefers_longer": part(prefers),
        "accuracy_where_unequal": part(right),
        "accuracy_where_chosen_is_longer": share(
            float(right[longer].sum()), int(longer.sum()), "chosen is never the longer one", confidence
        ),
        "accuracy_where_chosen_is_shorter": share(
            float(right[~longer].sum()), int((~longer).sum()), "chosen is never the shorter one", confidence
        ),
    }
