"""Tables of annotations and what is refused; repeats of one annotator; the ceiling that disagreement leaves."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import pytest

from rlhf.errors import DataError
from rlhf.statistics.agreement import (
    agreement_ceiling,
    cohen_kappa,
    fleiss_kappa,
    fleiss_kappa_of_counts,
    krippendorff_alpha,
    pairwise_cohen_kappa,
    percent_agreement,
    self_consistency,
)
from rlhf.statistics.annotations import Resampling, Value, annotation_table, table_of_labels

FEW = Resampling(num_resamples=50)


def test_missing_values_and_the_order_of_values() -> None:
    table = annotation_table([[10, None, ""], [2, float("nan"), 10]])
    assert (table.values, table.ordered) == ((2, 10), True)
    assert table.codes.tolist() == [[1, -1, -1], [0, -1, 1]]
    assert (table.num_items, table.num_comparable_items) == (2, 1)
    of_numpy = annotation_table(np.array([[10.0, np.nan, np.nan], [2.0, np.nan, 10.0]]).tolist())
    assert of_numpy.codes.tolist() == table.codes.tolist()
    # The scalars of numpy are not Python's numbers, yet hash and compare like them.
    assert annotation_table([[np.int64(10), np.str_("")]]).values == (10,)  # type: ignore[list-item]
    assert not annotation_table([["b", "a"]]).ordered
    assert annotation_table([["b", "a"]], order=["b", "a"]).codes.tolist() == [[0, 1]]


def test_values_can_be_counted_as_missing() -> None:
    table = annotation_table([[0, 1, 2], [None, 2, 1]]).without(0)
    assert table.values == (1, 2)
    assert table.codes.tolist() == [[-1, 0, 1], [-1, 1, 0]]
    assert table.without(1, 2).num_comparable_items == 0


def test_labels_in_any_order_make_the_table() -> None:
    table = table_of_labels([("p", "anna", 1), ("q", "bert", 0), ("q", "anna", 1), ("p", "carl", 0)])
    assert table.annotators == ("anna", "bert", "carl")
    assert table.codes.tolist() == [[1, -1, 0], [1, 0, -1]]
    with pytest.raises(DataError, match=r"'anna' labelled item 'p' twice.*self_consistency"):
        table_of_labels([("p", "anna", 1), ("p", "anna", 1)])


@pytest.mark.parametrize(
    ("rows", "order", "message"),
    [
        ([[1, 2], [1]], None, "item 2 has 1 ratings, expected one for each of 2"),
        ([[1, "1"]], None, r"mix texts \('1'\) with numbers \(1\)"),
        ([[1, 5]], [1, 2, 3], "order of the values is 1, 2, 3, but the ratings also have 5"),
        ([[1, 1]], [1, 2, 1], "names a value twice"),
        ([[1, float("inf")]], None, "item 1: a rating is a finite number"),
        ([[1, [2]]], None, "item 1: a rating is a text or a number, not list"),
    ],
)
def test_tables_that_cannot_be(rows: Sequence[Sequence[Value | None]], order: list[Value] | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        annotation_table(rows, order=order)


@pytest.mark.parametrize("bad", [{"confidence": 1.0}, {"confidence": 0.0}, {"num_resamples": 0}])
def test_resampling_refuses_what_gives_no_interval(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        Resampling(**bad)  # type: ignore[arg-type]


def test_refusals_say_what_to_do_instead() -> None:
    gaps = annotation_table([[0, 1, None], [0, 1, 2]])
    with pytest.raises(DataError, match=r"same number of ratings.*item 1 has 2, others up to 3.*Krippendorff"):
        fleiss_kappa(gaps)
    with pytest.raises(DataError, match="at least two; all have 1"):
        fleiss_kappa_of_counts([[1, 0], [0, 1]])
    with pytest.raises(DataError, match="whole counts"):
        fleiss_kappa_of_counts([[1.5, 0.5]])
    with pytest.raises(ValueError, match=r"two annotators, the table has 3.*pairwise_cohen_kappa"):
        cohen_kappa(gaps)
    texts = annotation_table([["good", "bad"]])
    with pytest.raises(DataError, match="kappa with linear weights needs values with an order"):
        cohen_kappa(texts, weights="linear")
    with pytest.raises(DataError, match="ordinal alpha needs values with an order"):
        krippendorff_alpha(texts, "ordinal")
    with pytest.raises(DataError, match="interval alpha needs numbers, the values have the text 'bad'"):
        krippendorff_alpha(texts, "interval")
    with pytest.raises(DataError, match=r"at least 0, the values have -1; use interval"):
        krippendorff_alpha(annotation_table([[-1, 2]]), "ratio")
    with pytest.raises(ValueError, match="level of measurement is one of"):
        krippendorff_alpha(gaps, "nominel")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="weights of kappa are one of"):
        pairwise_cohen_kappa(gaps, weights="cubic")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no annotator '7'; the table has 1, 2, 3"):
        gaps.pair("1", "7")
    with pytest.raises(ValueError, match="no value 9; the table has 0, 1, 2"):
        gaps.without(9)
    for measure in (percent_agreement, krippendorff_alpha, agreement_ceiling, pairwise_cohen_kappa):
        with pytest.raises(DataError, match="none of the 2 items"):
            measure(annotation_table([[0, None, None], [None, 1, None]]))


# --- repeats and the ceiling ------------------------------------------------------------------------------------------


def test_self_consistency_takes_the_items_answered_twice() -> None:
    answers: list[tuple[Hashable, str, Value | None]] = [
        ("p", "anna", "first"), ("q", "anna", "tie"), ("p", "anna", "first"), ("r", "anna", "second"),
        ("q", "anna", "first"), ("s", "anna", "tie"), ("s", "anna", None), ("p", "bert", "first"), ("q", "bert", "tie"),
    ]  # fmt: skip
    found = self_consistency(answers, resampling=FEW)
    assert list(found) == ["anna"]
    assert found["anna"].num_items == 2
    assert found["anna"].agreement.value == 0.5
    # Coincidences: first-first 2, first-tie 1 and 1; expected 2 * 3 * 1 = 6 of n (n - 1) = 12.
    assert found["anna"].alpha.value == pytest.approx(1 - 3 * 2 / 6)


@pytest.mark.parametrize(
    ("item", "lower", "upper"),
    [
        ("aaa", 1.0, 1.0),
        ("aab", 1 / 3, 2 / 3),  # each a is tied with b among the others, b is outvoted
        ("abc", 0.0, 1 / 3),
        ("ab.", 0.0, 0.5),
        ("aaabb", 3 / 10, 3 / 5),  # each of three a is tied with b among the others, b is outvoted
    ],
)
def test_ceiling_of_one_item(item: str, lower: float, upper: float) -> None:
    row: list[Value | None] = [None if sign == "." else sign for sign in item]
    ceiling = agreement_ceiling(annotation_table([row]), resampling=FEW)
    assert ceiling.lower.value == pytest.approx(lower)
    assert ceiling.upper.value == pytest.approx(upper)


@pytest.mark.parametrize("num_annotators", [2, 3, 7])
def test_the_best_possible_accuracy_lies_between_the_two_estimates(num_annotators: int) -> None:
    generator = np.random.Generator(np.random.PCG64(num_annotators))
    first = generator.beta(1.0, 1.0, size=4000)
    labels = generator.random((4000, num_annotators)) < first[:, None]
    best = float(np.maximum(first, 1 - first).mean())
    ceiling = agreement_ceiling(annotation_table(labels.astype(int).tolist()), resampling=FEW)
    assert ceiling.lower.value < best - 0.005
    assert best + 0.005 < ceiling.upper.value
    assert ceiling.upper.value - ceiling.lower.value < {2: 0.35, 3: 0.25, 7: 0.15}[num_annotators]


def test_ceiling_without_ties() -> None:
    rows: list[list[Value | None]] = [["first", "first", "tie"], ["tie", "tie", "second"], ["tie", None, "tie"]]
    ceiling = agreement_ceiling(annotation_table(rows).without("tie"), resampling=FEW)
    assert (ceiling.num_items, ceiling.upper.value, ceiling.lower.value) == (1, 1.0, 1.0)
