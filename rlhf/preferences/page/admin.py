"""The admin view's side of the server: how far the labelling is, how annotators work and agree, and the export."""

from __future__ import annotations

import io
import math
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from rlhf.errors import ConfigError, DataError
from rlhf.preferences.page.desk import DeskError
from rlhf.preferences.page.payloads import ReplanBody
from rlhf.preferences.page.progress import per_hour
from rlhf.preferences.resolution import ResolutionRule
from rlhf.preferences.store import AnnotatorFigures, BothBad, Choice, Label, PreferenceStore, RoundProgress, Task, Tie
from rlhf.statistics.agreement import fleiss_kappa, krippendorff_alpha, pairwise_cohen_kappa, percent_agreement
from rlhf.statistics.annotations import Annotations, Resampling, table_of_labels
from rlhf.statistics.intervals import Interval, wilson

RuleKind = Literal["majority", "mean", "all"]
Prompts = Literal["all", "text", "messages"]
NUM_LATEST = 50
NUM_HOURS = 24
PROMPT_LENGTH = 200
RESPONSE_LENGTH = 300
# Kappa of every two of more annotators than this is a table that nobody reads.
MAX_COHEN = 12
_RESAMPLING = Resampling(num_resamples=1000)
# Making the summary may take this share of the server's time.
_SHARE = 0.1


class Admin:
    """What the admin view asks. The summary is made by one request at a time; the others get the one before."""

    def __init__(self, store: PreferenceStore) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._summary: dict[str, Any] | None = None
        self._valid_until = 0.0

    def summary(self) -> dict[str, Any]:
        """The figures of the whole store, at most as old as ten times what they cost to make."""
        made = self._summary
        if made is not None and time.monotonic() < self._valid_until:
            return made
        if not self._lock.acquire(blocking=made is None):
            assert made is not None
            return made
        try:
            # Whoever waited here for the first summary takes it, and does not make it again.
            if self._summary is not None and time.monotonic() < self._valid_until:
                return self._summary
            start = time.monotonic()
            self._summary = summarise(self._store)
            end = time.monotonic()
            self._valid_until = end + (end - start) / _SHARE
            return self._summary
        finally:
            self._lock.release()

    def export(self, format: str, rule: RuleKind, prompts: Prompts) -> tuple[str, bytes]:
        """The name and the bytes of a zip file with the files of an export, which `rlhf preferences export` writes too.

        Raises `DeskError` when there is nothing to export, or the format cannot hold it.
        """
        # Here, since it imports what reads and writes data sets, which nothing else of the page needs.
        from rlhf.preferences.exchange import export_labels, write_export

        name = f"{self._store.path.stem}-{format}-{rule}"
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / name
            try:
                exported = export_labels(self._store, rule=ResolutionRule(rule))
                write_export(exported, folder, format=format, prompts=prompts, store=self._store)
            except (ConfigError, DataError) as error:
                raise DeskError(422, "export", str(error)) from error
            archive = io.BytesIO()
            with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
                for path in sorted(folder.rglob("*")):
                    if path.is_file():
                        packed.write(path, Path(name) / path.relative_to(folder))
        return f"{name}.zip", archive.getvalue()

    def replan(self, body: ReplanBody) -> dict[str, Any]:
        """Sets the wanted labels or the priority of the ordinary tasks of a round, or of all."""
        tasks = [
            task.id
            for task in self._store.tasks().values()
            if body.round in (None, task.plan.round) and task.plan.gold is None and task.plan.repeat_of is None
        ]
        self._store.replan(tasks, num_labels=body.num_labels, priority=body.priority)
        self._valid_until = 0.0
        return {"tasks": len(tasks)}


def summarise(store: PreferenceStore) -> dict[str, Any]:
    """Progress, queue, annotators, agreement, and what annotators said, as JSON without NaN."""
    labels = store.current_labels()
    tasks = store.tasks({label.task for label in labels})
    totals = store.totals("human")
    by_annotator: dict[str, list[Label]] = {}
    for label in labels:
        by_annotator.setdefault(label.annotator, []).append(label)
    return {
        "progress": {"wanted": totals.num_wanted, "done": totals.num_there, "labels": len(labels)},
        "queue": _queue(store.progress(), store.num_stuck("human")),
        "annotators": [
            _annotator(figures, by_annotator.get(figures.name, [])) for figures in store.annotator_figures()
        ],
        "agreement": agreement(labels, tasks),
        "pace": _pace(labels),
        "flags": _with_texts(store, _latest_flags(labels), tasks),
        "comments": _with_texts(store, _latest_comments(labels), tasks),
    }


def _queue(rounds: Sequence[RoundProgress], num_stuck: int) -> dict[str, Any]:
    fields = [name for name in RoundProgress.__dataclass_fields__ if name != "round"]
    total = {name.removeprefix("num_"): sum(getattr(one, name) for one in rounds) for name in fields}
    listed = [
        {"round": one.round, **{name.removeprefix("num_"): getattr(one, name) for name in fields}} for one in rounds
    ]
    return {**total, "open": total["tasks"] - total["done"], "declined_by_all": num_stuck, "rounds": listed}


def _annotator(figures: AnnotatorFigures, labels: Sequence[Label]) -> dict[str, Any]:
    return {
        "name": figures.name,
        "kind": figures.kind,
        "labels": figures.num_answered,
        "median_seconds": figures.median_seconds,
        "per_hour": per_hour([label.made_at for label in labels]),
        "left_share": _share(figures.num_first, figures.num_choices),
        "self_consistency": _share(figures.num_repeats_same, figures.num_repeats),
        "gold_accuracy": _share(figures.num_gold_right, figures.num_gold),
        "skips": sum(label.kind == "skip" for label in labels),
        "flags": sum(len(label.flags) for label in labels),
        "last": max(label.made_at for label in labels).isoformat() if labels else None,
    }


def agreement(labels: Iterable[Label], tasks: Mapping[str, Task]) -> dict[str, Any]:
    """How annotators agree on pairs, with 95 % intervals; repeats count for self-consistency only.

    The values are the two responses, a tie and both bad. Fleiss' kappa needs as many labels of every pair, so it is
    that of the pairs with the commonest number of labels of at least two.
    """
    rows = [
        (label.task, label.annotator, value)
        for label in labels
        if tasks[label.task].plan.repeat_of is None and (value := _pair_value(label, tasks[label.task])) is not None
    ]
    empty: dict[str, Any] = {"percent": None, "cohen": [], "fleiss": None, "krippendorff": None}
    if not rows:
        return {**empty, "note": "No pair has a label yet."}
    table = table_of_labels(rows)
    if not table.num_comparable_items:
        return {**empty, "note": "No pair has labels of two annotators; let tasks want more labels to measure it."}
    notes = [f"Of {table.num_items:,} labelled pairs, {table.num_comparable_items:,} have labels of two or more."]
    cohen: list[dict[str, Any]] = []
    if len(table.annotators) <= MAX_COHEN:
        pairs = pairwise_cohen_kappa(table, resampling=_RESAMPLING).pairs
        cohen = [
            {"first": first, "second": second, **shown}
            for (first, second), kappa in pairs.items()
            if (shown := _interval(kappa)) is not None
        ]
    else:
        notes.append(f"Cohen's kappa of every two is shown for up to {MAX_COHEN} annotators.")
    fleiss, note = _fleiss(table, rows)
    return {
        "percent": _interval(percent_agreement(table, resampling=_RESAMPLING)),
        "cohen": cohen,
        "fleiss": fleiss,
        "krippendorff": _interval(krippendorff_alpha(table, resampling=_RESAMPLING)),
        "note": " ".join([*notes, *note]),
    }


def _fleiss(
    table: Annotations, rows: Sequence[tuple[str, str, str]]
) -> tuple[dict[str, float | None] | None, list[str]]:
    """Fleiss' kappa of the pairs with the commonest number of labels, and a word on which these are."""
    counts: dict[str, int] = {}
    for task, _, _ in rows:
        counts[task] = counts.get(task, 0) + 1
    several = [count for count in counts.values() if count >= 2]
    commonest = max(set(several), key=lambda count: (several.count(count), count))
    kept = [row for row in rows if counts[row[0]] == commonest]
    note = (
        []
        if several.count(commonest) == len(several)
        else [f"Fleiss' kappa is of the {several.count(commonest):,} pairs with {commonest} labels."]
    )
    try:
        kappa = fleiss_kappa(table_of_labels(kept, order=table.values), resampling=_RESAMPLING)
    except DataError:
        return None, note
    return _interval(kappa), note


def _pair_value(label: Label, task: Task) -> str | None:
    if task.plan.kind != "pairwise":
        return None
    if isinstance(label.answer, Choice):
        return "first" if label.answer.preferred == task.plan.responses[0] else "second"
    return "tie" if isinstance(label.answer, Tie) else "both_bad" if isinstance(label.answer, BothBad) else None


def _latest_flags(labels: Sequence[Label]) -> list[dict[str, Any]]:
    """The newest flags; `position` is where the response was on the screen, None for the task as a whole."""
    found: list[dict[str, Any]] = []
    for label in reversed(labels):
        for flag in label.flags:
            known = flag.response is not None and flag.response in label.shown
            position = label.shown.index(flag.response) if known and flag.response is not None else None
            found.append({**_about(label), "kind": flag.kind, "position": position, "response": flag.response})
        if len(found) >= NUM_LATEST:
            break
    return found[:NUM_LATEST]


def _latest_comments(labels: Sequence[Label]) -> list[dict[str, Any]]:
    said = [label for label in reversed(labels) if label.comment]
    return [{**_about(label), "text": label.comment} for label in said[:NUM_LATEST]]


def _pace(labels: Iterable[Label]) -> list[dict[str, Any]]:
    """Labels made by people an hour, of the last hours that have any, the oldest first."""
    counts: dict[datetime, int] = {}
    for label in labels:
        if label.annotator_kind == "human":
            hour = label.made_at.replace(minute=0, second=0, microsecond=0)
            counts[hour] = counts.get(hour, 0) + 1
    return [{"hour": hour.isoformat(), "labels": counts[hour]} for hour in sorted(counts)][-NUM_HOURS:]


def _with_texts(store: PreferenceStore, said: list[dict[str, Any]], tasks: Mapping[str, Task]) -> list[dict[str, Any]]:
    """Flags or comments with what they are about: the end of the prompt, and the response where one is named."""
    prompts = store.prompts({tasks[one["task"]].prompt for one in said})
    responses = store.responses({one["response"] for one in said if one.get("response") is not None})
    shown = []
    for one in said:
        prompt = prompts[tasks[one["task"]].prompt].prompt
        text = prompt if isinstance(prompt, str) else prompt[-1].content if prompt else ""
        texts: dict[str, Any] = {"prompt": text[:PROMPT_LENGTH]}
        if "response" in one:
            named = one["response"]
            texts["response"] = None if named is None else responses[named].text[:RESPONSE_LENGTH]
        shown.append({**one, **texts})
    return shown


def _about(label: Label) -> dict[str, Any]:
    return {
        "label": label.id,
        "task": label.task,
        "round": label.round,
        "annotator": label.annotator,
        "at": label.made_at.isoformat(),
    }


def _share(successes: int, count: int) -> dict[str, float] | None:
    return {**wilson(successes, count).to_json(), "count": count} if count else None


def _interval(interval: Interval) -> dict[str, float | None] | None:
    """None for what is undefined, and for the ends of an interval that no resample defines."""
    if math.isnan(interval.value):
        return None
    return {name: None if math.isnan(value) else value for name, value in interval.to_json().items()}
