"""Charts as inline SVG: no script, no font, no file besides. Colours come from the page's CSS variables.

Classes used: `chart grid axis tick label note line path dot hit bar mark interval`; `s0 s1 s2` are colours.
Every point has a `<title>`, which browsers show on hover.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TypeVar

from rlhf.runs.results import Estimate

WIDTH, HEIGHT = 360, 210
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 10, 36
MAX_LINE_POINTS = 400
MAX_HOVER_POINTS = 120
FEW_POINTS = 12
# A y beyond it (NaN, too) is a gap: the range of larger ones would overflow.
LARGEST = 1e300
PointT = TypeVar("PointT")


@dataclass(frozen=True)
class Series:
    """A named line; a y of None is a gap."""

    name: str
    points: Sequence[tuple[float, float | None]]


@dataclass(frozen=True)
class Scale:
    """Maps values of [low, high] linearly to pixels [start, end]."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """The pixel of `value`."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten) that lie within [low, high]."""
    if not (math.isfinite(low) and math.isfinite(high)) or high <= low:
        return [low]
    step = _step(low, high, count)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    digits = max(0, -math.floor(math.log10(step)))
    return [round(index * step, digits) + 0.0 for index in range(first, last + 1)]


def _step(low: float, high: float, count: int) -> float:
    """The round distance whose number of intervals in [low, high] is nearest to `count`, by ratio."""
    power = 10.0 ** math.floor(math.log10((high - low) / count))
    steps = [factor * power for factor in (1, 2, 5, 10)]
    return min(steps, key=lambda step: abs(math.log((high - low) / step / count)))


def line_chart(title: str, series: Sequence[Series], *, x_label: str, y_label: str) -> str:
    """A figure with one line a series over a common axis; empty when no series has a finite point."""
    shown = [(index, one.name, _finite_runs(one)) for index, one in enumerate(series)]
    shown = [(index, name, runs) for index, name, runs in shown if runs]
    points = [point for _, _, runs in shown for run in runs for point in run]
    if not points:
        return ""
    first, last = _padded([x for x, _ in points], margin=0.0)
    x_scale = Scale(0.0 if 0 < first < 0.2 * last else first, last, LEFT, WIDTH - RIGHT)
    y_scale = Scale(*_padded([y for _, y in points], margin=0.06), HEIGHT - BOTTOM, TOP)
    body = [_axes(x_scale, y_scale, x_label, y_label)]
    for index, name, runs in shown:
        total = sum(map(len, runs))
        for run in runs:
            body.append(_polyline(_thinned(run, MAX_LINE_POINTS), x_scale, y_scale, index))
            dot = "dot" if total <= FEW_POINTS else "hit"
            for x, y in _evenly(run, MAX_HOVER_POINTS):
                text = f"{name}, {x_label} {_tick_text(x)}: {_exact(y)}"
                body.append(_circle(x_scale(x), y_scale(y), f"{dot} s{index % 3}", text))
    return _figure(title, body, [name for _, name, _ in shown])


def path_chart(title: str, points: Sequence[tuple[float, float, float]], *, x_label: str, y_label: str) -> str:
    """The way through (x, y) over the steps: points (x, y, step) joined in order, the first and last one marked."""
    finite = [point for point in points if all(math.isfinite(value) for value in point)]
    if not finite:
        return ""
    x_scale = Scale(*_padded([x for x, _, _ in finite], margin=0.05), LEFT, WIDTH - RIGHT)
    y_scale = Scale(*_padded([y for _, y, _ in finite], margin=0.08), HEIGHT - BOTTOM, TOP)
    shown = _evenly(finite, MAX_HOVER_POINTS)
    body = [_axes(x_scale, y_scale, x_label, y_label)]
    body.append(_polyline([(x, y) for x, y, _ in shown], x_scale, y_scale, 0, kind="line path"))
    for position, (x, y, step) in enumerate(shown):
        share = position / max(1, len(shown) - 1)
        text = f"step {_tick_text(step)}: {x_label} {_exact(x)}, {y_label} {_exact(y)}"
        body.append(_circle(x_scale(x), y_scale(y), "dot s0", text, radius=2.6, opacity=0.25 + 0.75 * share))
    for x, y, step in {shown[0], shown[-1]}:
        right = x_scale(x) > WIDTH * 0.75
        body.append(
            f'<text class="note" x="{x_scale(x) + (-7 if right else 7):.1f}" y="{y_scale(y) - 7:.1f}"'
            f' text-anchor="{"end" if right else "start"}">step {_tick_text(step)}</text>'
        )
    return _figure(title, body, [])


def interval_bar(
    before: Estimate | None, after: Estimate, *, bounds: tuple[float, float] | None, mark: float | None
) -> str:
    """One row's intervals on its own scale: before above, after below. `mark` is a value to compare with."""
    rows = [(name, one) for name, one in (("before", before), ("after", after)) if one is not None]
    values = [value for _, one in rows for value in (one.value, one.low, one.high) if value is not None]
    # A single estimate has nothing beside it to be compared with, so its axis shows zero.
    context = [] if mark is None else [mark]
    low, high = bounds or _rounded(*_padded([*values, *context, *([0.0] if len(rows) == 1 else [])], margin=0.0))
    scale = Scale(low, high, 8, 192)
    body = ['<line class="axis" x1="8" x2="192" y1="30" y2="30"/>']
    for end, anchor in ((low, "start"), (high, "end")):
        body.append(_tick(scale(end), 41, _tick_text(end), anchor))
    if mark is not None:
        body.append(f'<line class="mark" x1="{scale(mark):.1f}" x2="{scale(mark):.1f}" y1="2" y2="30"/>')
    for position, (name, one) in enumerate(rows):
        y = 16 if len(rows) == 1 else (10, 22)[position]
        kind = "s2" if name == "before" else "s0"
        text = f"{name}: {_exact(one.value)}"
        if one.low is not None and one.high is not None:
            text += f" [{_exact(one.low)}, {_exact(one.high)}]"
            ends = f'x1="{scale(one.low):.1f}" x2="{scale(one.high):.1f}" y1="{y}" y2="{y}"'
            body.append(f'<line class="bar {kind}" {ends}/>')
        body.append(_circle(scale(one.value), y, f"dot {kind}", text, radius=4.0))
    return f'<svg class="interval" viewBox="0 0 200 44" role="img">{"".join(body)}</svg>'


def _figure(title: str, body: Sequence[str], names: Sequence[str]) -> str:
    legend = ""
    if len(names) > 1:
        items = "".join(f'<span class="key s{index % 3}">{escape(name)}</span>' for index, name in enumerate(names))
        legend = f'<span class="legend">{items}</span>'
    return (
        f'<figure class="chart"><figcaption>{escape(title)}{legend}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(body)}</svg></figure>'
    )


def _axes(x_scale: Scale, y_scale: Scale, x_label: str, y_label: str) -> str:
    parts = []
    for value in ticks(y_scale.low, y_scale.high, 4):
        y = y_scale(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_tick(LEFT - 6, y + 3.5, _tick_text(value), "end"))
    bottom = HEIGHT - BOTTOM
    for value in ticks(x_scale.low, x_scale.high, 5):
        x = x_scale(value)
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
        parts.append(_tick(x, bottom + 16, _tick_text(value), "middle"))
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="label" x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text>')
    center = (TOP + bottom) / 2
    parts.append(
        f'<text class="label" x="11" y="{center}" text-anchor="middle" transform="rotate(-90 11 {center})">'
        f"{escape(y_label)}</text>"
    )
    return "".join(parts)


def _tick(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text class="tick" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _polyline(
    points: Sequence[tuple[float, float]], x_scale: Scale, y_scale: Scale, index: int, kind: str = "line"
) -> str:
    if len(points) < 2:
        return ""
    coordinates = " ".join(f"{x_scale(x):.1f},{y_scale(y):.1f}" for x, y in points)
    return f'<polyline class="{kind} s{index % 3}" points="{coordinates}"/>'


def _circle(x: float, y: float, kind: str, text: str, radius: float = 0.0, opacity: float | None = None) -> str:
    size = radius or (3.0 if kind.startswith("dot") else 6.0)
    faint = "" if opacity is None else f' opacity="{opacity:.2f}"'
    return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{size}"{faint}><title>{escape(text)}</title></circle>'


def _finite_runs(series: Series) -> list[list[tuple[float, float]]]:
    """The series cut at its gaps, ordered by x."""
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in sorted(series.points, key=lambda point: point[0]):
        if y is None or not abs(y) < LARGEST:
            runs.append([])
        else:
            runs[-1].append((x, y))
    return [run for run in runs if run]


def _padded(values: Sequence[float], *, margin: float) -> tuple[float, float]:
    """The values' range with a margin on both sides; never empty."""
    low, high = min(values), max(values)
    if high - low <= 1e-12 * max(abs(low), abs(high)):
        half = abs(low) * 0.1 or 0.5
        return low - half, high + half
    return low - margin * (high - low), high + margin * (high - low)


def _rounded(low: float, high: float) -> tuple[float, float]:
    """The range widened to round numbers."""
    step = _step(low, high, 5)
    return round(math.floor(low / step) * step, 12), round(math.ceil(high / step) * step, 12)


def _thinned(points: Sequence[tuple[float, float]], limit: int) -> list[tuple[float, float]]:
    """At most about `limit` points: the lowest and highest of each stretch, so that no spike is lost."""
    if len(points) <= limit:
        return list(points)
    size = math.ceil(len(points) * 2 / limit)
    kept = {0, len(points) - 1}
    for start in range(0, len(points), size):
        stretch = range(start, min(start + size, len(points)))
        kept.add(min(stretch, key=lambda index: points[index][1]))
        kept.add(max(stretch, key=lambda index: points[index][1]))
    return [points[index] for index in sorted(kept)]


def _evenly(points: Sequence[PointT], limit: int) -> list[PointT]:
    """At most `limit` points, the first and the last among them."""
    if len(points) <= limit:
        return list(points)
    return [points[round(index * (len(points) - 1) / (limit - 1))] for index in range(limit)]


def _tick_text(value: float) -> str:
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:g}M"
    if size >= 1e4:
        return f"{value / 1e3:g}k"
    if 0 < size < 1e-3:
        return f"{value:.1e}"
    return f"{value:g}"


def _exact(value: float) -> str:
    return f"{value:.5g}"
