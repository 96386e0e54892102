"""The sections of the report, each a function from what the run folder holds to HTML. All text is escaped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from rlhf.runs import results
from rlhf.runs.charts import Series, interval_bar, line_chart, path_chart
from rlhf.runs.results import Comparison, Estimate

MAX_SAMPLES = 200
MIN_POINTS = 4
MAX_ROLLOUTS = 300
NUM_CARDS = 4
# Which results come first at the top of the report: a name, or what it ends with.
_FIRST = ("win_rate", "gold_score", "positive_share", "judge_score", "kl_to_reference", "grammatical_share")
SHARES = ("rate", "share", "fraction", "accuracy")


@dataclass(frozen=True)
class Chart:
    """A chart of the report: title, unit of y, and the metrics drawn, as (legend, name)."""

    title: str
    unit: str
    lines: tuple[tuple[str, str], ...]


def _chart(title: str, unit: str, *names: str) -> Chart:
    return Chart(title, unit, tuple((results.label(name), name) for name in names))


def _training(stage: str, title: str, unit: str, metric: str) -> Chart:
    names = (("training", metric), ("validation", f"validation_{metric}"), ("test", f"test_{metric}"))
    return Chart(title, unit, tuple((legend, f"{stage}/{name}") for legend, name in names))


CHARTS: dict[str, tuple[Chart, ...]] = {
    "sft": (_training("sft", "Loss", "nats a token", "loss"),),
    "reward_model": (
        _training("reward_model", "Loss", "nats a pair", "loss"),
        _training("reward_model", "Accuracy", "share of pairs", "accuracy"),
    ),
    "dpo": (
        _training("dpo", "Loss", "of a pair", "loss"),
        _training("dpo", "Accuracy", "share of pairs", "accuracy"),
        _chart("Margin of the implicit rewards", "mean", "dpo/margin"),
        _chart("Implicit rewards", "mean", "dpo/chosen_reward", "dpo/rejected_reward"),
    ),
    "ppo": (
        _chart("Score", "mean score", "ppo/score_mean"),
        _chart("KL to the reference", "nats a response", "ppo/kl_to_reference"),
        _chart("Entropy", "nats a token", "ppo/entropy"),
        _chart("Clipped ratios", "share of tokens", "ppo/clip_fraction"),
        _chart("Approximate KL of an update", "nats a token", "ppo/approx_kl"),
        _chart("Explained variance of the values", "share", "ppo/explained_variance"),
        _chart("Value loss", "squared score", "ppo/value_loss"),
        _chart("Response length", "tokens", "ppo/response_length"),
        _chart("Responses that stopped", "share", "ppo/stopped_fraction"),
        Chart(
            "Throughput",
            "tokens a second",
            (("rollout", "perf/rollout_tokens_per_second"), ("training", "perf/train_tokens_per_second")),
        ),
    ),
}


def headline(rows: Sequence[Comparison]) -> str:
    """The first few results as cards with big numbers, the win rate first."""
    if not rows:
        return '<p class="empty card">No evaluation yet: it writes its numbers when it is finished.</p>'
    rank = {row.name: [row.name.endswith(name) for name in (*_FIRST, "")].index(True) for row in rows}
    ordered = sorted(rows, key=lambda row: rank[row.name])
    cards = []
    for row in ordered[:NUM_CARDS]:
        more = []
        if row.after.low is not None and row.after.high is not None:
            more.append(f"interval {_range(row, row.after.low, row.after.high)}")
        if row.before is not None:
            more.append(f"before {_text(row, row.before.value)}")
        cards.append(
            f'<div class="card"><div class="name">{escape(results.label(row.name))}</div>'
            f'<div class="number">{_text(row, row.after.value)}</div>'
            f'<div class="more">{"<br>".join(more)}</div></div>'
        )
    return f'<div class="cards">{"".join(cards)}</div>'


def evaluation_table(rows: Sequence[Comparison], confidence: float | None) -> str:
    """Before and after with their intervals as numbers and drawn, one metric a row."""
    if not rows:
        return ""
    lines = []
    for row in rows:
        bar = interval_bar(
            row.before,
            row.after,
            bounds=(0.0, 1.0) if _is_share(row) else None,
            mark=0.5 if row.name == "win_rate" else None,
        )
        lines.append(
            f"<tr><td>{escape(results.label(row.name))}</td><td class='n'>{_estimate(row, row.before)}</td>"
            f"<td class='n'>{_estimate(row, row.after)}</td><td>{bar}</td></tr>"
        )
    level = "intervals" if confidence is None else f"{confidence * 100:g} % intervals"
    return (
        '<div class="tablebox"><table class="evaluation"><thead><tr><th>Metric</th><th class="n">Before</th>'
        '<th class="n">After</th>'
        '<th><span class="legend"><span class="key s2">before</span><span class="key s0">after</span>'
        f"<span>{level}</span></span></th>"
        f"</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def gap_table(rows: Sequence[results.GapRow]) -> str:
    """The study `closed_form`: gap, objective, reward and KL of each training beside those of the optimum."""
    if not rows:
        return ""
    lines = []
    for row in rows:
        pairs = "".join(
            f"<td class='n'>{results.format_number(own)}<span class='range'>{results.format_number(best)}</span></td>"
            for own, best in (row.numbers[name] for name in results.GAP_NUMBERS)
        )
        lines.append(
            f"<tr><td>{escape(row.algorithm.upper())}</td><td class='n'>{row.beta:g}</td>"
            f"<td class='n'>{row.gap:.4f}</td>{pairs}</tr>"
        )
    heads = "".join(f'<th class="n">{name}<br>optimum</th>' for name in ("Objective", "Expected reward", "KL, nats"))
    return (
        "<h3>Distance from the exact optimum</h3>"
        '<p class="dim">Gap: (J* \N{MINUS SIGN} J) / (J* \N{MINUS SIGN} J of the reference), by enumeration.</p>'
        '<div class="tablebox"><table><thead><tr><th>Algorithm</th><th class="n">\N{GREEK SMALL LETTER BETA}</th>'
        f'<th class="n">Gap</th>{heads}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
    )


def _gap_curves(entries: Sequence[Mapping[str, Any]]) -> str:
    """One chart an algorithm with a line for each beta, over the responses used."""
    lines: dict[str, dict[str, list[tuple[float, float | None]]]] = {}
    for entry in entries:
        used = results.estimate(entry.get("closed_form/responses"))
        for name, value in entry.items():
            if used is None or not name.startswith("closed_form/gap/"):
                continue
            algorithm, _, beta = name.removeprefix("closed_form/gap/").partition("/")
            gap = results.estimate(value)
            points = lines.setdefault(algorithm, {}).setdefault(beta, [])
            points.append((used.value, None if gap is None else gap.value))
    figures = [
        line_chart(
            f"{algorithm.upper()}: gap to the optimum",
            [Series(f"\N{GREEK SMALL LETTER BETA} {beta}", points) for beta, points in of_beta.items()],
            x_label="sampled responses",
            y_label="gap",
        )
        for algorithm, of_beta in lines.items()
    ]
    return f'<h3>{results.label("closed_form")}</h3><div class="figures">{"".join(figures)}</div>' if figures else ""


def curves(stage: str, entries: Sequence[Mapping[str, Any]]) -> str:
    """The stage's charts; numbers that have none of their own are in a fold. Empty when nothing was logged."""
    if stage == "closed_form":
        return _gap_curves(entries)
    counts = Counter(name for entry in entries for name in entry)
    # What is measured once or twice is a result, shown elsewhere, unless a chart is meant for it.
    charted = {name for chart in CHARTS.get(stage, ()) for _, name in chart.lines}
    names = sorted(name for name in counts if name in charted or counts[name] >= MIN_POINTS)
    names = [name for name in names if name not in ("stage", "step")]
    figures = []
    if stage == "ppo":
        figures.append(_frontier(entries))
    for chart in CHARTS.get(stage, ()):
        lines = [Series(legend, _points(entries, name)) for legend, name in chart.lines if name in names]
        figures.append(line_chart(chart.title, lines, x_label="step", y_label=chart.unit))
    others = [
        line_chart(results.label(name), [Series(name, _points(entries, name))], x_label="step", y_label=name)
        for name in names
        if name not in charted
    ]
    main, more = "".join(figures), "".join(others)
    if not main:
        main, more = more, ""
    if not main:
        return ""
    fold = f'<details><summary>All other numbers</summary><div class="figures">{more}</div></details>' if more else ""
    return f'<h3>{escape(results.label(stage))}</h3><div class="figures">{main}</div>{fold}'


def _frontier(entries: Sequence[Mapping[str, Any]]) -> str:
    points = []
    for entry in entries:
        pair = results.estimate(entry.get("ppo/kl_to_reference")), results.estimate(entry.get("ppo/score_mean"))
        if pair[0] is not None and pair[1] is not None:
            points.append((pair[0].value, pair[1].value, float(entry["step"])))
    if len(points) < 2:
        return ""
    return path_chart("Score against KL", points, x_label="KL, nats a response", y_label="mean score")


def _points(entries: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float | None]]:
    found = [(entry["step"], entry[name]) for entry in entries if name in entry]
    points = []
    for step, value in found:
        number = results.estimate(value)
        points.append((float(step), None if number is None else number.value))
    return points


def samples(rows: Sequence[Mapping[str, Any]]) -> str:
    """Responses before and after side by side, with a filter and an order where scripts run."""
    if not rows:
        return '<p class="empty card">No samples yet.</p>'
    items = "".join(_pair(row) for row in rows[:MAX_SAMPLES])
    left = f'<p class="dim">The first {MAX_SAMPLES} of {len(rows)}.</p>' if len(rows) > MAX_SAMPLES else ""
    return (
        '<div class="tools" id="samples-tools" hidden>'
        '<input id="samples-filter" type="search" placeholder="Filter by words" aria-label="Filter by words">'
        '<label>Order <select id="samples-order"><option value="given">as evaluated</option>'
        '<option value="gain">largest gain first</option><option value="loss">largest loss first</option>'
        "</select></label>"
        '<span class="dim" id="samples-count"></span></div>'
        f'<div id="samples-list">{items}</div>{left}'
    )


def _pair(row: Mapping[str, Any]) -> str:
    before, after = (results.estimate(row.get(f"{side}_score")) for side in ("baseline", "policy"))
    gain = "" if before is None or after is None else f' data-gain="{after.value - before.value:.6g}"'
    sides = "".join(
        f'<div class="side {kind}"><div class="who">{kind}{_score(score)}</div>'
        f'<div class="text">{_response(row.get(f"{side}_response"))}</div></div>'
        for kind, side, score in (("before", "baseline", before), ("after", "policy", after))
    )
    return f'<div class="sample"{gain}>{prompt_text(row.get("prompt"))}<div class="pair">{sides}</div></div>'


def rollouts(entries: Sequence[Mapping[str, Any]]) -> str:
    """PPO's sampled responses over the training, a fold for each step, the last one open."""
    if not entries:
        return ""
    shown = entries[-MAX_ROLLOUTS:]
    steps = list(dict.fromkeys(entry.get("step") for entry in shown))
    folds = []
    for step in steps:
        items = "".join(_rollout(entry) for entry in shown if entry.get("step") == step)
        opened = " open" if step == steps[-1] else ""
        folds.append(
            f"<details{opened}><summary>Step {escape(str(step))}</summary>"
            f'<div class="tablebox"><table><tbody>{items}</tbody></table></div></details>'
        )
    left = f'<p class="dim">The last {MAX_ROLLOUTS} of {len(entries)}.</p>' if len(entries) > MAX_ROLLOUTS else ""
    return f"<h3>Rollouts while PPO trained</h3>{left}{''.join(folds)}"


def _rollout(entry: Mapping[str, Any]) -> str:
    score = results.estimate(entry.get("score", entry.get("policy_score")))
    shown = ("stage", "step", "prompt", "response", "score")
    rest = ((name, results.estimate(value)) for name, value in entry.items() if name not in shown)
    numbers = " · ".join(f"{escape(results.label(name))} {results.format_estimate(one)}" for name, one in rest if one)
    return (
        f'<tr><td>{prompt_text(entry.get("prompt"))}<div class="text">{_response(entry.get("response"))}</div>'
        f'<div class="who">{numbers}</div></td><td class="n">{_score(score)}</td></tr>'
    )


def _response(response: Any) -> str:
    """The text; the space that joins it to its prompt would only look like an error here."""
    return escape(str(response if response is not None else "").lstrip(" "))


def prompt_text(prompt: Any) -> str:
    """A plain prompt, or the turns of a conversation."""
    if isinstance(prompt, list):
        turns = "".join(
            f'<div class="text"><span class="role">{escape(str(turn.get("role", "")))}</span>'
            f"{escape(str(turn.get('content', '')))}</div>"
            for turn in prompt
            if isinstance(turn, Mapping)
        )
        return f'<div class="prompt">{turns}</div>'
    return f'<div class="prompt text">{escape(str(prompt if prompt is not None else ""))}</div>'


def _score(score: Estimate | None) -> str:
    return "" if score is None else f' <span class="chip">{results.format_number(score.value)}</span>'


def stage_table(rows: Iterable[results.StageRow]) -> str:
    """Status, time, memory and the first results of each stage."""
    lines = []
    for row in rows:
        found = [(name, results.estimate(value)) for name, value in row.summary.items()]
        numbers = [f"{escape(results.label(name))} {results.format_estimate(value)}" for name, value in found if value]
        lines.append(
            f"<tr><td>{escape(results.label(row.name))}</td>"
            f'<td><span class="chip {escape(row.status, quote=True)}">{escape(row.status)}</span></td>'
            f'<td class="n">{results.format_seconds(row.seconds)}</td>'
            f'<td class="n">{results.format_bytes(row.peak_memory_bytes)}</td>'
            f'<td class="dim">{" · ".join(numbers[:6])}</td></tr>'
        )
    if not lines:
        return '<p class="empty card">No stage has run yet.</p>'
    return (
        '<div class="tablebox"><table><thead><tr><th>Stage</th><th>Status</th><th class="n">Time</th>'
        f'<th class="n">Peak memory</th><th>Results</th></tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
    )


def fold(title: str, text: str) -> str:
    """Preformatted text in a fold."""
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"


def _is_share(row: Comparison) -> bool:
    """Whether the metric is a share by its name, all its numbers lying in [0, 1]."""
    values = [one.value for one in (row.before, row.after) if one is not None]
    return row.name.split("_")[-1] in SHARES and all(0 <= value <= 1 for value in values)


def _text(row: Comparison, value: float) -> str:
    return f"{value * 100:.1f} %" if _is_share(row) else results.format_number(value)


def _range(row: Comparison, low: float, high: float) -> str:
    return f"{_text(row, low).removesuffix(' %')} to {_text(row, high)}"


def _estimate(row: Comparison, value: Estimate | None) -> str:
    if value is None:
        return ""
    interval = ""
    if value.low is not None and value.high is not None:
        interval = f'<span class="range">{_range(row, value.low, value.high)}</span>'
    return f"{_text(row, value.value)}{interval}"
