"""Figures of a study as self-contained SVG files: light and dark, readable where README files are shown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

from rlhf.runs.charts import Scale, ticks

if TYPE_CHECKING:
    from rlhf.runs.exhibits import Figure, Line, Panel

PANEL_WIDTH, PANEL_HEIGHT = 420, 300
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 34, 46
LEGEND_ROW = 18
TITLE_HEIGHT = 30
# Okabe and Ito (2008): told apart also by readers with colour-vision deficiency.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", "#7f7f7f")
LIGHT_STYLE = """
text{font:12px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;fill:#24292f}
.title{font-weight:600;font-size:14px}.panel{font-weight:600}.tick{font-size:11px;fill:#57606a}
.grid{stroke:#d0d7de;stroke-width:.6}.axis{stroke:#57606a;stroke-width:1}
.line{fill:none;stroke-width:1.8;stroke-linejoin:round}.band{opacity:.16;stroke:none}
"""
DARK_STYLE = """\
@media(prefers-color-scheme:dark){text{fill:#e6edf3}.tick{fill:#9da7b3}.grid{stroke:#30363d}.axis{stroke:#9da7b3}
.band{opacity:.24}}
"""
STYLE = LIGHT_STYLE + DARK_STYLE


def draw(
    figure: Figure,
    *,
    standalone: bool = True,
    colors: Mapping[str, str] | None = None,
    background: str | None = None,
) -> str:
    """The figure as SVG text. Points that are not finite are left out; a panel without points says so.

    Standing alone it brings its style along; the report has it. With `colors`, one for each group, several figures
    share a legend that stands elsewhere: the panels alone are drawn. On a `background` (a colour) of its own the
    figure is a light one always.
    """
    width = PANEL_WIDTH * len(figure.panels)
    title, top = "", 0
    if colors is None:
        groups = list(dict.fromkeys(_group(line) for panel in figure.panels for line in panel.lines))
        colors = {group: COLORS[index % len(COLORS)] for index, group in enumerate(groups)}
        legend, rows = _legend(figure, colors, width)
        title = f'<text class="title" x="14" y="20">{escape(figure.title)}</text>{legend}'
        top = TITLE_HEIGHT + rows * LEGEND_ROW
    height = top + PANEL_HEIGHT
    panels = "".join(
        f'<g transform="translate({index * PANEL_WIDTH},{top})">{_panel(panel, colors)}</g>'
        for index, panel in enumerate(figure.panels)
    )
    ground = "" if background is None else f'<rect width="{width}" height="{height}" fill="{escape(background)}"/>'
    style = STYLE if background is None else LIGHT_STYLE
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        f' role="img" aria-label="{escape(figure.title)}">{f"<style>{style}</style>" if standalone else ""}'
        f"{ground}{title}{panels}</svg>\n"
    )


def _group(line: Line) -> str:
    return line.group or line.name


def _legend(figure: Figure, colors: Mapping[str, str], width: int) -> tuple[str, int]:
    """A sample of each name with its style; names that several panels share are listed once."""
    lines = {line.name: line for panel in figure.panels for line in panel.lines}
    parts, x, row = [], 14.0, 0
    for name, line in lines.items():
        space = 38 + 6.7 * len(name)
        if x > 14 and x + space > width:
            x, row = 14.0, row + 1
        y = TITLE_HEIGHT + row * LEGEND_ROW + 8
        color = colors[_group(line)]
        if line.style == "dots":
            parts.append(f'<circle cx="{x + 11:.1f}" cy="{y}" r="3.4" fill="{color}"/>')
        else:
            dash = ' stroke-dasharray="5 4"' if line.style == "dashed" else ""
            parts.append(
                f'<line x1="{x:.1f}" x2="{x + 22:.1f}" y1="{y}" y2="{y}" stroke="{color}" stroke-width="2"{dash}/>'
            )
        parts.append(f'<text x="{x + 28:.1f}" y="{y + 4}">{escape(name)}</text>')
        x += space
    return "".join(parts), row + 1 if lines else 0


def _panel(panel: Panel, colors: Mapping[str, str]) -> str:
    points = [point for line in panel.lines for point in _finite(line.points)]
    title = f'<text class="panel" x="{LEFT}" y="{TOP - 12}">{escape(panel.title)}</text>'
    if not points:
        return f'{title}<text x="{LEFT}" y="{TOP + 20}">no points</text>'
    ends = [end for line in panel.lines for pair in line.band or () for end in pair if math.isfinite(end)]
    across = [_x(panel, x) for x, _ in points]
    x_scale = Scale(*_range(across, 0.02), LEFT, PANEL_WIDTH - RIGHT)
    y_scale = Scale(*_range([*(y for _, y in points), *ends], 0.05), PANEL_HEIGHT - BOTTOM, TOP)
    body = [title, _axes(panel, x_scale, y_scale)]
    body += [_band(panel, line, x_scale, y_scale, colors[_group(line)]) for line in panel.lines]
    body += [_line(panel, line, x_scale, y_scale, colors[_group(line)]) for line in panel.lines]
    return "".join(body)


def _x(panel: Panel, x: float) -> float:
    return math.log10(x) if panel.logarithmic_x else x


def _finite(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def _range(values: Sequence[float], margin: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    pad = margin * (high - low) or abs(low) * 0.1 or 0.5
    return low - pad, high + pad


def _axes(panel: Panel, x_scale: Scale, y_scale: Scale) -> str:
    bottom, right = PANEL_HEIGHT - BOTTOM, PANEL_WIDTH - RIGHT
    parts = []
    for value in ticks(y_scale.low, y_scale.high, 5):
        y = y_scale(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for value, text in _x_ticks(panel, x_scale):
        x = x_scale(value)
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{text}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    middle, center = (LEFT + right) / 2, (TOP + bottom) / 2
    parts.append(f'<text x="{middle}" y="{PANEL_HEIGHT - 8}" text-anchor="middle">{escape(panel.x_label)}</text>')
    parts.append(
        f'<text x="13" y="{center}" text-anchor="middle" transform="rotate(-90 13 {center})">'
        f"{escape(panel.y_label)}</text>"
    )
    return "".join(parts)


def _x_ticks(panel: Panel, scale: Scale) -> list[tuple[float, str]]:
    if not panel.logarithmic_x:
        return [(value, f"{value:g}") for value in ticks(scale.low, scale.high, 6)]
    first, last = math.floor(scale.low), math.ceil(scale.high)
    steps = (1,) if last - first > 4 else (1, 2, 5)
    values = [step * 10.0**power for power in range(first, last + 1) for step in steps]
    return [(math.log10(value), f"{value:g}") for value in values if scale.low <= math.log10(value) <= scale.high]


def _band(panel: Panel, line: Line, x_scale: Scale, y_scale: Scale, color: str) -> str:
    if line.band is None or line.style == "dots":
        return ""
    ends = [
        (x_scale(_x(panel, x)), y_scale(low), y_scale(high))
        for (x, y), (low, high) in zip(line.points, line.band, strict=True)
        if all(map(math.isfinite, (x, y, low, high)))
    ]
    if len(ends) < 2:
        return ""
    corners = [(x, high) for x, _, high in ends] + [(x, low) for x, low, _ in reversed(ends)]
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
    return f'<polygon class="band" fill="{color}" points="{points}"/>'


def _line(panel: Panel, line: Line, x_scale: Scale, y_scale: Scale, color: str) -> str:
    parts = []
    finite = _finite(line.points)
    if line.style != "dots" and len(finite) > 1:
        dash = ' stroke-dasharray="5 4"' if line.style == "dashed" else ""
        points = " ".join(f"{x_scale(_x(panel, x)):.1f},{y_scale(y):.1f}" for x, y in finite)
        parts.append(f'<polyline class="line" stroke="{color}"{dash} points="{points}"/>')
    band = line.band or ((math.nan, math.nan),) * len(line.points)
    for (x, y), (low, high) in zip(line.points, band, strict=True):
        if not (math.isfinite(x) and math.isfinite(y)):
            continue
        place = x_scale(_x(panel, x))
        if line.style == "dots" and math.isfinite(low) and math.isfinite(high):
            ends = f'y1="{y_scale(low):.1f}" y2="{y_scale(high):.1f}"'
            parts.append(f'<line x1="{place:.1f}" x2="{place:.1f}" {ends} stroke="{color}" stroke-width="1.4"/>')
        interval = f" [{low:.4g}, {high:.4g}]" if math.isfinite(low) and math.isfinite(high) else ""
        text = f"{line.name}: {x:.4g}, {y:.4g}{interval}"
        radius = 3.4 if line.style == "dots" else 2.2 if len(finite) <= 30 else 1.2
        parts.append(
            f'<circle cx="{place:.1f}" cy="{y_scale(y):.1f}" r="{radius}" fill="{color}">'
            f"<title>{escape(text)}</title></circle>"
        )
    return "".join(parts)
