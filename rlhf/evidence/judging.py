"""Judges a run by the bands of an expected.json: a verdict for each check."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.config.errors import close_names, did_you_mean
from rlhf.errors import ConfigError
from rlhf.evidence.bands import prediction_band
from rlhf.evidence.expected import Check, Reading
from rlhf.evidence.record import RunRecord, StageRecord

# How a remark begins that says so.
TOO_TIGHT = "the band is too tight"


@dataclass(frozen=True)
class Verdict:
    """One check of one run: what was seen (None where the run has no such number) and whether it is in the band."""

    check: Check
    seen: float | None
    passed: bool
    remark: str = ""


def judge(check: Check, run: RunRecord) -> Verdict:
    """Reads the check's number in `run`; one that is missing or not finite fails, with a remark that says why."""
    try:
        seen = value_of(check, run)
    except MissingNumberError as error:
        return Verdict(check, None, False, str(error))
    if not math.isfinite(seen):
        return Verdict(check, seen, False, "the number is not finite")
    low = -math.inf if check.low is None else check.low
    high = math.inf if check.high is None else check.high
    passed = low <= seen <= high
    return Verdict(check, seen, passed, "" if passed else _too_tight(check, low, high))


def _too_tight(check: Check, low: float, high: float) -> str:
    """Says so where the limits leave out a recorded value, or are narrower than the rule gives; empty otherwise."""
    outside = [f"seed {seed} {show_number(value)}" for seed, value in check.values.items() if not low <= value <= high]
    if outside:
        return f"{TOO_TIGHT}: of the recorded values it leaves out {', '.join(outside)}"
    if check.limits_by_hand or len(check.values) < 2 or check.low is None or check.high is None:
        return ""
    low, high = prediction_band(list(check.values.values()), check.range)
    if check.high - check.low >= 0.99 * (high - low):
        return ""
    seeds = ", ".join(check.values)
    return (
        f"{TOO_TIGHT}: the recorded values of seeds {seeds} give [{show_number(low)}, {show_number(high)}] by the rule"
    )


class MissingNumberError(ConfigError):
    """A run has no number where a check reads one."""


def value_of(check: Check, run: RunRecord) -> float:
    """The check's number: its reading, less that of `minus`. Raises `MissingNumberError`."""
    value = read_number(check, run)
    return value if check.minus is None else value - read_number(check.minus, run)


def read_number(reading: Reading, run: RunRecord) -> float:
    """One number of a run. Raises `MissingNumberError` that says what there is instead."""
    if reading.arm is not None:
        if reading.arm not in run.arms:
            raise MissingNumberError(f"no arm {reading.arm}: the run has {', '.join(run.arms) or 'none'}")
        run = run.arms[reading.arm]
    stage = run.stages.get(reading.stage)
    if stage is None:
        raise MissingNumberError(f"no stage {reading.stage}: the run has {', '.join(run.stages) or 'none'}")
    if reading.at == "result":
        return _of_result(reading, stage)
    rows = [row for row in stage.rows if reading.metric in row]
    if not rows:
        names = sorted({name for row in stage.rows for name in row} - {"stage", "step"})
        if not names:
            raise MissingNumberError(f"metrics.jsonl has no line of stage {reading.stage}")
        near = did_you_mean(close_names(reading.metric, names)) or f": there are {', '.join(names)}"
        raise MissingNumberError(f"no line of stage {reading.stage} has {reading.metric}{near}")
    return _of_rows(reading, rows)


def _of_rows(reading: Reading, rows: Sequence[Mapping[str, Any]]) -> float:
    kind, _, number = reading.at.partition(":")
    if kind == "step":
        rows = [row for row in rows if row.get("step") == int(number)]
        if not rows:
            raise MissingNumberError(f"{reading.metric} of stage {reading.stage} has no step {number}")
        kind = "last"
    # What was not finite is None in the file.
    values = [math.nan if row[reading.metric] is None else row[reading.metric] for row in rows]
    wrong = [value for value in values if isinstance(value, bool) or not isinstance(value, int | float)]
    if wrong:
        raise MissingNumberError(
            f"{reading.metric} of stage {reading.stage} is no number in a line: {str(wrong[0])[:40]!r}"
        )
    if kind == "mean_last":
        if len(values) < int(number):
            raise MissingNumberError(f"{reading.metric} has {len(values)} lines, and the mean of {number} is asked")
        return statistics.fmean(values[-int(number) :])
    if kind in ("max", "min") and any(math.isnan(value) for value in values):
        return math.nan
    if kind in ("max", "min", "mean"):
        return max(values) if kind == "max" else min(values) if kind == "min" else statistics.fmean(values)
    return values[0] if kind == "first" else values[-1]


def _of_result(reading: Reading, stage: StageRecord) -> float:
    """From the summary: `win_rate` and `evaluate/win_rate` are the same number of stage evaluate."""
    if not stage.finished:
        raise MissingNumberError(f"stage {stage.name} is {stage.status}, and its result is asked for")
    name = reading.metric
    short = re.sub(rf"^{re.escape(stage.name)}/", "", name)
    summary: Any = stage.summary
    found = next((summary[key] for key in (name, short) if key in summary), None)
    if found is None:
        found = _nested(reading, short, summary)
    if isinstance(found, Mapping):
        found = found.get("value")  # an estimate with its interval
    if isinstance(found, bool) or not isinstance(found, int | float):
        names = [key for key, value in summary.items() if not isinstance(value, str)]
        near = did_you_mean(close_names(short, names)) or f": there are {', '.join(names) or 'none'}"
        raise MissingNumberError(f"the result of stage {stage.name} has no number {name}{near}")
    return float(found)


def _nested(reading: Reading, name: str, summary: Any) -> Any:
    """`table.gap`: the cell of the row that `row` chooses, or a value within a mapping."""
    found: Any = summary
    for part in name.split("."):
        if isinstance(found, list):
            wanted = reading.row or {}
            rows = [entry for entry in found if isinstance(entry, dict) and wanted.items() <= entry.items()]
            if len(rows) != 1:
                raise MissingNumberError(f"{len(rows)} rows of {reading.metric} have {wanted}, expected one")
            found = rows[0]
        if not isinstance(found, Mapping) or part not in found:
            return None
        found = found[part]
    return found


def show_number(value: float | None) -> str:
    """Six significant digits, without an exponent where it can be avoided."""
    return "none" if value is None else f"{value:.6g}"


def show_band(check: Check) -> str:
    """`in [0.7, 0.9]`, `at least 0.7` or `at most 0.9`."""
    if check.low is None:
        return f"at most {show_number(check.high)}"
    if check.high is None:
        return f"at least {show_number(check.low)}"
    return f"in [{show_number(check.low)}, {show_number(check.high)}]"
