"""The study active_selection without its trainings: what is asked and answered, and what the curves say."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf.config.active_selection import ActiveSelectionConfig, Strategy
from rlhf.config.annotators import SimulatedAnnotators
from rlhf.data.embedded import gold_reward
from rlhf.preferences.annotators import AnnotatorResources, make_annotators
from rlhf.preferences.selection import Floats, farthest_points
from rlhf.studies import active_selection
from rlhf.studies.active_curves import NOT_REACHED, Curve, Need, Point, exhibits, labels_to_reach
from rlhf.studies.active_pool import Labeller, Pool, choose_next

# Two groups of three; candidates 0..2 are the pairs (0,1) (0,2) (1,2) of the first group, 3..5 those of the second.
CANDIDATES = [(0, 1), (0, 2), (1, 2), (3, 4), (3, 5), (4, 5)]
SHUFFLE = [0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
SCORES = np.array([[0.0, 4.0, 1.0, 9.0, 2.0, 2.5]])


def pool_of(embeddings: Any = ((0.0,), (0.0,), (0.0,), (0.0,), (0.0,), (0.0,))) -> Pool:
    texts = [("p", letter) for letter in "abc"] + [("q", letter) for letter in "abc"]
    return Pool(texts, [range(3), range(3, 6)], CANDIDATES, np.array(SHUFFLE), np.array(embeddings), [])


def never() -> Floats:
    raise AssertionError("this strategy has no use for scores")


@pytest.mark.parametrize(
    ("strategy", "asked", "budget", "expected"),
    [
        ("random", [], 2, [4, 5]),
        ("random", [5], 2, [3, 4]),
        # Best against worst are (0, 1) and (3, 4): candidates 0 and 3.
        ("best_worst", [], 2, [0, 3]),
        # The first is known, so chance, which has the smallest numbers first, adds candidate 5.
        ("best_worst", [0], 2, [3, 5]),
        # The gaps are 4, 1, 3, 7, 6.5 and 0.5.
        ("near_tie", [], 2, [1, 5]),
        ("near_tie", [5], 2, [1, 2]),
    ],
)
def test_the_next_pairs_worked_by_hand(strategy: Strategy, asked: list[int], budget: int, expected: list[int]) -> None:
    members: Callable[[], Floats] = never if strategy == "random" else lambda: SCORES
    assert choose_next(strategy, pool_of(), asked, budget, members) == expected


def test_disagreement_asks_where_members_differ() -> None:
    # They differ on response 1 alone: on the candidates 0 and 2, more on 2.
    members = np.array([[0.0, 0.0, 1.0, 0.0, 0.0, 0.0], [0.0, 2.0, 1.0, 0.0, 0.0, 0.0]])
    assert choose_next("disagreement", pool_of(), [], 1, lambda: members) == [2]
    assert choose_next("disagreement", pool_of(), [2], 1, lambda: members) == [0]


def test_diversity_keeps_away_from_what_was_asked() -> None:
    # The means of the pairs' embeddings are 0, 5, 5, 20, 21 and 21.
    pool = pool_of(((0.0,), (0.0,), (10.0,), (20.0,), (20.0,), (22.0,)))
    assert choose_next("diversity", pool, [0], 1, never) == [4]
    assert choose_next("diversity", pool, [4], 1, never) == [0]
    assert choose_next("diversity", pool, [0, 4], 1, never) == [1]


def test_farthest_points_begin_with_those_that_are_chosen() -> None:
    line = np.array([[0.0], [1.0], [2.0], [10.0], [12.0]])
    # From 0 and 12 the farthest is 10 or 2 (2 each): the first counts. Then 10 (2), then 1.
    assert farthest_points(line, 9, chosen=[0, 4]) == [(2, 2.0), (3, 2.0), (1, 1.0)]
    assert farthest_points(line, 1, chosen=[4]) == [(0, 12.0)]
    assert farthest_points(line, 2, chosen=range(5)) == []


# --- labelling --------------------------------------------------------------------------------------------------------


def labeller(as_ties: bool = True, seed: int = 1, **values: Any) -> Labeller:
    texts = [("p", text) for text in ("The film is good.", "The film is bad.", "The film is bad, awful and dull.")]
    pool = Pool(texts, [range(3)], CANDIDATES[:3], np.array(SHUFFLE[:3]), np.zeros((3, 1)), [])
    annotators = make_annotators(SimulatedAnnotators.model_validate(values), AnnotatorResources(seed))
    return Labeller(annotators, pool, ties_of_both_bad=as_ties)


def test_labels_follow_the_gold_reward_and_belong_to_the_candidate() -> None:
    sharp = labeller(temperature=0.0)
    found = sharp.label([0, 1, 2])
    assert [sharp.label([number])[0] for number in (2, 0, 1)] == [found[2], found[0], found[1]]
    gaps = [gold_reward("p", row.chosen) - gold_reward("p", row.rejected) for row in found]
    assert min(gaps) >= 0 < max(gaps)
    assert active_selection.label_accuracy(found) == 1.0
    turned = labeller(temperature=0.0, flip_share=1.0).label([0, 1, 2])
    assert active_selection.label_accuracy(turned) == 0.0
    noisy = [labeller(temperature=50.0, seed=seed).label([0])[0].chosen for seed in range(20)]
    assert len(set(noisy)) == 2


def test_ties_and_abstentions() -> None:
    (tie,) = labeller(tie_margin=100.0).label([0])
    assert (tie.probability, tie.chosen) == (0.5, "The film is good.")
    assert active_selection.label_accuracy([tie]) is None
    assert labeller(abstain_share=1.0).label([0, 1]) == []
    assert [row.probability for row in labeller(both_bad_below=100.0).label([0])] == [0.5]
    assert labeller(False, both_bad_below=100.0).label([0]) == []


def points(*pairs: tuple[int, float]) -> tuple[Point, ...]:
    return tuple(Point(labels, labels, accuracy, 0.9) for labels, accuracy in pairs)


def test_labels_to_reach_worked_by_hand() -> None:
    curve = points((100, 0.6), (400, 0.8), (1600, 0.7), (6400, 0.9))
    # Half of the way from 100 to 400 on the log axis is 200.
    assert labels_to_reach(curve, 0.7) == pytest.approx(200)
    assert labels_to_reach(curve, 0.8) == 400
    # Later the curve falls and comes back: 0.85 lies at three quarters of the way from 1600 to 6400.
    assert labels_to_reach(curve, 0.85) == pytest.approx(1600 * 4**0.75)
    assert labels_to_reach(curve, 0.5) == 100
    assert labels_to_reach(curve, 0.91) is None


def test_needs_are_compared_seed_by_seed() -> None:
    mine, theirs = Need((50.0, 100.0)), Need((100.0, 400.0))
    mean, ratio = mine.mean, mine.ratio(theirs)
    assert mean is not None
    assert ratio is not None
    assert mean.value == pytest.approx(math.sqrt(50 * 100))
    # ln 1/2 and ln 1/4: mean -1.0397, standard deviation 0.4901, t(1) 12.706 -> half width 12.706 * 0.4901 / sqrt 2.
    assert ratio.value == pytest.approx(math.sqrt(1 / 8))
    half = 12.706 * math.log(2) / math.sqrt(2) / math.sqrt(2)
    assert (ratio.low, ratio.high) == pytest.approx((math.exp(math.log(1 / 8) / 2 - half), math.exp(-1.03972 + half)))
    lacking = Need((50.0, None))
    assert (lacking.mean, lacking.ratio(theirs), mine.ratio(lacking), lacking.num_reached) == (None, None, None, 1)


def curves_of(ends: dict[Strategy, Sequence[Sequence[float]]]) -> list[Curve]:
    """For each strategy the accuracies of each seed with 100, 200 and 400 labels."""
    return [
        Curve(seed, strategy, points(*zip((100, 200, 400), values, strict=True)), 1.0)
        for strategy, seeds in ends.items()
        for seed, values in enumerate(seeds, start=1)
    ]


def test_the_exhibits_say_what_the_curves_say() -> None:
    found = curves_of(
        {
            "random": [(0.6, 0.7, 0.8), (0.6, 0.7, 0.82), (0.6, 0.71, 0.8)],
            "disagreement": [(0.6, 0.8, 0.9), (0.6, 0.82, 0.9), (0.6, 0.81, 0.9)],
            "near_tie": [(0.6, 0.65, 0.7)] * 3,
        }
    )
    section = ActiveSelectionConfig.model_validate(
        {"strategies": ("random", "disagreement", "near_tie"), "num_labels": (100, 200, 400), "num_seeds": 3}
    )
    summary, shown = exhibits(section, found)
    need, accuracy = shown.tables
    by_name = {row[1]: row for row in need.rows}
    # Each seed's target is what its own random reaches: 400 labels by definition.
    assert by_name["random"][2]["value"] == pytest.approx(400)
    assert by_name["random"][4] is None
    # The second seed's 0.82 lies at 200, the third's 0.8 at 200 ** share of the way from 0.6 to 0.81.
    expected = (200 * 200 * 100 * 2 ** (0.2 / 0.21)) ** (1 / 3)
    assert by_name["disagreement"][2]["value"] == pytest.approx(expected)
    assert by_name["disagreement"][4]["value"] == pytest.approx(expected / 400)
    assert by_name["disagreement"][5] == "fewer, beyond chance"
    assert by_name["near ties"][2:] == (NOT_REACHED, "0 of 3", None, "")
    assert summary["labels_ratio_disagreement"]["high"] < 1
    assert "labels_near_tie" not in summary
    assert summary["accuracy_near_tie"]["value"] == pytest.approx(0.7)
    row = next(row for row in accuracy.rows if row[0] == "disagreement")
    # (0.10 + 0.10) / 2, (0.12 + 0.08) / 2 and (0.10 + 0.10) / 2 above random.
    assert row[4]["value"] == pytest.approx(0.1)
    assert row[5]["value"] == pytest.approx(0.9)
    (panel,) = shown.figures[0].panels
    assert panel.logarithmic_x
    assert [line.name for line in panel.lines] == ["random", "disagreement", "near ties"]
    assert panel.lines[0].points[-1] == pytest.approx((400, (0.8 + 0.82 + 0.8) / 3))
    assert panel.lines[0].band is not None
    assert any("Disagreement reaches" in remark and "fewer, beyond chance" in remark for remark in shown.remarks)
    assert any("Near ties" in remark and "0 of 3" in remark for remark in shown.remarks)
    given = section.model_copy(update={"target_accuracies": (0.7, 0.8)})
    summary, shown = exhibits(given, found)
    assert len(shown.tables[0].rows) == 9
    assert summary["labels_random_0.7"]["value"] == pytest.approx((200 * 200 * 100 * 2 ** (0.1 / 0.11)) ** (1 / 3))


def test_chance_is_told_from_a_difference() -> None:
    """At a target of 0.7 random needs 100 labels, near ties always 400; best against worst 200 once, else 100."""
    found = curves_of(
        {
            "random": [(0.7, 0.8, 0.9)] * 3,
            "best_worst": [(0.6, 0.7, 0.8), (0.7, 0.8, 0.9), (0.7, 0.8, 0.9)],
            "near_tie": [(0.5, 0.6, 0.7)] * 3,
        }
    )
    section = ActiveSelectionConfig.model_validate(
        {"strategies": ("random", "best_worst", "near_tie"), "num_labels": (100, 200, 400), "target_accuracies": (0.7,)}
    )
    rows = {row[1]: row for row in exhibits(section, found)[1].tables[0].rows}
    assert rows["near ties"][4]["value"] == pytest.approx(4.0)
    assert rows["near ties"][5] == "more, beyond chance"
    assert rows["best against worst"][4]["value"] == pytest.approx(2 ** (1 / 3))
    assert rows["best against worst"][5] == "no difference beyond chance"
    # The other way round: fewer labels at one seed of three are chance as well.
    turned = [replace(one, strategy=SWAPPED[one.strategy]) for one in found]
    rows = {row[1]: row for row in exhibits(section, turned)[1].tables[0].rows}
    assert rows["best against worst"][4]["value"] == pytest.approx(2 ** (-1 / 3))
    assert rows["best against worst"][5] == "no difference beyond chance"


SWAPPED: dict[Strategy, Strategy] = {"random": "best_worst", "best_worst": "random", "near_tie": "near_tie"}


def test_one_seed_has_no_intervals() -> None:
    section = ActiveSelectionConfig.model_validate(
        {"strategies": ("random",), "num_labels": (100, 200, 400), "num_seeds": 1}
    )
    summary, shown = exhibits(section, curves_of({"random": [(0.6, 0.7, 0.8)]}))
    assert summary["labels_random"] == pytest.approx(400)
    assert shown.figures[0].panels[0].lines[0].band is None


def test_a_curve_reads_back_what_it_wrote(tmp_path: Path) -> None:
    curve = Curve(3, "diversity", points((5, 0.6), (10, 0.7)), 2.5)
    curve.write(tmp_path / "curve.json")
    assert Curve.read(tmp_path / "curve.json") == curve
    assert Curve.read(tmp_path / "none.json") is None
