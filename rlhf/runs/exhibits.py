"""What a study shows: tables, figures and remarks, as data. The console, the report and files draw the same ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, Literal

from rlhf.runs import figures, files, results
from rlhf.runs.jsonable import read_json

EXHIBITS_FILE = "exhibits.json"
NUMBER = ' class="n"'
# A number, a text, nothing, or {"value", "low", "high"}.
Cell = Any
Style = Literal["line", "dashed", "dots"]


@dataclass(frozen=True)
class Table:
    """Rows of cells under column names. A cell is a number, a text, None, or an estimate {"value", "low", "high"}.

    One of `details` is in the report and the files; the console leaves it out.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    details: bool = False


@dataclass(frozen=True)
class Line:
    """A named curve of points (x, y); `band` holds (low, high) for each point where there are intervals.

    Lines of one `group` have one colour. `style` `dots` draws no line between the points.
    """

    name: str
    points: tuple[tuple[float, float], ...]
    band: tuple[tuple[float, float], ...] | None = None
    style: Style = "line"
    group: str = ""

    def __post_init__(self) -> None:
        if self.band is not None and len(self.band) != len(self.points):
            raise ValueError(f"line {self.name}: {len(self.band)} intervals for {len(self.points)} points")


@dataclass(frozen=True)
class Panel:
    """One pair of axes with its lines. With `logarithmic_x` equal ratios of x are equally far apart."""

    title: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]
    logarithmic_x: bool = False


@dataclass(frozen=True)
class Figure:
    """Panels side by side with one legend; `name` is that of its SVG file."""

    name: str
    title: str
    panels: tuple[Panel, ...]
    note: str = ""


@dataclass(frozen=True)
class Exhibits:
    """All a study shows, in order: remarks first, then figures, then tables."""

    tables: tuple[Table, ...] = ()
    figures: tuple[Figure, ...] = ()
    remarks: tuple[str, ...] = field(default=())

    def write(self, folder: Path) -> list[str]:
        """Writes `exhibits.json`, an SVG a figure and a CSV a table; returns their names. Raises `DiskFullError`."""
        files.write_json(folder / EXHIBITS_FILE, self)
        names = [EXHIBITS_FILE]
        for figure in self.figures:
            files.write_text(folder / f"{figure.name}.svg", figures.draw(figure))
            names.append(f"{figure.name}.svg")
        for table in self.tables:
            name = f"{_file_name(table.title)}.csv"
            files.write_text(folder / name, to_csv(table))
            names.append(name)
        return names

    @classmethod
    def read(cls, folder: Path) -> Exhibits | None:
        """What `write` left in the folder; None when it is missing or of another shape."""
        body = read_json(folder / EXHIBITS_FILE)
        if not isinstance(body, Mapping):
            return None
        try:
            return cls(
                tuple(
                    Table(
                        t["title"], tuple(t["columns"]), tuple(map(tuple, t["rows"])), t["note"], bool(t.get("details"))
                    )
                    for t in body["tables"]
                ),
                tuple(
                    Figure(f["name"], f["title"], tuple(_panel(panel) for panel in f["panels"]), f["note"])
                    for f in body["figures"]
                ),
                tuple(body["remarks"]),
            )
        except (KeyError, TypeError, ValueError):
            return None


def _panel(body: Mapping[str, Any]) -> Panel:
    lines = tuple(
        Line(
            line["name"],
            tuple((_number(x), _number(y)) for x, y in line["points"]),
            None if line["band"] is None else tuple((_number(low), _number(high)) for low, high in line["band"]),
            line["style"],
            line["group"],
        )
        for line in body["lines"]
    )
    return Panel(body["title"], body["x_label"], body["y_label"], lines, bool(body["logarithmic_x"]))


def _number(value: float | None) -> float:
    """What is not finite is null in JSON."""
    return math.nan if value is None else float(value)


def to_html(exhibits: Exhibits) -> str:
    """The exhibits as a part of the report; all text is escaped."""
    parts = ["".join(f"<li>{escape(remark)}</li>" for remark in exhibits.remarks)]
    if exhibits.remarks:
        parts[0] = f"<ul>{parts[0]}</ul>"
    for figure in exhibits.figures:
        note = f'<p class="dim">{escape(figure.note)}</p>' if figure.note else ""
        parts.append(f'<figure class="study">{figures.draw(figure, standalone=False)}</figure>{note}')
    for table in exhibits.tables:
        head = "".join(f"<th{'' if index == 0 else NUMBER}>{escape(c)}</th>" for index, c in enumerate(table.columns))
        body = "".join(
            "<tr>"
            + "".join(
                f"<td{'' if index == 0 else NUMBER}>{escape(results.format_cell(cell))}</td>"
                for index, cell in enumerate(row)
            )
            + "</tr>"
            for row in table.rows
        )
        note = f'<p class="dim">{escape(table.note)}</p>' if table.note else ""
        parts.append(
            f"<h3>{escape(table.title)}</h3>{note}"
            f'<div class="tablebox"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        )
    return "".join(parts)


def to_csv(table: Table) -> str:
    """The table as CSV; an estimate takes three columns: itself, `<name> low` and `<name> high`."""
    import csv
    import io

    wide = [any(isinstance(row[index], Mapping) for row in table.rows) for index in range(len(table.columns))]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        [
            name
            for column, is_wide in zip(table.columns, wide, strict=True)
            for name in ((column, f"{column} low", f"{column} high") if is_wide else (column,))
        ]
    )
    for row in table.rows:
        writer.writerow([value for cell, is_wide in zip(row, wide, strict=True) for value in _values(cell, is_wide)])
    return out.getvalue()


def _values(cell: Cell, is_wide: bool) -> Sequence[Any]:
    if isinstance(cell, Mapping):
        return [cell.get("value"), cell.get("low"), cell.get("high")]
    return [cell, None, None] if is_wide else [cell]


def _file_name(title: str) -> str:
    return "_".join("".join(letter if letter.isalnum() else " " for letter in title.lower()).split())
