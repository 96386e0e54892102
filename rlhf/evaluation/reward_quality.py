"""The report of a reward model on scored comparisons: how often it is right, where, and how far it can be believed.

Pure functions on arrays. Ties are neither right nor wrong: they are counted apart, and count as labels of 1/2 for the
cross-entropy and the calibration. Every figure has an interval, or a reason why there is none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from rlhf.evaluation.reward_calibration import calibration, sigmoid
from rlhf.evaluation.reward_ceiling import ceiling_figures, ensemble_figures
from rlhf.evaluation.reward_lengths import length_figures
from rlhf.evaluation.reward_rows import Floats, ScoredRows, figure, not_defined, over_prompts, share, weighted_mean
from rlhf.evaluation.reward_slices import accuracy_by_slice
from rlhf.records import to_json
from rlhf.statistics.annotations import Resampling

SCHEMA = "reward_report/1"
_NUM_HISTOGRAM_BINS = 30
_RESAMPLING = Resampling(num_resamples=1000)


@dataclass(frozen=True)
class QualitySettings:
    """How intervals are made, the most bins of the calibration curve, and how many mistakes are listed."""

    resampling: Resampling = _RESAMPLING
    num_bins: int = 10
    num_mistakes: int = 50


DEFAULT_SETTINGS = QualitySettings()


def reward_quality(rows: ScoredRows, settings: QualitySettings = DEFAULT_SETTINGS) -> dict[str, Any]:
    """All figures of the report as plain JSON values; `docs/reward_models.md` says what each one is."""
    resampling, decided = settings.resampling, ~rows.ties
    num = int(decided.sum())
    return {
        "schema": SCHEMA,
        "confidence": resampling.confidence,
        "num_comparisons": len(rows),
        "num_prompts": rows.num_prompts,
        "num_decided": num,
        "num_ties": len(rows) - num,
        "num_soft_labels": int((decided & (rows.labels < 1)).sum()),
        "num_equal_scores": int((decided & (rows.differences == 0)).sum()),
        "accuracy": share(float(rows.right[decided].sum()), num, "all comparisons are ties", resampling.confidence),
        **_over_prompts(rows, resampling),
        "ties": _ties(rows, resampling),
        "slices": accuracy_by_slice(rows, resampling.confidence),
        "calibration": calibration(rows, resampling, settings.num_bins),
        "length": length_figures(rows, resampling),
        "scores": _scores(rows),
        "ceiling": ceiling_figures(rows, resampling),
        "ensemble": ensemble_figures(rows, resampling),
    }


def _over_prompts(rows: ScoredRows, resampling: Resampling) -> dict[str, Any]:
    """The mean difference of scores; where prompts come several times, also the accuracy with their interval."""
    decided = (~rows.ties).astype(np.float64)

    def of_resamples(weights: Floats) -> Floats:
        means = [weighted_mean(weights * decided, values) for values in (rows.right, rows.differences)]
        return np.stack(means, axis=1)

    accuracy, margin = over_prompts(rows, of_resamples, resampling)
    reason = "all comparisons are ties"
    clustered = (
        figure(accuracy, reason)
        if rows.num_prompts < len(rows)
        else not_defined("every comparison has a prompt of its own: see accuracy")
    )
    return {"accuracy_over_prompts": clustered, "margin": figure(margin, reason)}


def _ties(rows: ScoredRows, resampling: Resampling) -> dict[str, Any]:
    """How far apart the model puts the responses of a tie, beside those of other comparisons: mean |difference|."""
    if not rows.ties.any():
        return not_defined("no comparison is a tie")
    sides = rows.ties.astype(np.float64), (~rows.ties).astype(np.float64)
    distances = np.abs(rows.differences)

    def of_resamples(weights: Floats) -> Floats:
        return np.stack([weighted_mean(weights * side, distances) for side in sides], axis=1)

    tied, others = over_prompts(rows, of_resamples, resampling)
    return {
        "num": int(rows.ties.sum()),
        "mean_distance": figure(tied),
        "mean_distance_of_others": figure(others, "all comparisons are ties"),
    }


def _scores(rows: ScoredRows) -> dict[str, Any]:
    """Mean, standard deviation and histogram of the scores (the members' mean) of both sides."""
    sides = {"chosen": rows.chosen_scores.mean(axis=0), "rejected": rows.rejected_scores.mean(axis=0)}
    edges = np.histogram_bin_edges(np.concatenate([*sides.values()]), bins=_NUM_HISTOGRAM_BINS)
    return {
        "edges": edges.tolist(),
        **{
            name: {
                "mean": float(values.mean()),
                "std": float(values.std()),
                "counts": np.histogram(values, bins=edges)[0].tolist(),
            }
            for name, values in sides.items()
        },
    }


def worst_mistakes(rows: ScoredRows, most: int) -> list[dict[str, Any]]:
    """The comparisons, no ties, whose rejected response leads by most, with their texts, the worst first."""
    order = np.argsort(rows.differences, kind="stable")
    wrong = [int(number) for number in order if rows.differences[number] < 0 and not rows.ties[number]][:most]
    return [
        {
            "comparison": to_json(rows.comparisons[number]),
            "number": number,
            "chosen_scores": rows.chosen_scores[:, number].tolist(),
            "rejected_scores": rows.rejected_scores[:, number].tolist(),
            "difference": float(rows.differences[number]),
            "probability_of_chosen": float(sigmoid(rows.differences[number : number + 1])[0]),
            "chosen_length": float(rows.chosen_lengths[number]),
            "rejected_length": float(rows.rejected_lengths[number]),
        }
        for number in wrong
    ]
