"""`rlhf report RUN...`: the command line of the comparison, its table in the console, and `--json`."""

from __future__ import annotations

import difflib
import glob
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.config import RLHFConfig
from rlhf.errors import EXIT_SUCCESS, ConfigError
from rlhf.runs.comparison.compare import Comparison, Test, compare
from rlhf.runs.comparison.folders import run_folders
from rlhf.runs.comparison.methods import Grouping, group_runs
from rlhf.runs.comparison.page import render_comparison
from rlhf.runs.comparison.records import Run
from rlhf.runs.comparison.tables import format_p, main_results, result_label
from rlhf.runs.files import write_text
from rlhf.runs.jsonable import dump_json
from rlhf.runs.report import render_report
from rlhf.runs.results import NONE, format_estimate, format_number
from rlhf.terminal import say, warn

OPTIONS = ("to", "group_by", "confidence")
PAGE = "comparison.html"


@dataclass(frozen=True)
class Request:
    """What the command line asks for."""

    folders: tuple[tuple[str | None, str], ...]
    to: str | None = None
    group_by: tuple[str, ...] = ()
    confidence: float = 0.95
    as_json: bool = False


def is_comparison(arguments: Sequence[str]) -> bool:
    """Whether `rlhf report ARGUMENTS` names run folders, by themselves or as LABEL=FOLDER, and not a config."""
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not argument.startswith("-") and not equals:
            return True
        if equals and name not in OPTIONS and _is_label(name) and _is_place(value):
            return True
    return False


def _is_place(text: str) -> bool:
    """A folder, a pattern of folders, or what is written as one: no value of a config's key looks like that."""
    return Path(text).expanduser().is_dir() or "/" in text or glob.has_magic(text)


def run_report(arguments: Sequence[str]) -> int:
    """Compares the runs, writes the page and prints a table. Raises `ConfigError`, `StorageError`."""
    request = read_arguments(arguments)
    if request.to is not None and Path(request.to).expanduser().is_dir():
        raise ConfigError(f"to={request.to} is a folder: name the file to write, such as to={request.to}/{PAGE}")
    runs = [Run.read(one.path, one.label) for one in run_folders(request.folders)]
    if len(runs) == 1 and not request.as_json:
        return _single(runs[0], request)
    grouping = group_runs(runs, request.group_by)
    comparison = compare(grouping.methods, confidence=request.confidence)
    _check_common(runs, comparison)
    page: Path | None = None
    if request.to is not None or not request.as_json:
        page = Path(request.to or PAGE).expanduser()
        write_text(page, render_comparison(grouping, comparison, request.confidence))
    if request.as_json:
        say(dump_json(as_json(grouping, comparison, request.confidence, page), indent=2))
        return EXIT_SUCCESS
    for note in [*grouping.notes, *comparison.notes]:
        warn(f"note: {note}")
    say(console_table(comparison))
    say(f"wrote {page}")
    return EXIT_SUCCESS


def read_arguments(arguments: Sequence[str]) -> Request:
    """The request. Raises `ConfigError` for an option that does not exist or a value that cannot be."""
    folders: list[tuple[str | None, str]] = []
    options: dict[str, str] = {}
    as_json = False
    for argument in arguments:
        if argument == "--json":
            as_json = True
            continue
        name, equals, value = argument.lstrip("-").partition("=")
        if not equals:
            if argument.startswith("-"):
                near = difflib.get_close_matches(name, ["json", *OPTIONS], n=1)
                hint = f"; did you mean {'--' if near[0] == 'json' else ''}{near[0]}?" if near else ""
                raise ConfigError(f"rlhf report: unknown option {argument}{hint}")
            folders.append((None, argument))
        elif name in OPTIONS:
            options[name] = value
        elif argument.startswith("-") or not _is_label(name):
            raise ConfigError(_unknown(argument, name))
        else:
            near = difflib.get_close_matches(name, OPTIONS, n=1, cutoff=0.8)
            if near and not Path(value).expanduser().exists():
                raise ConfigError(_unknown(argument, name))
            folders.append((name, value))
    return Request(
        tuple(folders),
        options.get("to"),
        tuple(key.strip() for key in options.get("group_by", "").strip("[]").split(",") if key.strip()),
        _confidence(options.get("confidence", "0.95")),
        as_json,
    )


def _is_label(name: str) -> bool:
    """Config keys and groups are none."""
    return bool(name) and "." not in name and not name.startswith("-") and name not in RLHFConfig.model_fields


def _unknown(argument: str, name: str) -> str:
    near = difflib.get_close_matches(name, OPTIONS, n=1)
    hint = f" Did you mean {near[0]}=?" if near else ""
    return (
        f"rlhf report with run folders takes FOLDER, LABEL=FOLDER, {', '.join(f'{name}=' for name in OPTIONS)} and "
        f"--json, not {argument}.{hint} Config keys belong to a report of one run: rlhf report experiment=NAME ..."
    )


def _confidence(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < 1:
        raise ConfigError(f"confidence={text}: expected a number between 0 and 1, both excluded, such as 0.95")
    return value


def _single(run: Run, request: Request) -> int:
    """One run has its own report."""
    page = run.folder.report if request.to is None else Path(request.to).expanduser()
    write_text(page, render_report(run.folder))
    say(f"wrote {page}: one run has nothing to be compared with, so this is its own report")
    return EXIT_SUCCESS


def _check_common(runs: Sequence[Run], comparison: Comparison) -> None:
    """Something must be there to compare. Raises `ConfigError`."""
    num_methods = len(comparison.methods)
    common = any(len(own) > 1 or num_methods == 1 for own in comparison.results.values())
    logged = [
        {name for of_stage in run.metrics.values() for _, numbers in of_stage for name in numbers} for run in runs
    ]
    if common or set.intersection(*logged):
        return
    listed = "\n".join(
        f"  {run.folder.path}: {', '.join(run.summaries) or 'no finished stage'}"
        + ("" if run.metrics else ", nothing logged")
        for run in runs[:10]
    )
    raise ConfigError(f"these runs have no result and no metric in common, so there is nothing to compare:\n{listed}")


def console_table(comparison: Comparison) -> str:
    """A short table of the main results, and of the tests of the judge's score."""
    names = main_results(comparison)[:5]
    rows = [["method", "seeds", *(result_label(name) for name in names)]]
    for method in comparison.methods:
        cells = [comparison.results[name].get(method.name) for name in names]
        shown = [NONE if one is None else format_estimate(one.estimate) for one in cells]
        rows.append([method.name, str(len(method.runs)), *shown])
    lines = _aligned(rows)
    tests = [test for test in comparison.tests if test.measure == "score"]
    if tests:
        rates = {(one.first, one.second): one for one in comparison.win_rates}
        rows = [["difference in the judge's score", "", "p (Holm)", "p, prompts (Holm)", "wins", "length-controlled"]]
        for test in tests:
            rate = rates.get((test.first, test.second))
            rows.append(_test_row(test, *(("", "") if rate is None else _percent(rate.rate, rate.controlled.win_rate))))
        lines += ["", *_aligned(rows)]
    return "\n".join(lines)


def _percent(*intervals: Any) -> tuple[str, ...]:
    return tuple(f"{one.value * 100:.1f} %" for one in intervals)


def _test_row(test: Test, wins: str, controlled: str) -> list[str]:
    found = test.difference
    interval = f"{format_number(found.value)} [{format_number(found.low)}, {format_number(found.high)}]"
    prompts = NONE if test.adjusted_prompts is None else format_p(test.adjusted_prompts)
    name = f"{test.first} \N{MINUS SIGN} {test.second}"
    return [name, interval, format_p(test.adjusted), prompts, wins, controlled]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def as_json(grouping: Grouping, comparison: Comparison, confidence: float, page: Path | None) -> dict[str, Any]:
    """The comparison as plain data."""
    return {
        "schema": "comparison/1",
        "confidence": confidence,
        "page": None if page is None else str(page),
        "notes": [*grouping.notes, *comparison.notes],
        "methods": [
            {
                "name": method.name,
                "seeds": method.seeds,
                "runs": [{"folder": run.folder.path, "seed": run.seed, "status": run.status} for run in method.runs],
            }
            for method in comparison.methods
        ],
        "differing_keys": {
            key: dict(zip((method.name for method in comparison.methods), values, strict=True))
            for key, values in grouping.differing.items()
        },
        "results": {
            name: {method: {**vars(one.estimate), "seeds": one.seeds} for method, one in own.items()}
            for name, own in comparison.results.items()
        },
        "tests": [{**vars(test), "difference": test.difference.to_json()} for test in comparison.tests],
        "win_rates": [_rate_json(one) for one in [*comparison.win_rates, *comparison.against_baseline.values()]],
        "ratings": {name: one.to_json() for name, one in comparison.ratings.items()},
    }


def _rate_json(one: Any) -> dict[str, Any]:
    return {
        "first": one.first,
        "second": one.second,
        "win_rate": one.rate.to_json(),
        "length_controlled": one.controlled.win_rate.to_json(),
        "length_effect": one.controlled.length_effect,
        "extrapolated": one.controlled.extrapolated,
        "num_prompts": one.num_prompts,
    }
