"""Records a baseline: the values and bands of expected.json, and `recorded/`, what a later FAIL is compared with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.errors import ConfigError
from rlhf.evidence.bands import MINIMUM_SEEDS, RULE, prediction_band
from rlhf.evidence.expected import Baseline, Check, Expected, write_expected
from rlhf.evidence.judging import value_of
from rlhf.evidence.record import RECORDED, RunRecord
from rlhf.runs.files import discard, write_json, write_text
from rlhf.runs.jsonable import dump_json
from rlhf.studies.arms import ARMS_FOLDER

# All metrics of a record together, in bytes; of longer runs every k-th logged step is kept.
METRICS_BYTES = 120_000
_THINNING = (1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000)
# Sections that say where and how a run lives, and may name somebody's folders.
_LEFT_OUT = ("run", "tracking", "plan", "launcher", "serve")
_LARGEST_SUMMARY = 20_000


def record_baseline(baseline: Baseline, runs: Mapping[int, RunRecord]) -> Baseline:
    """Writes values and bands of the seeds' runs into expected.json, and the first seed's run into `recorded/`.

    What is written by hand stays: names, metrics, sources, reasons, and the limits of claims. Raises `ConfigError` for
    fewer than three seeds, a number that a run does not have, or a band that no run could leave.
    """
    if len(runs) < MINIMUM_SEEDS:
        raise ConfigError(f"a band needs at least {MINIMUM_SEEDS} seeds, got {len(runs)}: set seeds=[1,2,3]")
    checks = tuple(_measured(check, runs) for check in baseline.expected.checks)
    first = next(iter(runs.values()))
    changes: dict[str, Any] = {
        "seeds": tuple(runs),
        "checks": checks,
        "seconds": {str(seed): round(_seconds(run), 1) for seed, run in runs.items()},
        "hardware": _hardware(first),
    }
    if any(not check.limits_by_hand for check in checks):
        changes["rule"] = RULE
    expected: Expected = baseline.expected.model_copy(update=changes)
    write_expected(baseline.path, expected)
    discard(baseline.recorded)
    _write_record(baseline.recorded, first, _every(first), top=True)
    return Baseline(baseline.path, expected)


def _measured(check: Check, runs: Mapping[int, RunRecord]) -> Check:
    values = {}
    for seed, run in runs.items():
        try:
            values[str(seed)] = value_of(check, run)
        except ConfigError as error:
            raise ConfigError(f"check {check.name!r}, seed {seed} ({run.path}): {error}") from error
    if not all(math.isfinite(value) for value in values.values()):
        raise ConfigError(f"check {check.name!r} has a value that is not finite: {values}")
    if check.limits_by_hand:
        return check.model_copy(update={"values": values})
    low, high = prediction_band(list(values.values()), check.range)
    if (low, high) == check.range:
        raise ConfigError(
            f"check {check.name!r} cannot fail: the band of its values, {_listed(values)}, is the whole range of the "
            f"metric, {low:g} to {high:g}. Give more seeds, whose band is narrower, or take the check out of "
            "expected.json. Runs that are finished are not run again"
        )
    return check.model_copy(
        update={"values": values, "low": _rounded(low, math.floor), "high": _rounded(high, math.ceil)}
    )


def _listed(values: Mapping[str, float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values.values())


def _rounded(value: float, outward: Any) -> float:
    """Six significant digits, away from the middle of the band."""
    if value == 0:
        return 0.0
    digits = 5 - math.floor(math.log10(abs(value)))
    # Through text, so that the file has no digits beyond those.
    return float(f"{outward(value * 10**digits) / 10**digits:.6g}")


def _seconds(run: RunRecord) -> float:
    seconds = run.manifest.get("seconds")
    return float(seconds) if isinstance(seconds, int | float) else 0.0


def _hardware(run: RunRecord) -> str:
    """`Intel Xeon, 2 cores, 1 thread a process`."""
    hardware = run.manifest.get("hardware")
    hardware = hardware if isinstance(hardware, Mapping) else {}
    parts = [str(gpu.get("name")) for gpu in hardware.get("gpus") or ()]
    parts += [str(hardware.get("cpu") or "unknown processor"), f"{hardware.get('cores')} cores"]
    threads = {stage.compute["num_threads"] for stage in run.stages.values() if "num_threads" in stage.compute}
    if len(threads) == 1:
        number = threads.pop()
        parts.append(f"{number} thread{'s' if number != 1 else ''} a process")
    return ", ".join(parts)


def _every(run: RunRecord) -> int:
    """Every how many logged steps are kept, so that all metrics together stay below `METRICS_BYTES`."""
    for every in _THINNING:
        if _size(run, every) <= METRICS_BYTES:
            return every
    return _THINNING[-1]


def _size(run: RunRecord, every: int) -> int:
    own = sum(len(dump_json(row)) + 1 for row in _kept(run, every))
    return own + sum(_size(arm, every) for arm in run.arms.values())


def _kept(run: RunRecord, every: int) -> list[Mapping[str, Any]]:
    """The lines of every k-th step of each stage, of the first two and of the last."""
    lines = []
    for stage in run.stages.values():
        steps = sorted({row.get("step", -1) for row in stage.rows})
        chosen = {*steps[:2], *steps[::every], *steps[-1:]}
        lines += [row for row in stage.rows if row.get("step", -1) in chosen]
    return lines


def _write_record(folder: Path, run: RunRecord, every: int, *, top: bool) -> None:
    stages = {}
    for name, stage in run.stages.items():
        summary = stage.summary
        if len(dump_json(summary)) > _LARGEST_SUMMARY:
            # Tables of many rows; the numbers that are judged stay.
            summary = {key: value for key, value in summary.items() if not isinstance(value, list)}
        stages[name] = {
            "status": stage.status,
            "seconds": stage.seconds,
            "outputs": stage.outputs,
            "summary": summary,
            "decided_by": _without_folders(stage.decided_by) if top else {},
            "compute": stage.compute,
        }
    body = {
        "schema": run.manifest.get("schema"),
        "status": run.status,
        "seed": run.seed,
        "seconds": run.manifest.get("seconds"),
        RECORDED: {"every": every},
        "code": run.manifest.get("code"),
        "packages": run.manifest.get("packages"),
        "hardware": run.manifest.get("hardware"),
        "data": run.manifest.get("data"),
        "stages": stages,
    }
    if top:
        config = run.manifest.get("config")
        config = config if isinstance(config, Mapping) else {}
        body["config"] = _without_folders({key: value for key, value in config.items() if key not in _LEFT_OUT})
    else:
        # The same as the study's own.
        for key in ("code", "packages", "hardware", "data"):
            body.pop(key)
    write_json(folder / "manifest.json", body)
    write_text(folder / "metrics.jsonl", "".join(dump_json(row) + "\n" for row in _kept(run, every)))
    for name, arm in run.arms.items():
        _write_record(folder / ARMS_FOLDER / name, arm, every, top=False)


def _without_folders(value: Any) -> Any:
    """The values with absolute paths cut to their last part: a record names nobody's folders."""
    if isinstance(value, Mapping):
        return {key: _without_folders(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_folders(item) for item in value]
    if isinstance(value, str) and (value.startswith("~") or Path(value).is_absolute()):
        return Path(value).name
    return value


def check_seeds(seeds: Sequence[int]) -> None:
    """Raises `ConfigError` for seeds that no band can be computed from."""
    if len(set(seeds)) != len(seeds):
        raise ConfigError(f"seeds names a seed twice: {list(seeds)}")
    if len(seeds) < MINIMUM_SEEDS:
        raise ConfigError(
            f"record=true needs at least {MINIMUM_SEEDS} seeds, got seeds={list(seeds)}: set seeds=[1,2,3], or leave "
            "seeds out to take these"
        )
