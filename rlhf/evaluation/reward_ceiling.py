"""What the annotators leave a reward model to reach, and what the members of an ensemble know of their own mistakes."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np

from rlhf.evaluation.reward_lengths import weighted_correlation
from rlhf.evaluation.reward_rows import Floats, ScoredRows, figure, not_defined, over_prompts, share, weighted_mean
from rlhf.statistics.agreement import agreement_ceiling
from rlhf.statistics.annotations import Resampling, annotation_table

_WIDEST = 100


def votes_of(rows: ScoredRows) -> list[tuple[int, int, bool]]:
    """(votes for the response that won, votes against, whether the model prefers that response) of every known pair.

    A pair with several rows (one an annotator) has a vote from each. Otherwise `agreement` times `num_annotators` are
    the votes for `chosen`. Pairs with fewer than two votes say nothing of agreement and are left out, as are ties.
    """
    pairs: defaultdict[tuple[Any, frozenset[str]], list[int]] = defaultdict(list)
    for number, row in enumerate(rows.comparisons):
        if not rows.ties[number]:
            pairs[row.prompt, frozenset((row.chosen, row.rejected))].append(number)
    found = []
    for numbers in pairs.values():
        first = rows.comparisons[numbers[0]]
        if len(numbers) > 1:
            same = sum(rows.comparisons[number].chosen == first.chosen for number in numbers)
            votes = same, len(numbers) - same
        elif first.agreement is not None and first.num_annotators is not None:
            same = round(first.agreement * first.num_annotators)
            votes = same, first.num_annotators - same
        else:
            continue
        prefers_first = bool(rows.differences[numbers[0]] > 0)
        if sum(votes) >= 2:
            found.append((max(votes), min(votes), prefers_first if votes[0] >= votes[1] else not prefers_first))
    return found


def ceiling_figures(rows: ScoredRows, resampling: Resampling) -> dict[str, Any]:
    """The expected accuracy of a perfect model against one annotator's label, and the model's own against the same.

    `lower` and `upper` are those of `rlhf.statistics.agreement.agreement_ceiling`, over the pairs with several labels;
    `accuracy_against_one` is how often the model agrees with an annotator drawn for such a pair.
    """
    votes = votes_of(rows)
    if not votes:
        return not_defined(
            "no comparison has the labels of several annotators (num_annotators of at least 2 with agreement, or a row "
            "an annotator)"
        )
    # The table wants as many columns as an item may have labels; shares of very many annotators are scaled down.
    width = min(_WIDEST, max(one + other for one, other, _ in votes))
    labels = []
    for one, other, _ in votes:
        total = min(width, one + other)
        won = round(total * one / (one + other))
        labels.append(["won"] * won + ["lost"] * (total - won) + [None] * (width - total))
    ceiling = agreement_ceiling(annotation_table(labels, order=["won", "lost"]), resampling=resampling)
    agreed = np.array([(one if right else other) / (one + other) for one, other, right in votes])
    against = resampling.intervals(
        lambda drawn: weighted_mean(drawn, agreed)[:, None], np.ones(len(agreed), dtype=np.float64)
    )[0]
    return {
        "lower": figure(ceiling.lower),
        "upper": figure(ceiling.upper),
        "accuracy_against_one": figure(against),
        "num_pairs": ceiling.num_items,
    }


def ensemble_figures(rows: ScoredRows, resampling: Resampling) -> dict[str, Any]:
    """Of an ensemble each member's accuracy, and whether the members' spread tells where their mean is wrong.

    Every member's differences are divided by their root mean square, since members have scales of their own. The
    spread of a comparison is the standard deviation (over M) of those. Ties are left out.
    """
    if rows.num_members == 1:
        return not_defined("a single model")
    decided = ~rows.ties
    num, members = int(decided.sum()), rows.member_differences
    scale = np.sqrt(np.mean(members**2, axis=1, keepdims=True))
    scaled = np.divide(members, scale, out=np.zeros_like(members), where=scale > 0)
    spread: Floats = scaled.std(axis=0)
    wrong = 1 - rows.right
    signs = np.sign(members)
    unanimous = decided & (np.abs(signs.sum(axis=0)) == rows.num_members)
    reason, level = "all comparisons are ties", resampling.confidence

    def of_resamples(weights: Floats) -> Floats:
        weights = weights * decided
        correlation = weighted_correlation(weights, spread, wrong)
        return np.stack([correlation, weighted_mean(weights, spread)], axis=1)

    correlation, mean_spread = over_prompts(rows, of_resamples, resampling)
    split = decided & ~unanimous
    return {
        "num_members": rows.num_members,
        "member_accuracy": [share(float((0.5 + 0.5 * sign[decided]).sum()), num, reason, level) for sign in signs],
        "spread": figure(mean_spread, reason),
        "spread_and_wrong": figure(correlation, "the spread does not vary, or nothing is wrong"),
        "unanimous": share(float(unanimous.sum()), num, reason, level),
        "accuracy_where_unanimous": share(
            float(rows.right[unanimous].sum()), int(unanimous.sum()), "the members never agree", level
        ),
        "accuracy_where_split": share(
            float(rows.right[split].sum()), int(split.sum()), "the members always agree", level
        ),
    }
