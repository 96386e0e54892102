"""Agreement: published examples, published implementations, a slow oracle from the definitions, and the bootstrap."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score

from rlhf.preferences.resolution import rated_labels
from rlhf.statistics.agreement import (
    KappaWeights,
    Level,
    cohen_kappa,
    fleiss_kappa,
    fleiss_kappa_of_counts,
    krippendorff_alpha,
    pairwise_cohen_kappa,
    percent_agreement,
)
from rlhf.statistics.annotations import Annotations, Resampling, Value, annotation_table, table_of_labels
from rlhf.statistics.intervals import Interval

FEW = Resampling(num_resamples=50)
LEVELS: tuple[Level, ...] = ("nominal", "ordinal", "interval", "ratio")
Rows = Sequence[Sequence[Value | None]]


def rows_of(text: str) -> list[list[int | None]]:
    """One word an item, one digit an annotator, a dot where one is missing."""
    return [[None if sign == "." else int(sign) for sign in word] for word in text.split()]


def columns(*annotators: str) -> list[list[str | None]]:
    """One word an annotator, one letter an item."""
    return [[None if sign == "." else sign for sign in item] for item in zip(*annotators, strict=True)]


def random_rows(generator: np.random.Generator, gaps: float) -> list[list[float | None]]:
    """2 to 25 items, 2 to 5 annotators, up to 5 unevenly spaced values, the first item rated twice."""
    num_items, num_annotators = int(generator.integers(2, 26)), int(generator.integers(2, 6))
    scale = np.array([0.0, 1.0, 2.5, 7.0, 7.5])[: int(generator.integers(2, 6))]
    truth = generator.integers(len(scale), size=(num_items, 1))
    noise = generator.integers(len(scale), size=(num_items, num_annotators))
    table = scale[np.where(generator.random(noise.shape) < 0.5, noise, truth)]
    missing = generator.random(noise.shape) < gaps
    missing[0] = False
    return [
        [None if gone else float(value) for value, gone in zip(*pair, strict=True)]
        for pair in zip(table, missing, strict=True)
    ]


# --- the slow oracle: every pair of ratings by itself -----------------------------------------------------------------


def alpha_by_definition(rows: Rows, level: Level) -> float:
    """Krippendorff (2011), part D: the coincidences o_ck, and the differences delta_ck^2 as printed there."""
    units = [[float(value) for value in row if value is not None] for row in rows]
    coincidences: Counter[tuple[float, float]] = Counter()
    for unit in units:
        for i, j in itertools.permutations(range(len(unit)), 2):
            coincidences[unit[i], unit[j]] += 1 / (len(unit) - 1)  # type: ignore[assignment]
    values = sorted({value for unit in units for value in unit})
    margin = {c: sum(coincidences[c, k] for k in values) for c in values}
    total = sum(margin.values())

    def difference(c: float, k: float) -> float:
        if level == "nominal":
            return float(c != k)
        if level == "interval":
            return (c - k) ** 2
        if level == "ratio":
            return ((c - k) / (c + k)) ** 2 if c != k else 0.0
        between = [margin[g] for g in values if min(c, k) <= g <= max(c, k)]
        return (sum(between) - (margin[c] + margin[k]) / 2) ** 2

    observed = sum(coincidences[c, k] * difference(c, k) for c in values for k in values)
    expected = sum(margin[c] * margin[k] * difference(c, k) for c in values for k in values)
    return 1 - (total - 1) * observed / expected if expected else math.nan


def cohen_by_definition(rows: Rows, weights: KappaWeights, values: Sequence[Value]) -> float:
    """Cohen (1968): 1 - sum(v p_o) / sum(v p_c), with p_c the product of the two annotators' shares."""
    pairs = [(values.index(a), values.index(b)) for a, b in rows if a is not None and b is not None]
    observed = expected = 0.0
    for (a, _), (_, b) in itertools.product(pairs, pairs):
        expected += {"none": float(a != b), "linear": abs(a - b), "quadratic": (a - b) ** 2}[weights] / len(pairs) ** 2
    for a, b in pairs:
        observed += {"none": float(a != b), "linear": abs(a - b), "quadratic": (a - b) ** 2}[weights] / len(pairs)
    return 1 - observed / expected if expected else math.nan


def fleiss_by_definition(rows: Rows) -> float:
    """Fleiss (1971), equations 1 to 8, counting pairs of ratings."""
    shares = Counter(value for row in rows for value in row)
    total = sum(shares.values())
    by_chance = sum((count / total) ** 2 for count in shares.values())
    observed = percent_by_definition(rows)
    return (observed - by_chance) / (1 - by_chance) if len(shares) > 1 else math.nan


def percent_by_definition(rows: Rows) -> float:
    shares = []
    for row in rows:
        pairs = list(itertools.combinations([value for value in row if value is not None], 2))
        if pairs:
            shares.append(sum(a == b for a, b in pairs) / len(pairs))
    return sum(shares) / len(shares)


@pytest.mark.parametrize("seed", range(40))
def test_random_tables_give_what_the_definitions_give(seed: int) -> None:
    generator = np.random.Generator(np.random.PCG64(seed))
    rows = random_rows(generator, gaps=0.35 if seed % 2 else 0.0)
    table = annotation_table(rows)
    assert percent_agreement(table, resampling=FEW).value == pytest.approx(percent_by_definition(rows))
    for level in LEVELS:
        found = krippendorff_alpha(table, level, resampling=FEW).value
        assert found == pytest.approx(alpha_by_definition(rows, level), nan_ok=True), level
    if not seed % 2:
        assert fleiss_kappa(table, resampling=FEW).value == pytest.approx(fleiss_by_definition(rows), nan_ok=True)
    both = [row[:2] for row in rows]
    weights: KappaWeights
    for weights in ("none", "linear", "quadratic"):
        found = cohen_kappa(table.pair("1", "2"), weights=weights, resampling=FEW).value
        assert found == pytest.approx(cohen_by_definition(both, weights, table.values), nan_ok=True), weights


# --- published examples -----------------------------------------------------------------------------------------------

# Krippendorff (2011), data of parts A, B and C.
BINARY = columns("0100000010", "1110010000")
NOMINAL = columns("aabbdcccedda", "babbbccceddd")
FOUR_OBSERVERS = columns("123321412...", "1233224125.3", ".3332342251.", "12332441251.")


def test_alpha_of_krippendorffs_examples() -> None:
    assert round(krippendorff_alpha(annotation_table(BINARY), resampling=FEW).value, 3) == 0.095
    assert round(krippendorff_alpha(annotation_table(NOMINAL), resampling=FEW).value, 3) == 0.692
    numbers = [[None if value is None else int(value) for value in row] for row in FOUR_OBSERVERS]
    for level, published in zip(LEVELS, (0.743, 0.815, 0.849, 0.797), strict=True):
        assert round(krippendorff_alpha(annotation_table(numbers), level, resampling=FEW).value, 3) == published, level


# Fleiss (1971), table 1: 30 patients, 6 psychiatrists each; depression, personality disorder, schizophrenia, neurosis,
# other.
FLEISS = """
00060 03003 01401 00006 03030 20400 00402 20310 20040 00006 10050 11040 03300 10050 02031 00501 30012 51000 02040 10203
00006 01050 02013 20040 10041 05010 40002 02040 10500 00006
"""


def test_fleiss_example_by_counts_and_by_ratings() -> None:
    counts = [[int(sign) for sign in word] for word in FLEISS.split()]
    by_counts = fleiss_kappa_of_counts(counts, resampling=FEW)
    assert round(by_counts.value, 3) == 0.430
    ratings = [[value for value, count in enumerate(row) for _ in range(count)] for row in counts]
    assert fleiss_kappa(annotation_table(ratings), resampling=FEW) == by_counts


def test_cohen_example() -> None:
    """The example of Cohen (1960, 1968): 200 patients, two psychiatrists, kappa 0.492."""
    joint = [[88, 14, 18], [10, 40, 10], [2, 6, 12]]
    rows = [[i, j] for i in range(3) for j in range(3) for _ in range(joint[i][j])]
    assert round(cohen_kappa(annotation_table(rows), resampling=FEW).value, 3) == 0.492


# --- published implementations ----------------------------------------------------------------------------------------

# What krippendorff 0.9.0 gives for nominal, ordinal, interval and ratio.
KRIPPENDORFF = {
    "022 .21 0.2 222 11. 221 1.. 00. 100 002 .10 212": (
        0.15294117647058825,
        0.20398093447905474,
        0.20725388601036265,
        0.20147874306839186,
    ),
    ".02.. 0.... 3..31 .11.1 .4234 ..30. .444. .0000 222.4 .4444 .3.42 .30.3 3..33 .244. .0..0 22.2. 4.0.. .24.4 32..."
    " ..1..": (0.4174340085942295, 0.44178050494213583, 0.4607018724072204, 0.49932693071752876),
    "21 11 20 33 33 30 2. 1. 32 01 21 .0 31 .1 30": (
        0.045454545454545525,
        0.012700534759358173,
        -0.009615384615384581,
        -0.07743329290479095,
    ),
}
# What statsmodels 0.15.0 gives.
STATSMODELS = {
    "122 122 101 111 200 020 220 111 101 000 222 111 222 112": 0.4156521739130433,
    "12213 00122 23322 11133 12000 31322 20200 12111 13002 01123 02303 21113 10123 11113 12221 00210 00200 22000 31333"
    " 03303": 0.11693872089911697,
    "00 20 44 33 11 13 41 11 40 10": 0.3333333333333333,
}


@pytest.mark.parametrize("text", KRIPPENDORFF)
def test_alpha_is_that_of_the_package_krippendorff(text: str) -> None:
    table = annotation_table(rows_of(text))
    found = [krippendorff_alpha(table, level, resampling=FEW).value for level in LEVELS]
    assert found == pytest.approx(KRIPPENDORFF[text], abs=1e-12)


@pytest.mark.parametrize("text", STATSMODELS)
def test_fleiss_kappa_is_that_of_statsmodels(text: str) -> None:
    found = fleiss_kappa(annotation_table(rows_of(text)), resampling=FEW).value
    assert found == pytest.approx(STATSMODELS[text], abs=1e-12)


@pytest.mark.parametrize("weights", ["none", "linear", "quadratic"])
def test_kappa_is_that_of_scikit_learn_on_the_items_that_both_rated(weights: KappaWeights) -> None:
    rows = rows_of(next(text for text in KRIPPENDORFF if text.startswith(".02")))
    table = annotation_table(rows)
    result = pairwise_cohen_kappa(table, weights=weights, resampling=FEW)
    expected = []
    for first, second in itertools.combinations(range(5), 2):
        both = [(row[first], row[second]) for row in rows if row[first] is not None and row[second] is not None]
        name = None if weights == "none" else weights
        published = cohen_kappa_score(*zip(*both, strict=True), labels=table.values, weights=name)
        assert result.pairs[str(first + 1), str(second + 1)].value == pytest.approx(published, abs=1e-12)
        assert cohen_kappa(table.pair(str(first + 1), str(second + 1)), weights=weights, resampling=FEW).value == (
            result.pairs[str(first + 1), str(second + 1)].value
        )
        expected.append(published)
    assert len(expected) == 10
    assert result.num_undefined == 0
    assert result.mean.value == pytest.approx(np.mean(expected))


# --- undefined and perfect --------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_one_value_throughout_is_undefined_as_for_the_published_implementations() -> None:
    table = annotation_table([[0.1, 0.1]] * 3, order=[0.1, 0.2])
    kappas = [cohen_kappa(table), fleiss_kappa(table), pairwise_cohen_kappa(table).mean]
    for interval in [*kappas, *(krippendorff_alpha(table, level) for level in LEVELS)]:
        assert all(map(math.isnan, (interval.value, interval.low, interval.high)))
    assert percent_agreement(table) == Interval(1.0, 1.0, 1.0)


def test_perfect_agreement_on_several_values_is_one() -> None:
    """Some resamples draw one value only; they are undefined and left out."""
    table = annotation_table([[0.1, 0.1, 0.1], [0.7, 0.7, 0.7]])
    kappas = [cohen_kappa(table.pair("1", "3")), fleiss_kappa(table), pairwise_cohen_kappa(table).mean]
    for interval in [*kappas, *(krippendorff_alpha(table, level) for level in LEVELS)]:
        assert interval == Interval(1.0, 1.0, 1.0)


def test_a_pair_without_a_kappa_is_left_out_of_the_mean() -> None:
    # Annotators 1 and 3 share no item; 2 and 3 gave one value throughout.
    rows = [[0, 0, None], [1, 0, None], [1, 1, None], [None, 1, 1], [None, 1, 1]]
    result = pairwise_cohen_kappa(annotation_table(rows), resampling=FEW)
    assert result.pairs["1", "2"].value == pytest.approx(0.4)  # (2/3 - 4/9) / (1 - 4/9)
    assert math.isnan(result.pairs["1", "3"].value)
    assert math.isnan(result.pairs["2", "3"].value)
    assert result.num_undefined == 2
    assert result.mean.value == result.pairs["1", "2"].value


# --- the bootstrap ----------------------------------------------------------------------------------------------------

BOOTSTRAPPED: dict[str, tuple[Callable[[Annotations, Resampling], Interval], Callable[[Rows], float]]] = {
    "percent": (lambda table, how: percent_agreement(table, resampling=how), percent_by_definition),
    "fleiss": (lambda table, how: fleiss_kappa(table, resampling=how), fleiss_by_definition),
    "ordinal": (
        lambda table, how: krippendorff_alpha(table, "ordinal", resampling=how),
        lambda rows: alpha_by_definition(rows, "ordinal"),
    ),
    "ratio": (
        lambda table, how: krippendorff_alpha(table, "ratio", resampling=how),
        lambda rows: alpha_by_definition(rows, "ratio"),
    ),
    "interval": (
        lambda table, how: krippendorff_alpha(table, "interval", resampling=how),
        lambda rows: alpha_by_definition(rows, "interval"),
    ),
    "cohen": (
        lambda table, how: cohen_kappa(table.pair("1", "2"), weights="linear", resampling=how),
        lambda rows: cohen_by_definition([row[:2] for row in rows], "linear", [0, 1, 2]),
    ),
}


@pytest.mark.parametrize("name", BOOTSTRAPPED)
def test_ends_are_quantiles_of_the_exact_bootstrap_distribution(name: str) -> None:
    """All 4^4 resamples of four items, two of them alike, each with its statistic from the definitions."""
    rows = rows_of("012 110 222 110")
    statistic, definition = BOOTSTRAPPED[name]
    exact = np.array([definition([rows[i] for i in drawn]) for drawn in itertools.product(range(4), repeat=4)])
    exact = exact[~np.isnan(exact)]
    interval = statistic(annotation_table(rows), Resampling(confidence=0.7, num_resamples=6000))
    assert interval.value == pytest.approx(definition(rows))
    for end, share in ((interval.low, 0.15), (interval.high, 0.85)):
        # A quantile of a distribution of lumps: no more than the share lies below it, no less up to it.
        assert np.mean(exact < end - 1e-9) <= share + 0.02
        assert np.mean(exact <= end + 1e-9) >= share - 0.02


def test_resamples_of_one_value_are_left_out_whatever_the_rounding() -> None:
    """Both rows drawn: 0. The second twice, four 0.1 and two 0.9 of which each row has one: 1 - 5 * 4 / 16 = -0.25."""
    interval = krippendorff_alpha(annotation_table([[0.1, 0.1, 0.1], [0.1, 0.1, 0.9]]), "interval")
    assert [interval.value, interval.low, interval.high] == pytest.approx([0.0, -0.25, 0.0], abs=1e-12)


def test_intervals_depend_on_the_seed_alone() -> None:
    rows = rows_of(next(iter(KRIPPENDORFF)))
    first, again, other = (
        krippendorff_alpha(annotation_table(given), "ordinal", resampling=Resampling(seed=seed, num_resamples=300))
        for given, seed in ((rows, 3), (rows[::-1], 3), (rows, 4))
    )
    assert first == again
    assert first.value == other.value
    assert (first.low, first.high) != (other.low, other.high)


def test_the_means_interval_is_of_the_mean_not_of_one_pair() -> None:
    """Nearly independent pairs: their mean varies less than any of them."""
    generator = np.random.Generator(np.random.PCG64(0))
    result = pairwise_cohen_kappa(annotation_table(generator.integers(2, size=(300, 4)).tolist()))
    widths = [interval.high - interval.low for interval in result.pairs.values()]
    assert min(widths) > 0.2
    assert result.mean.high - result.mean.low < 0.6 * min(widths)


def test_many_resamples_in_blocks_are_all_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    table = annotation_table(rows_of(next(iter(KRIPPENDORFF))))
    whole = krippendorff_alpha(table, "ordinal")
    monkeypatch.setattr("rlhf.statistics.annotations._BLOCK", 70)
    assert krippendorff_alpha(table, "ordinal") == whole


# --- an order given ---------------------------------------------------------------------------------------------------


def test_an_order_changes_ordinal_alpha_as_it_should() -> None:
    names = {1: "poor", 2: "fair", 3: "good"}
    rows = rows_of("13 13 11 33 22 22")
    texts = [[names[value] for value in row if value is not None] for row in rows]
    ordered = annotation_table(texts, order=["poor", "fair", "good"])
    expected = alpha_by_definition(rows, "ordinal")
    assert krippendorff_alpha(ordered, "ordinal", resampling=FEW).value == pytest.approx(expected)
    shuffled = annotation_table(texts, order=["poor", "good", "fair"])
    assert krippendorff_alpha(shuffled, "ordinal", resampling=FEW).value != pytest.approx(expected, abs=0.05)


# --- PandaLM's layout -------------------------------------------------------------------------------------------------


def test_a_file_in_pandalms_layout(tmp_path: Path) -> None:
    file = tmp_path / "testset.json"
    ratings = rows_of("222 111 112 000 120 21.")
    file.write_text(
        json.dumps(
            [
                {"idx": number, "instruction": "Do.", "input": math.nan, "response1": "a", "response2": "b"}
                | {f"annotator{column}": value for column, value in enumerate(row, start=1)}
                for number, row in enumerate(ratings)
            ]
        )
    )
    labels = [label for row in json.loads(file.read_text()) for label in rated_labels(row, task=str(row["idx"]))]
    table = table_of_labels([(label.task, label.annotator, label.choice) for label in labels])
    assert table.annotators == ("annotator1", "annotator2", "annotator3")
    assert table.values == ("first", "second", "tie")
    assert percent_agreement(table, resampling=FEW).value == pytest.approx((1 + 1 + 1 / 3 + 1 + 0 + 0) / 6)
    expected = alpha_by_definition(ratings, "nominal")
    assert krippendorff_alpha(table, resampling=FEW).value == pytest.approx(expected)
    pair = pairwise_cohen_kappa(table, resampling=FEW).pairs["annotator1", "annotator3"].value
    assert pair == pytest.approx(cohen_kappa_score([2, 1, 1, 0, 1], [2, 1, 2, 0, 0]))


def test_999_rows_of_three_annotators() -> None:
    generator = np.random.Generator(np.random.PCG64(5))
    truth = generator.integers(3, size=(999, 1))
    ratings = np.where(generator.random((999, 3)) < 0.3, generator.integers(3, size=(999, 3)), truth)
    table = annotation_table(ratings.tolist())
    result = pairwise_cohen_kappa(table)
    for (first, second), interval in result.pairs.items():
        published = cohen_kappa_score(ratings[:, int(first) - 1], ratings[:, int(second) - 1])
        assert interval.value == pytest.approx(published, abs=1e-12)
        assert interval.low < published < interval.high
    assert fleiss_kappa(table).value == pytest.approx(fleiss_by_definition(ratings.tolist()))
    alpha = krippendorff_alpha(table)
    # Of 999 items with kappas near 0.49 the standard error is near 0.018.
    assert 0.05 < alpha.high - alpha.low < 0.1
