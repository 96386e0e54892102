"""The part of the report that shows a reward model's worst mistakes: the texts that only reading can judge."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from rlhf.runs import report_sections as sections
from rlhf.runs import results
from rlhf.runs.folder import RunFolder
from rlhf.runs.jsonable import read_lines

MISTAKES_FILE = "mistakes.jsonl"
MOST_SHOWN = 20


def mistakes(run: RunFolder) -> str:
    """A fold for each stage that has listed mistakes, the worst first; empty without any. All text is escaped."""
    folds = []
    for file in sorted(run.stages.glob(f"*/{MISTAKES_FILE}")):
        entries = [entry for entry in read_lines(file) if isinstance(entry.get("comparison"), Mapping)]
        if not entries:
            continue
        listed = "".join(_mistake(entry) for entry in entries[:MOST_SHOWN])
        rest = f" of {len(entries)}" if len(entries) > MOST_SHOWN else ""
        folds.append(
            f"<details><summary>Worst mistakes of the reward model ({escape(file.parent.name)}): "
            f"{min(len(entries), MOST_SHOWN)}{rest}</summary>{listed}</details>"
        )
    return "".join(folds)


def _mistake(entry: Mapping[str, Any]) -> str:
    comparison = entry["comparison"]
    sides = "".join(
        f'<div class="side {kind}"><div class="who">{who}{_score(entry.get(f"{name}_scores"))}</div>'
        f'<div class="text">{escape(str(comparison.get(name, "")).lstrip(" "))}</div></div>'
        for kind, name, who in (
            ("before", "chosen", "chosen by the annotators"),
            ("after", "rejected", "preferred by the model"),
        )
    )
    return f'<div class="sample">{sections.prompt_text(comparison.get("prompt"))}<div class="pair">{sides}</div></div>'


def _score(scores: Any) -> str:
    """The members' mean."""
    numbers = [
        one.value for one in map(results.estimate, scores if isinstance(scores, list) else ()) if one is not None
    ]
    return f' <span class="chip">{results.format_number(sum(numbers) / len(numbers))}</span>' if numbers else ""
