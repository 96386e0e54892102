"""How far annotators agree: with each other, with themselves, and what that leaves for a model to reach. numpy only.

Every coefficient comes as an `Interval` with a percentile bootstrap over the items with at least two ratings.

Where all ratings are one value there is no disagreement to expect by chance, and kappa and alpha are 0 / 0: they are
NaN here, also when everybody agrees. scikit-learn's `cohen_kappa_score` and statsmodels' `fleiss_kappa` give NaN too;
the package `krippendorff` refuses such a table, or gives NaN when told of values that were not used.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike

from rlhf.errors import DataError
from rlhf.statistics.annotations import (
    DEFAULT_RESAMPLING,
    MISSING,
    Annotations,
    Codes,
    Floats,
    Resampling,
    Value,
    annotation_table,
    count_values,
)
from rlhf.statistics.intervals import Interval

KappaWeights = Literal["none", "linear", "quadratic"]
Level = Literal["nominal", "ordinal", "interval", "ratio"]


@dataclass(frozen=True)
class PairwiseKappa:
    """Cohen's kappa of every two annotators, and the mean over the pairs for which it is defined."""

    pairs: Mapping[tuple[str, str], Interval]
    mean: Interval
    num_undefined: int


@dataclass(frozen=True)
class SelfConsistency:
    """How one annotator's repeats agree: the share of equal pairs of answers, and Krippendorff's alpha of them."""

    num_items: int
    agreement: Interval
    alpha: Interval


@dataclass(frozen=True)
class Ceiling:
    """The accuracy that no model can pass lies, in expectation, from `lower` to `upper`; see `agreement_ceiling`."""

    lower: Interval
    upper: Interval
    num_items: int


def percent_agreement(annotations: Annotations, *, resampling: Resampling = DEFAULT_RESAMPLING) -> Interval:
    """The share of equal ones among an item's pairs of ratings, averaged over the items with at least two ratings.

    It is the probability that two annotators drawn for an item agree: P-bar of Fleiss (1971), and the agreement that
    Zheng et al. (2023, MT-bench) report. As a share in 0..1. Raises `DataError` when no item has two ratings.
    """
    counts, multiplicity = _distinct_counts(annotations)
    return _mean_over_items(_share_of_equal_pairs(counts), multiplicity, resampling)


def cohen_kappa(
    annotations: Annotations, *, weights: KappaWeights = "none", resampling: Resampling = DEFAULT_RESAMPLING
) -> Interval:
    """Kappa of two annotators (Cohen 1960), or weighted kappa (Cohen 1968), over the items that both rated.

    The weights are |i - j| (linear) or (i - j)^2 (quadratic) of the positions i, j in `annotations.values`, whatever
    numbers stand there, as in `sklearn.metrics.cohen_kappa_score(labels=annotations.values)`. NaN when both gave one
    and the same value throughout. Raises `DataError` for weights on values without an order or no item that both
    rated, `ValueError` for another number of annotators than two.
    """
    if len(annotations.annotators) != 2:
        raise ValueError(
            f"Cohen's kappa is of two annotators, the table has {len(annotations.annotators)}; "
            "use annotations.pair or pairwise_cohen_kappa"
        )
    distances = _position_distances(annotations, weights)
    rows, multiplicity = annotations.comparable_rows(keep_annotators=True)
    return resampling.intervals(lambda drawn: _kappa(drawn, rows, distances)[:, None], multiplicity)[0]


def pairwise_cohen_kappa(
    annotations: Annotations, *, weights: KappaWeights = "none", resampling: Resampling = DEFAULT_RESAMPLING
) -> PairwiseKappa:
    """Cohen's kappa of every two annotators and their mean (Light 1971); see `cohen_kappa`.

    The items are resampled once for all pairs, so that the mean's interval knows how the pairs hang together. A pair
    without a common item, or whose kappa is undefined, is NaN and left out of the mean, in every resample anew.
    Raises `DataError` as `cohen_kappa`, but only when no two annotators share an item.
    """
    distances = _position_distances(annotations, weights)
    rows, multiplicity = annotations.comparable_rows(keep_annotators=True)
    columns = list(itertools.combinations(range(len(annotations.annotators)), 2))

    def statistic(drawn: Floats) -> Floats:
        kappas = np.stack([_kappa(drawn, rows[:, pair], distances) for pair in columns], axis=1)
        defined = ~np.isnan(kappas)
        mean = _divide(np.where(defined, kappas, 0.0).sum(axis=1), defined.sum(axis=1).astype(np.float64))
        return np.column_stack([kappas, mean])

    *intervals, mean = resampling.intervals(statistic, multiplicity)
    names = [(annotations.annotators[first], annotations.annotators[second]) for first, second in columns]
    undefined = sum(bool(np.isnan(interval.value)) for interval in intervals)
    return PairwiseKappa(dict(zip(names, intervals, strict=True)), mean, undefined)


def fleiss_kappa(annotations: Annotations, *, resampling: Resampling = DEFAULT_RESAMPLING) -> Interval:
    """Fleiss' kappa (Fleiss 1971) of any number of annotators, who need not be the same for every item.

    NaN when all ratings are one value. Raises `DataError` unless every item has the same number of ratings, at least
    two; `krippendorff_alpha` takes tables with gaps.
    """
    return fleiss_kappa_of_counts(count_values(annotations.codes, len(annotations.values)), resampling=resampling)


def fleiss_kappa_of_counts(counts: ArrayLike, *, resampling: Resampling = DEFAULT_RESAMPLING) -> Interval:
    """`fleiss_kappa` of how many ratings gave each item each value, shape (num_items, num_values)."""
    table = np.asarray(counts, dtype=np.float64)
    if table.ndim != 2 or not table.size or not (np.isfinite(table) & (table >= 0) & (table % 1 == 0)).all():
        raise DataError(f"Fleiss' kappa needs whole counts, items by values; got shape {table.shape}: {counts!r:.80}")
    ratings = table.sum(axis=1)
    size = ratings[0]
    if size < 2 or (ratings != size).any():
        few, many = int(ratings.min()), int(ratings.max())
        came = f"all have {few}" if few == many else f"item {int(ratings.argmin()) + 1} has {few}, others up to {many}"
        raise DataError(
            f"Fleiss' kappa needs the same number of ratings for every item, at least two; {came}. "
            "Leave out the items with gaps, or use Krippendorff's alpha, which takes them"
        )
    rows, multiplicity = np.unique(table, axis=0, return_counts=True)
    equal_pairs = _share_of_equal_pairs(rows)

    def statistic(drawn: Floats) -> Floats:
        num_items = drawn.sum(axis=1)
        observed = drawn @ equal_pairs / num_items
        shares = drawn @ rows / (num_items * size)[:, None]
        by_chance = (shares**2).sum(axis=1)
        return _divide(observed - by_chance, 1 - by_chance)[:, None]

    return resampling.intervals(statistic, multiplicity.astype(np.float64))[0]


def krippendorff_alpha(
    annotations: Annotations, level: Level = "nominal", *, resampling: Resampling = DEFAULT_RESAMPLING
) -> Interval:
    """Krippendorff's alpha of any number of annotators with any gaps.

    Krippendorff (2011), "Computing Krippendorff's Alpha-Reliability". An item with one rating has nothing to be
    compared with and counts nowhere. NaN when all ratings that can be compared are one value. `ordinal` takes the
    order of `annotations.values`, `interval` and `ratio` the numbers themselves; `ratio` takes memory in the square of
    the number of distinct ones. Raises `DataError` for values that do not have the level, or no item with two ratings.
    """
    if level not in get_args(Level):
        raise ValueError(f"the level of measurement is one of {', '.join(get_args(Level))}, not {level!r}")
    numbers = _numbers(annotations, level)
    counts, multiplicity = _distinct_counts(annotations)
    if level == "interval":
        # Differences stay as they are; sums of squares of numbers far from 0 would lose them.
        numbers = numbers - multiplicity @ counts @ numbers / (multiplicity @ counts).sum()
    return resampling.intervals(lambda drawn: _alpha(drawn, counts, level, numbers)[:, None], multiplicity)[0]


def self_consistency(
    answers: Iterable[tuple[Hashable, str, Value | None]],
    level: Level = "nominal",
    *,
    order: Sequence[Value] | None = None,
    resampling: Resampling = DEFAULT_RESAMPLING,
) -> dict[str, SelfConsistency]:
    """How annotators agree with themselves on items that they answered more than once, by annotator.

    `answers` are (item, annotator, value); a value names the response, not the side on which it was shown, since
    repeats swap sides. Krippendorff (2004, chapter 11) calls this stability. Annotators without a repeat are absent.
    """
    given: defaultdict[str, defaultdict[Hashable, list[Value | None]]] = defaultdict(lambda: defaultdict(list))
    for item, annotator, value in answers:
        given[annotator][item].append(value)
    found = {}
    for annotator, items in given.items():
        longest = max(map(len, items.values()))
        table = annotation_table([[*row, *[None] * (longest - len(row))] for row in items.values()], order=order)
        if table.num_comparable_items:
            agreement = percent_agreement(table, resampling=resampling)
            alpha = krippendorff_alpha(table, level, resampling=resampling)
            found[annotator] = SelfConsistency(table.num_comparable_items, agreement, alpha)
    return found


def agreement_ceiling(annotations: Annotations, *, resampling: Resampling = DEFAULT_RESAMPLING) -> Ceiling:
    """The expected accuracy of a perfect model against the label of one annotator, over items with several labels.

    A model that knows how likely each label of item x is can do no better than name the likeliest one, and is right
    with probability max_k P(k | x): one minus the Bayes error (Devroye, Gyoerfi and Lugosi 1996, theorem 2.1). Its
    mean over items lies between two estimates, where an item's labels are independent draws from P(. | x):

    - `upper`: the mean share of an item's most frequent label, the estimate of Ishida et al. (2023, "Is the performance
      of my deep network too good to be true?"). The maximum of shares is at least as large as that of what they
      estimate, in expectation (Jensen), and 1 for a single label.
    - `lower`: how often a label equals the most frequent one among the item's other labels, evenly split where several
      are. That is a predictor that has not seen the label, so it does no better than the best, in expectation.

    Labels that the model cannot predict, ties for a reward model, are left out before: `annotations.without("tie")`.
    Both are shares in 0..1. Raises `DataError` when no item has two labels.
    """
    counts, multiplicity = _distinct_counts(annotations)
    lower = np.array([_held_out_accuracy(row) for row in counts])
    upper = counts.max(axis=1) / counts.sum(axis=1)
    return Ceiling(
        lower=_mean_over_items(lower, multiplicity, resampling),
        upper=_mean_over_items(upper, multiplicity, resampling),
        num_items=annotations.num_comparable_items,
    )


# --- parts ------------------------------------------------------------------------------------------------------------


def _distinct_counts(annotations: Annotations) -> tuple[Floats, Floats]:
    """Counts of values, shape (num_rows, num_values), of the distinct comparable items, and how many are alike."""
    rows, multiplicity = annotations.comparable_rows(keep_annotators=False)
    return count_values(rows, len(annotations.values)), multiplicity


def _mean_over_items(of_row: Floats, multiplicity: Floats, resampling: Resampling) -> Interval:
    return resampling.intervals(lambda drawn: (drawn @ of_row / drawn.sum(axis=1))[:, None], multiplicity)[0]


def _share_of_equal_pairs(counts: Floats) -> Floats:
    ratings = counts.sum(axis=1)
    equal: Floats = (counts * (counts - 1)).sum(axis=1) / (ratings * (ratings - 1))
    return equal


def _divide(numerator: Floats, denominator: Floats) -> Floats:
    """NaN, without a warning, where the denominator is 0."""
    quotient = np.full(len(numerator), np.nan)
    np.divide(numerator, denominator, out=quotient, where=denominator != 0)
    return quotient


def _position_distances(annotations: Annotations, weights: KappaWeights) -> Floats:
    """The weight of each disagreement, shape (num_values, num_values), 0 on the diagonal."""
    if weights not in get_args(KappaWeights):
        raise ValueError(f"the weights of kappa are one of {', '.join(get_args(KappaWeights))}, not {weights!r}")
    positions = np.arange(len(annotations.values), dtype=np.float64)
    apart = np.abs(positions[:, None] - positions)
    if weights == "none":
        return (apart > 0).astype(np.float64)
    _check_ordered(annotations, f"kappa with {weights} weights")
    return apart if weights == "linear" else apart**2


def _check_ordered(annotations: Annotations, what: str) -> None:
    if not annotations.ordered:
        raise DataError(
            f"{what} needs values with an order; the values are texts: {', '.join(map(repr, annotations.values[:8]))}. "
            "Give their order from lowest to highest"
        )


def _kappa(drawn: Floats, rows: Codes, distances: Floats) -> Floats:
    """Kappa of the two columns of `rows` in each resample, shape (num_resamples,)."""
    both = (rows != MISSING).all(axis=1)
    drawn, first, second = drawn[:, both], rows[both, 0], rows[both, 1]
    units = np.eye(len(distances))
    observed = drawn @ distances[first, second]
    expected = ((drawn @ units[first] @ distances) * (drawn @ units[second])).sum(axis=1)
    # Sums of whole numbers, so that 0 is exact.
    return 1 - _divide(observed * drawn.sum(axis=1), expected)


def _numbers(annotations: Annotations, level: Level) -> Floats:
    """The values as numbers; positions where the level asks for none."""
    if level == "ordinal":
        _check_ordered(annotations, "ordinal alpha")
    if level in ("nominal", "ordinal"):
        return np.arange(len(annotations.values), dtype=np.float64)
    texts = [value for value in annotations.values if isinstance(value, str)]
    if texts:
        raise DataError(f"{level} alpha needs numbers, the values have the text {texts[0]!r}; use nominal or ordinal")
    numbers = np.array(annotations.values, dtype=np.float64)
    if level == "ratio" and (numbers < 0).any():
        raise DataError(f"ratio alpha needs numbers of at least 0, the values have {numbers.min():g}; use interval")
    return numbers


def _alpha(drawn: Floats, counts: Floats, level: Level, numbers: Floats) -> Floats:
    """Alpha of each resample, shape (num_resamples,): 1 - (n - 1) * observed / expected sums over ordered pairs.

    An item of m ratings adds its pairs' squared differences over m - 1 to the observed sum, whatever else was drawn.
    Only the ordinal difference depends on the other items. It is the distance between the values' middle ranks, since
    all ratings from c to k less half of those at c and at k reach from the middle of c's ranks to the middle of k's.
    """
    totals = drawn @ counts
    split = (counts > 0).sum(axis=1) > 1
    drawn, counts = drawn[:, split], counts[split]
    others = counts.sum(axis=1) - 1
    if level == "nominal":
        observed = drawn @ (_unequal_pairs(counts) / others)
        expected = _unequal_pairs(totals)
    elif level == "ratio":
        sums = numbers[:, None] + numbers
        squares = np.divide(numbers[:, None] - numbers, sums, out=np.zeros_like(sums), where=sums != 0) ** 2
        observed = drawn @ ((counts @ squares * counts).sum(axis=1) / others)
        expected = (totals @ squares * totals).sum(axis=1)
    else:
        ranks = np.cumsum(totals, axis=1) - totals / 2 - totals.sum(axis=1, keepdims=True) / 2
        places = ranks if level == "ordinal" else np.broadcast_to(numbers, (1, len(numbers)))
        pairs = 2 * ((others + 1) * (places**2 @ counts.T) - (places @ counts.T) ** 2)
        observed = (drawn * pairs / others).sum(axis=1)
        expected = 2 * (totals.sum(axis=1) * (totals * places**2).sum(axis=1) - (totals * places).sum(axis=1) ** 2)
    # Rounding can keep the sum for a single value from being 0.
    several = (totals > 0).sum(axis=1) > 1
    return 1 - _divide((totals.sum(axis=1) - 1) * observed, np.where(several, expected, 0.0))


def _unequal_pairs(counts: Floats) -> Floats:
    pairs: Floats = counts.sum(axis=1) ** 2 - (counts**2).sum(axis=1)
    return pairs


def _held_out_accuracy(counts: Floats) -> float:
    """How often a rating of one item equals the most frequent of its other ratings, evenly split where several are."""
    right = 0.0
    for value in np.flatnonzero(counts):
        others = counts.copy()
        others[value] -= 1
        if others[value] == others.max():
            right += counts[value] / np.count_nonzero(others == others.max())
    return float(right / counts.sum())
