"""The comparison as one HTML file that opens without a network."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from rlhf.runs import figures, results
from rlhf.runs.comparison import tables
from rlhf.runs.comparison.assets import SCRIPT, STYLE
from rlhf.runs.comparison.compare import Comparison
from rlhf.runs.comparison.curves import AXES, charts, frontiers
from rlhf.runs.comparison.methods import Grouping, Method
from rlhf.runs.comparison.samples import collect_samples, to_script
from rlhf.runs.exhibits import Figure, Line, Panel
from rlhf.runs.report_assets import STYLE as REPORT_STYLE

SECTIONS = {
    "results": "Results",
    "tests": "Tests",
    "curves": "Learning curves",
    "frontier": "Reward and KL",
    "lengths": "Lengths",
    "samples": "Samples",
    "configs": "Configs and runs",
}
_NUM_BINS = 30


def render_comparison(grouping: Grouping, comparison: Comparison, confidence: float) -> str:
    """The page. All text of the runs is escaped, or put into the page as text by its only script.

    As with the report, a content security policy lets the browser run no other script and load nothing.
    """
    methods = comparison.methods
    colors = {method.name: figures.COLORS[index % len(figures.COLORS)] for index, method in enumerate(methods)}
    script_hash = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{script_hash}'"
    title = " · ".join(dict.fromkeys(str(run.config.get("experiment") or "run") for m in methods for run in m.runs))
    sections = {
        "results": _results(comparison, colors, confidence),
        "tests": _tests(comparison, colors, confidence),
        "curves": _curves(methods, colors, confidence),
        "frontier": _plots(frontiers(methods, comparison.results), colors),
        "lengths": _lengths(comparison, colors),
        "samples": _samples(methods),
        "configs": _configs(grouping, methods),
    }
    body = "".join(
        f'<section id="{name}"><h2>{SECTIONS[name]}</h2>{content}</section>'
        for name, content in sections.items()
        if content
    )
    links = "".join(f'<a href="#{name}">{SECTIONS[name]}</a>' for name, content in sections.items() if content)
    num_runs = sum(len(method.runs) for method in methods)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title[:80])} · rlhf comparison</title><style>{REPORT_STYLE}{STYLE}</style></head><body><main>"
        f"<header><h1>{len(methods)} method{'s' if len(methods) != 1 else ''} compared</h1>"
        f'<div class="meta"><span>{escape(title[:200])}</span><span>{num_runs} runs</span>'
        f"<span>{confidence * 100:g} % intervals</span></div><nav>{links}</nav></header>"
        f"{_notes(grouping, comparison)}{_legend(colors)}{body}</main><script>{SCRIPT}</script></body></html>\n"
    )


def _notes(grouping: Grouping, comparison: Comparison) -> str:
    notes = [*grouping.notes, *comparison.notes]
    if not notes:
        return ""
    return f'<ul class="notes" aria-label="Notes">{"".join(f"<li>{escape(note)}.</li>" for note in notes)}</ul>'


def _legend(colors: Mapping[str, str]) -> str:
    items = "".join(f"<li>{tables.swatch(color)}{escape(name)}</li>" for name, color in colors.items())
    return f'<ul class="methods" aria-label="Methods and their colours">{items}</ul>'


def _results(comparison: Comparison, colors: Mapping[str, str], confidence: float) -> str:
    if not comparison.results:
        return '<p class="empty card">No stage has finished in every seed of a method yet.</p>'
    return (
        f"{tables.results_table(comparison, colors, confidence)}"
        f"<details><summary>All results</summary>{tables.all_results_table(comparison)}</details>"
    )


def _tests(comparison: Comparison, colors: Mapping[str, str], confidence: float) -> str:
    if len(comparison.methods) < 2:
        return ""
    parts = []
    for measure in dict.fromkeys(test.measure for test in comparison.tests):
        tests = [test for test in comparison.tests if test.measure == measure]
        table = tables.tests_table(tests, confidence)
        name = tables.MEASURE_NAMES[measure]
        if measure == "score":
            parts.append(f"<h3>Difference in the {name}</h3>{table}{_explanation(comparison)}")
            parts.append(f"<h3>Who wins</h3>{tables.win_matrix(comparison, colors)}")
        else:
            parts.append(f"<details><summary>Difference in {escape(name)}</summary>{table}</details>")
    return "".join(parts)


def _explanation(comparison: Comparison) -> str:
    """What the p-values are about, in words."""
    tests = [test for test in comparison.tests if test.measure == "score"]
    lines = []
    if all(test.paired_seeds for test in tests):
        lines.append("Runs are paired by seed, responses by prompt.")
    else:
        lines.append(
            "Where the methods do not share seeds, their runs are not paired: the tests over seeds are unpaired there. "
            "Responses are paired by prompt."
        )
    lines.append(
        "<b>p, seeds and prompts</b> asks whether the methods differ on other seeds and other prompts; "
        "<b>p, prompts</b> (sign flips) whether these trained models differ on other prompts."
    )
    if any(test.p_seeds is not None for test in tests):
        lines.append(
            "<b>p, seeds</b> (sign flips, or permutations where seeds are not paired) asks whether the methods differ, "
            "each run being one number."
        )
    smallest = [2 / 2 ** test.num_seeds[0] for test in tests if test.p_seeds is not None and test.paired_seeds]
    if smallest and max(smallest) > tables.SIGNIFICANT:
        lines.append(
            f"With so few seeds the last one cannot be less than {max(smallest):g}, whatever the difference, and the "
            "bootstrap's interval is too narrow: there are few different resamples of the seeds."
        )
    return f'<p class="dim">{" ".join(lines)}</p>'


def _curves(methods: Sequence[Method], colors: Mapping[str, str], confidence: float) -> str:
    parts = []
    found = charts(methods, confidence)
    for stage, by_axis in found.items():
        bodies = []
        for axis, (main, others) in by_axis.items():
            fold = ""
            if others:
                fold = f"<details><summary>All other numbers</summary>{_plots(others, colors)}</details>"
            hidden = "" if axis == "step" else " hidden"
            bodies.append(f'<div data-axis="{axis}"{hidden}>{_plots(main, colors)}{fold}</div>')
        parts.append(f"<h3>{escape(results.label(stage))}</h3><div>{''.join(bodies)}</div>")
    if not parts:
        return ""
    used = [axis for axis in AXES if any(axis in by_axis for by_axis in found.values())]
    options = "".join(f'<option value="{axis}">{escape(AXES[axis][0])}</option>' for axis in used)
    tools = f'<div class="tools" id="axis-tools" hidden><label>Over <select id="axis">{options}</select></label></div>'
    several = any(len(method.runs) > 1 for method in methods)
    band = f"Lines are means over seeds, bands Student's {confidence * 100:g} % intervals." if several else ""
    return f'<p class="dim">{band}</p>{tools}{"".join(parts)}'


def _plots(drawn: Sequence[Figure], colors: Mapping[str, str]) -> str:
    if not drawn:
        return ""
    items = "".join(
        f'<figure class="plot">{figures.draw(one, standalone=False, colors=colors)}</figure>' for one in drawn
    )
    return f'<div class="figures">{items}</div>'


def _lengths(comparison: Comparison, colors: Mapping[str, str]) -> str:
    table = tables.length_table(comparison) if comparison.win_rates or comparison.against_baseline else ""
    note = (
        '<p class="dim">Length control after Dubois et al., arXiv 2404.04475: a logistic regression of the win on the '
        "length difference. Intervals are over prompts.</p>"
        if table
        else ""
    )
    histogram = _histogram(comparison.methods)
    drawn = _plots([histogram], colors) if histogram else ""
    return f"{table}{note}{drawn}{tables.lengths_table(comparison.methods)}"


def _histogram(methods: Sequence[Method]) -> Figure | None:
    """The distribution of lengths: the share of responses in each bin."""
    lengths = {
        method.name: [
            one.own.numbers["length"]
            for run in method.runs
            for one in run.answers.values()
            if "length" in one.own.numbers
        ]
        for method in methods
    }
    every = [length for own in lengths.values() for length in own]
    if not every:
        return None
    span = max(every) - min(every)
    width = max(1, round(span / _NUM_BINS + 0.49))
    edges = np.arange(min(every) - 0.5, max(every) + width + 0.5, width)
    lines = []
    for name, own in lengths.items():
        if own:
            shares = np.histogram(own, edges)[0] / len(own)
            centers = (edges[:-1] + edges[1:]) / 2
            lines.append(Line(name, tuple((float(x), float(y)) for x, y in zip(centers, shares, strict=True))))
    title = "Lengths of the responses"
    unit = "share of responses" if width == 1 else f"share of responses, bins of {width}"
    return Figure("lengths", title, (Panel(title, "tokens", unit, tuple(lines)),))


def _samples(methods: Sequence[Method]) -> str:
    samples = collect_samples(methods)
    if not samples.num_all:
        return ""
    orders = [("gap", "largest disagreement first"), ("given", "as evaluated")]
    for index, method in enumerate(methods) if len(methods) > 1 else ():
        orders.append((f"best-{index}", f"{method.name} ahead most"))
        orders.append((f"last-{index}", f"{method.name} behind most"))
    options = "".join(f'<option value="{value}">{escape(text)}</option>' for value, text in orders)
    seeds = sorted({run.seed for method in methods for run in method.runs if run.seed is not None})
    listed = "".join(f'<option value="{seed}">{seed}</option>' for seed in seeds)
    left = ""
    if samples.num_prompts < samples.num_all:
        left = (
            f'<p class="dim">The {samples.num_prompts} prompts of {samples.num_all} with the largest disagreement.</p>'
        )
    return (
        '<noscript><p class="empty card">The browser of samples needs scripts.</p></noscript>'
        '<div class="tools" id="samples-tools" hidden>'
        '<input id="samples-filter" type="search" placeholder="Filter by words" aria-label="Filter by words">'
        f'<label>Order <select id="samples-order">{options}</select></label>'
        f'<label>Seed <select id="samples-seed">{listed}<option value="all">all</option></select></label>'
        '<span class="dim" id="samples-count" role="status"></span></div>'
        f'{left}<div id="samples-list" data-colors="{",".join(figures.COLORS)}"></div>'
        '<div class="pager" id="samples-pager" hidden><button id="samples-back" type="button">Back</button>'
        '<span id="samples-page" class="dim"></span><button id="samples-next" type="button">Next</button></div>'
        f'<script type="application/json" id="samples-data">{to_script(samples.body)}</script>'
    )


def _configs(grouping: Grouping, methods: Sequence[Method]) -> str:
    keys = tables.keys_table(methods, grouping.differing) if grouping.differing else ""
    same = "" if keys else '<p class="dim">The configs differ in the seed alone.</p>'
    return f"{keys}{same}{tables.runs_table(methods)}{tables.packages_table(methods)}"
