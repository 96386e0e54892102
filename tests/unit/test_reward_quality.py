"""The report of a reward model against numbers worked out by hand, slow loops and scipy."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from rlhf.errors import DataError
from rlhf.evaluation.reward_calibration import calibration, equal_mass_bins, temperature
from rlhf.evaluation.reward_ceiling import ceiling_figures, ensemble_figures, votes_of
from rlhf.evaluation.reward_exhibits import quality_exhibits
from rlhf.evaluation.reward_lengths import length_figures, weighted_correlation, weighted_ranks
from rlhf.evaluation.reward_quality import QualitySettings, reward_quality, worst_mistakes
from rlhf.evaluation.reward_rows import ScoredRows, over_prompts, weighted_mean
from rlhf.evaluation.reward_slices import accuracy_by_slice, num_turns
from rlhf.records import Comparison, Message
from rlhf.runs.exhibits import Exhibits, to_html
from rlhf.runs.folder import RunFolder
from rlhf.runs.report import render_report
from rlhf.statistics.annotations import Resampling

QUICK = Resampling(num_resamples=50)


def rows_of(
    differences: Sequence[float] | np.ndarray[Any, Any],
    records: Sequence[Comparison] | None = None,
    lengths: tuple[Sequence[float], Sequence[float]] | None = None,
) -> ScoredRows:
    """Rows with these differences of scores (M, N) or (N,); rejected has score 1."""
    scores = np.atleast_2d(np.asarray(differences, dtype=np.float64))
    count = scores.shape[1]
    comparisons = records or [Comparison(f"prompt {n}", f"c {n}", f"r {n}") for n in range(count)]
    chosen, rejected = lengths or ([3.0] * count, [2.0] * count)
    return ScoredRows(
        tuple(comparisons), scores + 1, np.ones_like(scores), np.asarray(chosen, float), np.asarray(rejected, float)
    )


def labelled(probabilities: Sequence[float | None]) -> list[Comparison]:
    return [Comparison(f"prompt {n}", "c", "r", probability=value) for n, value in enumerate(probabilities)]


def test_ties_are_neither_right_nor_wrong() -> None:
    rows = rows_of([2.0, -1.0, 0.0, 3.0, -0.5, 0.25], labelled([None, None, None, 0.8, 0.5, 0.5]))
    report = reward_quality(rows, QualitySettings(QUICK))
    assert (report["num_decided"], report["num_ties"], report["num_soft_labels"]) == (4, 2, 1)
    assert report["num_equal_scores"] == 1
    # Two of four are right and equal scores are half right.
    assert report["accuracy"]["value"] == pytest.approx(2.5 / 4)
    assert report["accuracy"]["few"]
    assert report["margin"]["value"] == pytest.approx((2 - 1 + 0 + 3) / 4)
    assert report["ties"]["mean_distance"]["value"] == pytest.approx(0.375)
    assert report["ties"]["mean_distance_of_others"]["value"] == pytest.approx(1.5)


def test_cross_entropy_and_brier_use_the_soft_labels() -> None:
    log3 = math.log(3)  # sigmoid is 3/4
    rows = rows_of([log3, -log3], labelled([0.6, None]))
    found = calibration(rows, QUICK)
    first = -0.6 * math.log(0.75) - 0.4 * math.log(0.25)
    assert found["cross_entropy"]["value"] == pytest.approx((first - math.log(0.25)) / 2)
    assert found["brier"]["value"] == pytest.approx((0.15**2 + 0.75**2) / 2)


def test_the_calibration_error_is_that_of_a_slow_loop_over_bins() -> None:
    generator = np.random.default_rng(0)
    rows = rows_of(generator.normal(0.7, 1.5, 103), labelled([(None, 0.5, 0.7)[n % 3] for n in range(103)]))
    found = calibration(rows, QUICK, num_bins=4)
    graded = []
    for record, difference in zip(rows.comparisons, rows.differences, strict=True):
        label = 1.0 if record.probability is None else record.probability
        graded.append((1 / (1 + math.exp(-abs(difference))), label if difference > 0 else 1 - label))
    graded.sort()
    bins = [graded[103 * n // 4 : 103 * (n + 1) // 4] for n in range(4)]
    gaps = [abs(sum(right - confident for confident, right in part)) for part in bins]
    assert found["ece"]["value"] == pytest.approx(sum(gaps) / 103)
    assert [part["num"] for part in found["curve"]] == [len(part) for part in bins]
    for part, members in zip(found["curve"], bins, strict=True):
        assert part["confidence"] == pytest.approx(sum(confident for confident, _ in members) / len(members))
        assert part["accuracy"]["value"] == pytest.approx(sum(right for _, right in members) / len(members))


def test_a_calibrated_model_shows_about_the_error_that_it_should() -> None:
    generator = np.random.default_rng(3)
    size = np.abs(generator.normal(0, 1.5, 4000))
    right = generator.random(4000) < 1 / (1 + np.exp(-size))
    found = calibration(rows_of(np.where(right, size, -size)), QUICK)
    assert found["ece_if_calibrated"]["low"] <= found["ece"]["value"] <= found["ece_if_calibrated"]["high"]
    assert found["temperature"]["low"] < 1 < found["temperature"]["high"]
    sure = calibration(rows_of(np.where(right, size, -size) * 3), QUICK)
    assert sure["ece"]["value"] > 3 * sure["ece_if_calibrated"]["high"]
    assert sure["temperature"]["value"] == pytest.approx(3 * found["temperature"]["value"], rel=1e-6)


def test_equal_values_share_a_bin() -> None:
    assert equal_mass_bins(np.array([0.5, 0.5, 0.5, 0.5, 0.9, 0.7]), 3).tolist() == [0, 0, 0, 0, 1, 1]
    assert equal_mass_bins(np.full(5, 0.5), 3).tolist() == [0] * 5


def test_temperature_worked_by_hand() -> None:
    # 75 of 100 right at distance 2: sigmoid(2 / T) = 3/4.
    found = temperature(rows_of([2.0] * 75 + [-2.0] * 25))
    inverse = math.log(3) / 2
    assert found["value"] == pytest.approx(1 / inverse)
    # Slopes are -0.5 and 1.5, the curvature of each is 4 x 3/16.
    error = math.sqrt(75 * 0.5**2 + 25 * 1.5**2) / 75
    assert found["low"] == pytest.approx(1 / (inverse + 1.959964 * error), rel=1e-6)
    assert found["high"] == pytest.approx(1 / (inverse - 1.959964 * error), rel=1e-6)
    assert found["cross_entropy"] == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    # Twenty-five times the same four comparisons on one prompt are not a hundred independent ones.
    together = [Comparison(str(n // 50), "c", "r") for n in range(100)]
    assert temperature(rows_of([2.0] * 75 + [-2.0] * 25, together))["low"] < found["low"]


@pytest.mark.parametrize(
    ("differences", "reason"),
    [([1.0, 2.0], "every comparison is right"), ([-1.0, 0.5], "do not favour"), ([0.0, 0.0], "are 0")],
)
def test_where_no_temperature_calibrates_it_says_why(differences: list[float], reason: str) -> None:
    assert reason in temperature(rows_of(differences))["not_defined"]


def test_correlations_with_length_are_scipys() -> None:
    generator = np.random.default_rng(2)
    lengths = generator.integers(1, 9, (2, 60)).astype(float)
    differences = 0.3 * (lengths[0] - lengths[1]) + generator.normal(size=60)
    rows = rows_of(differences, lengths=(list(lengths[0]), list(lengths[1])))
    found = length_figures(rows, QUICK)
    scores, sizes = np.concatenate([differences + 1, np.ones(60)]), lengths.ravel()
    assert found["pearson"]["value"] == pytest.approx(stats.pearsonr(scores, sizes)[0])
    assert found["spearman"]["value"] == pytest.approx(stats.spearmanr(scores, sizes)[0])
    gaps = lengths[0] - lengths[1]
    both = np.concatenate([differences, -differences]), np.concatenate([gaps, -gaps])
    assert found["difference_pearson"]["value"] == pytest.approx(stats.pearsonr(*both)[0])
    assert found["difference_spearman"]["value"] == pytest.approx(stats.spearmanr(*both)[0])
    assert found["difference_pearson"]["low"] < found["difference_pearson"]["value"]


def test_weights_count_as_copies() -> None:
    first, second = np.array([1.0, 2.0, 2.0, 5.0]), np.array([3.0, 1.0, 4.0, 4.0])
    weights = np.array([[2.0, 0.0, 1.0, 3.0]])
    copies = [0, 0, 2, 3, 3, 3]
    assert weighted_correlation(weights, first, second)[0] == pytest.approx(
        stats.pearsonr(first[copies], second[copies])[0]
    )
    ranks = [weighted_ranks(weights, values) for values in (first, second)]
    assert weighted_correlation(weights, *ranks)[0] == pytest.approx(stats.spearmanr(first[copies], second[copies])[0])
    assert np.isnan(weighted_correlation(np.ones((1, 4)), first, np.full(4, 0.1))[0])


def test_the_longer_wins_is_measured_on_the_same_comparisons_as_the_model() -> None:
    rows = rows_of(
        [1.0, 1.0, -1.0, -1.0, 1.0, 1.0],
        labelled([None, None, None, None, None, 0.5]),
        ([5, 1, 5, 1, 2, 9], [1, 5, 1, 5, 2, 1]),
    )
    found = length_figures(rows, QUICK)
    assert (found["num_unequal"], found["num_equal"]) == (4, 1)
    assert found["longer_wins"]["value"] == 0.5
    assert found["accuracy_where_unequal"]["value"] == 0.5
    assert found["model_prefers_longer"]["value"] == 0.5
    assert found["accuracy_where_chosen_is_longer"]["value"] == 0.5
    equal = length_figures(rows_of([1.0, 2.0], lengths=([2, 2], [2, 2])), QUICK)
    assert "unequal lengths" in equal["longer_wins"]["not_defined"]
    assert "not_defined" in equal["pearson"]


def test_prompts_are_drawn_with_all_their_comparisons() -> None:
    """Ten prompts of twenty equal rows are worth ten rows, not two hundred."""
    records = [Comparison(f"prompt {n // 20}", f"c {n}", "r") for n in range(200)]
    rows = rows_of([1.0 if n // 20 % 2 else -1.0 for n in range(200)], records)
    report = reward_quality(rows, QualitySettings(Resampling(num_resamples=500)))
    wide, narrow = report["accuracy_over_prompts"], report["accuracy"]
    assert wide["value"] == narrow["value"] == 0.5
    assert wide["high"] - wide["low"] > 3 * (narrow["high"] - narrow["low"])
    alone = over_prompts(rows_of([1.0, -1.0] * 5), lambda weights: weighted_mean(weights, np.ones(10))[:, None], QUICK)
    assert alone[0].low == alone[0].high == 1


def test_slices_tell_groups_apart_and_mark_small_ones() -> None:
    records = [
        Comparison(f"p {n}", "c", "r", source="web" if n < 25 else "lab" if n < 28 else None, margin=float(n % 2))
        for n in range(30)
    ]
    rows = rows_of([1.0] * 20 + [-1.0] * 10, records)
    slices = accuracy_by_slice(rows)
    web, lab, unknown = slices["source"]
    assert (web["group"], web["num"], web["accuracy"]["value"]) == ("web", 25, 0.8)
    assert "few" not in web["accuracy"]
    assert (lab["num"], lab["accuracy"]["value"], lab["accuracy"]["few"]) == (3, 0.0, True)
    assert (unknown["group"], unknown["num"]) == ("unknown", 2)
    assert [group["group"] for group in slices["margin"]] == ["0", "1"]
    assert "how many annotators" in slices["agreement"]["not_defined"]
    assert "certain" in slices["label"]["not_defined"]


def test_many_values_are_cut_into_ranges_of_equal_mass() -> None:
    gaps = [float(n - 50) for n in range(100)]
    rows = rows_of([1.0 if gap > 0 else -1.0 for gap in gaps], lengths=([60 + gap for gap in gaps], [60.0] * 100))
    groups = accuracy_by_slice(rows)["length_gap"]
    assert [group["num"] for group in groups] == [20] * 5
    assert groups[0]["group"] == "-50 to -31 tokens"
    assert [group["accuracy"]["value"] for group in groups] == [0, 0, pytest.approx(0.45), 1, 1]
    assert groups[4]["mean"] == pytest.approx(39.5)


def test_turns_of_transcripts_and_conversations() -> None:
    assert num_turns("\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:") == 2
    assert num_turns("any text") == 1
    assert (
        num_turns((Message("system", "s"), Message("user", "a"), Message("assistant", "b"), Message("user", "c"))) == 2
    )
    records = [Comparison("\n\nHuman: x" * (n + 1), "c", "r") for n in range(7)]
    groups = accuracy_by_slice(rows_of([1.0] * 7, records))["turns"]
    assert [(group["group"], group["num"]) for group in groups][-2:] == [("4 turns", 1), ("5 or more turns", 3)]


def test_the_ceiling_from_counts_of_annotators() -> None:
    records = [
        Comparison("a", "c", "r", agreement=2 / 3, num_annotators=3),
        Comparison("b", "c", "r", agreement=1.0, num_annotators=3),
        Comparison("c", "c", "r", agreement=1.0, num_annotators=1),
        Comparison("d", "c", "r"),
        Comparison("e", "c", "r", agreement=0.0, num_annotators=2, probability=0.5),
    ]
    rows = rows_of([-1.0, 1.0, 1.0, 1.0, 1.0], records)
    assert votes_of(rows) == [(2, 1, False), (3, 0, True)]
    found = ceiling_figures(rows, QUICK)
    assert found["num_pairs"] == 2
    assert found["upper"]["value"] == pytest.approx((2 / 3 + 1) / 2)
    # Of two against one the others of the two are split (half right), and those of the one are against it.
    assert found["lower"]["value"] == pytest.approx((1 / 3 + 1) / 2)
    # The model is against the two, so with the one.
    assert found["accuracy_against_one"]["value"] == pytest.approx((1 / 3 + 1) / 2)
    assert "several annotators" in ceiling_figures(rows_of([1.0]), QUICK)["not_defined"]


def test_the_ceiling_from_a_row_an_annotator() -> None:
    records = [
        Comparison("a", "c", "r"),
        Comparison("a", "r", "c"),
        Comparison("a", "c", "r"),
        Comparison("b", "c", "r"),
    ]
    assert votes_of(rows_of([1.0, -1.0, 1.0, 1.0], records)) == [(2, 1, True)]
    assert votes_of(rows_of([-1.0, 1.0, -1.0, 1.0], records)) == [(2, 1, False)]
    assert votes_of(rows_of([-1.0, 1.0], [records[1], records[0]])) == [(1, 1, False)]


def test_members_of_an_ensemble_and_their_spread() -> None:
    members = np.array([[1.0, 1.0, -1.0, 1.0], [2.0, 2.0, 2.0, -6.0]])
    found = ensemble_figures(rows_of(members), QUICK)
    assert [one["value"] for one in found["member_accuracy"]] == [0.75, 0.75]
    assert found["unanimous"]["value"] == 0.5
    assert found["accuracy_where_unanimous"]["value"] == 1.0
    assert found["accuracy_where_split"]["value"] == 0.5
    scaled = np.stack([members[0], members[1] / math.sqrt(12)])
    spread, wrong = scaled.std(axis=0), np.array([0.0, 0.0, 0.0, 1.0])
    assert found["spread"]["value"] == pytest.approx(spread.mean())
    assert found["spread_and_wrong"]["value"] == pytest.approx(np.corrcoef(spread, wrong)[0, 1])
    assert ensemble_figures(rows_of([1.0]), QUICK) == {"not_defined": "a single model"}


def test_histograms_count_every_response() -> None:
    scores = reward_quality(rows_of([1.0, 2.0, 3.0]), QualitySettings(QUICK))["scores"]
    assert sum(scores["chosen"]["counts"]) == sum(scores["rejected"]["counts"]) == 3
    assert scores["chosen"]["mean"] == pytest.approx(3.0)
    assert len(scores["edges"]) == len(scores["chosen"]["counts"]) + 1


def test_the_worst_mistakes_come_first_and_ties_are_none() -> None:
    rows = rows_of([-1.0, -3.0, 2.0, -5.0, -2.0], labelled([None, None, None, 0.5, None]))
    assert [one["number"] for one in worst_mistakes(rows, 2)] == [1, 4]
    worst = worst_mistakes(rows, 9)[0]
    assert worst["difference"] == -3.0
    assert worst["probability_of_chosen"] == pytest.approx(1 / (1 + math.exp(3)))
    assert worst["comparison"]["chosen"] == "c"
    assert worst_mistakes(rows, 0) == []


@pytest.mark.parametrize(
    "rows",
    [
        rows_of([1.0]),
        rows_of([0.0, 0.0]),
        rows_of([1.0, -1.0], labelled([0.5, 0.5])),
        rows_of(np.array([[1.0, 2.0, 1e9], [-1.0, 1e-9, 0.0]])),
        rows_of([1.0, 2.0], [Comparison("one", "c", "r"), Comparison("one", "d", "r")]),
    ],
    ids=["one", "equal", "ties", "extreme", "one prompt"],
)
def test_whatever_comes_the_report_is_json_and_can_be_shown(rows: ScoredRows, tmp_path: Path) -> None:
    report = reward_quality(rows, QualitySettings(QUICK))
    json.dumps(report, allow_nan=False)
    json.dumps(worst_mistakes(rows, 5), allow_nan=False)
    shown = quality_exhibits(report, "Reward model")
    shown.write(tmp_path)
    assert Exhibits.read(tmp_path) == shown
    to_html(shown)


def test_scores_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(DataError, match=r"no finite score to 1 of 2 comparisons .*number 2"):
        rows_of([1.0, math.nan])


def test_mistakes_are_shown_in_the_report_as_text_not_markup(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.create()
    folder = run.stage("reward_model").path
    folder.mkdir()
    prompt = (Message("user", "<script>alert(1)</script>"),)
    rows = rows_of([-1.0, 1.0], [Comparison(prompt, "<b>chosen", "rej<i>ected"), Comparison("b", "c", "r")])
    mistakes = worst_mistakes(rows, 5)
    (folder / "mistakes.jsonl").write_text("".join(json.dumps(one) + "\n" for one in mistakes) + "not json\n[]\n")
    quality_exhibits(reward_quality(rows, QualitySettings(QUICK)), "Reward model").write(folder)
    page = render_report(run)
    assert "Worst mistakes of the reward model (reward_model): 1<" in page
    assert "&lt;b&gt;chosen" in page
    assert "rej&lt;i&gt;ected" in page
    assert "<script>alert" not in page
    assert "Reward model: accuracy by slice" in page
