"""The rounds of a preference store: what earlier ones have asked, and what identifies their labels."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from rlhf.preferences.store import PreferenceStore
from rlhf.preferences.store.answers import answer_kind, answer_to_json


def earlier_tasks(store: PreferenceStore, number: int) -> list[str]:
    """The tasks (ids) of the rounds before `number`, in the order of creation, without gold questions and repeats."""
    return [
        key
        for key, task in store.tasks().items()
        if task.plan.round < number and task.plan.gold is None and task.plan.repeat_of is None
    ]


def earlier_labels(path: Path, number: int) -> str:
    """A hash of the current labels of the rounds before `number`; the same for a store that is not there and none."""
    labels = []
    if path.exists():
        with PreferenceStore.open(path) as store:
            labels = sorted(
                [label.task, label.annotator, answer_kind(label.answer), answer_to_json(label.answer)]
                for label in store.current_labels()
                if label.round < number and label.answer is not None
            )
    return hashlib.sha256(json.dumps(labels).encode()).hexdigest()
