"""Tables and figures of a reward model's report, from its numbers alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
_NUM_TEXTS = 10
_LONGEST_TEXT = 160


def quality_exhibits(report: Mapping[str, Any], mistakes: Sequence[Mapping[str, Any]], title: str) -> Exhibits:
    """What the report, the console and the files show of `reward_quality`; `title` begins the tables' titles."""
    tables = [_summary(report, title), _slice_table(report, title), _calibration_table(report, title)]
    if "member_accuracy" in report["ensemble"]:
        tables.append(_ensemble_table(report, title))
    if mistakes:
        tables.append(_mistakes_table(mistakes, title))
    return Exhibits(tuple(tables), (_figure(report, title),))


def _cell(figure: Any) -> Cell:
    """A figure, or why it is not there."""
    if isinstance(figure, Mapping) and "not_defined" in figure:
        return f"not defined: {figure['not_defined']}"
    return figure


def _short(figure: Any) -> Cell:
    return "not defined" if isinstance(figure, Mapping) and "not_defined" in figure else figure


def _summary(report: Mapping[str, Any], title: str) -> Table:
    """One row a headline number: what the console shows."""
    calibration, length, ceiling = report["calibration"], report["length"], report["ceiling"]
    rows: list[tuple[Cell, ...]] = [
        ("comparisons without ties", report["num_decided"]),
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
        (f"Spearman of score with {length['unit']}, a pair's differences", _short(length["difference_spearman"])),
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
            cells = _SLICES[name], f"{group['group']}{few}", group["num"], group["num_ties"]
            rows.append((*cells, _short(group["accuracy"]), group["margin"]))
    note = f"(few): fewer than {FEW_ROWS} comparisons." + "".join(f" Not sliced by {why}." for why in missing)
    columns = ("slice", "group", "comparisons", "ties", "accuracy", "mean margin of scores")
    return Table(f"{title}: accuracy by slice", columns, tuple(rows), note, details=True)


def _calibration_table(report: Mapping[str, Any], title: str) -> Table:
    rows = tuple(
        (f"{part['lowest']:.3f} to {part['highest']:.3f}", part["num"], part["confidence"], part["accuracy"])
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


def _mistakes_table(mistakes: Sequence[Mapping[str, Any]], title: str) -> Table:
    rows = []
    for mistake in mistakes[:_NUM_TEXTS]:
        comparison = mistake["comparison"]
        prompt = comparison["prompt"]
        last = prompt if isinstance(prompt, str) else prompt[-1]["content"] if prompt else ""
        sides = (_excerpt(comparison[side]) for side in ("chosen", "rejected"))
        rows.append((_excerpt(last, end=True), *sides, mistake["difference"]))
    note = f"The first {len(rows)} of mistakes.jsonl, which has the whole texts; prompts are cut at their beginning."
    columns = ("prompt", "chosen", "rejected, which the model prefers", "difference")
    return Table(f"{title}: worst mistakes", columns, tuple(rows), note, details=True)


def _excerpt(text: str, *, end: bool = False) -> str:
    plain = " ".join(text.split())
    if len(plain) <= _LONGEST_TEXT:
        return plain
    return f"… {plain[-_LONGEST_TEXT:]}" if end else f"{plain[:_LONGEST_TEXT]} …"


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
