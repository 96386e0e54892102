"""What a stage writes about a reward model: scores, the report's numbers, tables and figures, the worst mistakes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.data.splits import SPLITS, SplitName
from rlhf.evaluation.reward_exhibits import quality_exhibits
from rlhf.evaluation.reward_quality import DEFAULT_SETTINGS, QualitySettings, reward_quality, worst_mistakes
from rlhf.evaluation.reward_rows import ScoredRows
from rlhf.records import to_json
from rlhf.runs.exhibits import Exhibits
from rlhf.runs.files import write_json, write_text
from rlhf.runs.jsonable import dump_json
from rlhf.stages.reward_measures import Pair, ScoredComparison

# All held-out comparisons with their raw scores by every member, one a line: to look at, no stage reads it.
HELD_OUT_SCORES = "held_out_scores.jsonl"
REPORT_FILE = "reward_report.json"
MISTAKES_FILE = "mistakes.jsonl"


def write_held_out(
    folder: Path, scored: Mapping[str, list[ScoredComparison]], pairs: Mapping[str, Sequence[Pair]]
) -> None:
    """The scores of what stage reward_model held out, and the report on the test split, else on the validation split.

    `pairs` has the token ids of each split. Without held-out comparisons there is no report.
    """
    write_scores(folder / HELD_OUT_SCORES, scored)
    split = next((name for name in ("test", "validation") if scored.get(name)), None)
    if split is None:
        return
    lengths = [(len(chosen.response_ids), len(rejected.response_ids)) for chosen, rejected in pairs[split]]
    rows = rows_of(scored[split], lengths)
    about = {"measured_on": {"what": "held-out comparisons of stage reward_model", "splits": [split]}}
    report, exhibits = write_quality(folder, rows, "Reward model", about)
    write_json(folder / REPORT_FILE, report)
    exhibits.write(folder)


def rows_of(scored: Sequence[ScoredComparison], lengths: Sequence[tuple[int, int]]) -> ScoredRows:
    """Scored comparisons with the lengths of both responses in tokens, EOS included, as arrays."""
    chosen, rejected = np.array(lengths, dtype=np.float64).T
    return ScoredRows(
        tuple(row.comparison for row in scored),
        np.array([row.chosen_scores for row in scored], dtype=np.float64).T,
        np.array([row.rejected_scores for row in scored], dtype=np.float64).T,
        chosen,
        rejected,
    )


def write_quality(
    folder: Path,
    rows: ScoredRows,
    title: str,
    about: Mapping[str, Any],
    settings: QualitySettings = DEFAULT_SETTINGS,
) -> tuple[dict[str, Any], Exhibits]:
    """Writes the worst mistakes; returns the report's numbers, `about` before them, and what is to be shown."""
    report = {**about, **reward_quality(rows, settings)}
    mistakes = worst_mistakes(rows, settings.num_mistakes)
    write_text(folder / MISTAKES_FILE, "".join(dump_json(mistake) + "\n" for mistake in mistakes))
    return report, quality_exhibits(report, title)


def write_scores(path: Path, scored: Mapping[str, list[ScoredComparison]]) -> None:
    """Scored comparisons by split, one a line."""
    lines = [
        {
            "split": split,
            "comparison": to_json(row.comparison),
            "chosen_scores": row.chosen_scores,
            "rejected_scores": row.rejected_scores,
        }
        for split, rows in sorted(scored.items())
        for row in rows
    ]
    write_text(path, "".join(json.dumps(line, ensure_ascii=False, sort_keys=True) + "\n" for line in lines))


def split_names(names: Sequence[str]) -> list[SplitName]:
    """The named splits in their usual order."""
    return [name for name in SPLITS if name in names]
