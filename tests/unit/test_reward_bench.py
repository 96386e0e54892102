"""RewardBench from a file: sections and totals against numbers worked out by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from rlhf.errors import ConfigError, DataError
from rlhf.evaluation.reward_bench import (
    CODE,
    PRIOR_SETS,
    SECOND,
    SECTIONS,
    BenchmarkRow,
    RowScores,
    benchmark_report,
    check_benchmark,
    read_benchmark,
    weighted,
)
from rlhf.evaluation.reward_exhibits import benchmark_exhibits
from rlhf.records import Message
from rlhf.runs.exhibits import to_html
from rlhf.statistics import wilson

RIGHT: RowScores = ([1.0], [0.0])
WRONG: RowScores = ([0.0], [1.0])
EQUAL: RowScores = ([1.0], [1.0])


def row(subset: str, chosen: Sequence[str] = ("c",), rejected: Sequence[str] = ("r",), **columns: Any) -> BenchmarkRow:
    return BenchmarkRow("p", tuple(chosen), tuple(rejected), subset, columns)


def report_of(counts: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """The report where so many of so many rows of each subset are right."""
    rows, scores = [], []
    for subset, (right, num) in counts.items():
        rows += [row(subset)] * num
        scores += [RIGHT] * right + [WRONG] * (num - right)
    return benchmark_report(rows, scores)


def test_the_published_subsets() -> None:
    assert {name: len(subsets) for name, subsets in SECTIONS.items()} == {
        "Chat": 5,
        "Chat Hard": 6,
        "Safety": 5,
        "Reasoning": 7,
    }
    assert len({subset for subsets in SECTIONS.values() for subset in subsets}) == 23


def test_sections_weigh_by_prompt_and_maths_as_much_as_code() -> None:
    found = report_of(
        {
            "alpacaeval-easy": (9, 10),
            "mt-bench-easy": (1, 2),
            "mt-bench-hard": (1, 4),
            "donotanswer": (3, 5),
            "math-prm": (1, 5),
            "hep-cpp": (8, 10),
            "hep-go": (20, 20),
        }
    )
    sections = {name: one["value"] for name, one in found["sections"].items()}
    assert sections["Chat"] == pytest.approx(10 / 12)
    assert sections["Chat Hard"] == pytest.approx(0.25)
    assert sections["Safety"] == pytest.approx(0.6)
    assert sections["Reasoning"] == pytest.approx((1 / 5 + 28 / 30) / 2)
    assert found["total"]["value"] == pytest.approx(sum(sections.values()) / 4)
    assert found["subsets"]["hep-cpp"]["num"] == 10
    assert {"hep-js", "llmbar-natural"} <= set(found["missing_subsets"])
    assert not set(PRIOR_SETS) & set(found["missing_subsets"])


def test_prior_sets_count_half() -> None:
    four = {"alpacaeval-easy": (1, 1), "mt-bench-hard": (0, 1), "donotanswer": (1, 1), "math-prm": (0, 1)}
    found = report_of(
        {**four, "shp": (1, 2), "summarize": (1, 1), "anthropic_hhh": (1, 1), "anthropic_helpful": (0, 4)}
    )
    assert found["prior_sets"]["value"] == pytest.approx((0.5 + 1 + 1 + 0) / 4)
    assert found["total"]["value"] == pytest.approx(0.5)
    assert found["total_with_prior_sets"]["value"] == pytest.approx((2 + 0.5 * 0.625) / 4.5)
    assert "not all prior sets" in report_of({**four, "shp": (1, 2)})["prior_sets"]["not_defined"]
    assert "prior_sets" not in report_of(four)


def test_what_is_missing_leaves_no_total_and_other_subsets_count_apart() -> None:
    found = report_of({"alpacaeval-easy": (1, 2), "my-own": (1, 1), "(no subset)": (0, 1)})
    assert found["total"]["not_defined"] == "the file has nothing of Chat Hard, Safety, Reasoning"
    assert found["sections"]["Chat"]["value"] == 0.5
    assert {name: one["accuracy"]["value"] for name, one in found["other_subsets"].items()} == {
        "my-own": 1.0,
        "(no subset)": 0.0,
    }
    page = to_html(benchmark_exhibits(found, "<file>"))
    assert "my-own" in page
    assert "&lt;file&gt;" in page


def test_equal_scores_are_no_success_and_what_is_too_long_counts_nowhere() -> None:
    rows = [row("donotanswer")] * 4
    found = benchmark_report(rows, [RIGHT, EQUAL, None, WRONG])
    assert (found["num_rows"], found["num_too_long"], found["num_equal_scores"]) == (4, 1, 1)
    assert found["subsets"]["donotanswer"]["accuracy"]["value"] == pytest.approx(1 / 3)
    assert found["subsets"]["donotanswer"]["num"] == 3


def test_intervals_of_a_weighted_mean() -> None:
    first, second = wilson(8, 10).to_json(), wilson(30, 40).to_json()
    found = weighted([(1.0, first), (3.0, second)])
    assert found["value"] == pytest.approx((0.8 + 3 * 0.75) / 4)
    below = math.hypot(first["value"] - first["low"], 3 * (second["value"] - second["low"])) / 4
    above = math.hypot(first["high"] - first["value"], 3 * (second["high"] - second["value"])) / 4
    assert found["low"] == pytest.approx(found["value"] - below)
    assert found["high"] == pytest.approx(found["value"] + above)
    assert weighted([(2.0, first)]) == pytest.approx(first)


def test_best_of_four() -> None:
    subsets = [row(name, ["c"], ["x", "y", "z"]) for name in SECOND for _ in range(2)]
    scores: list[RowScores | None] = [([1.0], [0.0, 0.5, 0.9]), ([1.0], [0.0, 1.5, 0.9])] * len(SECOND)
    found = benchmark_report(subsets, scores)
    assert found["layout"] == "rewardbench2"
    assert all(found["subsets"][name]["accuracy"]["value"] == 0.5 for name in SECOND)
    assert found["total"]["not_defined"] == "the file has nothing of Ties"
    ties = [row("Ties", ["a", "b"], ["x"], id="tied:1"), row("Ties", ["a"], ["x"], id="ref:1")]
    whole = benchmark_report([*subsets, *ties], [*scores, ([3.0, 2.5], [0.0]), ([1.0], [0.0])])
    # All right; the gaps are 2.5 and 1, the spread of the right ones 0.5.
    score = 0.3 + 0.3 + 0.2 + 0.2 + 0.01 * math.tanh(1 / 0.5 - 1)
    assert whole["subsets"]["Ties"]["accuracy"]["value"] == pytest.approx(score)
    assert whole["total"]["value"] == pytest.approx((5 * 0.5 + score) / 6)


@pytest.mark.parametrize(
    ("tied", "reference", "score"),
    [
        (([3.0, 1.0], [0.0]), ([1.0], [2.0]), 0.3 + 0.01 * math.tanh(-1 / 2 - 1)),
        (([3.0, 1.0], [0.0]), ([5.0], [2.0]), 0.6 + 0.01 * math.tanh(1 / 2 - 1)),
        (([3.0, 2.5], [2.0]), ([2.2], [2.0]), 0.6 + 0.01 * math.tanh(0.2 / 0.5 - 1)),
        (([3.0, 2.8], [2.0]), ([2.1], [2.0]), 0.8 + 0.01 * math.tanh(0.1 / 0.2 - 1)),
        (([2.0, 2.0], [0.0]), ([1.0], [0.0]), 1.01),
        (([0.0, 0.0], [0.0]), ([0.0], [0.0]), 0.0),
    ],
)
def test_the_score_of_ties(tied: RowScores, reference: RowScores, score: float) -> None:
    rows = [row("Ties", ["a", "b"], ["x"], id="tied:7"), row("Ties", ["a"], ["x"], id="ref:7")]
    assert benchmark_report(rows, [tied, reference])["subsets"]["Ties"]["accuracy"]["value"] == pytest.approx(score)


def test_ties_without_their_references_have_no_score() -> None:
    rows = [row("Ties", ["a", "b"], ["x"], id="tied:1"), row("Ties", ["a", "b"], ["x"], id="other:1")]
    only = benchmark_report(rows[:1], [([1.0, 1.0], [0.0])])
    assert "reference" in only["subsets"]["Ties"]["accuracy"]["not_defined"]
    both = benchmark_report(rows, [([1.0, 1.0], [0.0])] * 2)
    assert "tied:N" in both["subsets"]["Ties"]["accuracy"]["not_defined"]
    assert "Ties" in both["total"]["not_defined"]
    json.dumps(both, allow_nan=False)


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return str(path)


def test_files_are_read_in_both_layouts(tmp_path: Path) -> None:
    first = {
        "prompt": "hello?",
        "chosen": "hi",
        "rejected": "no",
        "subset": "donotanswer",
        "id": 3,
        "chosen_model": "m",
    }
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    chat = {
        "prompt": turns,
        "chosen": [*turns, {"role": "assistant", "content": "yes"}],
        "rejected": [*turns, {"role": "assistant", "content": "no"}],
    }
    plain, spoken = read_benchmark(write(tmp_path / "one.jsonl", [first, chat]))
    assert plain == BenchmarkRow("hello?", ("hi",), ("no",), "donotanswer", {"id": 3, "chosen_model": "m"})
    assert plain.as_chat().prompt == (Message("user", "hello?"),)
    assert (
        spoken.prompt
        == spoken.as_chat().prompt
        == (Message("user", "a"), Message("assistant", "b"), Message("user", "c"))
    )
    assert (spoken.chosen, spoken.rejected, spoken.subset) == (("yes",), ("no",), "(no subset)")
    listed = {"prompt": "p", "chosen": ["a"], "rejected": ["b", "c", "d"], "subset": "Focus"}
    assert read_benchmark(write(tmp_path / "two.jsonl", [listed]))[0].rejected == ("b", "c", "d")


def test_parquet_is_read(tmp_path: Path) -> None:
    table = pyarrow.table({"prompt": ["p"], "chosen": ["c"], "rejected": ["r"], "subset": [CODE[0]], "id": [1]})
    parquet.write_table(table, tmp_path / "bench.parquet")
    assert read_benchmark(str(tmp_path / "bench.parquet"))[0].subset == "hep-cpp"


def test_what_is_no_benchmark_is_refused(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "p", "chosen": "c", "rejected": "r"},
        {"prompt": "", "chosen": "c", "rejected": "r"},
    ]
    with pytest.raises(DataError, match=r"field 'prompt' is a text.*line 2"):
        read_benchmark(write(tmp_path / "bad.jsonl", [*rows, {"prompt": "p", "chosen": 3, "rejected": "r"}]))
    mixed: list[dict[str, Any]] = [rows[0], {"prompt": "p", "chosen": ["c"], "rejected": ["r", "s"]}]
    with pytest.raises(DataError, match="split the file"):
        read_benchmark(write(tmp_path / "mixed.jsonl", mixed))
    with pytest.raises(DataError, match="no rows"):
        read_benchmark(write(tmp_path / "empty.jsonl", []))
    with pytest.raises(ConfigError, match=r"reward_report\.benchmark=.*no such file"):
        check_benchmark(str(tmp_path / "none.jsonl"), "reward_report.benchmark")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ConfigError, match="JSONL"):
        check_benchmark(str(tmp_path / "a.txt"), "reward_report.benchmark")
