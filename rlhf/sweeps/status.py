"""How a sweep stands: settings with their mean over the seeds, trials by state, the cost, and what matters."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rlhf.statistics.student import t_interval
from rlhf.sweeps.folder import Sweep
from rlhf.sweeps.journal import State, Trial, TrialState
from rlhf.sweeps.metric import History
from rlhf.sweeps.search import Search
from rlhf.sweeps.space import label

STATES: tuple[TrialState, ...] = ("finished", "running", "waiting", "pruned", "failed", "skipped")
NUM_BEST = 10
# Fewer settings say nothing about what matters.
FEWEST_FOR_IMPORTANCE = 4
CONFIDENCE = 0.95


@dataclass(frozen=True)
class SettingStatus:
    """A setting: its mean over the finished seeds, with Student's 95 % interval where there are at least two."""

    number: int
    values: dict[str, Any]
    state: str
    trials: list[int]
    by_seed: list[float]
    mean: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class TrialStatus:
    """A trial that is not finished well: what it is at, or what became of it. `value` is the metric's latest."""

    number: int
    setting: int
    seed: Any
    state: str
    attempt: int
    value: float | None
    note: str
    tail: tuple[str, ...]


@dataclass(frozen=True)
class Status:
    """All of it. `settings` come best first; `history` is the best mean after each finished setting, in their order."""

    name: str
    method: str
    metric: str | None
    goal: str
    num_settings: int | None
    run_cap: int | None
    num_seeds: int
    counts: dict[str, int]
    seconds: float
    settings: list[SettingStatus]
    trials: list[TrialStatus]
    history: list[tuple[int, float, float]]
    importance: dict[str, float]
    codes: dict[str, list[int]]

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        return asdict(self)


def status_of(sweep: Sweep) -> Status:
    """Reads the sweep; changes nothing."""
    state = sweep.journal.look()
    metric = sweep.file.metric
    settings = _settings(state)
    finished = [one for one in settings if one.state == "finished" and one.mean is not None]
    sign = -1.0 if metric is not None and metric.goal == "maximize" else 1.0
    rank = {id(one): sign * one.mean for one in finished if one.mean is not None}
    settings.sort(key=lambda one: (id(one) not in rank, rank.get(id(one), 0.0), one.number))
    codes: dict[str, list[int]] = {}
    for trial in state.trials.values():
        if trial.code is not None:
            codes.setdefault(trial.code, []).append(trial.number)
    return Status(
        name=sweep.folder.name,
        method=sweep.file.method,
        metric=None if metric is None else metric.name,
        goal="" if metric is None else metric.goal,
        num_settings=sweep.num_settings,
        run_cap=sweep.file.run_cap,
        num_seeds=max(1, len(sweep.space.seeds)),
        counts={name: len(state.by_state(name)) for name in STATES},
        seconds=sum(trial.seconds for trial in state.trials.values()),
        settings=settings,
        trials=[_trial(sweep, trial) for trial in state.trials.values() if trial.state not in ("finished", "skipped")],
        history=_history(finished, sign),
        importance=_importance(sweep, state, len(finished)),
        codes=codes,
    )


def _settings(state: State) -> list[SettingStatus]:
    found = []
    for record in state.settings.values():
        trials = [state.trials[number] for number in record.trials]
        values = [trial.value for trial in trials if trial.state == "finished" and trial.value is not None]
        mean = math.fsum(values) / len(values) if values else None
        low = high = None
        if len(values) > 1:
            interval = t_interval(values, confidence=CONFIDENCE)
            low, high = interval.low, interval.high
        if record.state == "open":
            states = {trial.state for trial in trials}
            name = "running" if states & {"running", "finished"} else "waiting"
        else:
            name = record.state
        found.append(SettingStatus(record.number, record.values, name, record.trials, values, mean, low, high))
    return found


def _trial(sweep: Sweep, trial: Trial) -> TrialStatus:
    value = trial.value
    note = trial.note
    if value is None and sweep.file.metric is not None:
        latest = History(sweep.folder.trial(trial.number), sweep.file.metric.name).update()
        value = latest[-1] if latest else None
    if trial.state == "running":
        try:
            age = time.time() - (sweep.folder.path / "leases" / f"{trial.number}.json").stat().st_mtime
        except OSError:
            age = None
        note = f"agent {trial.agent}" + ("" if age is None else f", last heard of {max(age, 0.0):.0f} s ago")
    return TrialStatus(trial.number, trial.setting, trial.seed, trial.state, trial.attempt, value, note, trial.tail)


def _history(finished: Sequence[SettingStatus], sign: float) -> list[tuple[int, float, float]]:
    found, best = [], math.inf
    for one in sorted(finished, key=lambda one: one.number):
        assert one.mean is not None
        best = min(best, sign * one.mean)
        found.append((one.number, one.mean, sign * best))
    return found


def _importance(sweep: Sweep, state: State, num_finished: int) -> dict[str, float]:
    """The share of the metric's variance that each parameter explains (fANOVA, Hutter et al. 2014), most first.

    Empty where there is too little to say: few settings, one parameter, or values that do not differ.
    """
    if sweep.file.metric is None or num_finished < FEWEST_FOR_IMPORTANCE or len(sweep.space.searched) < 2:
        return {}
    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = optuna.importance.get_param_importances(
                Search(sweep).known(state), evaluator=optuna.importance.FanovaImportanceEvaluator(seed=0)
            )
        except (ValueError, RuntimeError):
            # Settings with different parameters, or values that are all the same.
            return {}
    return {name: float(share) for name, share in found.items() if math.isfinite(share)}


def describe(status: Status) -> list[str]:
    """The table for a terminal."""
    size = "" if status.num_settings is None else f" of {status.num_settings * status.num_seeds}"
    cap = "" if status.run_cap is None else f" (at most {status.run_cap})"
    aim = f", {status.goal} {status.metric}" if status.metric else ""
    counts = ", ".join(f"{count} {name}" for name, count in status.counts.items() if count)
    lines = [
        f"sweep {status.name}: {status.method}{aim}",
        f"trials: {sum(status.counts.values())}{size}{cap}: {counts or 'none yet'}; {duration(status.seconds)} of work",
    ]
    best = [one for one in status.settings if one.state == "finished" and one.mean is not None]
    if best:
        lines += ["", *_table(best[:NUM_BEST], status)]
        if len(best) > NUM_BEST:
            lines.append(f"... and {len(best) - NUM_BEST} more (--json, or the page)")
    others = [one for one in status.trials if one.state in ("running", "waiting", "pruned", "failed")]
    for one in sorted(others, key=lambda one: (STATES.index(_state(one.state)), one.number)):
        value = "" if one.value is None else f" {status.metric}={one.value:.4g}"
        again = f" (attempt {one.attempt})" if one.attempt > 1 else ""
        lines.append(f"{one.state:<8} trial {one.number}{again}{value}{': ' if one.note else ''}{one.note}")
        lines += [f"    {line}" for line in one.tail[-3:]] if one.state == "failed" else []
    if status.importance:
        shares = ", ".join(f"{name} {share:.2f}" for name, share in status.importance.items())
        lines.append(f"share of the variance explained (fANOVA): {shares}")
    if len(status.codes) > 1:
        lines.append(f"warning: {code_warning(status)}")
    return lines


def code_warning(status: Status) -> str:
    """That trials ran on different code, and which."""
    parts = ", ".join(f"{code} (trials {_ranges(numbers)})" for code, numbers in status.codes.items())
    return f"trials ran on different code, so their results may not be comparable: {parts}"


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def estimate_text(one: SettingStatus) -> str:
    """`mean ± half interval (n seeds)`."""
    if one.mean is None:
        return ""
    if one.low is None or one.high is None:
        return f"{one.mean:.4g}"
    return f"{one.mean:.4g} ± {(one.high - one.low) / 2:.2g} ({len(one.by_seed)} seeds)"


def _table(rows: Sequence[SettingStatus], status: Status) -> list[str]:
    names = list(dict.fromkeys(name for one in rows for name in one.values))
    header = ["setting", status.metric or "", *names]
    body = [
        [
            str(one.number),
            estimate_text(one),
            *(label(one.values[name]) if name in one.values else "" for name in names),
        ]
        for one in rows
    ]
    widths = [max(len(row[column]) for row in (header, *body)) for column in range(len(header))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, *body)
    ]


def _state(name: str) -> TrialState:
    return next(state for state in STATES if state == name)


def _ranges(numbers: Sequence[int]) -> str:
    """`0-3, 7` for 0, 1, 2, 3, 7."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)
