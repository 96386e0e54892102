"""A table of annotations, items by annotators with gaps, and the resampling of its items. numpy only."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf.errors import DataError
from rlhf.statistics.intervals import Interval

Value = str | int | float | bool
Codes = NDArray[np.int64]
Floats = NDArray[np.float64]
# Of weights (num_resamples, num_rows), how often each distinct row was drawn: values (num_resamples, num_statistics).
Statistic = Callable[[Floats], Floats]

MISSING = -1
# Resamples are drawn in blocks of about this many numbers, so that memory does not grow with their count.
_BLOCK = 1_000_000


@dataclass(frozen=True, eq=False)
class Annotations:
    """Who gave which value to which item; made by `annotation_table` or `table_of_labels`.

    `codes`, shape (num_items, num_annotators), are positions in `values`, `MISSING` where an annotator gave none.
    `values` are the values that can occur, in their order; `ordered` says whether that order means anything: True for
    numbers and where an order was given, False for texts.
    """

    codes: Codes
    values: tuple[Value, ...]
    annotators: tuple[str, ...]
    ordered: bool

    @property
    def num_items(self) -> int:
        """All items, also those that nobody annotated."""
        return len(self.codes)

    @property
    def num_comparable_items(self) -> int:
        """The items with at least two ratings, which are those that say something about agreement."""
        return int(np.count_nonzero(_num_ratings(self.codes) >= 2))

    def pair(self, first: str, second: str) -> Annotations:
        """The table of two annotators, all items and all values kept. Raises `ValueError` for an unknown name."""
        columns = []
        for name in (first, second):
            if name not in self.annotators:
                raise ValueError(f"no annotator {name!r}; the table has {', '.join(self.annotators)}")
            columns.append(self.annotators.index(name))
        return replace(self, codes=self.codes[:, columns], annotators=(first, second))

    def without(self, *values: Value) -> Annotations:
        """The table with these values counted as missing, e.g. ties. Raises `ValueError` for a value it cannot have."""
        for value in values:
            if value not in self.values:
                raise ValueError(f"no value {value!r}; the table has {_listed(self.values)}")
        kept = tuple(value for value in self.values if value not in values)
        renumbered = [kept.index(value) if value in kept else MISSING for value in self.values]
        # The last entry is what MISSING, -1, points at.
        return replace(self, codes=np.array([*renumbered, MISSING], dtype=np.int64)[self.codes], values=kept)

    def comparable_rows(self, *, keep_annotators: bool) -> tuple[Codes, Floats]:
        """The distinct rows with at least two ratings, shape (num_rows, num_annotators), and how often each occurs.

        Where it does not matter who gave a rating (`keep_annotators` False) rows that differ in this only count as one.
        Raises `DataError` when no item has two ratings.
        """
        codes = self.codes[_num_ratings(self.codes) >= 2]
        if not len(codes):
            raise DataError(
                f"agreement needs an item with ratings of two annotators; none of the {self.num_items} items has them. "
                "Give the same items to several annotators"
            )
        rows, multiplicity = np.unique(codes if keep_annotators else np.sort(codes, axis=1), axis=0, return_counts=True)
        return rows.astype(np.int64), multiplicity.astype(np.float64)


def annotation_table(
    rows: Sequence[Sequence[Value | None]],
    *,
    annotators: Sequence[str] | None = None,
    order: Sequence[Value] | None = None,
) -> Annotations:
    """The table of `rows`, one an item, each with one value an annotator; None, NaN and "" are missing.

    `order` lists all values that may occur, from lowest to highest; it matters for the ordinal and the weighted
    coefficients, and when a value of the scale was never used. Without it the values are those that occur, numbers
    by size and texts by alphabet. `annotators` are named 1, 2, ... unless given. Raises `DataError` for rows of
    unequal length, values outside `order`, infinite numbers, and texts mixed with numbers.
    """
    width = len(rows[0]) if rows else 0
    names = tuple(annotators) if annotators is not None else tuple(str(number + 1) for number in range(width))
    if len(set(names)) != len(names):
        raise DataError(f"every annotator needs a name of its own; got {', '.join(names)}")
    table = []
    for number, row in enumerate(rows, start=1):
        if len(row) != len(names):
            raise DataError(
                f"item {number} has {len(row)} ratings, expected one for each of {len(names)} annotators; "
                "write a missing one as null"
            )
        table.append([_plain(value, number) for value in row])
    present = {value for row in table for value in row if value is not None}
    values, ordered = _domain(present, order)
    position = {value: index for index, value in enumerate(values)}
    codes = [[MISSING if value is None else position[value] for value in row] for row in table]
    return Annotations(np.array(codes, dtype=np.int64).reshape(len(rows), len(names)), values, names, ordered)


def table_of_labels(
    labels: Iterable[tuple[Hashable, str, Value | None]], *, order: Sequence[Value] | None = None
) -> Annotations:
    """The table of labels (item, annotator, value) in any order; items and annotators in order of appearance.

    Raises `DataError` when an annotator labels an item twice (repeats belong to `agreement.self_consistency`), and as
    `annotation_table`.
    """
    cells: dict[tuple[Hashable, str], Value | None] = {}
    for item, annotator, value in labels:
        if (item, annotator) in cells:
            raise DataError(
                f"annotator {annotator!r} labelled item {item!r} twice; agreement between annotators takes one label "
                "of each, repeats are for self_consistency"
            )
        cells[item, annotator] = value
    items = list(dict.fromkeys(item for item, _ in cells))
    annotators = list(dict.fromkeys(annotator for _, annotator in cells))
    rows = [[cells.get((item, annotator)) for annotator in annotators] for item in items]
    return annotation_table(rows, annotators=annotators, order=order)


def count_values(codes: Codes, num_values: int) -> Floats:
    """How often each item was given each value, shape (num_items, num_values), from codes with `MISSING`."""
    counts = np.zeros((len(codes), num_values))
    for column in codes.T:
        rated = np.flatnonzero(column != MISSING)
        counts[rated, column[rated]] += 1
    return counts


@dataclass(frozen=True)
class Resampling:
    """How intervals are made: the percentile bootstrap (Efron 1979) over items, drawn from `seed`.

    Raises `ValueError` for a confidence outside (0, 1) or fewer than one resample.
    """

    confidence: float = 0.95
    num_resamples: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence lies between 0 and 1, both excluded; got {self.confidence}")
        if self.num_resamples < 1:
            raise ValueError(f"num_resamples must be at least 1, not {self.num_resamples}")

    def intervals(self, statistic: Statistic, multiplicity: Floats) -> list[Interval]:
        """One interval for each column of `statistic`, over items of which `multiplicity` are alike, shape (num_rows,).

        Drawing as many items as there are, with replacement, draws the counts of the distinct rows from a multinomial
        distribution. All columns share the resamples. A resample in which a statistic is undefined (NaN) is left out
        of its interval; a statistic that is undefined itself has NaN for both ends.
        """
        values = statistic(multiplicity[None])[0]
        generator = np.random.Generator(np.random.PCG64(self.seed))
        num_items = int(multiplicity.sum())
        rows = max(1, _BLOCK // len(multiplicity))
        draws = np.concatenate(
            [
                statistic(
                    generator.multinomial(
                        num_items, multiplicity / num_items, size=min(rows, self.num_resamples - start)
                    ).astype(np.float64)
                )
                for start in range(0, self.num_resamples, rows)
            ]
        )
        return [self._interval(float(value), draw) for value, draw in zip(values, draws.T, strict=True)]

    def _interval(self, value: float, draws: Floats) -> Interval:
        defined = draws[~np.isnan(draws)]
        if math.isnan(value) or not len(defined):
            return Interval(value, math.nan, math.nan)
        low, high = np.quantile(defined, [(1 - self.confidence) / 2, (1 + self.confidence) / 2])
        return Interval(value, float(low), float(high))


DEFAULT_RESAMPLING = Resampling()


def _num_ratings(codes: Codes) -> Codes:
    ratings: Codes = (codes != MISSING).sum(axis=1)
    return ratings


def _plain(value: Any, item: int) -> Value | None:
    """A value as Python's own type, None when it is missing."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return None
    if not isinstance(value, str | int | float):
        raise DataError(f"item {item}: a rating is a text or a number, not {type(value).__name__}: {value!r:.80}")
    if isinstance(value, float) and math.isinf(value):
        raise DataError(f"item {item}: a rating is a finite number, not {value}; write a missing one as null")
    return value


def _domain(present: set[Value], order: Sequence[Value] | None) -> tuple[tuple[Value, ...], bool]:
    """The values in their order, and whether it means anything."""
    if order is not None:
        if len(set(order)) != len(order):
            raise DataError(f"the order names a value twice: {_listed(order)}")
        unknown = sorted((value for value in present if value not in order), key=repr)
        if unknown:
            raise DataError(
                f"the order of the values is {_listed(order)}, but the ratings also have {_listed(unknown)}; "
                "add them to the order or correct the ratings"
            )
        return tuple(order), True
    texts = sorted(value for value in present if isinstance(value, str))
    numbers = sorted(value for value in present if not isinstance(value, str))
    if texts and numbers:
        raise DataError(
            f'the ratings mix texts ({_listed(texts)}) with numbers ({_listed(numbers)}), so that "1" would not equal '
            "1; write all of them as one kind"
        )
    return (tuple(texts), False) if texts else (tuple(numbers), True)


def _listed(values: Iterable[Value]) -> str:
    """The first values for a message."""
    shown = [repr(value) for value in values]
    return ", ".join(shown[:8]) + (f" and {len(shown) - 8} more" if len(shown) > 8 else "")
