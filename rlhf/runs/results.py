"""Reads the key results of a run folder, for the console's summary and for the report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlhf.runs.folder import RunFolder
from rlhf.runs.manifest import read_manifest

BASELINE = "_baseline"
POLICY = "_policy"
NONE = "\N{EN DASH}"


@dataclass(frozen=True)
class Estimate:
    """A number, with its interval where there is one."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Comparison:
    """One evaluation metric: of the baseline ("before") and the policy ("after"), or a single number (`after`)."""

    name: str
    before: Estimate | None
    after: Estimate


@dataclass(frozen=True)
class StageRow:
    """What is known of one stage."""

    name: str
    status: str
    seconds: float | None
    peak_memory_bytes: float | None
    summary: Mapping[str, Any]


def estimate(value: Any) -> Estimate | None:
    """`value` as an estimate: a number or `{"value", "low", "high"}`; None for anything else."""
    if isinstance(value, Mapping):
        number, low, high = (_number(value.get(name)) for name in ("value", "low", "high"))
        return None if number is None else Estimate(number, low, high)
    number = _number(value)
    return None if number is None else Estimate(number)


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def comparisons(summary: Mapping[str, Any]) -> list[Comparison]:
    """The evaluation's metrics: `x_policy` with `x_baseline` becomes one row, in the order of the summary.

    Counts (`num_...`) are no metrics.
    """
    rows = []
    for name, value in summary.items():
        after = estimate(value)
        if (
            after is None
            or name.startswith("num_")
            or (name.endswith(BASELINE) and name.removesuffix(BASELINE) + POLICY in summary)
        ):
            continue
        if name.endswith(POLICY):
            stem = name.removesuffix(POLICY)
            rows.append(Comparison(stem, estimate(summary.get(stem + BASELINE)), after))
        else:
            rows.append(Comparison(name, None, after))
    return rows


@dataclass(frozen=True)
class GapRow:
    """One training of the study `closed_form`: where it ended, and where the optimum is."""

    algorithm: str
    beta: float
    gap: float
    numbers: Mapping[str, tuple[float, float]]  # objective, expected_reward, kl: of the policy and of the optimum


GAP_NUMBERS = ("objective", "expected_reward", "kl")


def gap_rows(summary: Mapping[str, Any]) -> list[GapRow]:
    """The trainings in the summary of stage closed_form; entries that are not whole are left out."""
    table = summary.get("table")
    rows = []
    for entry in table if isinstance(table, list) else []:
        if not isinstance(entry, Mapping):
            continue
        beta, gap = _number(entry.get("beta")), _number(entry.get("gap"))
        pairs = {name: (_number(entry.get(name)), _number(entry.get(f"optimal_{name}"))) for name in GAP_NUMBERS}
        numbers = {name: (own, best) for name, (own, best) in pairs.items() if own is not None and best is not None}
        if beta is not None and gap is not None and len(numbers) == len(GAP_NUMBERS):
            rows.append(GapRow(str(entry.get("algorithm")), beta, gap, numbers))
    return rows


def stage_rows(run: RunFolder) -> list[StageRow]:
    """The run's stages in the manifest's order, then stage folders it does not know."""
    entries = read_manifest(run).get("stages", {})
    entries = entries if isinstance(entries, dict) else {}
    folders = sorted(path.name for path in run.stages.iterdir() if path.is_dir()) if run.stages.is_dir() else []
    rows = []
    for name in [*entries, *(name for name in folders if name not in entries and not name.startswith("."))]:
        entry = entries.get(name, {})
        result = run.stage(name).read_result()
        status = entry.get("status") or ("finished" if result else "unknown")
        seconds = _number(entry.get("seconds"))
        if seconds is None and result is not None:
            seconds = result.seconds
        rows.append(
            StageRow(name, status, seconds, _number(entry.get("peak_memory_bytes")), result.summary if result else {})
        )
    return rows


def label(name: str) -> str:
    """A metric's name for people: `kl_to_reference` → "KL to reference"."""
    words = name.rpartition("/")[2].removeprefix("num_").replace("_", " ")
    words = " ".join(word.upper() if word in ("kl", "ppo", "sft") else word for word in words.split())
    return words[:1].upper() + words[1:]


def format_number(value: float | None) -> str:
    """Three digits, no exponent where it can be avoided: 0.532, 0.070, 12.3, 1,230, 0.00312, 3.1e-06."""
    if value is None or not math.isfinite(value):
        return NONE
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e7 or size < 1e-3:
        return f"{value:.2g}"
    if size >= 100:
        return f"{value:,.0f}"
    digits = 3 if 0.01 <= size < 1 else max(0, 2 - math.floor(math.log10(size)))
    return f"{value:.{digits}f}"


def format_estimate(value: Estimate | None) -> str:
    """`0.83 [0.80, 0.86]`, the interval only where there is one."""
    if value is None:
        return NONE
    if value.low is None or value.high is None:
        return format_number(value.value)
    return f"{format_number(value.value)} [{format_number(value.low)}, {format_number(value.high)}]"


def format_cell(cell: Any) -> str:
    """A cell of a study's table: an estimate, a number or a text."""
    return cell if isinstance(cell, str) else format_estimate(estimate(cell))


def format_seconds(seconds: float | None) -> str:
    """`4.2 s`, `1:05`, `2:03:10`."""
    if seconds is None or not math.isfinite(seconds):
        return NONE
    if seconds < 60:
        return f"{seconds:.1f} s"
    return clock(seconds)


def clock(seconds: float) -> str:
    """`0:45`, `12:05`, `2:03:10`."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def format_bytes(size: float | None) -> str:
    """In MiB or GiB."""
    if size is None:
        return NONE
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
