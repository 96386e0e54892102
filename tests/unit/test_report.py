"""The report: complete, inert whatever the texts hold, and made from whatever is there."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from rlhf.runs import charts
from rlhf.runs.charts import Series
from rlhf.runs.files import write_text
from rlhf.runs.folder import RunFolder
from rlhf.runs.report import write_report
from rlhf.runs.results import Estimate
from tests.html_page import Page
from tests.unit.runs_example import STAGES, make_run

HOSTILE = "</div></td><script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp;"


def render(run: RunFolder) -> tuple[str, Page]:
    text = write_report(run).read_text(encoding="utf-8")
    return text, Page(text)


def test_full_report(tmp_path: Path) -> None:
    text, page = render(make_run(tmp_path / "run"))
    for expected in (
        "Win rate",
        "83.4 %",
        "on 500 held-out prompts",
        "80.1 to 86.6 %",
        "Score against KL",
        "Explained variance",
        "Throughput",
        "was a delight",
        "Rollouts while PPO trained",
        "num_updates: 120",
        "Manifest",
    ):
        assert expected in text
    figures = [name for name in page.elements if name == "figure"]
    # 1 SFT, 2 reward model, 11 PPO, and one for each other number: 2 learning rates of SFT, 5 of PPO.
    assert len(figures) == 14 + 2 + 5
    assert page.elements.count("svg") == len(figures) + 6
    assert "nan" not in re.sub(r"[a-z]*nan[a-z]+|[a-z]+nan", "", text.lower())


def test_nothing_is_loaded_from_elsewhere(tmp_path: Path) -> None:
    text, page = render(make_run(tmp_path / "run"))
    links = [value or "" for name, value in page.attributes if name in ("src", "href", "action", "data", "srcset")]
    assert all(link.startswith("#") for link in links)
    assert "http" not in re.sub(r"http-equiv", "", text)
    assert "url(" not in text
    assert "@import" not in text


def test_hostile_texts_are_inert(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", response=HOSTILE)
    write_text(run.config, f"experiment: {HOSTILE}\n")
    body = run.manifest.read_text().replace('"quickstart"', '"<script>alert(3)</script>"')
    run.manifest.write_text(body.replace('"rlhf"', '"</pre><script>alert(4)</script>"'))
    run.samples.write_text(
        run.samples.read_text()
        + '{"stage": "evaluate", "step": 0, "policy_score": "<i>", '
        + '"prompt": [{"role": "<b>", "content": "<script>"}, 3]}\n'
    )
    lines = [f'{{"stage": "<script>", "step": {step}, "<img src=x>/<b>": 1.0}}\n' for step in range(5)]
    run.metrics.write_text(run.metrics.read_text() + "".join(lines))
    text, page = render(run)
    assert "&lt;img src=x&gt;" in text
    assert page.elements.count("script") == 1
    assert "img" not in page.elements
    assert "b" in page.elements  # our own, in the header
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert HOSTILE.replace("&amp;", "&amp;") in "".join(page.texts)
    policy = next(value for name, value in page.attributes if name == "content" and value and "default-src" in value)
    assert "script-src 'sha256-" in policy
    assert "default-src 'none'" in policy
    assert "<script>alert" not in text


@pytest.mark.parametrize("count", range(len(STAGES)))
def test_partly_finished_runs(tmp_path: Path, count: int) -> None:
    text, _ = render(make_run(tmp_path / "run", finished=STAGES[:count]))
    assert ("No evaluation yet" in text) == (count < 5)


def test_missing_and_broken_pieces(tmp_path: Path) -> None:
    for name in ("manifest.json", "config.yaml", "metrics.jsonl", "samples.jsonl", "stages"):
        run = make_run(tmp_path / name)
        target = run.path / name
        if target.is_dir():
            shutil.rmtree(target)
        else:
            target.write_bytes(target.read_bytes()[:-40] + b"\xff\xfe")
            render(run)
            target.unlink()
        render(run)
    empty = RunFolder(tmp_path / "empty")
    empty.create()
    text, _ = render(empty)
    assert "No stage has run yet" in text


def test_odd_metrics(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    write_text(
        run.metrics,
        '{"stage": "ppo", "step": 1, "ppo/score_mean": null, "ppo/kl_to_reference": 1.0}\n'
        '{"stage": "ppo", "step": 2, "ppo/score_mean": "text", "ppo/entropy": 1e308}\n'
        '{"stage": "ppo", "step": 3, "ppo/score_mean": 2.0, "ppo/entropy": -1e308}\n'
        '{"stage": "ppo", "step": "x"}\n{"step": 1}\n',
    )
    text, _ = render(run)
    assert "KL to the reference" in text
    assert "nan" not in text


def test_ticks_are_round() -> None:
    assert charts.ticks(0, 100, 5) == [0, 20, 40, 60, 80, 100]
    assert charts.ticks(-0.3, 0.31, 3) == [-0.2, 0.0, 0.2]
    assert charts.ticks(1, 1) == [1]
    for low, high in ((0.0012, 0.0019), (-5e6, 3e7), (0.5, 0.51), (1e-9, 3e-9)):
        found = charts.ticks(low, high, 4)
        assert 2 <= len(found) <= 8
        assert all(low <= value <= high for value in found)


def test_line_chart_positions() -> None:
    figure = charts.line_chart("T", [Series("a", [(0, 0.0), (10, 1.0)])], x_label="step", y_label="y")
    points = re.search(r'points="([^"]+)"', figure)
    assert points is not None
    (x0, y0), (x1, y1) = (map(float, point.split(",")) for point in points[1].split())
    assert (x0, x1) == (charts.LEFT, charts.WIDTH - charts.RIGHT)
    # y grows downwards; 6 % of the range stay free on both sides.
    assert y0 > y1
    height = charts.HEIGHT - charts.BOTTOM - charts.TOP
    assert y0 - y1 == pytest.approx(height / 1.12, abs=0.1)
    assert "<title>a, step 10: 1</title>" in figure


def test_line_chart_gaps_spikes_and_constants() -> None:
    gap = charts.line_chart(
        "T", [Series("a", [(1, 1.0), (2, 2.0), (3, None), (4, 1.0), (5, 2.0)])], x_label="", y_label=""
    )
    assert gap.count("<polyline") == 2
    spiky = [(float(x), 100.0 if x == 7777 else 0.0) for x in range(10_000)]
    figure = charts.line_chart("T", [Series("a", spiky)], x_label="", y_label="")
    heights = [float(point.split(",")[1]) for point in re.search(r'points="([^"]+)"', figure)[1].split()]  # type: ignore[index]
    assert len(heights) < 1000
    assert max(heights) - min(heights) > 100
    assert "<svg" in charts.line_chart("T", [Series("a", [(1, 3.0), (2, 3.0)])], x_label="", y_label="")
    assert charts.line_chart("T", [Series("a", [(1, float("nan"))])], x_label="", y_label="") == ""


def test_interval_bar() -> None:
    bar = charts.interval_bar(Estimate(0.2), Estimate(0.5, 0.25, 0.75), bounds=(0.0, 1.0), mark=0.5)
    # 0 is at 8 and 1 at 192.
    assert 'x1="54.0" x2="146.0"' in bar
    assert 'cx="100.0"' in bar
    assert 'class="mark" x1="100.0"' in bar
    assert "<title>before: 0.2</title>" in bar
    alone = charts.interval_bar(None, Estimate(8.9, 8.4, 9.4), bounds=None, mark=None)
    assert ">0</text>" in alone
    assert ">10</text>" in alone
