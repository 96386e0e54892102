"""`rlhf diff A B`: what two runs were made of, and where their numbers part."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rlhf.errors import EXIT_FAILURE, EXIT_SUCCESS, ConfigError
from rlhf.evidence.difference import Difference, StageDifference, compare
from rlhf.evidence.facts import Fact, show
from rlhf.evidence.record import RunRecord, read_record
from rlhf.evidence.steps import Divergence
from rlhf.terminal import say

USAGE = """usage: rlhf diff A B [--json] [--exit-code]
A and B are run folders, or the recorded/ folder of a baseline. --exit-code: 1 where they are not identical."""
_FLAGS = ("--json", "--exit-code")
_FACTS = {
    "results": "config, decides results",
    "seed": "seed",
    "data": "data",
    "content": "files and input models",
    "rounding": "config, decides rounding",
    "nothing": "config, decides nothing here",
    "code": "code",
    "packages": "packages",
    "hardware": "hardware",
    "compute": "computed",
}


def run_diff(arguments: Sequence[str]) -> int:
    """The verb. 0 when the comparison worked; with --exit-code 1 where the runs are not identical."""
    folders = [argument for argument in arguments if argument not in _FLAGS]
    wrong = [argument for argument in folders if argument.startswith("--")]
    if wrong:
        raise ConfigError(f"unknown flag {wrong[0]}\n{USAGE}")
    if len(folders) != 2:
        raise ConfigError(f"expected two folders, got {len(folders)}\n{USAGE}")
    difference = compare(*(read_record(Path(folder)) for folder in folders))
    if "--json" in arguments:
        print(json.dumps(to_json(difference), indent=2))
    else:
        for line in render(difference):
            say(line)
    return EXIT_FAILURE if "--exit-code" in arguments and not difference.identical else EXIT_SUCCESS


def headline(difference: Difference) -> str:
    """The verdict in one sentence."""
    so_far = " as far as both have come" if difference.partial else ""
    if difference.empty:
        return "nothing to compare: the runs have no line of metrics and no finished stage in common"
    if difference.verdict == "identical":
        return f"identical{so_far}"
    found = difference.first_divergence(beyond_rounding=difference.verdict == "different")
    if found is None:
        return _without_numbers(difference) + so_far
    arm, part = found
    where = f"arm {arm}, " if arm else ""
    if difference.verdict == "rounding":
        return (
            f"equal to rounding{so_far} (max relative {_short(difference.largest)}; first at {where}{part.describe()})"
        )
    text = f"diverging at {where}{part.describe()}"
    earlier = difference.first_divergence()
    if earlier is not None and (earlier[0], earlier[1].place) != (arm, part.place):
        text += f"; differing by rounding from {f'arm {earlier[0]}, ' if earlier[0] else ''}{earlier[1].describe()} on"
    return text


def _without_numbers(difference: Difference) -> str:
    """Runs whose common numbers are equal and that differ all the same."""
    parts = []
    only = [(difference.only_first, "the first"), (difference.only_second, "the second")]
    parts += [f"{', '.join(names)} of {who} alone" for names, who in only if names]
    for name, one in [("", difference), *difference.arms.items()]:
        prefix = f"arm {name}, " if name else ""
        for stage in one.stages:
            differing = [output for output, equal in stage.outputs.items() if not equal]
            if differing:
                parts.append(f"{prefix}the output {', '.join(differing)} of stage {stage.name}")
            if stage.steps.unmatched:
                parts.append(f"{prefix}{stage.name} step {stage.steps.unmatched[0]} was logged by one alone")
        if one.samples is not None:
            parts.append(f"{prefix}samples.jsonl from line {one.samples[0]} on ({one.samples[1]})")
    return f"different, although the common numbers are identical: {'; '.join(parts)}"


def render(difference: Difference) -> Iterator[str]:
    """The comparison as lines of text."""
    yield f"first   {_title(difference.first)}"
    yield f"second  {_title(difference.second)}"
    yield ""
    yield headline(difference)
    for name, title in _FACTS.items():
        found: tuple[Fact, ...] = getattr(difference.facts, name)
        if found:
            yield ""
            yield f"{title}:"
            width = min(60, max(len(fact.name) for fact in found))
            yield from (f"  {fact.name:<{width}}  {show(fact.first)}  {show(fact.second)}" for fact in found)
    yield from _stage_lines(difference, "")
    for names, who in ((difference.only_first, "first"), (difference.only_second, "second")):
        if names:
            yield f"in the {who} alone: {', '.join(names)}"


def _title(run: RunRecord) -> str:
    kind = "recorded" if run.is_recorded else run.status
    arms = f", {len(run.arms)} arms" if run.arms else ""
    return f"{run.path}  ({kind}, seed {run.seed}, stages {', '.join(run.stages) or 'none'}{arms})"


def _stage_lines(difference: Difference, arm: str) -> Iterator[str]:
    if difference.stages:
        yield ""
        yield f"stages{f' of arm {arm}' if arm else ''}:"
    for stage in difference.stages:
        yield from _of_stage(stage)
    if difference.samples is not None:
        yield f"  samples.jsonl: differs from line {difference.samples[0]} on ({difference.samples[1]})"
    for name, inner in difference.arms.items():
        if inner.verdict == "identical":
            yield f"arm {name}: identical{' as far as both have come' if inner.partial else ''}"
        else:
            yield from _stage_lines(inner, f"{arm}/{name}".lstrip("/"))


def _of_stage(stage: StageDifference) -> Iterator[str]:
    steps = stage.steps
    lines = (
        f"{steps.num_compared} lines"
        if steps.num_first == steps.num_second
        else (f"{steps.num_compared} common lines of {steps.num_first} and {steps.num_second}")
    )
    outputs = ", ".join(f"{name} {'equal' if equal else 'differs'}" for name, equal in stage.outputs.items())
    text = f"  {stage.name}: {stage.verdict}, {lines}{f'; outputs: {outputs}' if outputs else ''}"
    if stage.partial:
        text += f"; {stage.statuses[0]} and {stage.statuses[1]}"
    yield text
    if stage.first is not None:
        yield f"    first difference: {stage.first.describe()}"
    if stage.beyond is not None and stage.first is not None and stage.beyond.place != stage.first.place:
        yield f"    beyond rounding:  {stage.beyond.describe()}"
    if steps.growth:
        yield "    largest so far:   " + ", ".join(f"step {step}: {_short(value)}" for step, value in steps.growth)
    if steps.unmatched:
        shown = ", ".join(map(str, steps.unmatched[:6]))
        yield f"    logged by one alone: step {shown}{' and more' if len(steps.unmatched) > 6 else ''}"


def _short(value: float) -> str:
    return "infinite" if math.isinf(value) else f"{value:.2g}"


def to_json(difference: Difference) -> dict[str, Any]:
    """The comparison for machines."""
    found = difference.first_divergence(beyond_rounding=difference.verdict == "different")
    return {
        "first": str(difference.first.path),
        "second": str(difference.second.path),
        "verdict": difference.verdict,
        "partial": difference.partial,
        "headline": headline(difference),
        "largest_relative_difference": _finite(difference.largest),
        "first_divergence": None if found is None else {"arm": found[0], **_divergence(found[1])},
        "facts": {name: [vars(fact) for fact in getattr(difference.facts, name)] for name in _FACTS},
        "code_known": difference.facts.code_known,
        "stages": {stage.name: _stage_json(stage) for stage in difference.stages},
        "samples_differ_from_line": None if difference.samples is None else difference.samples[0],
        "only_first": list(difference.only_first),
        "only_second": list(difference.only_second),
        "arms": {name: to_json(arm) for name, arm in difference.arms.items()},
    }


def _stage_json(stage: StageDifference) -> dict[str, Any]:
    return {
        "verdict": stage.verdict,
        "statuses": list(stage.statuses),
        "num_lines": [stage.steps.num_first, stage.steps.num_second],
        "num_compared": stage.steps.num_compared,
        "largest_relative_difference": _finite(stage.largest),
        "first_divergence": None if stage.first is None else _divergence(stage.first),
        "beyond_rounding": None if stage.beyond is None else _divergence(stage.beyond),
        "growth": [[step, _finite(value)] for step, value in stage.steps.growth],
        "outputs_equal": dict(stage.outputs),
        "unmatched_steps": list(stage.steps.unmatched),
    }


def _divergence(part: Divergence) -> dict[str, Any]:
    return {**vars(part), "relative": _finite(part.relative)}


def _finite(value: float) -> float | str:
    """JSON has no infinity."""
    return value if math.isfinite(value) else "infinite"
