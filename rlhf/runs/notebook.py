"""What notebooks show of runs: the same figures and tables as the report, as outputs that GitHub displays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlhf.runs import figures, results
from rlhf.runs.exhibits import Figure, Line, Panel, Table
from rlhf.runs.folder import RunFolder
from rlhf.runs.jsonable import read_lines

PAPER = "#ffffff"


def metrics(run: Path, stage: str) -> list[dict[str, Any]]:
    """The logged steps of a stage, in their order; empty where there is none."""
    return [entry for entry in read_lines(RunFolder(run).metrics) if entry.get("stage") == stage]


def summary(run: Path, stage: str) -> dict[str, Any]:
    """The key results of a finished stage. Raises `FileNotFoundError` when it is not finished."""
    result = RunFolder(run).stage(stage).read_result()
    if result is None:
        raise FileNotFoundError(f"{run} has no finished stage {stage}")
    return result.summary


def line(name: str, entries: list[dict[str, Any]], y: str, x: str = "step") -> Line:
    """A curve of logged steps: `y` over `x`, both names of metrics, where both were logged."""
    pairs = ((results.estimate(entry.get(x)), results.estimate(entry.get(y))) for entry in entries)
    return Line(name, tuple((one.value, other.value) for one, other in pairs if one is not None and other is not None))


def plot(title: str, *panels: Panel) -> Any:
    """The panels side by side, as an SVG that IPython displays."""
    return picture(Figure("figure", title, panels))


def picture(figure: Figure) -> Any:
    """A figure as an SVG that IPython displays, on white whatever the page is."""
    from IPython.display import SVG

    return SVG(data=figures.draw(figure, background=PAPER))


def table(shown: Table) -> Any:
    """A table as Markdown that IPython displays."""
    from IPython.display import Markdown

    def row(cells: Any) -> str:
        return f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in cells)} |"

    lines = [row(shown.columns), row(["---"] * len(shown.columns))]
    lines += [row(results.format_cell(cell) for cell in cells) for cells in shown.rows]
    return Markdown("\n".join([f"**{shown.title}**", "", *lines, "", shown.note]).strip())
