"""Tables and figures of a reward model's report, from its numbers alone."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from rlhf.evaluation.reward_rows import FEW_ROWS
from rlhf.runs.exhibits import Cell, Exhibits, Figure, Line, Panel, Table

_SLICES = {
    "source": "source",
    "agreement": "annotators' agreement",
    "label": "probability of the label",
    "length_gap": "chosen longer by",
    "margin": "stated margin",
    "turns": "turns of the conversation",
}


def quality_exhibits(report: Mapping[str, Any], title: str) -> Exhibits:
    """What the report, the console and the files show of `reward_quality`; `title` begins the tables' titles."""
    tables = [_summary(report, title), _slice_table(report, title), _calibration_table(report, title)]
    if "member_accuracy" in report["ensemble"]:
        tables.append(_ensemble_table(report, title))
    return Exhibits(tuple(tables), (_figure(report, title),))


def benchmark_exhibits(report: Mapping[str, Any], name: str) -> Exhibits:
    """What is shown of `benchmark_report`; `name` is that of the file."""
    title = {"rewardbench": "RewardBench", "rewardbench2": "RewardBench 2"}[report["layout"]]
    rows: list[tuple[Cell, ...]] = [(section, _short(found)) for section, found in report.get("sections", {}).items()]
    rows.append(("total", _short(report["total"])))
    rows += [
        (label, _short(report[key]))
        for key, label in (("prior_sets", "prior sets"), ("total_with_prior_sets", "total with prior sets"))
        if key in report
    ]
    notes = [f"{report['num_rows']} rows of {name}."]
    if report["num_too_long"]:
        notes.append(f"{report['num_too_long']} are too long for the model and count nowhere.")
    if report["num_equal_scores"]:
        notes.append(f"{report['num_equal_scores']} have equal scores, which is no success.")
    if "not_defined" in report["total"]:
        notes.append(f"No total: {report['total']['not_defined']}.")
    subsets = [
        (subset, where, str(found["num"]), _short(found["accuracy"]))
        for where, group in (("benchmark", report["subsets"]), ("other", report["other_subsets"]))
        for subset, found in group.items()
    ]
    missing = ", ".join(report["missing_subsets"])
    return Exhibits(
        (
            Table(title, ("section", "score"), tuple(rows), " ".join(notes)),
            Table(
                f"{title}: subsets",
                ("subset", "of", "rows", "score"),
                tuple(subsets),
                f"Not in the file: {missing}." if missing else "",
                details=True,
            ),
        )
    )


def _short(figure: Any) -> Cell:
    """A figure; the note says why it is not there."""
    return "not defined" if isinstance(figure, Mapping) and "not_defined" in figure else figure


def _summary(report: Mapping[str, Any], title: str) -> Table:
    """One row a headline number: what the console shows."""
    calibration, length, ceiling = report["calibration"], report["length"], report["ceiling"]
    rows: list[tuple[Cell, ...]] = [
        ("comparisons without ties", str(report["num_decided"])),
        ("accuracy", _short(report["accuracy"])),
    ]
    if "value" in report["accuracy_over_prompts"]:
        rows.append(("accuracy, interval over prompts", report["accuracy_over_prompts"]))
    rows.append(("accuracy of preferring the longer response", _short(length["longer_wins"])))
    if "upper" in ceiling:
        rows += [
            ("agrees with one annotator", ceiling["accuracy_against_one"]),
            ("the best any model could, at least", ceiling["lower"]),
            ("the best any model could, at most", ceiling["upper"]),
        ]
    if "mean_distance" in report["ties"]:
        rows += [
            ("ties: mean distance of scores", report["ties"]["mean_distance"]),
            ("others: mean distance of scores", _short(report["ties"]["mean_distance_of_others"])),
        ]
    rows += [
        ("cross-entropy", calibration["cross_entropy"]),
        ("expected calibration error", calibration["ece"]),
        ("the same, were it calibrated", calibration["ece_if_calibrated"]),
        ("temperature that would calibrate", _short(calibration["temperature"])),
        (
            f"rank correlation of a pair's differences in score and {length['unit']}",
            _short(length["difference_spearman"]),
        ),
    ]
    if "member_accuracy" in report["ensemble"]:
        rows.append(("members' spread where wrong, correlation", _short(report["ensemble"]["spread_and_wrong"])))
    level = f"Intervals at {report['confidence']:.0%}."
    unknown = "" if "upper" in ceiling else f" Agreement ceiling unknown: {ceiling['not_defined']}."
    return Table(title, ("measure", "value"), tuple(rows), f"{level}{unknown}")


def _slice_table(report: Mapping[str, Any], title: str) -> Table:
    rows: list[tuple[Cell, ...]] = []
    missing = []
    for name, groups in report["slices"].items():
        if isinstance(groups, Mapping):
            missing.append(f"{_SLICES[name]}: {groups['not_defined']}")
            continue
        for group in groups:
            few = " (few)" if group["accuracy"].get("few") else ""
            cells = _SLICES[name], f"{group['group']}{few}", str(group["num"]), str(group["num_ties"])
            rows.append((*cells, _short(group["accuracy"]), group["margin"]))
    note = f"(few): fewer than {FEW_ROWS} comparisons." + "".join(f" Not sliced by {why}." for why in missing)
    columns = ("slice", "group", "comparisons", "ties", "accuracy", "mean margin of scores")
    return Table(f"{title}: accuracy by slice", columns, tuple(rows), note, details=True)


def _calibration_table(report: Mapping[str, Any], title: str) -> Table:
    rows = tuple(
        (f"{part['lowest']:.3f} to {part['highest']:.3f}", str(part["num"]), part["confidence"], part["accuracy"])
        for part in report["calibration"]["curve"]
    )
    note = "Confidence is sigmoid(|difference of scores|); bins of equal mass; ties count as half right."
    columns = ("confidence", "comparisons", "mean confidence", "share right")
    return Table(f"{title}: calibration", columns, rows, note, details=True)


def _ensemble_table(report: Mapping[str, Any], title: str) -> Table:
    ensemble = report["ensemble"]
    rows: list[tuple[Cell, ...]] = [
        (f"accuracy of member {number}", _short(accuracy))
        for number, accuracy in enumerate(ensemble["member_accuracy"])
    ]
    names = {
        "unanimous": "comparisons on which all members agree",
        "accuracy_where_unanimous": "accuracy there",
        "accuracy_where_split": "accuracy where they do not",
        "spread": "mean spread of scaled differences",
        "spread_and_wrong": "correlation of spread with being wrong",
    }
    rows += [(label, _short(ensemble[name])) for name, label in names.items()]
    return Table(f"{title}: members", ("measure", "value"), tuple(rows), details=True)


def _figure(report: Mapping[str, Any], title: str) -> Figure:
    return Figure("reward_report", title, (_calibration_panel(report), _score_panel(report), _gap_panel(report)))


def _calibration_panel(report: Mapping[str, Any]) -> Panel:
    curve = report["calibration"]["curve"]
    points = tuple((part["confidence"], part["accuracy"]["value"]) for part in curve)
    band = tuple((part["accuracy"]["low"], part["accuracy"]["high"]) for part in curve)
    far = max((x for x, _ in points), default=1.0)
    lines = (
        Line("model", points, band, style="dots", group="model"),
        Line("calibrated", ((0.5, 0.5), (far, far)), style="dashed", group="calibrated"),
    )
    return Panel("Calibration", "confidence of the model", "share right", lines)


def _score_panel(report: Mapping[str, Any]) -> Panel:
    scores = report["scores"]
    edges = scores["edges"]
    middles = [(low + high) / 2 for low, high in pairwise(edges)]
    lines = tuple(
        Line(side, tuple((x, count / report["num_comparisons"]) for x, count in zip(middles, counts, strict=True)))
        for side in ("chosen", "rejected")
        for counts in (scores[side]["counts"],)
    )
    return Panel("Scores", "score", "share of the responses", lines)


def _gap_panel(report: Mapping[str, Any]) -> Panel:
    groups = [group for group in report["slices"]["length_gap"] if "value" in group["accuracy"]]
    points = tuple((group["mean"], group["accuracy"]["value"]) for group in groups)
    band = tuple((group["accuracy"]["low"], group["accuracy"]["high"]) for group in groups)
    unit = report["length"]["unit"]
    return Panel(
        "Accuracy by length gap",
        f"chosen longer by ({unit}, mean of the group)",
        "accuracy",
        (Line("accuracy", points, band, style="dots"),),
    )
