"""The console: few plain lines without a terminal, a live line on one, and the summary."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.runs import results
from rlhf.runs.console import StageProgress, heading, print_summary
from tests.unit.runs_example import make_run


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def progress_lines(seconds_a_step: float, total: int | None, steps: int) -> list[str]:
    now = [0.0]
    stream = io.StringIO()
    progress = StageProgress("ppo", total, stream=stream, clock=lambda: now[0])
    for step in range(1, steps + 1):
        now[0] += seconds_a_step
        progress.update(step, {"ppo/score_mean": 0.534, "ppo/kl_to_reference": 2.1, "perf/step_seconds": 9.0})
    progress.close()
    progress.close()
    return stream.getvalue().splitlines()


def test_plain_lines() -> None:
    lines = progress_lines(1.0, 100, 100)
    assert lines[0] == "ppo 1/100  score 0.534  kl 2.10"
    assert lines[1] == "ppo 6/100  eta 1:34  score 0.534  kl 2.10"
    assert lines[-1] == "ppo 100/100  eta 0:00  score 0.534  kl 2.10"
    assert 15 <= len(lines) <= 25


@pytest.mark.parametrize(
    ("seconds", "total", "steps", "most"),
    [(0.01, 1000, 1000, 6), (20.0, 1000, 1000, 40), (0.5, None, 20_000, 45), (1.0, 3, 3, 3)],
)
def test_plain_lines_stay_few(seconds: float, total: int | None, steps: int, most: int) -> None:
    lines = progress_lines(seconds, total, steps)
    assert 2 <= len(lines) <= most
    assert len(set(lines)) == len(lines)


def test_last_state_is_shown_once_when_a_stage_ends_early() -> None:
    lines = progress_lines(0.01, 100, 40)
    assert lines[-1].startswith("ppo 40/100")


def test_live_line_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    progress = StageProgress("ppo", 10, stream=stream)
    progress.update(1, {"ppo/score_mean": 0.5})
    progress.message("checkpoint [saved]")
    progress.update(4, {"ppo/stopped_fraction": 0.9})
    progress.close()
    shown = stream.getvalue()
    assert "checkpoint [saved]" in shown
    assert "4/10" in shown
    assert "stopped 0.900" in shown
    heading("ppo", 4, 5, "resumes at step [40]", stream)
    assert "resumes at step [40]" in stream.getvalue()


def test_ascii_streams_do_not_break() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    heading("sft", 1, 5, "naïve", stream)
    assert raw.getvalue() == b"?? sft (1/5) ? na?ve ??\n"


def test_summary(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    run.report.write_text("")
    stream = io.StringIO()
    print_summary(run, stream)
    text = stream.getvalue()
    assert "win_rate 0.834 [0.801, 0.866]" in text
    assert "validation_loss 1.34, loss 1.31" in text
    assert "0.120 [0.070, 0.170]" in text
    assert f"Report: {run.report}" in text
    assert "\x1b" not in text
    stream = io.StringIO()
    print_summary(make_run(tmp_path / "other", finished=("sft",)), stream)
    assert "pending" in stream.getvalue()
    assert "Evaluation" not in stream.getvalue()


def test_numbers_for_people() -> None:
    values = [0.0, 0.53249, 0.07, 0.00312, 3.1e-6, 12.34, 1234.5, 2.5e7, -1.5, None, float("nan")]
    shown = ["0", "0.532", "0.070", "0.00312", "3.1e-06", "12.3", "1,234", "2.5e+07", "-1.50", "–", "–"]
    assert [results.format_number(value) for value in values] == shown
    assert [results.clock(value) for value in (0, 45.2, 59.6, 725, 7390)] == [
        "0:00",
        "0:45",
        "1:00",
        "12:05",
        "2:03:10",
    ]
    assert results.label("ppo/kl_to_reference") == "KL to reference"


def test_comparisons_pair_before_with_after() -> None:
    rows = results.comparisons(
        {"x_baseline": 1, "x_policy": {"value": 2, "low": 1, "high": 3}, "y_policy": 5, "z_baseline": 7, "t": "text"}
    )
    assert [(row.name, row.before and row.before.value, row.after.value) for row in rows] == [
        ("x", 1.0, 2.0),
        ("y", None, 5.0),
        ("z_baseline", None, 7.0),
    ]


def test_quiet_libraries_silences_bars() -> None:
    code = """
from rlhf.runs.console import quiet_libraries
quiet_libraries()
from datasets import Dataset
from tqdm.auto import tqdm
for _ in tqdm(range(3)):
    pass
Dataset.from_list([{"a": 1}]).map(lambda row: {"b": 2})
"""
    environment = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert answer.stdout + answer.stderr == ""
