"""`status.html` of a sweep: one file that opens without a network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from rlhf.runs import figures, report_assets
from rlhf.runs.exhibits import Figure, Line, Panel
from rlhf.runs.files import write_text
from rlhf.sweeps.file import Parameter
from rlhf.sweeps.folder import Sweep
from rlhf.sweeps.space import label
from rlhf.sweeps.status import STATES, SettingStatus, Status, code_warning, duration, estimate_text

WIDTH, HEIGHT, TOP, BOTTOM, SIDE = 1040, 380, 46, 26, 90
# From bad to good; in between in equal steps of lightness, so that it is read without colours as well (viridis).
COLORS = ("#440154", "#3b528b", "#21918c", "#5ec962", "#d9c413")
STYLE = """
.parallel path{fill:none;stroke-width:1.8;opacity:.75}.parallel path:hover{stroke-width:4;opacity:1}
.parallel .best{stroke-width:4;opacity:1}.parallel line{stroke:var(--dim)}.shares{display:grid;
grid-template-columns:auto 1fr auto;gap:6px 12px;align-items:center;padding:12px 16px;margin:0}
.study.history svg{max-width:640px}
.shares i{display:block;height:12px;border-radius:3px;background:var(--s0)}
"""


def write_page(sweep: Sweep, status: Status) -> Path:
    """Writes the page of the sweep and returns its path."""
    about = (status.method, f"{status.goal} {status.metric or 'no metric'}", f"{duration(status.seconds)} of work")
    parts = [
        f"<h1>Sweep {escape(status.name)}</h1>",
        f'<div class="meta">{"".join(f"<span>{escape(one)}</span>" for one in about)}</div>',
        _cards(status),
    ]
    if len(status.codes) > 1:
        parts.append(f'<p class="bad">{escape(code_warning(status))}</p>')
    parts += [_parallel(sweep, status), _shares(status), _history(status), _settings(status), _trials(status)]
    body = "\n".join(part for part in parts if part)
    text = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, '
        f'initial-scale=1"><title>Sweep {escape(status.name)}</title><style>{report_assets.STYLE}{figures.STYLE}'
        f"{STYLE}</style></head><body><main>{body}</main></body></html>\n"
    )
    write_text(sweep.folder.page, text)
    return sweep.folder.page


def _cards(status: Status) -> str:
    cards: list[tuple[str, str]] = [(name, str(status.counts[name])) for name in STATES if status.counts[name]]
    best = next((one for one in status.settings if one.state == "finished" and one.mean is not None), None)
    if best is not None:
        cards.insert(0, (f"best, setting {best.number}", estimate_text(best)))
    shown = (
        f'<div class="card"><div class="name">{escape(name)}</div><div class="number">{escape(value)}</div></div>'
        for name, value in cards
    )
    return f'<div class="cards">{"".join(shown)}</div>'


def _finished(status: Status) -> list[SettingStatus]:
    return [one for one in status.settings if one.state == "finished" and one.mean is not None]


def _parallel(sweep: Sweep, status: Status) -> str:
    """One line a finished setting through an axis a parameter and one for the metric, coloured by how good it is."""
    finished = _finished(status)
    searched = sweep.space.searched
    if len(finished) < 2 or not searched:
        return ""
    means = [one.mean for one in finished if one.mean is not None]
    low, high = min(means), max(means)
    step = (WIDTH - 2 * SIDE) / len(searched)
    axes = "".join(_axis(parameter, SIDE + index * step, finished) for index, parameter in enumerate(searched))
    axes += _axis_text(status.metric or "", SIDE + len(searched) * step, label(high), label(low))
    drawn = []
    for one in reversed(finished):
        assert one.mean is not None
        share = 0.5 if high == low else (one.mean - low) / (high - low)
        points = [
            (SIDE + index * step, _height(_share(parameter, one.values, finished)))
            for index, parameter in enumerate(searched)
        ]
        points.append((SIDE + len(searched) * step, _height(share)))
        known = [f"{x:.1f},{y:.1f}" for x, y in points if y is not None]
        good = share if status.goal == "maximize" else 1 - share
        color = COLORS[min(int(good * len(COLORS)), len(COLORS) - 1)]
        values = ", ".join(f"{name}={label(value)}" for name, value in one.values.items())
        name = "best" if one is finished[0] else ""
        drawn.append(
            f'<path class="{name}" stroke="{color}" d="M{" L".join(known)}"><title>setting {one.number}: '
            f"{escape(values)}: {escape(estimate_text(one))}</title></path>"
        )
    return (
        f'<h2>All settings</h2><figure><svg class="parallel" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="parallel coordinates">{axes}{"".join(drawn)}</svg></figure>'
        '<p class="dim">A line is a setting, from the worst (dark) to the best (light, thick); a parameter that does '
        "not exist under a choice is passed by.</p>"
    )


def _height(share: float | None) -> float | None:
    return None if share is None else HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def _share(parameter: Parameter, values: dict[str, Any], all_of_them: Sequence[SettingStatus]) -> float | None:
    """Where a value lies on the parameter's axis, 0 to 1; None when the setting does not have it."""
    if parameter.name not in values:
        return None
    value, own = values[parameter.name], parameter.distribution
    if own.is_listed:
        return 0.5 if len(own.values) == 1 else own.values.index(value) / (len(own.values) - 1)
    seen = [one.values[parameter.name] for one in all_of_them if parameter.name in one.values]
    low, high = min(seen), max(seen)
    if low == high:
        return 0.5
    if "log" in own.kind and low > 0:
        return (math.log(value) - math.log(low)) / (math.log(high) - math.log(low))
    return float((value - low) / (high - low))


def _axis(parameter: Parameter, x: float, finished: Sequence[SettingStatus]) -> str:
    own = parameter.distribution
    if own.is_listed:
        marks = ""
        for value in own.values:
            y = _height(_share(parameter, {parameter.name: value}, finished)) or 0.0
            marks += (
                f'<text class="tick" x="{x - 6:.1f}" y="{y + 4:.1f}" text-anchor="end">{escape(label(value))}</text>'
            )
        return _axis_text(parameter.name, x, "", "") + marks
    seen = [one.values[parameter.name] for one in finished if parameter.name in one.values]
    return (
        _axis_text(parameter.name, x, label(max(seen)), label(min(seen)))
        if seen
        else _axis_text(parameter.name, x, "", "")
    )


def _axis_text(name: str, x: float, high: str, low: str) -> str:
    return (
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        f'<text class="note" x="{x:.1f}" y="16" text-anchor="middle">{escape(name)}</text>'
        f'<text class="tick" x="{x:.1f}" y="34" text-anchor="middle">{escape(high)}</text>'
        f'<text class="tick" x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{escape(low)}</text>'
    )


def _shares(status: Status) -> str:
    if not status.importance:
        return ""
    rows = "".join(
        f'<span>{escape(name)}</span><i style="width:{100 * share:.1f}%"></i><span class="n">{share:.2f}</span>'
        for name, share in status.importance.items()
    )
    return (
        f'<h2>What matters</h2><figure class="shares">{rows}</figure><p class="dim">Share of the variance of '
        f"{escape(status.metric or '')} over the space that a parameter explains by itself (fANOVA).</p>"
    )


def _history(status: Status) -> str:
    if len(status.history) < 2:
        return ""
    figure = Figure(
        "history",
        "The best so far",
        (
            Panel(
                "",
                "setting",
                status.metric or "",
                (
                    Line("settings", tuple((float(number), mean) for number, mean, _ in status.history), style="dots"),
                    Line("best so far", tuple((float(number), best) for number, _, best in status.history)),
                ),
            ),
        ),
    )
    return f'<h2>History</h2><div class="study history">{figures.draw(figure, standalone=False)}</div>'


def _settings(status: Status) -> str:
    if not status.settings:
        return "<p>No trial has begun yet.</p>"
    names = list(dict.fromkeys(name for one in status.settings for name in one.values))
    head = "".join(f"<th>{escape(name)}</th>" for name in ("setting", status.metric or "", *names, "state", "trials"))
    rows = "".join(
        f'<tr><td class="n">{one.number}</td><td class="n">{escape(estimate_text(one))}</td>'
        + "".join(f"<td>{escape(label(one.values[name])) if name in one.values else ''}</td>" for name in names)
        + f'<td class="{one.state}">{one.state}</td><td>{", ".join(map(str, one.trials))}</td></tr>'
        for one in status.settings
    )
    return (
        f'<h2>Settings</h2><div class="tablebox"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
        "</div>"
        '<p class="dim">Mean over the seeds ± half of Student\'s 95 % interval.</p>'
    )


def _trials(status: Status) -> str:
    shown = [one for one in status.trials if one.state in ("running", "waiting", "pruned", "failed")]
    if not shown:
        return ""
    rows = "".join(
        f'<tr><td class="n">{one.number}</td><td class="{one.state}">{one.state}</td><td class="n">{one.attempt}</td>'
        f"<td>{escape(one.note)}{_tail(one.tail)}</td></tr>"
        for one in shown
    )
    return (
        '<h2>Trials under way, given up or failed</h2><div class="tablebox"><table><thead><tr><th>trial</th><th>state'
        f"</th><th>attempts</th><th></th></tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _tail(lines: Sequence[str]) -> str:
    return f"<pre>{escape(chr(10).join(lines))}</pre>" if lines else ""
