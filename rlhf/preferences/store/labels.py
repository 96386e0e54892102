"""What was answered: labels are appended in versions, never changed; the newest version of an assignment counts."""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from rlhf.preferences.store.answers import (
    Answer,
    Choice,
    Flag,
    LabelKind,
    Skip,
    answer_from_json,
    answer_kind,
    answer_to_json,
    check_answer,
    check_flags,
    flags_from_json,
    flags_to_json,
)
from rlhf.preferences.store.assignments import (
    Assignments,
    AssignmentState,
    RefusedError,
    Screen,
    check_lease,
    has_room,
    later,
    move,
    owned,
)
from rlhf.preferences.store.content import AnnotatorKind

_QUERY = """
    SELECT l.*, a.task, a.annotator, a.shown, n.kind AS annotator_kind, t.round
    FROM labels l JOIN assignments a ON a.id = l.assignment JOIN tasks t ON t.id = a.task
    JOIN annotators n ON n.name = a.annotator
"""
_CURRENT = "NOT EXISTS (SELECT 1 FROM labels later WHERE later.supersedes = l.id)"


@dataclass(frozen=True)
class Label:
    """One version of an annotator's answer to an assignment.

    `answer` is None for flags alone and for a retraction. `shown` are the ids of the responses in the order on the
    screen, empty when not known; `seconds` is how long the annotator took, where known; `made_at` is in UTC.
    `supersedes` is the id of the version before.
    """

    id: int
    assignment: int
    task: str
    round: int
    annotator: str
    annotator_kind: AnnotatorKind
    version: int
    supersedes: int | None
    kind: LabelKind
    answer: Answer | None
    flags: tuple[Flag, ...]
    comment: str
    seconds: float | None
    shown: tuple[str, ...]
    made_at: datetime
    token: str

    @property
    def clicked(self) -> int | None:
        """The place on the screen, from 0, of the response chosen; None without a choice or a known order."""
        return self.shown.index(self.answer.preferred) if self.shown and isinstance(self.answer, Choice) else None


@dataclass(frozen=True)
class Reconstruction:
    """A label with exactly what was on the screen: `screen.responses` are in the order shown."""

    label: Label
    screen: Screen


class Labels(Assignments):
    """The methods that add and read labels."""

    def submit(
        self,
        assignment: int,
        annotator: str,
        answer: Answer | None,
        *,
        token: str,
        seconds: float | None = None,
        flags: Iterable[Flag] = (),
        comment: str = "",
    ) -> Label:
        """Appends the answer to an assignment; once this has returned, it survives a crash and a power cut.

        `answer` is None for flags alone. `token` is the client's name for this one submission: the same one again
        returns the label that it made, so that a retry after a lost reply adds nothing. A further submission with a
        new token is a correction: a new version. After the end of the lease an answer is accepted while the task has
        room. Raises `RefusedError`, whose `reason` says why, when it has not, and for an answer that does not fit the
        task.
        """
        flags_json = flags_to_json(flags)
        answered = answer is not None and not isinstance(answer, Skip)
        with self._write() as connection:
            row = owned(connection, assignment, annotator)
            check_submission(connection, row["task"], answer, flags_from_json(flags_json), seconds, (token, comment))
            body = (answer_kind(answer), None if answer is None else answer_to_json(answer), flags_json, comment)
            known = same_submission(connection, token, assignment, body)
            if known is None:
                now = self._sweep(connection)
                row = owned(connection, assignment, annotator)
                state: AssignmentState = "answered" if answered else "declined"
                move(connection, row, state)
                known = append_version(connection, assignment, token, body, seconds, now)
            return _label(connection.execute(f"{_QUERY} WHERE l.id = ?", (known,)).fetchone())

    def retract(
        self, assignment: int, annotator: str, *, token: str, comment: str = "", lease_seconds: float | None = None
    ) -> Label:
        """Takes the newest version back by a further one that says so; the place is free again.

        With `lease_seconds` the annotator holds the assignment again, to answer anew, unless it was declined and the
        task has no room any more. `token` is as in `submit`. Raises `RefusedError` when there is nothing to retract.
        """
        if lease_seconds is not None:
            check_lease(lease_seconds)
        with self._write() as connection:
            _check_token(token)
            row = owned(connection, assignment, annotator)
            body: tuple[LabelKind, str | None, str, str] = ("retract", None, flags_to_json(()), comment)
            known = same_submission(connection, token, assignment, body)
            if known is None:
                now = self._sweep(connection)
                if row["state"] not in ("answered", "declined"):
                    raise RefusedError("nothing_to_retract", f"assignment {assignment} has no label that counts")
                if lease_seconds is not None and (row["state"] == "answered" or has_room(connection, row["task"])):
                    move(connection, row, "leased", later(now, lease_seconds))
                else:
                    move(connection, row, "released")
                known = append_version(connection, assignment, token, body, None, now)
            return _label(connection.execute(f"{_QUERY} WHERE l.id = ?", (known,)).fetchone())

    def current_labels(
        self,
        *,
        tasks: Iterable[str] | None = None,
        annotators: Iterable[str] | None = None,
        kinds: Iterable[LabelKind] | None = None,
        round: int | None = None,
    ) -> list[Label]:
        """The newest version of every label that was not retracted, in the order of their making.

        Skips and flags without an answer are among them. Each argument, when given, narrows them down.
        """
        where, values = [_CURRENT, "l.kind <> 'retract'"], list[Any]()
        for column, wanted in (("a.task", tasks), ("a.annotator", annotators), ("l.kind", kinds)):
            if wanted is not None:
                where.append(f"{column} IN (SELECT value FROM json_each(?))")
                values.append(json.dumps(list(wanted)))
        if round is not None:
            where.append("t.round = ?")
            values.append(round)
        with self._read() as connection:
            rows = connection.execute(f"{_QUERY} WHERE {' AND '.join(where)} ORDER BY l.id", values)
            return [_label(row) for row in rows]

    def last_label(self, annotator: str, page: str) -> Label | None:
        """The newest current label of an annotator that was made on a page whose version starts with `page`."""
        query = (
            f"{_QUERY.replace('FROM labels l JOIN assignments a', 'FROM assignments a CROSS JOIN labels l')}"
            f" WHERE a.annotator = ? AND a.state IN ('answered', 'declined') AND {_CURRENT}"
            " AND SUBSTR(a.page, 1, LENGTH(?)) = ? ORDER BY l.id DESC LIMIT 1"
        )
        with self._read() as connection:
            row = connection.execute(query, (annotator, page, page)).fetchone()
        return None if row is None else _label(row)

    def label_of_token(self, token: str) -> Label | None:
        """The label that a submission or a retraction of this token made."""
        with self._read() as connection:
            row = connection.execute(f"{_QUERY} WHERE l.token = ?", (token,)).fetchone()
        return None if row is None else _label(row)

    def history(self, task: str) -> list[Label]:
        """Every version of every label of a task, retractions included, in the order of their making."""
        with self._read() as connection:
            return [_label(row) for row in connection.execute(f"{_QUERY} WHERE a.task = ? ORDER BY l.id", (task,))]

    def reconstruct(self, label: int) -> Reconstruction:
        """A label (id) with the prompt, the responses on their sides and the instructions, as the annotator saw them.

        Raises `KeyError` for an unknown label.
        """
        with self._read() as connection:
            row = connection.execute(f"{_QUERY} WHERE l.id = ?", (label,)).fetchone()
        if row is None:
            raise KeyError(f"the preference store {self.path} has no label {label}")
        return Reconstruction(_label(row), self.screen(row["assignment"]))


def _check_token(token: str) -> None:
    if not token:
        raise RefusedError("invalid_answer", "a submission has a token that the client made up; got an empty one")


def check_submission(
    connection: sqlite3.Connection,
    task: str,
    answer: Answer | None,
    flags: Sequence[Flag],
    seconds: float | None,
    texts: Sequence[str],
) -> None:
    """Raises `RefusedError` for what the task cannot have as its label; `texts` are its token and comment."""
    _check_token(texts[0])
    kind, scale = connection.execute("SELECT kind, scale FROM tasks WHERE id = ?", (task,)).fetchone()
    rows = connection.execute("SELECT response FROM task_responses WHERE task = ?", (task,))
    responses = [row[0] for row in rows]
    try:
        if answer is not None:
            check_answer(kind, responses, scale, answer)
        elif not flags:
            raise ValueError("a label has an answer or a flag; got neither")
        check_flags(responses, flags)
        for text in texts:
            # Half a surrogate pair, which JSON from a browser can hold, is not text.
            text.encode()
        if seconds is not None and not (math.isfinite(seconds) and seconds >= 0):
            raise ValueError(f"the seconds taken are a finite number of at least 0, not {seconds}")
    except ValueError as error:
        raise RefusedError("invalid_answer", str(error)) from error


def same_submission(
    connection: sqlite3.Connection, token: str, assignment: int, body: tuple[LabelKind, str | None, str, str]
) -> int | None:
    """The label that this token made before. Raises `RefusedError` when that one says something else."""
    query = "SELECT id, assignment, kind, answer, flags, comment FROM labels WHERE token = ?"
    row = connection.execute(query, (token,)).fetchone()
    if row is None:
        return None
    if tuple(row)[1:] != (assignment, *body):
        raise RefusedError("token_reused", f"the token {token!r} was used for another submission; make up a new one")
    label: int = row["id"]
    return label


def append_version(
    connection: sqlite3.Connection,
    assignment: int,
    token: str,
    body: tuple[LabelKind, str | None, str, str],
    seconds: float | None,
    now: str,
) -> int:
    """Appends the next version; returns its id."""
    query = "SELECT id, version FROM labels WHERE assignment = ? ORDER BY version DESC LIMIT 1"
    before, version = connection.execute(query, (assignment,)).fetchone() or (None, 0)
    made = connection.execute(
        "INSERT INTO labels (assignment, version, supersedes, token, kind, answer, flags, comment, seconds, made_at)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (assignment, version + 1, before, token, *body, seconds, now),
    )
    return made.lastrowid or 0


def _label(row: sqlite3.Row) -> Label:
    names = ("id", "assignment", "task", "round", "annotator", "annotator_kind", "version", "supersedes", "kind")
    return Label(
        answer=answer_from_json(row["kind"], row["answer"]),
        flags=flags_from_json(row["flags"]),
        shown=tuple(json.loads(row["shown"])),
        made_at=datetime.fromisoformat(row["made_at"]),
        **{name: row[name] for name in (*names, "comment", "seconds", "token")},
    )
