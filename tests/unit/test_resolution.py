"""Resolving several annotators' labels: each rule worked out by hand, and what is left out and why."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest

from rlhf.errors import ConfigError, DataError
from rlhf.preferences.resolution import (
    Choice,
    LeftOut,
    PairwiseLabel,
    Resolution,
    ResolutionRule,
    Resolved,
    rated_labels,
    resolve,
)

CHOICE_OF: dict[str, Choice] = {"1": "first", "2": "second", "t": "tie", "b": "both_bad", "s": "skip"}


def labels_of(answers: str, task: str = "task", weights: str = "") -> list[PairwiseLabel]:
    """One label a word, of annotators a, b, c, ...: a sign of `CHOICE_OF` and perhaps a strength; weights as words."""
    words = answers.split()
    return [
        PairwiseLabel(task, name, CHOICE_OF[word[0]], int(word[1:]) if word[1:] else None, float(weight))
        for name, word, weight in zip("abcdefg", words, weights.split() or ["1"] * len(words), strict=False)
    ]


def only(resolved: Resolved) -> Resolution:
    assert len(resolved.resolutions) == 1
    return resolved.resolutions[0]


@pytest.mark.parametrize(
    ("answers", "weights", "outcome", "agreement"),
    [
        ("1 1 2", "", "first", 2 / 3),
        ("2 2 1", "", "second", 2 / 3),
        ("1 2 2 t t t", "", "tie", 1 / 2),
        ("1 1 2 t", "", "first", 1 / 2),  # the most frequent choice need not have more than half
        ("t b 1", "", "tie", 2 / 3),  # both bad votes with the ties
        ("1 2 2", "5 2 2", "first", 5 / 9),
        ("1", "", "first", 1.0),
        ("1 s s", "", "first", 1.0),
    ],
)
def test_majority(answers: str, weights: str, outcome: str, agreement: float) -> None:
    found = only(resolve(labels_of(answers, weights=weights), ResolutionRule("majority")))
    assert found.outcome == outcome
    assert found.probability == {"first": 1.0, "second": 0.0, "tie": 0.5}[outcome]
    assert found.agreement == pytest.approx(agreement)
    assert found.num_annotators == len(answers.replace("s", "").split())


@pytest.mark.parametrize(
    ("answers", "weights", "agreement"),
    [("1 2", "", 0.0), ("1 2 t", "", 1 / 3), ("1 1 t t 2", "", 2 / 5), ("1 1 2", "0.1 0.2 0.3", 0.0)],
)
def test_a_tied_vote_is_dropped_or_kept_as_a_tie(answers: str, weights: str, agreement: float) -> None:
    labels = labels_of(answers, weights=weights)
    dropped = resolve(labels, ResolutionRule("majority"))
    assert (dropped.resolutions, dropped.left_out) == ((), (LeftOut("task", None, "tied vote"),))
    kept = only(resolve(labels, ResolutionRule("majority", on_tied_vote="tie")))
    assert (kept.outcome, kept.probability) == ("tie", 0.5)
    assert kept.agreement == pytest.approx(agreement)


@pytest.mark.parametrize(
    ("answers", "weights", "probability", "outcome", "agreement"),
    [
        ("1 1 2", "", 2 / 3, "first", 2 / 3),
        ("1 t", "", 3 / 4, "first", 1 / 2),
        ("2 t t", "", 1 / 3, "second", 1 / 3),
        ("1 2", "", 1 / 2, "tie", 0.0),
        ("b 2", "", 1 / 4, "second", 1 / 2),
        ("1 2", "1 3", 1 / 4, "second", 3 / 4),
        ("1 1 2", "0.1 0.2 0.3", 1 / 2, "tie", 0.0),
    ],
)
def test_mean(answers: str, weights: str, probability: float, outcome: str, agreement: float) -> None:
    found = only(resolve(labels_of(answers, weights=weights), ResolutionRule("mean")))
    assert found.probability == pytest.approx(probability)
    assert found.outcome == outcome
    assert found.agreement == pytest.approx(agreement)


@pytest.mark.parametrize(
    ("answers", "probability", "outcome"),
    [
        ("11", 4 / 6, "first"),
        ("12", 5 / 6, "first"),
        ("13", 1.0, "first"),
        ("23", 0.0, "second"),
        ("21 t", 5 / 12, "second"),  # (2/6 + 3/6) / 2
        ("13 21 21", 5 / 9, "first"),  # (6 + 2 + 2) / 18: two of three say second
        ("12 22", 0.5, "tie"),
    ],
)
def test_mean_with_strength(answers: str, probability: float, outcome: str) -> None:
    found = only(resolve(labels_of(answers), ResolutionRule("mean", use_strength=True)))
    assert found.probability == pytest.approx(probability)
    assert found.outcome == outcome


def test_strength_matters_only_where_the_rule_says_so() -> None:
    labels = labels_of("13 21 21")
    assert only(resolve(labels, ResolutionRule("mean"))).probability == pytest.approx(1 / 3)
    assert only(resolve(labels, ResolutionRule("majority"))).outcome == "second"
    with pytest.raises(DataError, match=r"annotator 'b': the rule uses strengths and this choice has none"):
        resolve(labels_of("13 2"), ResolutionRule("mean", use_strength=True))


def test_all_keeps_every_label() -> None:
    resolved = resolve(labels_of("13 2 t s"), ResolutionRule("all"))
    assert [(item.annotators, item.outcome, item.probability) for item in resolved.resolutions] == [
        (("a",), "first", 1.0),
        (("b",), "second", 0.0),
        (("c",), "tie", 0.5),
    ]
    assert {(item.num_annotators, item.agreement) for item in resolved.resolutions} == {(1, 1.0)}
    assert resolved.left_out == (LeftOut("task", "d", "skipped"),)
    strong = resolve(labels_of("13 22 t"), ResolutionRule("all", use_strength=True))
    assert [item.probability for item in strong.resolutions] == pytest.approx([1.0, 1 / 6, 0.5])


def test_what_is_left_out_and_why() -> None:
    labels = [
        *labels_of("1 s b 1", "p", weights="1 1 1 0"),
        PairwiseLabel("p", "a", "second"),
        *labels_of("s s", "q"),
        *labels_of("1 2", "r"),
    ]
    resolved = resolve(labels, ResolutionRule("majority", both_bad="leave_out"))
    assert only(resolved) == Resolution("p", "first", 1.0, 1.0, 1, ("a",))
    assert resolved.left_out == (
        LeftOut("p", "b", "skipped"),
        LeftOut("p", "c", "both bad"),
        LeftOut("p", "d", "weight 0"),
        LeftOut("p", "a", "repeat by the same annotator"),
        LeftOut("q", "a", "skipped"),
        LeftOut("q", "b", "skipped"),
        LeftOut("q", None, "no label that counts"),
        LeftOut("r", None, "tied vote"),
    )
    assert (resolved.num_tasks, resolved.num_labels) == (3, 9)
    assert resolved.reasons(tasks=True) == {"no label that counts": 1, "tied vote": 1}
    assert str(resolved) == (
        "majority: the choice with the largest weight; a tied vote is left out; both bad is left out; "
        "9 labels of 3 tasks gave 1; tasks left out: 1 x no label that counts, 1 x tied vote; labels left out: "
        "3 x skipped, 1 x both bad, 1 x weight 0, 1 x repeat by the same annotator"
    )


def test_a_skip_does_not_use_up_the_annotators_label() -> None:
    labels = [PairwiseLabel("p", "a", "skip"), PairwiseLabel("p", "a", "second")]
    assert only(resolve(labels, ResolutionRule("majority"))).outcome == "second"


def test_tasks_keep_the_order_of_their_first_label() -> None:
    mixed = [pair[i] for i in (0, 1) for pair in (labels_of("1 1", "q"), labels_of("2 2", "p"))]
    resolved = resolve(mixed, ResolutionRule("majority"))
    assert [(item.task, item.outcome) for item in resolved.resolutions] == [("q", "first"), ("p", "second")]
    assert resolve([], ResolutionRule("mean")).resolutions == ()


def test_rules_state_themselves() -> None:
    assert str(ResolutionRule("mean", use_strength=True)) == (
        "mean: the labels' weighted mean of first 1, tie 0.5, second 0 moved by the strength; both bad counts as a tie"
    )
    assert "becomes a tie" in str(ResolutionRule("majority", on_tied_vote="tie"))
    assert str(ResolutionRule("all")).startswith("all: every label by itself; first 1")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"kind": "median"}, "kind is one of majority, mean, all, not 'median'"),
        ({"on_tied_vote": "coin"}, "on_tied_vote is one of drop, tie"),
        ({"both_bad": "drop"}, "both_bad is one of tie, leave_out"),
        ({"kind": "majority", "use_strength": True}, "use kind=mean or kind=all"),
    ],
)
def test_rules_that_do_not_exist(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ResolutionRule(**bad)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"choice": "third"}, "task 'p', annotator 'a': the choice is one of first, second, tie, both_bad, skip"),
        ({"choice": "tie", "strength": 1}, "the choice tie has no strength"),
        ({"choice": "first", "strength": 4}, "a strength is 1, 2 or 3, not 4"),
        ({"choice": "first", "strength": 0}, "a strength is 1, 2 or 3, not 0"),
        ({"choice": "first", "weight": -1.0}, "a weight is a finite number of at least 0"),
        ({"choice": "first", "weight": math.nan}, "a weight is a finite number of at least 0"),
    ],
)
def test_labels_that_cannot_be(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        PairwiseLabel("p", "a", **bad)


# --- PandaLM's layout -------------------------------------------------------------------------------------------------

RATED = ["221", "112", "000", "012", "2.2"]


def rated_row(number: int) -> dict[str, Any]:
    ratings = [None if sign == "." else int(sign) for sign in RATED[number]]
    row: dict[str, Any] = {"idx": number, "instruction": "Do.", "input": math.nan, "response1": "a", "response2": "b"}
    return row | {f"annotator{column}": value for column, value in enumerate(ratings, start=1)}


@pytest.mark.parametrize("kind", ["json", "csv"])
def test_a_file_in_pandalms_layout(tmp_path: Path, kind: str) -> None:
    rows = [rated_row(number) for number in range(len(RATED))]
    file = tmp_path / f"testset.{kind}"
    with file.open("w+", newline="") as opened:
        if kind == "json":
            json.dump(rows, opened)
        else:
            writer = csv.DictWriter(opened, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        opened.seek(0)
        read = json.load(opened) if kind == "json" else list(csv.DictReader(opened))
    labels = [label for row in read for label in rated_labels(row, task=str(row["idx"]))]
    majority = resolve(labels, ResolutionRule("majority"))
    assert [(item.task, item.outcome, item.num_annotators) for item in majority.resolutions] == [
        ("0", "second", 3),
        ("1", "first", 3),
        ("2", "tie", 3),
        ("4", "second", 2),
    ]
    assert [item.agreement for item in majority.resolutions] == pytest.approx([2 / 3, 2 / 3, 1.0, 1.0])
    assert majority.left_out == (LeftOut("3", None, "tied vote"),)
    mean = resolve(labels, ResolutionRule("mean"))
    assert [item.probability for item in mean.resolutions] == pytest.approx([1 / 3, 2 / 3, 0.5, 0.5, 0.0])
    assert len(resolve(labels, ResolutionRule("all")).resolutions) == 14


def test_ratings_written_as_floats_are_read_and_others_refused() -> None:
    labels = rated_labels({"annotator_1": 2.0, "annotator2": "1.0", "annotator10": math.nan, "annotators": 7}, "p")
    assert [(label.annotator, label.choice) for label in labels] == [("annotator_1", "second"), ("annotator2", "first")]
    for value in (3, -1, "first", 1.5, "nan", [1]):
        with pytest.raises(DataError, match=r"task 'p', annotator1: expected 0 \(tie\), 1 \(first\) or 2 \(second\)"):
            rated_labels({"annotator1": value}, "p")
    with pytest.raises(DataError, match=r"expected the columns annotator1.*got chosen, rejected"):
        rated_labels({"chosen": "a", "rejected": "b"}, "p")
