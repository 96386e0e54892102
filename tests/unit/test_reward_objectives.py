"""From comparisons and ratings to examples: what each knob changes, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from rlhf.config.reward_model import RewardModelConfig
from rlhf.errors import DataError
from rlhf.records import Comparison, RatedResponse
from rlhf.stages.reward_objectives import (
    Example,
    TrainingSet,
    bootstrap_order,
    comparison_set,
    rated_pairs,
    rating_set,
)

TIE = Comparison("p", "a", "b", probability=0.5, margin=3.0)
SURE = Comparison("p", "a", "c", margin=2.0, agreement=1.0, source="web")
SOFT = Comparison("q", "d", "e", probability=0.8, agreement=0.5, source="lab")


def section(**values: Any) -> RewardModelConfig:
    return RewardModelConfig.model_validate(values)


def pairs_of(loss: dict[str, Any], *rows: Comparison, **values: Any) -> TrainingSet:
    return comparison_set(section(loss=loss, **values), rows)


def test_a_certain_pair_is_plain_and_every_knob_makes_it_something_else() -> None:
    sure = Comparison("p", "a", "b", margin=2.0, agreement=0.5)
    found = comparison_set(section(), [sure, Comparison("p", "a", "c", probability=1.0)])
    assert found.plain
    assert found.examples[0] == Example("p", ("a", "b"), (1.0,), ((0, 1),), (1.0,), (0.0,))
    assert not comparison_set(section(), [sure, SOFT]).plain
    for knob in (
        {"use_margin": True},
        {"label_smoothing": 0.1},
        {"ties": "davidson"},
        {"ties": "rao_kupper"},
        {"type": "kwise"},
    ):
        rows = [sure, Comparison("p", "a", "c", agreement=0.25)]
        assert not pairs_of({"type": "bradley_terry", **knob}, *rows).plain, knob
    weighted = pairs_of({"type": "bradley_terry", "weight_by_agreement": True}, sure, Comparison("p", "a", "c"))
    assert not weighted.plain
    # Weights 0.5 and 1 have mean 0.75, which leaves the learning rate its meaning.
    assert [example.weights[0] for example in weighted.examples] == pytest.approx([2 / 3, 4 / 3])


def test_ties_are_soft_labels_or_left_out_and_have_no_margin() -> None:
    soft = pairs_of({"type": "bradley_terry", "use_margin": True}, TIE, SURE, SOFT)
    assert [example.probabilities for example in soft.examples] == [(0.5,), (1.0,), (0.8,)]
    assert [example.margins for example in soft.examples] == [(0.0,), (2.0,), (0.0,)]
    assert soft.counts == {"num_ties": 1, "num_train_left_out": 0}
    left = pairs_of({"type": "bradley_terry", "ties": "leave_out"}, TIE, SURE)
    assert [example.responses for example in left.examples] == [("a", "c")]
    assert left.plain
    assert left.counts == {"num_ties": 1, "num_train_left_out": 1}


def test_kwise_reads_a_response_once_and_weighs_prompts_alike() -> None:
    found = pairs_of({"type": "kwise", "use_margin": True}, TIE, SURE, Comparison("p", "c", "b"), SOFT)
    assert not found.plain
    assert found.examples[0] == Example(
        "p",
        ("a", "b", "c"),
        (1 / 3, 1 / 3, 1 / 3),
        ((0, 1), (0, 2), (2, 1)),
        (0.5, 1.0, 1.0),
        (0.0, 2.0, 0.0),
    )
    assert found.examples[1] == Example("q", ("d", "e"), (1.0,), ((0, 1),), (0.8,), (0.0,))
    with pytest.raises(DataError, match="two responses only"):
        pairs_of({"type": "kwise"}, SURE, SOFT)
    with pytest.raises(DataError, match="has 3 responses"):
        pairs_of({"type": "kwise", "max_responses": 2}, TIE, SURE)


def test_plackett_luce_takes_complete_orders_alone() -> None:
    order = [Comparison("p", "b", "c"), Comparison("p", "a", "c"), Comparison("p", "b", "a")]
    found = pairs_of({"type": "plackett_luce"}, *order)
    assert found.objective == "ranking"
    assert found.examples == [Example("p", ("b", "a", "c"), (1.0,))]
    circle = [*order[:2], Comparison("p", "c", "b")]
    for rows in (order[:2], circle, [*order[:2], Comparison("p", "b", "a", probability=0.5)]):
        with pytest.raises(DataError, match="complete order"):
            pairs_of({"type": "plackett_luce"}, *rows)


def test_sources_weigh_or_are_left_out() -> None:
    rows = (SURE, SOFT, Comparison("r", "f", "g"))
    found = comparison_set(section(source_weights={"web": 3.0, "lab": 0.0}), rows)
    assert [example.responses for example in found.examples] == [("a", "c"), ("f", "g")]
    assert [example.weights[0] for example in found.examples] == [1.5, 0.5]
    assert found.counts["num_train_left_out"] == 1
    with pytest.raises(DataError, match=r"'wep'.*lab, web"):
        comparison_set(section(source_weights={"wep": 2.0}), rows)


def test_what_a_loss_needs_must_be_there() -> None:
    bare = Comparison("p", "a", "b")
    with pytest.raises(DataError, match="use_margin=true needs comparisons with a field `margin`"):
        pairs_of({"type": "bradley_terry", "use_margin": True}, bare)
    with pytest.raises(DataError, match="field `agreement`"):
        pairs_of({"type": "kwise", "weight_by_agreement": True}, bare)
    with pytest.raises(DataError, match="all 2 training ratings are 3"):
        rating_set(section(loss={"type": "rating"}), [RatedResponse("p", text, 3.0) for text in "ab"])


def test_ratings_are_standardised_or_placed_between_the_ends() -> None:
    rows = [RatedResponse("p", "a", 1.0), RatedResponse("p", "b", 3.0), RatedResponse("q", "c", 5.0)]
    squared = rating_set(section(loss={"type": "rating"}), rows)
    std = (8 / 3) ** 0.5
    assert [example.targets[0] for example in squared.examples] == pytest.approx([-2 / std, 0.0, 2 / std])
    assert squared.scale is not None
    assert squared.scale.rating(1.0) == pytest.approx(3 + std)
    logistic = rating_set(section(loss={"type": "rating", "form": "logistic"}), rows)
    assert [example.targets[0] for example in logistic.examples] == [0.0, 0.5, 1.0]
    assert logistic.scale is not None
    assert logistic.scale.rating(0.0) == 3.0
    assert logistic.scale.rating(-800.0) == 1.0
    assert logistic.scale.target(9.0) == 1.0


def test_rated_pairs_are_of_one_prompt_and_of_different_ratings() -> None:
    rows = [RatedResponse("p", "a", 1.0), RatedResponse("q", "c", 5.0), RatedResponse("p", "b", 3.0)]
    assert rated_pairs([*rows, RatedResponse("p", "d", 3.0), RatedResponse("p", "a", 2.0)]) == [
        Comparison("p", "b", "a", 2.0),
        Comparison("p", "d", "a", 2.0),
        Comparison("p", "b", "a", 1.0),
        Comparison("p", "d", "a", 1.0),
    ]


def test_a_bootstrap_is_of_the_same_size_and_follows_from_the_seed() -> None:
    drawn = bootstrap_order(1000, 1)
    assert drawn == bootstrap_order(1000, 1) != bootstrap_order(1000, 2)
    # With replacement about 1 / e of the examples are never drawn.
    assert 600 < len(set(drawn)) < 660


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"loss": {"type": "rating"}, "center_coefficient": 0.1}, "no pairs"),
        ({"bootstrap": True}, "num_members"),
        ({"ratings": "folder"}, "loss.type=rating alone"),
        ({"loss": {"type": "bradley_terry", "tie_parameter": 2.0}}, "tie_parameter"),
        ({"loss": {"type": "bradley_terry", "label_smoothing": 0.5}}, "less than 0.5"),
    ],
)
def test_sections_that_contradict_themselves_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        section(**values)
