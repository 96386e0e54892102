"""Accuracy by slice: where a reward model is right, and where it is not. numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf.data.formats import HUMAN
from rlhf.evaluation.reward_calibration import equal_mass_bins
from rlhf.evaluation.reward_rows import FEW_ROWS, Floats, ScoredRows, not_defined, share
from rlhf.records import PromptContent

# More different values than this are put into bins of equal mass.
_MOST_VALUES = 7
_NUM_BINS = 5
_MOST_SOURCES = 30
_LAST_TURNS = 5


def num_turns(prompt: PromptContent) -> int:
    """How often the user speaks: messages of the user, or "Human:" in a transcript; 1 for any other text."""
    if isinstance(prompt, str):
        return max(1, prompt.count(HUMAN))
    return max(1, sum(message.role == "user" for message in prompt))


def accuracy_by_slice(rows: ScoredRows, confidence: float = 0.95) -> dict[str, Any]:
    """By slice the groups with `num` decided comparisons, `accuracy` (Wilson), `margin` (mean difference), `num_ties`.

    Slices: source, annotators' agreement, certainty of the label, length gap, margin, turns. One that no comparison
    has a value for is `{"not_defined": why}`; comparisons without a value are the group "unknown".
    """
    records = rows.comparisons
    unit = rows.length_unit
    return {
        "source": _slice(rows, _by_name([row.source for row in records]), "no comparison names a source", confidence),
        "agreement": _slice(
            rows,
            _by_number(_numbers([row.agreement for row in records])),
            "no comparison says how many annotators agreed",
            confidence,
        ),
        "label": _slice(
            rows,
            _by_number(rows.labels) if ((rows.labels < 1) & ~rows.ties).any() else None,
            "all labels are certain or ties",
            confidence,
        ),
        "length_gap": _slice(rows, _by_number(rows.gaps, f" {unit}"), "no comparison", confidence, rows.gaps),
        "margin": _slice(
            rows, _by_number(_numbers([row.margin for row in records])), "no comparison states a margin", confidence
        ),
        "turns": _slice(rows, _by_turns([num_turns(row.prompt) for row in records]), "no comparison", confidence),
    }


def _numbers(values: Sequence[float | None]) -> Floats:
    return np.array([np.nan if value is None else value for value in values])


Groups = tuple[NDArray[np.int64], list[str]]


def _by_name(values: Sequence[str | None]) -> Groups | None:
    """The commonest names in the order of their counts; the others together."""
    named = [value for value in values if value is not None]
    if not named:
        return None
    names, counts = np.unique(named, return_counts=True)
    kept = [str(names[place]) for place in np.argsort(-counts, kind="stable")[:_MOST_SOURCES]]
    labels = [*kept, "other sources", "unknown"]
    place_of = {name: place for place, name in enumerate(kept)}
    codes = [len(kept) + 1 if value is None else place_of.get(value, len(kept)) for value in values]
    return np.array(codes, dtype=np.int64), labels


def _by_number(values: Floats, unit: str = "") -> Groups | None:
    """Each value where they are few, else ranges of equal mass; what is not known is a group of its own."""
    known = ~np.isnan(values)
    if not known.any():
        return None
    distinct = np.unique(values[known])
    if len(distinct) <= _MOST_VALUES:
        codes = np.searchsorted(distinct, values)
        labels = [f"{value:g}{unit}" for value in distinct]
    else:
        bins = equal_mass_bins(values[known], max(1, min(_NUM_BINS, int(known.sum()) // FEW_ROWS)))
        codes = np.full(len(values), 0)
        codes[known] = bins
        inside = [values[known][bins == number] for number in range(int(bins.max()) + 1)]
        ranges = [(float(part.min()), float(part.max())) for part in inside]
        labels = [f"{low:g}{unit}" if low == high else f"{low:g} to {high:g}{unit}" for low, high in ranges]
    return np.where(known, codes, len(labels)).astype(np.int64), [*labels, "unknown"]


def _by_turns(values: Sequence[int]) -> Groups:
    codes = np.minimum(np.array(values), _LAST_TURNS) - 1
    last = f"{_LAST_TURNS} or more turns"
    return codes.astype(np.int64), ["1 turn", *(f"{count} turns" for count in range(2, _LAST_TURNS)), last]


def _slice(
    rows: ScoredRows, groups: Groups | None, reason: str, confidence: float, places: Floats | None = None
) -> dict[str, Any] | list[dict[str, Any]]:
    if groups is None:
        return not_defined(reason)
    codes, labels = groups
    found = []
    for number, label in enumerate(labels):
        inside = codes == number
        decided = inside & ~rows.ties
        if not inside.any():
            continue
        count = int(decided.sum())
        group: dict[str, Any] = {
            "group": label,
            "num": count,
            "num_ties": int((inside & rows.ties).sum()),
            "accuracy": share(float(rows.right[decided].sum()), count, "all are ties", confidence),
            "margin": float(rows.differences[decided].mean()) if count else None,
        }
        if places is not None:
            group["mean"] = float(places[inside].mean())
        found.append(group)
    return found
