"""Importing ratings: PandaLM's layout with several annotators, and rated responses."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from rlhf.errors import DataError
from rlhf.preferences.exchange import ImportOptions, export_labels, import_file
from rlhf.preferences.exchange.agreement import agreement_figures, comparisons_said
from rlhf.preferences.exchange.selection import select
from rlhf.preferences.resolution import ResolutionRule
from rlhf.preferences.store import Tie
from rlhf.records import RatedResponse, dump_line
from rlhf.statistics.agreement import fleiss_kappa, krippendorff_alpha, pairwise_cohen_kappa, percent_agreement
from rlhf.statistics.annotations import annotation_table
from tests.unit.preference_files import import_rows, new_store

NAMES = ("annotator1", "annotator2", "annotator3")


def rated_rows(number: int, seed: int = 3) -> list[dict[str, Any]]:
    """Rows in PandaLM's layout: annotators who lean to the first response, missing inputs, equal rows and responses."""
    generator = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for index in range(number):
        truth = generator.choice([0, 1, 1, 1, 2])
        given = [truth if generator.random() < 0.7 else generator.choice([0, 1, 2]) for _ in NAMES]
        rows.append(
            {
                "idx": index % (number // 2 + 1),
                "cmp_key": generator.choice(["a_b", "a_c"]),
                "instruction": f"Do thing {index % 40}",
                "input": math.nan if index % 3 else f"with {index % 7}",
                "response1": f"one {index % 50}",
                "response2": f"two {index % 60}" if index != 5 else "one 5",
                **dict(zip(NAMES, given, strict=True)),
            }
        )
    # Without anything that tells them apart, equal rows are still items of their own.
    for row in rows[-20:]:
        del row["idx"]
        row.update({name: rows[-1][name] for name in ("cmp_key", "instruction", "input", "response1", "response2")})
    return rows


def test_agreement_of_999_rows_is_that_of_the_raw_columns(tmp_path: Path) -> None:
    rows = rated_rows(999)
    path = tmp_path / "testset.json"
    # NaN is what the published file has where an input is missing.
    path.write_text(json.dumps(rows))
    assert "NaN" in path.read_text()
    store = new_store(tmp_path)
    report = import_file(store, path)
    assert (report.format, report.num_rows, report.num_tasks, report.num_new_labels) == ("rated_list", 999, 999, 2997)
    assert report.annotators == NAMES
    selection = select(store)
    figures = agreement_figures(comparisons_said(selection, selection.tasks))
    table = annotation_table([[row[name] for name in NAMES] for row in rows], annotators=NAMES)
    cohen = pairwise_cohen_kappa(table)
    expected = {
        "percent_agreement": percent_agreement(table),
        "cohen_kappa_mean": cohen.mean,
        "fleiss_kappa": fleiss_kappa(table),
        "krippendorff_alpha": krippendorff_alpha(table),
    }
    for name, interval in expected.items():
        assert figures[name]["value"] == pytest.approx(interval.value, abs=1e-12), name
        # The values are named otherwise, so the resamples differ; the intervals are those of the same items.
        assert figures[name]["low"] == pytest.approx(interval.low, abs=0.01)
        assert figures[name]["high"] == pytest.approx(interval.high, abs=0.01)
    for (first, second), interval in cohen.pairs.items():
        assert figures["cohen_kappa_pairs"][f"{first} / {second}"]["value"] == pytest.approx(interval.value, abs=1e-12)
    assert import_file(store, path).num_new_labels == 0


def test_rated_rows_keep_prompt_columns_ties_and_gaps(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    row = {"idx": 3, "cmp_key": "x_y", "instruction": "Add", "input": "1 and 2", "response1": "3", "response2": "4"}
    import_rows(store, [{**row, "annotator1": "1", "annotator2": "", "annotator3": 0.0}])
    (task,) = store.tasks().values()
    prompt = store.prompts()[task.prompt]
    assert (prompt.prompt, dict(prompt.columns)) == ("Add\n\n1 and 2", {"idx": 3, "cmp_key": "x_y"})
    found = {label.annotator: label.answer for label in store.current_labels()}
    assert set(found) == {"annotator1", "annotator3"}
    assert found["annotator3"] == Tie()
    (one,) = export_labels(store, rule=ResolutionRule("mean"), split_of=lambda prompt: "test").comparisons.test
    assert (one.chosen, one.probability, one.source) == ("3", 0.75, "x_y")
    for column, value, reason in (("annotator1", 5, "expected 0"), ("response2", 7, "'response2' is text")):
        with pytest.raises(DataError, match=reason):
            import_rows(store, [{**row, "annotator1": 1, column: value}])


def test_rated_responses(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    rows = [
        RatedResponse("p", "a", 4.5, "anna", "forum"),
        RatedResponse("p", "a", 2, "ben"),
        RatedResponse("p", "b", 1),
    ]
    path = tmp_path / "ratings.jsonl"
    path.write_text("".join(dump_line(row) + "\n" for row in rows))
    report = import_file(store, path, options=ImportOptions(rating_scale=7))
    assert (report.format, report.num_tasks, report.num_labels) == ("ratings", 2, 3)
    assert {task.plan.scale for task in store.tasks().values()} == {7}
    ratings = export_labels(store, rule=ResolutionRule("mean"), split_of=lambda prompt: "train").ratings.train
    assert [(one.response, one.rating, one.annotator) for one in ratings] == [
        ("a", 3.25, "anna, ben"),
        ("b", 1.0, "ratings"),
    ]
    for value in (0, 8, "good", True, None):
        with pytest.raises(DataError, match="rating_scale=7"):
            import_rows(
                store, [{"prompt": "p", "response": "c", "rating": value}], options=ImportOptions(rating_scale=7)
            )
