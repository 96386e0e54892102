"""Labels that were made elsewhere: imported from a file, or by a program that needs no lease and no page."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from rlhf.preferences.store.answers import (
    Answer,
    Flag,
    Skip,
    answer_kind,
    answer_to_json,
    flags_from_json,
    flags_to_json,
)
from rlhf.preferences.store.assignments import RefusedError, has_room
from rlhf.preferences.store.content import batches
from rlhf.preferences.store.database import time_text
from rlhf.preferences.store.labels import Labels, append_version, check_submission, same_submission


@dataclass(frozen=True)
class MadeLabel:
    """An answer to a task (id) that no assignment of this store led to.

    `shown` are the ids of the responses in the order in which the annotator saw them, empty when that is not known.
    `made_at` is now when not given. `token` names the label: the same one again adds nothing. `page` says where the
    label comes from. `instructions` is the hash of the text shown beside the task, which has been added; `leased_at` is
    when the task was given out, `made_at` unless known.
    """

    task: str
    annotator: str
    answer: Answer | None
    token: str
    shown: tuple[str, ...] = ()
    seconds: float | None = None
    flags: tuple[Flag, ...] = ()
    comment: str = ""
    page: str = "recorded"
    made_at: datetime | None = None
    instructions: str | None = None
    leased_at: datetime | None = None


class Recording(Labels):
    """The method that takes labels from elsewhere."""

    def record(self, labels: Iterable[MadeLabel]) -> int:
        """Appends labels that are not there yet, many in a transaction; returns how many were new.

        They take the places of their tasks as others do. Raises `RefusedError` for one that does not fit its task, has
        no place or an annotator who is unknown or has the task already; of its batch, none is kept then.
        """
        new = 0
        for batch in batches(labels):
            with self._write() as connection:
                now = self._sweep(connection)
                new += sum(_record(connection, label, now) for label in batch)
        return new


def _record(connection: sqlite3.Connection, made: MadeLabel, now: str) -> bool:
    """Appends one label; False when it is there."""
    time = now if made.made_at is None else time_text(made.made_at)
    flags = flags_to_json(made.flags)
    body = (answer_kind(made.answer), None if made.answer is None else answer_to_json(made.answer), flags, made.comment)
    query = "SELECT a.id, a.task, a.annotator FROM labels l JOIN assignments a ON a.id = l.assignment WHERE l.token = ?"
    known = connection.execute(query, (made.token,)).fetchone()
    if known is not None:
        assignment = known[0] if tuple(known)[1:] == (made.task, made.annotator) else 0
        return same_submission(connection, made.token, assignment, body) is None
    if connection.execute("SELECT 1 FROM tasks WHERE id = ?", (made.task,)).fetchone() is None:
        raise RefusedError("unknown_task", f"there is no task {made.task!r}; add it first")
    if connection.execute("SELECT 1 FROM annotators WHERE name = ?", (made.annotator,)).fetchone() is None:
        raise RefusedError("unknown_annotator", f"there is no annotator {made.annotator!r}; add them first")
    check_submission(
        connection, made.task, made.answer, flags_from_json(flags), made.seconds, (made.token, made.comment)
    )
    _check_shown(connection, made)
    live = "SELECT 1 FROM assignments WHERE task = ? AND annotator = ? AND state IN ('leased', 'answered', 'declined')"
    if connection.execute(live, (made.task, made.annotator)).fetchone() is not None:
        raise RefusedError("already_labelled", f"{made.annotator!r} labelled or holds task {made.task}; see `submit`")
    fills = made.answer is not None and not isinstance(made.answer, Skip)
    if fills and not has_room(connection, made.task):
        raise RefusedError("no_room", f"task {made.task} has all the labels that it wants; see `replan`")
    leased = time if made.leased_at is None else time_text(made.leased_at)
    values = (made.task, made.annotator, json.dumps(made.shown), made.instructions, made.page, leased, time)
    row = connection.execute(
        "INSERT INTO assignments (task, annotator, shown, instructions, page, leased_at, lease_ends, state)"
        f" VALUES (?, ?, ?, ?, ?, ?, ?, '{'answered' if fills else 'declined'}')",
        values,
    )
    append_version(connection, row.lastrowid or 0, made.token, body, made.seconds, time)
    return True


def _check_shown(connection: sqlite3.Connection, made: MadeLabel) -> None:
    rows = connection.execute("SELECT response FROM task_responses WHERE task = ? ORDER BY response", (made.task,))
    if made.shown and sorted(made.shown) != [row[0] for row in rows]:
        raise RefusedError(
            "invalid_answer", f"the order shown names each response of the task once; got {list(made.shown)}"
        )
