"""The state of a preference store in numbers and as a short table."""

from __future__ import annotations

import io
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rlhf.preferences.exchange.agreement import agreement_figures, comparisons_said, ratings_said
from rlhf.preferences.exchange.card import length_bias, position_bias
from rlhf.preferences.exchange.card_text import figure_text
from rlhf.preferences.exchange.selection import select
from rlhf.preferences.store import PreferenceStore


def store_status(store: PreferenceStore) -> dict[str, Any]:
    """Counts, the queue by round, the annotators and their agreement; plain JSON values."""
    selection = select(store)
    compared = [task for task in selection.tasks if task.plan.kind != "rating"]
    return {
        "store": str(store.path),
        "seed": store.seed,
        "num_prompts": len(store.prompts()),
        "num_responses": len(store.responses()),
        "num_tasks": len(store.tasks()),
        "num_labels": len(store.current_labels()),
        "rounds": [asdict(progress) for progress in store.progress()],
        "annotators": [asdict(figures) for figures in store.annotator_figures()],
        "agreement": {
            "comparisons": agreement_figures(comparisons_said(selection, compared)),
            "ratings": agreement_figures(
                ratings_said(selection, [task for task in selection.tasks if task.plan.kind == "rating"]), numbers=True
            ),
        },
        "position_bias": position_bias(selection, selection.tasks),
        "length_bias": length_bias(selection, [task for task in compared if task.plan.kind == "pairwise"]),
    }


def render_status(status: Mapping[str, Any]) -> str:
    """The status as text with tables."""
    from rich.console import Console
    from rich.table import Table

    stream = io.StringIO()
    width = max(80, shutil.get_terminal_size((100, 24)).columns)
    console = Console(file=stream, width=width, highlight=False, color_system=None)
    counts = (f"{status[f'num_{name}']:,} {name}" for name in ("prompts", "responses", "tasks", "labels"))
    console.print(f"{status['store']}: {', '.join(counts)}", markup=False, soft_wrap=True)
    rounds = Table("round", "tasks", "done", "in work", "started", "waiting", "labels", "declined", "missing")
    names = ("round", "num_tasks", "num_done", "num_in_work", "num_started", "num_waiting")
    for one in status["rounds"]:
        row = [f"{one[name]:,}" for name in (*names, "num_answered", "num_declined", "num_missing")]
        rounds.add_row(*row)
    console.print(rounds)
    people = Table("annotator", "kind", "labels", "declined", "median time", "first side", "gold right", "repeats same")
    for one in status["annotators"]:
        pace = "" if one["median_seconds"] is None else f"{one['median_seconds']:.1f} s"
        people.add_row(
            _plain(one["name"]),
            one["kind"],
            f"{one['num_answered']:,}",
            f"{one['num_declined']:,}",
            pace,
            _of(one["num_first"], one["num_choices"]),
            _of(one["num_gold_right"], one["num_gold"]),
            _of(one["num_repeats_same"], one["num_repeats"]),
        )
    console.print(people)
    for name, figures in status["agreement"].items():
        if figures.get("not_defined") == "no labels":
            continue
        console.print(f"agreement of {name}: {_agreement(figures)}", markup=False, soft_wrap=True)
    for title, name in (("first side chosen", "position_bias"), ("longer response chosen", "length_bias")):
        if status[name]["num"]:
            text = f"{title}: {figure_text(status[name], percent=True)} of {status[name]['num']:,} choices"
            console.print(text, markup=False, soft_wrap=True)
    return stream.getvalue().rstrip("\n")


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape("".join(character if character.isprintable() else "?" for character in text))


def _of(count: int, of: int) -> str:
    return f"{count:,} of {of:,}" if of else ""


def _agreement(figures: Mapping[str, Any]) -> str:
    if "not_defined" in figures:
        return f"not defined: {figures['not_defined']}"
    return (
        f"{figure_text(figures['percent_agreement'], percent=True)}; Krippendorff's alpha "
        f"{figure_text(figures['krippendorff_alpha'])}; Fleiss' kappa {figure_text(figures['fleiss_kappa'])}; Cohen's "
        f"kappa (mean of pairs) {figure_text(figures['cohen_kappa_mean'])}; over "
        f"{figures['num_comparable_items']:,} items"
    )
