"""What the terminal shows: headings, a progress line, the summary at the end; plain lines without a terminal."""

from __future__ import annotations

import io
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TextIO

from rlhf.runs import results
from rlhf.runs.exhibits import Exhibits
from rlhf.runs.folder import RunFolder
from rlhf.terminal import forgiving, say

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

# For each stage the key numbers: the label, and the metrics that may carry it, the first present one wins.
KEY_METRICS: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "sft": (
        ("loss", ("sft/loss",)),
        ("validation", ("sft/validation_loss",)),
    ),
    "reward_model": (
        ("loss", ("reward_model/loss",)),
        ("accuracy", ("reward_model/accuracy",)),
        ("validation", ("reward_model/validation_accuracy",)),
    ),
    "ppo": (
        ("score", ("ppo/score_mean",)),
        ("kl", ("ppo/kl_to_reference",)),
        ("entropy", ("ppo/entropy",)),
        ("length", ("ppo/response_length",)),
        ("stopped", ("ppo/stopped_fraction",)),
    ),
    "dpo": (
        ("loss", ("dpo/loss",)),
        ("accuracy", ("dpo/accuracy",)),
        ("margin", ("dpo/margin",)),
        ("validation", ("dpo/validation_accuracy",)),
    ),
    "collect": (("comparisons", ("collect/comparisons",)), ("gold score", ("collect/gold_score_mean",))),
    "evaluate": (("responses", ("evaluate/policy_responses",)), ("win rate", ("evaluate/win_rate",))),
    "closed_form": (("gap", ("closed_form/gap",)),),
}
# The result a stage's row of the summary shows; a stage that is not here shows its first numbers.
KEY_RESULTS: dict[str, tuple[str, ...]] = {
    "sft": ("validation_loss", "loss"),
    "reward_model": ("accuracy", "validation_accuracy"),
    "ppo": ("ppo/score_mean", "ppo/kl_to_reference"),
    "dpo": ("test_accuracy", "validation_accuracy", "loss"),
    "evaluate": ("win_rate",),
}
MAX_RESULTS = 3
PLAIN_LINES = 20
PLAIN_SECONDS = 3.0
PLAIN_LONGEST_SILENCE = 600.0
_LIBRARIES = ("transformers", "datasets", "trl", "accelerate", "deepspeed", "DeepSpeed", "peft", "huggingface_hub")


class StageProgress:
    """Progress of one stage: a live line on a terminal, at most about twenty plain lines elsewhere."""

    def __init__(
        self,
        stage: str,
        total_steps: int | None,
        *,
        initial_step: int = 0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stage = stage
        self.total_steps = total_steps
        self._stream = _output(stream)
        self._clock = clock
        self._step = initial_step
        self._started = clock()
        self._first: tuple[float, int] | None = None
        self._numbers: dict[str, float] = {}
        self._printed: tuple[float, int] | None = None
        self._line_is_news = False
        self._live = _start_live(self) if self._stream.isatty() else None

    def update(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Shows that `step` is done. Key numbers that `metrics` does not have keep their last value."""
        self._step = step
        if self._first is None:
            self._first = (self._clock(), step)
        for name, candidates in KEY_METRICS.get(self.stage, ()):
            found = [metrics[candidate] for candidate in candidates if metrics.get(candidate) is not None]
            if found and found[0] is not None:
                self._numbers[name] = float(found[0])
        self._line_is_news = True
        if self._live is None and self._is_due():
            self._print_line()

    def message(self, text: str) -> None:
        """Prints a line, above the live one."""
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False)
        else:
            say(text, self._stream)

    def line(self) -> str:
        """`ppo 12/100  eta 0:45  score 0.53  kl 2.1`."""
        return "  ".join((f"{self.stage} {self._count()}", *self._numbers_text()))

    def close(self) -> None:
        """Leaves the last state on the screen; closing again does nothing."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        elif self._line_is_news:
            self._print_line()
        self._line_is_news = False

    def _count(self) -> str:
        return str(self._step) if self.total_steps is None else f"{self._step}/{self.total_steps}"

    def _numbers_text(self) -> list[str]:
        eta = self._eta()
        parts = [] if eta is None else [f"eta {results.clock(eta)}"]
        return parts + [f"{name} {results.format_number(value)}" for name, value in self._numbers.items()]

    def _eta(self) -> float | None:
        """Seconds to go, at the pace since the first update: loading and compiling before it say nothing of it."""
        if self.total_steps is None or self._first is None or self._step <= self._first[1]:
            return None
        since, at_step = self._first
        return (self._clock() - since) / (self._step - at_step) * max(0, self.total_steps - self._step)

    def _is_due(self) -> bool:
        if self._printed is None:
            return True
        since, at_step = self._clock() - self._printed[0], self._printed[1]
        if since >= PLAIN_LONGEST_SILENCE:
            return True
        if self.total_steps is None:
            # Without an end in sight the lines get rarer as the stage goes on, so that they stay few.
            return since >= max(PLAIN_SECONDS, (self._clock() - self._started) / 4)
        return since >= PLAIN_SECONDS and (self._step - at_step) * PLAIN_LINES >= self.total_steps

    def _print_line(self) -> None:
        self._printed = (self._clock(), self._step)
        self._line_is_news = False
        say(self.line(), self._stream)

    def __rich__(self) -> RenderableType:
        """The live line."""
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        grid = Table.grid(padding=(0, 1))
        cells: list[RenderableType] = [Text(self.stage, style="bold")]
        grid.add_column(no_wrap=True)
        if self.total_steps is not None:
            grid.add_column(width=16)
            cells.append(ProgressBar(total=max(1, self.total_steps), completed=self._step, width=16))
        grid.add_column(no_wrap=True)
        grid.add_column(no_wrap=True, overflow="ellipsis")
        cells += [Text(self._count()), Text("  ".join(self._numbers_text()), style="dim")]
        grid.add_row(*cells)
        return grid


def _start_live(progress: StageProgress) -> Live:
    from rich.console import Console
    from rich.live import Live

    # The thread below would die of a terminal that is gone, and the console end the process.
    console = Console(file=forgiving(progress._stream))
    # The screen is redrawn twice a second by a thread: training shares the cores with it.
    live = Live(get_renderable=progress.__rich__, console=console, refresh_per_second=2)
    live.start()
    return live


def heading(stage: str, position: int, total: int, detail: str = "", stream: TextIO | None = None) -> None:
    """Prints a stage's heading, such as `── ppo (4/5) · resumes at step 40 ──`."""
    stream = _output(stream)
    text = f"{stage} ({position}/{total})" + (f" · {detail}" if detail else "")
    if stream.isatty():
        console = _console(stream)
        console.rule(f"[bold]{_escape(text)}[/bold]", align="left")
    else:
        say(f"── {text} ──", stream)


def _output(stream: TextIO | None) -> TextIO:
    """`stream`, else standard output, or what stands for it where the process was started without one."""
    return stream or sys.stdout or io.StringIO()


def summary_table(run: RunFolder) -> RenderableType:
    """The stages with status, time and key results; before and after with intervals; where the report lies."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    styles = {"finished": "green", "skipped": "dim", "failed": "red", "interrupted": "yellow"}
    stages = Table(box=box.SIMPLE, title="Stages", title_justify="left", title_style="bold")
    for name in ("stage", "status", "time", "results"):
        stages.add_column(name, justify="right" if name == "time" else "left", no_wrap=name != "results")
    parts: list[RenderableType] = [stages]
    for row in results.stage_rows(run):
        status = Text(row.status, style=styles.get(row.status, ""))
        stages.add_row(Text(row.name), status, results.format_seconds(row.seconds), Text(_key_results(row)))
        if row.name == "evaluate" and row.summary:
            parts.append(_evaluation_table(row.summary))
        if row.name == "closed_form" and row.summary:
            parts.append(_gap_table(row.summary))
        parts += _exhibits(run, row.name)
    if run.report.is_file():
        parts.append(Text(f"Report: {run.report.resolve()}", no_wrap=True, overflow="ignore"))
    return Group(*parts)


def _evaluation_table(summary: Mapping[str, Any]) -> RenderableType:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE, title="Evaluation", title_justify="left", title_style="bold")
    for name in ("metric", "before", "after"):
        table.add_column(name, justify="left" if name == "metric" else "right", no_wrap=True)
    for row in results.comparisons(summary):
        before = "" if row.before is None else results.format_estimate(row.before)
        table.add_row(Text(results.label(row.name)), Text(before), Text(results.format_estimate(row.after)))
    return table


def _gap_table(summary: Mapping[str, Any]) -> RenderableType:
    """The gaps of stage closed_form, an algorithm a row."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    rows = results.gap_rows(summary)
    betas = list(dict.fromkeys(row.beta for row in rows))
    table = Table(box=box.SIMPLE, title="Gap to the exact optimum", title_justify="left", title_style="bold")
    table.add_column("algorithm", no_wrap=True)
    for beta in betas:
        table.add_column(f"beta {beta:g}", justify="right", no_wrap=True)
    for algorithm in dict.fromkeys(row.algorithm for row in rows):
        gaps = {row.beta: row.gap for row in rows if row.algorithm == algorithm}
        table.add_row(Text(algorithm), *(Text(f"{gaps[beta]:.4f}" if beta in gaps else "") for beta in betas))
    return table


def _exhibits(run: RunFolder, stage: str) -> list[RenderableType]:
    """A study's tables and remarks, and where its figures lie."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    folder = run.stage(stage).path
    exhibits = Exhibits.read(folder)
    if exhibits is None:
        return []
    parts: list[RenderableType] = []
    for table in exhibits.tables:
        if table.details:
            continue
        shown = Table(box=box.SIMPLE, title=table.title, title_justify="left", title_style="bold", caption=table.note)
        for index, column in enumerate(table.columns):
            shown.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
        for row in table.rows:
            shown.add_row(*(Text(results.format_cell(cell)) for cell in row))
        parts.append(shown)
    parts += [Text(f"- {remark}") for remark in exhibits.remarks]
    figures = (str((folder / f"{figure.name}.svg").resolve()) for figure in exhibits.figures)
    return parts + [Text(f"Figure: {path}", no_wrap=True, overflow="ignore") for path in figures]


def _key_results(row: results.StageRow) -> str:
    names = [name for name in KEY_RESULTS.get(row.name, ()) if name in row.summary]
    if not names:
        names = [name for name, value in row.summary.items() if results.estimate(value) is not None][:MAX_RESULTS]
    shown = ((name.rpartition("/")[2], results.estimate(row.summary[name])) for name in names)
    return ", ".join(f"{name} {results.format_estimate(value)}" for name, value in shown)


def print_summary(run: RunFolder, stream: TextIO | None = None) -> None:
    """Prints `summary_table(run)`; without a terminal wide and without colours."""
    _console(_output(stream)).print(summary_table(run))


def _console(stream: TextIO) -> Console:
    from rich.console import Console

    return Console(file=forgiving(stream), width=None if stream.isatty() else 160, highlight=False)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def quiet_libraries() -> None:
    """Silences progress bars and chatter of the libraries, before or after they are imported.

    A variable that the user set wins. Warnings and errors that matter still come as exceptions.
    """
    variables = {
        "TQDM_DISABLE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "DATASETS_VERBOSITY": "error",
        "DS_LOG_LEVEL": "error",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    for name, value in variables.items():
        os.environ.setdefault(name, value)
    for name in _LIBRARIES:
        logging.getLogger(name).setLevel(logging.ERROR)
    # Libraries that read their variables at import have to be told when they are already there.
    for module, function in (
        ("transformers.utils.logging", "disable_progress_bar"),
        ("datasets.utils.tqdm", "disable_progress_bars"),
        ("huggingface_hub.utils.tqdm", "disable_progress_bars"),
    ):
        loaded = sys.modules.get(module)
        if loaded is not None and hasattr(loaded, function):
            getattr(loaded, function)()
