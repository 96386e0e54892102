"""The study `closed_form` over several seeds: one table, one CSV and one plot of all its runs.

python -m rlhf.studies.closed_form_tables --out FOLDER RUN_FOLDER RUN_FOLDER ...
"""

from __future__ import annotations

import argparse
import csv
import io
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import fmean

from rlhf.errors import EXIT_SUCCESS, DataError, UserError
from rlhf.runs.files import write_text
from rlhf.runs.folder import RunFolder
from rlhf.runs.manifest import read_manifest
from rlhf.studies.closed_form_curve import Curve, flat

COLUMNS = (
    "seed",
    "algorithm",
    "beta",
    "gap",
    "objective",
    "optimal_objective",
    "expected_reward",
    "optimal_expected_reward",
    "kl",
    "optimal_kl",
    "responses",
    "seconds",
)
COLOURS = ("#2457d6", "#c2570c", "#18794e", "#9333ea", "#b4232c", "#7c8798")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 340, 280, 52, 10, 30, 44


@dataclass(frozen=True)
class SeedCurve:
    """A curve and the seed of its run."""

    seed: int
    curve: Curve


def read_runs(folders: Sequence[Path]) -> list[SeedCurve]:
    """The curves of all runs, those of unfinished studies as far as they are. Raises `DataError` for a run without."""
    found = []
    for folder in folders:
        run = RunFolder(folder)
        seed = read_manifest(run).get("seed")
        curves = [Curve.read(path) for path in sorted((run.stage("closed_form").path / "curves").glob("*.json"))]
        if not curves or not isinstance(seed, int):
            raise DataError(
                f"{folder} is not a run of the study closed_form: expected manifest.json with its seed and "
                "stages/closed_form/curves/*.json"
            )
        found += [SeedCurve(seed, curve) for curve in curves if curve is not None]
    return found


def as_csv(curves: Sequence[SeedCurve]) -> str:
    """One line a training: its seed, where it ended, and the optimum."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for one in sorted(curves, key=lambda one: (one.curve.beta, one.curve.algorithm, one.seed)):
        row = {"seed": one.seed, **flat(one.curve)}
        writer.writerow([f"{row[name]:.6g}" if isinstance(row[name], float) else row[name] for name in COLUMNS])
    return text.getvalue()


def as_markdown(curves: Sequence[SeedCurve]) -> str:
    """A table for each beta: mean and range of the gap over the seeds, and the means of what it is made of."""
    parts = []
    for beta in sorted({one.curve.beta for one in curves}):
        here = [one.curve for one in curves if one.curve.beta == beta]
        rows = [
            f"| β = {beta:g} | gap, mean | gap, range | E[r] − β·KL | E[r] | KL, nats | seconds |",
            "|---|---|---|---|---|---|---|",
        ]
        best = {curve.optimum for curve in here}
        rows.append(
            f"| optimum | 0 | | {fmean(one.objective for one in best):.3f} | "
            f"{fmean(one.expected_reward for one in best):.3f} | {fmean(one.kl for one in best):.2f} | |"
        )
        for algorithm in sorted({curve.algorithm for curve in here}, key=lambda name: _mean_gap(here, name)):
            own = [curve for curve in here if curve.algorithm == algorithm]
            gaps = [curve.last.gap for curve in own]
            rows.append(
                f"| {algorithm.upper()} | {fmean(gaps):.4f} | {min(gaps):.4f} … {max(gaps):.4f} | "
                f"{fmean(one.last.objective for one in own):.3f} | "
                f"{fmean(one.last.expected_reward for one in own):.3f} | "
                f"{fmean(one.last.kl for one in own):.2f} | {fmean(one.seconds for one in own):.0f} |"
            )
        parts.append("\n".join(rows))
    return "\n\n".join(parts) + "\n"


def _mean_gap(curves: Sequence[Curve], algorithm: str) -> float:
    return fmean(curve.last.gap for curve in curves if curve.algorithm == algorithm)


def as_svg(curves: Sequence[SeedCurve]) -> str:
    """The gap over the sampled responses, a panel for each beta: the mean of the seeds and, shaded, their range."""
    betas = sorted({one.curve.beta for one in curves})
    algorithms = list(dict.fromkeys(one.curve.algorithm for one in curves))
    gaps = [max(point.standing.gap, 1e-6) for one in curves for point in one.curve.points]
    low, high = 10 ** math.floor(math.log10(min(gaps))), max(1.5, 1.1 * max(gaps))
    panels = []
    for index, beta in enumerate(betas):
        chosen = [one.curve for one in curves if one.curve.beta == beta]
        body = _panel(chosen, algorithms, f"β = {beta:g}", low, high)
        panels.append(f'<g transform="translate({index * WIDTH} 0)">{body}</g>')
    legend = "".join(
        f'<rect x="{LEFT + 90 * index}" y="{HEIGHT + 6}" width="16" height="4" fill="{COLOURS[index % len(COLOURS)]}"/>'
        f'<text x="{LEFT + 22 + 90 * index}" y="{HEIGHT + 12}">{escape(name.upper())}</text>'
        for index, name in enumerate(algorithms)
    )
    width, height = WIDTH * len(betas), HEIGHT + 24
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="11"><rect width="{width}" height="{height}" fill="#fff"/>'
        f"{''.join(panels)}{legend}</svg>\n"
    )


def _panel(curves: Sequence[Curve], algorithms: Sequence[str], title: str, low: float, high: float) -> str:
    last = max(point.responses for curve in curves for point in curve.points)

    def place(responses: float, gap: float) -> tuple[float, float]:
        share = math.log(max(gap, low) / low) / math.log(high / low)
        return LEFT + responses / last * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    parts = [f'<text x="{LEFT}" y="18" font-weight="bold">{escape(title)}</text>']
    for exponent in range(round(math.log10(low)), 1):
        y = place(0, 10.0**exponent)[1]
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e1e4ea"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{10.0**exponent:g}</text>')
    for share in (0.0, 0.5, 1.0):
        x = place(share * last, low)[0]
        anchor = {0.0: "start", 0.5: "middle", 1.0: "end"}[share]
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 28}" text-anchor="{anchor}">{share * last:,.0f}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 12}" text-anchor="middle">sampled responses</text>')
    parts.append(f'<text transform="translate(11 {HEIGHT / 2}) rotate(-90)" text-anchor="middle">gap, log scale</text>')
    for index, algorithm in enumerate(algorithms):
        own = [curve for curve in curves if curve.algorithm == algorithm]
        if own:
            parts.append(_band(own, COLOURS[index % len(COLOURS)], place))
    return "".join(parts)


def _band(curves: Sequence[Curve], colour: str, place: object) -> str:
    assert callable(place)
    counts = [point.responses for point in curves[0].points]
    columns = [[curve.points[index].standing.gap for curve in curves] for index in range(len(counts))]

    def line(values: Sequence[float], order: int = 1) -> str:
        places = [place(count, value) for count, value in zip(counts, values, strict=True)][::order]
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)

    outline = f"{line([min(column) for column in columns])} {line([max(column) for column in columns], -1)}"
    return (
        f'<polygon points="{outline}" fill="{colour}" fill-opacity="0.15"/>'
        f'<polyline points="{line([fmean(column) for column in columns])}" fill="none" stroke="{colour}" '
        'stroke-width="1.8"/>'
    )


def main(arguments: Sequence[str]) -> int:
    """Writes results.csv and gaps.svg to `--out` and prints the table as Markdown."""
    parser = argparse.ArgumentParser(prog="python -m rlhf.studies.closed_form_tables", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders of experiment=closed_form, one a seed")
    parser.add_argument("--out", type=Path, required=True, help="folder for results.csv and gaps.svg")
    options = parser.parse_args(arguments)
    try:
        curves = read_runs(options.runs)
        options.out.mkdir(parents=True, exist_ok=True)
        write_text(options.out / "results.csv", as_csv(curves))
        write_text(options.out / "gaps.svg", as_svg(curves))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(as_markdown(curves))
    return EXIT_SUCCESS


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
