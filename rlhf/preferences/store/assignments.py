"""Who is asked what: annotators, leases, and the screens that they see.

Every write first marks the leases that have ended as lapsed. From then on the state of an assignment alone decides,
so that a place handed to somebody else is never claimed back by a clock that was set.
"""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Literal

from rlhf.errors import DataError, UserError
from rlhf.preferences.store.content import AnnotatorKind, Contents, Response, Task, canonical_json, identity
from rlhf.preferences.store.database import time_text
from rlhf.records import Prompt

AssignmentState = Literal["leased", "answered", "declined", "released", "lapsed"]
RefusalReason = Literal[
    "unknown_annotator",
    "unknown_task",
    "unknown_assignment",
    "other_annotator",
    "no_room",
    "asked_again",
    "already_labelled",
    "nothing_to_retract",
    "invalid_answer",
    "token_reused",
]


class RefusedError(UserError):
    """The store does not do what it was asked, and nothing was changed; `reason` is for programs."""

    def __init__(self, reason: RefusalReason, message: str) -> None:
        super().__init__(message)
        self.reason: RefusalReason = reason


@dataclass(frozen=True)
class Annotator:
    """Who or what answers; `description` holds its settings, or what people want to note."""

    name: str
    kind: AnnotatorKind
    description: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Assignment:
    """A task shown to an annotator. `shown` are the ids of its responses in the order on the screen, first on the left;
    empty when it is not known, for a label made elsewhere.

    `instructions` is the hash of the text shown beside it, `page` the version of the page. Times are in UTC.
    """

    id: int
    task: str
    annotator: str
    shown: tuple[str, ...]
    instructions: str | None
    page: str
    leased_at: datetime
    lease_ends: datetime
    state: AssignmentState


@dataclass(frozen=True)
class Screen:
    """All that an annotator sees of an assignment.

    `responses` are in the order shown, or in the canonical one when that is not known.
    """

    assignment: Assignment
    task: Task
    prompt: Prompt
    responses: tuple[Response, ...]
    instructions: str | None


class Assignments(Contents):
    """The methods about annotators and leases."""

    def add_annotator(self, annotator: Annotator) -> None:
        """Adds an annotator; the same one again changes nothing.

        Raises `DataError` when the name belongs to another one: their labels would be taken for one annotator's.
        """
        if not annotator.name:
            raise DataError("an annotator has a name; got an empty one")
        description = canonical_json(dict(annotator.description))
        with self._write() as connection:
            row = connection.execute("SELECT * FROM annotators WHERE name = ?", (annotator.name,)).fetchone()
            if row is None:
                values = (annotator.name, annotator.kind, description)
                connection.execute("INSERT INTO annotators VALUES (?, ?, ?)", values)
            elif (row["kind"], row["description"]) != (annotator.kind, description):
                raise DataError(
                    f"the annotator {annotator.name!r} of {self.path} is {row['kind']} with {row['description']}, not "
                    f"{annotator.kind} with {description}; give this one another name"
                )

    def annotators(self) -> dict[str, Annotator]:
        """All annotators, by name."""
        rows = self._rows("SELECT * FROM annotators ORDER BY name", "name", None)
        return {row["name"]: Annotator(row["name"], row["kind"], json.loads(row["description"])) for row in rows}

    def add_instructions(self, text: str) -> str:
        """Keeps the text that annotators are instructed by; returns its hash, for `next_assignment`."""
        return self._add("instructions", "hash", [text], lambda item: identity("instructions", item), lambda i: (i,))[0]

    def next_assignment(
        self,
        annotator: str,
        *,
        lease_seconds: float,
        instructions: str | None = None,
        page: str = "",
        repeat_gap: int = 10,
    ) -> Assignment | None:
        """Leases the annotator a task for `lease_seconds`; None when there is none for them now.

        It has a place left, is for their kind, and they neither answered nor declined nor hold it. A blind repeat goes
        to those who answered the original, after `repeat_gap` labels on other tasks, or earlier when nothing else is
        left. The highest priority comes first; ties are broken at random, drawn from the store's seed, as is the order
        of the responses. What the annotator holds already is not given again: see `held`. Raises `RefusedError` for an
        unknown annotator.
        """
        check_lease(lease_seconds)
        with self._write() as connection:
            now = self._sweep(connection)
            row = connection.execute("SELECT kind FROM annotators WHERE name = ?", (annotator,)).fetchone()
            if row is None:
                raise RefusedError("unknown_annotator", f"{self.path} has no annotator {annotator!r}; add them first")
            task = _choose(connection, annotator, row[0], repeat_gap)
            if task is None and repeat_gap > 0:
                task = _choose(connection, annotator, row[0], 0)
            if task is None:
                return None
            shown = self._order(connection, task, annotator)
            ends = later(now, lease_seconds)
            values = (task, annotator, json.dumps(shown), instructions, page, now, ends)
            made = connection.execute(
                "INSERT INTO assignments (task, annotator, shown, instructions, page, leased_at, lease_ends, state)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, 'leased')",
                values,
            )
            return _assignment(_row(connection, made.lastrowid or 0))

    def extend_lease(self, assignment: int, annotator: str, *, lease_seconds: float) -> Assignment:
        """Lets the lease end no earlier than `lease_seconds` from now, also one that ended if the place is still free.

        Raises `RefusedError` when it is not, and when the assignment has been labelled.
        """
        check_lease(lease_seconds)
        with self._write() as connection:
            now = self._sweep(connection)
            row = owned(connection, assignment, annotator)
            if row["state"] in ("answered", "declined"):
                raise RefusedError(
                    "already_labelled", f"assignment {assignment} has a label; retract it to answer again"
                )
            move(connection, row, "leased", max(row["lease_ends"], later(now, lease_seconds)))
            return _assignment(_row(connection, assignment))

    def release(self, assignment: int, annotator: str) -> None:
        """Gives a leased task back; nothing changes when it no longer is. Raises `RefusedError` once it is labelled."""
        with self._write() as connection:
            self._sweep(connection)
            row = owned(connection, assignment, annotator)
            if row["state"] in ("answered", "declined"):
                raise RefusedError(
                    "already_labelled", f"assignment {assignment} has a label; retract it to give it back"
                )
            if row["state"] == "leased":
                move(connection, row, "released")

    def held(self, annotator: str) -> list[Assignment]:
        """The assignments that the annotator holds now, the oldest first: what a page shows again after a reload."""
        query = "SELECT * FROM assignments WHERE annotator = ? AND state = 'leased' AND lease_ends > ? ORDER BY id"
        with self._read() as connection:
            return [_assignment(row) for row in connection.execute(query, (annotator, self._now()))]

    def assignment(self, assignment: int) -> Assignment:
        """One assignment by its id. Raises `RefusedError` when there is none."""
        with self._read() as connection:
            return _assignment(_row(connection, assignment))

    def assignments(self, task: str) -> list[Assignment]:
        """All assignments that a task ever had, the oldest first."""
        query = "SELECT * FROM assignments WHERE task = ? ORDER BY id"
        with self._read() as connection:
            return [_assignment(row) for row in connection.execute(query, (task,))]

    def assignments_of(self, tasks: Iterable[str]) -> dict[str, list[Assignment]]:
        """`assignments` of many tasks in one query, by task; those that never had one are left out."""
        query = "SELECT * FROM assignments WHERE task IN (SELECT value FROM json_each(?)) ORDER BY id"
        found: dict[str, list[Assignment]] = {}
        with self._read() as connection:
            for row in connection.execute(query, (json.dumps(list(tasks)),)):
                found.setdefault(row["task"], []).append(_assignment(row))
        return found

    def screen(self, assignment: int) -> Screen:
        """What the annotator of an assignment sees. Raises `RefusedError` when there is no such assignment."""
        with self._read() as connection:
            found = _assignment(_row(connection, assignment))
            query = "SELECT text FROM instructions WHERE hash = ?"
            instructions = connection.execute(query, (found.instructions,)).fetchone()
        task = self.tasks([found.task])[found.task]
        shown = found.shown or task.plan.responses
        responses = self.responses(shown)
        return Screen(
            found,
            task,
            self.prompts([task.prompt])[task.prompt],
            tuple(responses[response] for response in shown),
            None if instructions is None else instructions[0],
        )

    def _sweep(self, connection: sqlite3.Connection) -> str:
        """Marks the leases that have ended; returns the time."""
        now = self._now()
        query = "UPDATE assignments SET state = 'lapsed' WHERE state = 'leased' AND lease_ends <= ?"
        connection.execute(query, (now,))
        return now

    def _order(self, connection: sqlite3.Connection, task: str, annotator: str) -> list[str]:
        """A task's responses in an order that is random among assignments and fixed by the store's seed."""
        query = "SELECT COUNT(*) FROM assignments WHERE task = ? AND annotator = ?"
        (attempt,) = connection.execute(query, (task, annotator)).fetchone()
        rows = connection.execute("SELECT response FROM task_responses WHERE task = ?", (task,))
        return sorted((row[0] for row in rows), key=lambda r: identity("order", self.seed, task, annotator, attempt, r))


def _choose(connection: sqlite3.Connection, annotator: str, kind: str, repeat_gap: int) -> str | None:
    """The task that an annotator gets next."""
    # `num_taken < num_labels` is the condition of the index tasks_with_room, which is in the wanted order.
    query = """
        SELECT t.id FROM tasks t
        WHERE t.num_taken < t.num_labels
          AND (t.audience IS NULL OR t.audience = :kind)
          AND NOT EXISTS (
            SELECT 1 FROM assignments a WHERE a.task = t.id AND a.annotator = :annotator
              AND a.state IN ('leased', 'answered', 'declined'))
          AND (t.repeat_of IS NULL OR EXISTS (
            SELECT 1 FROM assignments a WHERE a.task = t.repeat_of AND a.annotator = :annotator
              AND a.state = 'answered'
              AND :gap <= (
                SELECT COUNT(*) FROM assignments b WHERE b.annotator = :annotator AND b.id > a.id
                  AND b.state IN ('answered', 'declined'))))
        ORDER BY t.priority DESC, t.shuffle, t.id LIMIT 1
    """
    row = connection.execute(query, {"kind": kind, "annotator": annotator, "gap": repeat_gap}).fetchone()
    return None if row is None else row[0]


def _row(connection: sqlite3.Connection, assignment: int) -> sqlite3.Row:
    row: sqlite3.Row | None = connection.execute("SELECT * FROM assignments WHERE id = ?", (assignment,)).fetchone()
    if row is None:
        raise RefusedError("unknown_assignment", f"there is no assignment {assignment}; ask for the next one")
    return row


def owned(connection: sqlite3.Connection, assignment: int, annotator: str) -> sqlite3.Row:
    """The row of an assignment. Raises `RefusedError` when there is none or it is somebody else's."""
    row = _row(connection, assignment)
    if row["annotator"] != annotator:
        raise RefusedError("other_annotator", f"assignment {assignment} is not {annotator!r}'s; ask for the next one")
    return row


def has_room(connection: sqlite3.Connection, task: str) -> bool:
    """Whether the task wants more labels than it has or is about to get."""
    query = "SELECT num_taken < num_labels FROM tasks WHERE id = ?"
    return bool(connection.execute(query, (task,)).fetchone()[0])


def move(
    connection: sqlite3.Connection, row: sqlite3.Row, state: AssignmentState, lease_ends: str | None = None
) -> None:
    """Brings an assignment to a state, if the plan allows it. Raises `RefusedError` when it does not."""
    if row["state"] in ("released", "lapsed") and state not in ("released", "lapsed"):
        query = (
            "SELECT 1 FROM assignments WHERE task = ? AND annotator = ? AND id <> ?"
            " AND state IN ('leased', 'answered', 'declined')"
        )
        if connection.execute(query, (row["task"], row["annotator"], row["id"])).fetchone():
            raise RefusedError(
                "asked_again",
                f"the lease of assignment {row['id']} ended and {row['annotator']!r} was given the task again; "
                "answer the newer assignment",
            )
    takes, took = (value in ("leased", "answered") for value in (state, row["state"]))
    if takes and not took and not has_room(connection, row["task"]):
        raise RefusedError(
            "no_room",
            f"assignment {row['id']} holds no place (it is {row['state']}) and its task has none left: it has, or is "
            "about to get, all the labels that it wants. Ask for the next one",
        )
    connection.execute(
        "UPDATE assignments SET state = ?, lease_ends = COALESCE(?, lease_ends) WHERE id = ?",
        (state, lease_ends, row["id"]),
    )


def check_lease(seconds: float) -> None:
    """Raises `ValueError` for what is no length of a lease."""
    if not (math.isfinite(seconds) and seconds > 0):
        raise ValueError(f"a lease lasts a positive number of seconds, not {seconds}")


def later(time: str, seconds: float) -> str:
    """A stored time, moved on."""
    return time_text(datetime.fromisoformat(time) + timedelta(seconds=seconds))


def _assignment(row: sqlite3.Row) -> Assignment:
    return Assignment(
        id=row["id"],
        task=row["task"],
        annotator=row["annotator"],
        shown=tuple(json.loads(row["shown"])),
        instructions=row["instructions"],
        page=row["page"],
        leased_at=datetime.fromisoformat(row["leased_at"]),
        lease_ends=datetime.fromisoformat(row["lease_ends"]),
        state=row["state"],
    )
