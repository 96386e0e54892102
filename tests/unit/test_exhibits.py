"""A study's tables and figures: written, read again, drawn, and harmless whatever they are called."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from rlhf.runs import figures
from rlhf.runs.console import summary_table
from rlhf.runs.exhibits import EXHIBITS_FILE, Exhibits, Figure, Line, Panel, Table, to_csv, to_html
from rlhf.runs.folder import RunFolder
from rlhf.runs.report import render_report

ESTIMATE = {"value": 0.5, "low": 0.25, "high": 0.75}
TABLE = Table(
    "Rounds & more", ("policy", "labels", "gold"), (("round-1", 100, ESTIMATE), ("round-2", 200, None)), "note"
)
LINE = Line("gold", ((1.0, 0.0), (10.0, 1.0), (100.0, math.nan)), ((-0.5, 0.5), (0.5, 1.5), (0.0, 0.0)))
DOTS = Line("one <batch>", ((100.0, 2.0),), ((1.0, 3.0),), style="dots")
FIGURE = Figure("curve", "Gold & proxy", (Panel("left", "labels", "gold", (LINE, DOTS), logarithmic_x=True),), "below")
EXHIBITS = Exhibits((TABLE,), (FIGURE,), ("round-2 beats round-1 <script>alert(1)</script>",))


def _svg(figure: Figure) -> ElementTree.Element:
    return ElementTree.fromstring(figures.draw(figure))


def _all(root: ElementTree.Element, tag: str) -> list[ElementTree.Element]:
    return root.findall(f".//{{http://www.w3.org/2000/svg}}{tag}")


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    names = EXHIBITS.write(tmp_path)
    assert names == [EXHIBITS_FILE, "curve.svg", "rounds_more.csv"]
    read = Exhibits.read(tmp_path)
    assert read is not None
    assert (read.tables, read.remarks) == (EXHIBITS.tables, EXHIBITS.remarks)
    line, dots = read.figures[0].panels[0].lines
    assert dots == DOTS
    assert line.points[:2] == LINE.points[:2]
    assert math.isnan(line.points[2][1])  # null in the file, as NaN is no JSON


@pytest.mark.parametrize(
    "text", ["", "[]", '{"tables": 3}', '{"tables": [{"title": "a"}], "figures": [], "remarks": []}']
)
def test_a_broken_file_is_no_exhibit(tmp_path: Path, text: str) -> None:
    (tmp_path / EXHIBITS_FILE).write_text(text)
    assert Exhibits.read(tmp_path) is None


def test_a_csv_has_three_columns_for_an_estimate() -> None:
    assert to_csv(TABLE) == "policy,labels,gold,gold low,gold high\nround-1,100,0.5,0.25,0.75\nround-2,200,,,\n"


def test_equal_ratios_are_equally_far_apart_on_a_logarithmic_axis() -> None:
    line = Line("a", ((1.0, 0.0), (10.0, 0.0), (100.0, 0.0)))
    panel = Panel("", "x", "y", (line,), logarithmic_x=True)
    places = [float(circle.attrib["cx"]) for circle in _all(_svg(Figure("f", "t", (panel,))), "circle")]
    assert places[1] - places[0] == pytest.approx(places[2] - places[1], abs=0.11)
    linear = Panel("", "x", "y", (line,))
    places = [float(circle.attrib["cx"]) for circle in _all(_svg(Figure("f", "t", (linear,))), "circle")]
    assert places[2] - places[1] == pytest.approx(10 * (places[1] - places[0]), abs=1.1)


def test_a_higher_value_is_drawn_higher_and_bands_lie_around_their_line() -> None:
    root = _svg(FIGURE)
    dots = _all(root, "circle")
    first, second = (float(dot.attrib["cy"]) for dot in dots if len(dot) and "gold" in str(dot[0].text))
    assert second < first
    (band,) = _all(root, "polygon")
    corners = [tuple(map(float, pair.split(","))) for pair in band.attrib["points"].split()]
    assert len(corners) == 4  # the third point is not finite
    assert corners[0][1] < first < corners[3][1]


def test_a_panel_without_points_says_so() -> None:
    root = _svg(Figure("f", "t", (Panel("empty", "x", "y", (Line("a", ((math.nan, 1.0),)),)),)))
    assert "no points" in [text.text for text in _all(root, "text")]


def test_lines_of_a_group_share_a_colour_and_others_do_not() -> None:
    lines = (
        Line("proxy a", ((0.0, 0.0), (1.0, 1.0)), group="a"),
        Line("gold a", ((0.0, 0.0), (1.0, 2.0)), group="a", style="dashed"),
        Line("b", ((0.0, 1.0), (1.0, 3.0))),
    )
    polylines = _all(_svg(Figure("f", "t", (Panel("", "x", "y", lines),))), "polyline")
    strokes = [line.attrib["stroke"] for line in polylines]
    assert strokes[0] == strokes[1] != strokes[2]
    assert ["stroke-dasharray" in line.attrib for line in polylines] == [False, True, False]


def test_intervals_must_match_their_points() -> None:
    with pytest.raises(ValueError, match="1 intervals for 2 points"):
        Line("a", ((0.0, 0.0), (1.0, 1.0)), ((0.0, 0.0),))


def test_text_is_escaped_in_the_report() -> None:
    page = to_html(EXHIBITS)
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "one &lt;batch&gt;" in page


def test_console_and_report_show_a_finished_study(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.create()
    folder = run.stage("iterated").path
    folder.mkdir()
    EXHIBITS.write(folder)
    page = render_report(run)
    assert "Rounds &amp; more" in page
    assert "Gold &amp; proxy" in page
    out = StringIO()
    Console(file=out, width=160).print(summary_table(run))
    assert "0.500 [0.250, 0.750]" in out.getvalue()
    assert "curve.svg" in out.getvalue()
