"""The page's tables. All text is escaped; every table says by its caption what is in it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from rlhf.runs import results
from rlhf.runs.comparison.compare import Comparison, Result, Test, WinRate
from rlhf.runs.comparison.methods import Method
from rlhf.runs.comparison.records import EVALUATE
from rlhf.runs.results import NONE, Estimate, format_number
from rlhf.statistics import Interval, LengthControlled

# Results of the evaluation that the first table has, in this order, as far as they are there.
MAIN = (
    "win_rate",
    "gold_score",
    "positive_probability",
    "judge_score",
    "reward_model_score",
    "kl_to_reference",
    "response_length",
)
# Where there is no evaluation: so many results of the last stage.
NUM_OTHERS = 5
MEASURE_NAMES = {
    "score": "judge's score",
    "reward_model_score": "reward model's score",
    "kl": "KL to the reference",
    "length": "tokens",
}
SIGNIFICANT = 0.05


def swatch(color: str) -> str:
    """A patch of a method's colour."""
    return f'<span class="swatch" style="background:{color}" aria-hidden="true"></span>'


def wrapping(name: str) -> str:
    """A name that may go on in the next line where its words end."""
    return escape(name).replace("=", "=<wbr>")


def _named(name: str, colors: Mapping[str, str]) -> str:
    return f'<span class="named">{swatch(colors[name])}<span>{wrapping(name)}</span></span>'


def main_results(comparison: Comparison) -> list[str]:
    """The results to show first, by `stage/name`: of the evaluation, else of the last stage that all methods have."""
    found = [f"{EVALUATE}/{name}" for name in MAIN if f"{EVALUATE}/{name}" in comparison.results]
    if found:
        return found
    common = [name for name, own in comparison.results.items() if len(own) == len(comparison.methods)]
    last = common[-1].partition("/")[0] if common else ""
    return [name for name in common if name.startswith(f"{last}/")][:NUM_OTHERS]


def result_label(name: str) -> str:
    """A result's name for people, with its stage unless it is the evaluation's."""
    stage, _, rest = name.partition("/")
    return results.label(rest) if stage == EVALUATE else f"{results.label(rest)} ({results.label(stage)})"


def results_table(comparison: Comparison, colors: Mapping[str, str], confidence: float) -> str:
    """A method a row: seeds, prompts and the main results with their intervals."""
    names = main_results(comparison)
    heads = "".join(f'<th scope="col" class="n">{escape(result_label(name))}</th>' for name in names)
    lines = []
    for method in comparison.methods:
        cells = "".join(f'<td class="n">{_result(comparison.results[name], method)}</td>' for name in names)
        prompts = sorted({len(run.answers) for run in method.runs if run.answers})
        count = (
            NONE if not prompts else f"{prompts[0]:,}" if len(prompts) == 1 else f"{prompts[0]:,} to {prompts[-1]:,}"
        )
        lines.append(
            f'<tr><th scope="row" class="method">{_named(method.name, colors)}</th>'
            f'<td class="n">{len(method.runs)}</td><td class="n">{count}</td>{cells}</tr>'
        )
    caption = (
        f"Means with {confidence * 100:g} % intervals: Student's over seeds where there are several, else the run's "
        "own over prompts."
    )
    return _table(
        caption,
        f'<th scope="col">Method</th><th scope="col" class="n">Seeds</th><th scope="col" class="n">Prompts</th>{heads}',
        lines,
    )


def all_results_table(comparison: Comparison) -> str:
    """A result a row, a method a column."""
    heads = "".join(f'<th scope="col" class="n method">{wrapping(one.name)}</th>' for one in comparison.methods)
    lines = [
        f'<tr><th scope="row"><code>{escape(name)}</code></th>'
        + "".join(f'<td class="n">{_result(own, method)}</td>' for method in comparison.methods)
        + "</tr>"
        for name, own in comparison.results.items()
    ]
    return _table("All results.", f'<th scope="col">Result</th>{heads}', lines)


def tests_table(tests: Sequence[Test], confidence: float) -> str:
    """The tests of one measure, a pair of methods a row."""
    seeds = any(test.p_seeds is not None for test in tests)
    lines = []
    for test in tests:
        found = test.difference
        effect = NONE if found.effect_size is None else f"{found.effect_size:.2f}"
        lines.append(
            f'<tr><th scope="row" class="method">{wrapping(test.first)} \N{MINUS SIGN} {wrapping(test.second)}</th>'
            f'<td class="n">{_interval(Interval(found.value, found.low, found.high))}</td>'
            f'<td class="n">{format_number(found.bootstrap_low)} to {format_number(found.bootstrap_high)}</td>'
            f'<td class="n">{effect}</td>'
            f'<td class="n">{_p(found.p_value, test.adjusted)}</td>'
            f'<td class="n">{_p(test.p_prompts, test.adjusted_prompts)}</td>'
            + (f'<td class="n">{_p(test.p_seeds, test.adjusted_seeds)}</td>' if seeds else "")
            + f'<td class="n">{_counts(test)}<span class="range">{test.num_prompts:,} prompts</span></td></tr>'
        )
    heads = ["Difference", "Paired bootstrap", "Effect size d", "p, seeds and prompts", "p, prompts"] + (
        ["p, seeds"] if seeds else []
    )
    heads.append("Seeds, prompts")
    shown = "".join(f'<th scope="col" class="n">{head}</th>' for head in heads)
    pairs = "one pair" if len(tests) == 1 else f"{len(tests)} pairs"
    caption = (
        f"Differences with {confidence * 100:g} % intervals: Student's for seeds and prompts together, then the "
        f"bootstrap that resamples both. Under each p-value Holm's correction for the {pairs} of this table."
    )
    return _table(caption, f'<th scope="col">Methods</th>{shown}', lines)


def win_matrix(comparison: Comparison, colors: Mapping[str, str]) -> str:
    """How often the row's response scores higher than the column's on the same prompt."""
    rates = {(one.first, one.second): one for one in comparison.win_rates}
    heads = "".join(f'<th scope="col" class="method">{wrapping(one.name)}</th>' for one in comparison.methods)
    lines = []
    for row in comparison.methods:
        cells = "".join(_win_cell(row.name, column.name, rates) for column in comparison.methods)
        rating = comparison.ratings.get(row.name)
        points = f'<td class="n">{_points(rating)}</td>' if comparison.ratings else ""
        lines.append(f'<tr><th scope="row" class="method">{_named(row.name, colors)}</th>{cells}{points}</tr>')
    rated = '<th scope="col" class="n">Rating</th>' if comparison.ratings else ""
    caption = "Share of prompts on which the row's response scores higher than the column's, ties half."
    if comparison.ratings:
        caption += (
            " Ratings are Bradley and Terry's in Elo points (400 points are odds of ten to one), mean 0; their "
            "intervals are over prompts alone and speak of these trained models."
        )
    return _table(caption, f'<th scope="col">Wins against</th>{heads}{rated}', lines, "matrix")


def length_table(comparison: Comparison) -> str:
    """Win rates with and without the effect of length, against each other and against the baselines."""
    pairs = [*comparison.win_rates, *comparison.against_baseline.values()]
    lines = [
        f'<tr><th scope="row" class="method">{wrapping(one.first)} against {wrapping(one.second)}</th>'
        f'<td class="n">{_share(one.rate)}</td><td class="n">{_controlled(one.controlled)}</td>'
        f'<td class="n">{_effect(one.controlled.length_effect)}</td><td class="n">{one.num_prompts:,}</td></tr>'
        for one in pairs
    ]
    heads = ("Win rate", "Length-controlled", "Effect of length", "Prompts")
    shown = "".join(f'<th scope="col" class="n">{head}</th>' for head in heads)
    return _table(
        "Length-controlled: what the win rate would be at equal lengths in characters; where one side is the longer "
        "one on every prompt, the data does not tell. Effect of length: the coefficient of tanh(length difference / "
        "its standard deviation) in the log-odds of a win.",
        f'<th scope="col">Methods</th>{shown}',
        lines,
    )


def _controlled(one: LengthControlled) -> str:
    """The rate, and where there is no response of either side near equal lengths, that the data does not tell it."""
    return _share(one.win_rate) + ('<span class="range">not told by the data</span>' if one.extrapolated else "")


def _effect(value: float) -> str:
    return NONE if math.isnan(value) else f"{value:+.2f}"


def lengths_table(methods: Sequence[Method]) -> str:
    """Quantiles of the responses' lengths in tokens."""
    lines = []
    for method in methods:
        lengths = [
            one.own.numbers["length"]
            for run in method.runs
            for one in run.answers.values()
            if "length" in one.own.numbers
        ]
        if lengths:
            numbers = [float(np.mean(lengths)), *map(float, np.quantile(lengths, [0.1, 0.5, 0.9]))]
            cells = "".join(f'<td class="n">{format_number(value)}</td>' for value in numbers)
            lines.append(f'<tr><th scope="row" class="method">{wrapping(method.name)}</th>{cells}</tr>')
    if not lines:
        return ""
    heads = "".join(f'<th scope="col" class="n">{head}</th>' for head in ("Mean", "10 %", "Median", "90 %"))
    return _table("Lengths of the responses in tokens.", f'<th scope="col">Method</th>{heads}', lines)


def keys_table(methods: Sequence[Method], differing: Mapping[str, Sequence[str]]) -> str:
    """The config keys in which the methods differ."""
    heads = "".join(f'<th scope="col" class="method">{wrapping(one.name)}</th>' for one in methods)
    lines = [
        f'<tr><th scope="row"><code>{escape(key)}</code></th>'
        + "".join(f"<td>{escape(value)}</td>" for value in values)
        + "</tr>"
        for key, values in differing.items()
    ]
    return _table("Config keys in which the methods differ.", f'<th scope="col">Key</th>{heads}', lines)


def runs_table(methods: Sequence[Method]) -> str:
    """Every run: where it is, its seed, its status, its code."""
    lines = []
    for method in methods:
        for run in method.runs:
            code = run.manifest.get("code")
            commit = str(code.get("commit") or "")[:10] if isinstance(code, Mapping) else ""
            if commit and isinstance(code, Mapping) and code.get("diff_hash"):
                commit += " with changes"
            seconds = run.manifest.get("seconds")
            lines.append(
                f'<tr><th scope="row" class="method">{wrapping(method.name)}</th>'
                f'<td class="n">{NONE if run.seed is None else run.seed}</td>'
                f'<td><span class="chip {escape(run.status, quote=True)}">{escape(run.status)}</span></td>'
                f'<td class="n">{results.format_seconds(seconds) if isinstance(seconds, int | float) else NONE}</td>'
                f"<td>{escape(commit) or NONE}</td>"
                f'<td class="method"><code>{escape(str(run.folder.path))}</code></td></tr>'
            )
    heads = '<th scope="col">Method</th><th scope="col" class="n">Seed</th><th scope="col">Status</th>'
    heads += '<th scope="col" class="n">Time</th><th scope="col">Code</th><th scope="col">Folder</th>'
    return _table("The runs.", heads, lines)


def packages_table(methods: Sequence[Method]) -> str:
    """The packages whose versions differ between runs; empty when none does."""
    versions: dict[str, dict[str, list[str]]] = {}
    for method in methods:
        for run in method.runs:
            packages = run.manifest.get("packages")
            for name, version in packages.items() if isinstance(packages, Mapping) else ():
                versions.setdefault(str(name), {}).setdefault(str(version), []).append(
                    f"{method.name}, seed {run.seed}"
                )
    lines = [
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(version)}</td><td>{escape("; ".join(runs))}</td></tr>'
        for name, found in sorted(versions.items())
        if len(found) > 1
        for version, runs in found.items()
    ]
    heads = '<th scope="col">Package</th><th scope="col">Version</th><th scope="col">Runs</th>'
    return _table("Packages whose versions differ.", heads, lines) if lines else ""


def _table(caption: str, heads: str, lines: Sequence[str], kind: str = "") -> str:
    named = f' class="{kind}"' if kind else ""
    return (
        f'<div class="tablebox" tabindex="0" role="region" aria-label="{escape(caption)}"><table{named}>'
        f"<caption>{escape(caption)}</caption><thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _result(results_by_method: Mapping[str, Result], method: Method) -> str:
    """The method's estimate, with the number of its runs that have the result where not all have."""
    result = results_by_method.get(method.name)
    if result is None:
        return NONE
    count, num_runs = len(result.seeds), len(method.runs)
    few = "" if count == num_runs else f'<span class="range">{count} of {num_runs} seeds</span>'
    return _estimate(result.estimate) + few


def _estimate(one: Estimate) -> str:
    if one.low is None or one.high is None:
        return format_number(one.value)
    return _interval(Interval(one.value, one.low, one.high))


def _interval(one: Interval) -> str:
    ends = f"{format_number(one.low)} to {format_number(one.high)}"
    return f'{format_number(one.value)}<span class="range">{ends}</span>'


def _p(value: float | None, adjusted: float | None) -> str:
    if value is None or adjusted is None:
        return NONE
    strong = ' class="strong"' if adjusted < SIGNIFICANT else ""
    return f'<span{strong}>{format_p(value)}</span><span class="range">Holm {format_p(adjusted)}</span>'


def format_p(value: float) -> str:
    """Two digits, and no p-value of 0."""
    return "< 0.0001" if value < 1e-4 else f"{value:.2g}" if value < 0.1 else f"{value:.2f}"


def _counts(test: Test) -> str:
    one, other = test.num_seeds
    return f"{one} paired" if test.paired_seeds else f"{one} and {other}"


def _win_cell(row: str, column: str, rates: Mapping[tuple[str, str], WinRate]) -> str:
    if row == column:
        return '<td class="self">\N{MIDDLE DOT}</td>'
    rate = rates.get((row, column))
    mirrored = rates.get((column, row))
    if rate is not None:
        return f"<td>{_share(rate.rate)}</td>"
    if mirrored is None:
        return f'<td class="self">{NONE}</td>'
    one = mirrored.rate
    return f"<td>{_share(Interval(1 - one.value, 1 - one.high, 1 - one.low))}</td>"


def _share(one: Interval) -> str:
    ends = f"{one.low * 100:.1f} to {one.high * 100:.1f} %"
    return f'{one.value * 100:.1f} %<span class="range">{ends}</span>'


def _points(one: Interval | None) -> str:
    return NONE if one is None else f'{one.value:+.0f}<span class="range">{one.low:+.0f} to {one.high:+.0f}</span>'
