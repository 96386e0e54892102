"""What is asked: prompts, policies, responses and tasks. Adding is idempotent: an id is a hash of the content."""

from __future__ import annotations

import hashlib
import json
import math
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Literal, TypeVar

from rlhf.errors import DataError
from rlhf.preferences.store.answers import (
    NUM_RESPONSES,
    Answer,
    LabelKind,
    Skip,
    TaskKind,
    answer_from_json,
    answer_kind,
    answer_to_json,
    check_answer,
)
from rlhf.preferences.store.database import Database
from rlhf.records import Prompt, prompt_from_json, prompt_hash, prompt_to_json

AnnotatorKind = Literal["human", "simulated", "judge", "rule"]
ItemT = TypeVar("ItemT")
# The fields of a plan that are columns as they are.
_PLAN_COLUMNS = ("num_labels", "priority", "round", "strategy", "score", "audience", "scale", "repeat_of")
# Rows of one transaction: annotators who wait for the write lock get in between.
_BATCH = 2000


@dataclass(frozen=True)
class Policy:
    """What made a response: the hash of its weights, and a description for people."""

    hash: str
    description: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Response:
    """A text that answers the prompt of id `prompt`, and what made it.

    `policy` is a `Policy.hash`, None when no policy of ours wrote it. `sampling` holds the settings, `seed` and
    `number` say which sample it is; two samples of equal text are two responses.
    """

    prompt: str
    text: str
    policy: str | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    number: int | None = None


@dataclass(frozen=True)
class TaskPlan:
    """Something to ask about responses (ids) to one prompt.

    `num_labels` annotators are wanted, of kind `audience` when given; higher `priority` comes first. `strategy` chose
    the task and gave it `score`. A rating goes from 1 to `scale`. `gold` is the right answer where it is known.
    `repeat_of` is the id of a task that annotators who answered it answer again, blind, as this one.
    """

    kind: TaskKind
    responses: tuple[str, ...]
    num_labels: int = 1
    priority: float = 0.0
    round: int = 0
    strategy: str = "given"
    score: float | None = None
    audience: AnnotatorKind | None = None
    scale: int | None = None
    gold: Answer | None = None
    repeat_of: str | None = None


@dataclass(frozen=True)
class Task:
    """A stored task. `plan.responses` is in the canonical order, that of the ids."""

    id: str
    prompt: str
    plan: TaskPlan


def canonical_json(value: Any) -> str:
    """JSON text that is equal for equal values. Raises `DataError` for what JSON cannot hold."""
    try:
        text = json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
        text.encode()
    except (TypeError, ValueError) as error:
        raise DataError(f"a preference store keeps text and JSON values; got {value!r:.200}: {error}") from error
    return text


def identity(kind: str, *parts: Any) -> str:
    """The id of a piece of content: 128 bits in hexadecimal, the same on every machine."""
    return hashlib.blake2b(canonical_json([kind, *parts]).encode(), digest_size=16).hexdigest()


def prompt_id(prompt: Prompt) -> str:
    """The id of a prompt: its exact content and columns.

    `rlhf.records.prompt_hash` does not tell white space apart, as splits want it; what was on a screen must be exact.
    """
    return identity("prompt", prompt_to_json(prompt.prompt), dict(prompt.columns))


def response_id(response: Response) -> str:
    """The id of a response: the prompt, the text and what made it."""
    made = (response.policy, dict(response.sampling), response.seed, response.number)
    return identity("response", response.prompt, response.text, *made)


def task_id(plan: TaskPlan) -> str:
    """The id of a task: what is asked of whom in which round. The order of the responses does not matter."""
    gold = None if plan.gold is None else [answer_kind(plan.gold), answer_to_json(plan.gold)]
    rest = (plan.round, plan.audience, plan.scale, gold, plan.repeat_of)
    return identity("task", plan.kind, sorted(plan.responses), *rest)


class Contents(Database):
    """The methods that add and read what is asked."""

    def add_prompts(self, prompts: Iterable[Prompt]) -> list[str]:
        """Adds the prompts that are not there; returns the id of each."""
        return self._add("prompts", "id", prompts, prompt_id, _prompt_row)

    def add_policies(self, policies: Iterable[Policy]) -> list[str]:
        """Adds the policies that are not there; returns the hash of each. The first description of a hash stays."""
        return self._add(
            "policies", "hash", policies, lambda policy: policy.hash, lambda p: (canonical_json(dict(p.description)),)
        )

    def add_responses(self, responses: Iterable[Response]) -> list[str]:
        """Adds the responses that are not there; returns the id of each.

        Raises `DataError` for one whose prompt or policy has not been added; of its batch, none is then.
        """
        return self._add("responses", "id", responses, response_id, _response_row)

    def add_tasks(self, plans: Iterable[TaskPlan]) -> list[str]:
        """Adds the tasks that are not there; returns the id of each.

        One that is there stays as it is, also where its plan has another number of labels or priority: see `replan`.
        Raises `DataError` for a plan that does not hold together.
        """
        ids = []
        for batch in batches(plans):
            made = {task_id(plan): replace(plan, responses=tuple(sorted(plan.responses))) for plan in batch}
            with self._write() as connection:
                there = _existing(connection, "tasks", "id", made)
                for task, plan in made.items():
                    if task not in there:
                        prompt = _check_plan(connection, plan)
                        _insert_task(connection, Task(task, prompt, plan), self._shuffle(task))
            ids += [task_id(plan) for plan in batch]
        return ids

    def replan(self, tasks: Iterable[str], *, num_labels: int | None = None, priority: float | None = None) -> None:
        """Sets the wanted labels or the priority of tasks (ids); 0 labels closes them.

        Answers and leases that a smaller plan has no place for stay. Raises `DataError` for an unknown task.
        """
        if num_labels is not None and num_labels < 0:
            raise DataError(f"a task wants 0 labels or more, not {num_labels}")
        with self._write() as connection:
            for task in tasks:
                changed = connection.execute(
                    "UPDATE tasks SET num_labels = COALESCE(?, num_labels), priority = COALESCE(?, priority)"
                    " WHERE id = ?",
                    (num_labels, priority, task),
                )
                if not changed.rowcount:
                    raise DataError(f"the preference store {self.path} has no task {task!r}; add it first")

    def prompts(self, ids: Iterable[str] | None = None) -> dict[str, Prompt]:
        """The prompts of these ids, or all, by id."""
        rows = self._rows("SELECT id, content, columns FROM prompts", "id", ids)
        return {
            row["id"]: Prompt(prompt_from_json(json.loads(row["content"])), json.loads(row["columns"])) for row in rows
        }

    def policies(self) -> dict[str, Policy]:
        """All policies, by hash."""
        rows = self._rows("SELECT hash, description FROM policies", "hash", None)
        return {row["hash"]: Policy(row["hash"], json.loads(row["description"])) for row in rows}

    def responses(self, ids: Iterable[str] | None = None) -> dict[str, Response]:
        """The responses of these ids, or all, by id."""
        rows = self._rows("SELECT * FROM responses", "id", ids)
        return {
            row["id"]: Response(
                row["prompt"], row["text"], row["policy"], json.loads(row["sampling"]), row["seed"], row["number"]
            )
            for row in rows
        }

    def tasks(self, ids: Iterable[str] | None = None) -> dict[str, Task]:
        """The tasks of these ids, or all, by id."""
        query = (
            "SELECT *, (SELECT json_group_array(response) FROM task_responses WHERE task = tasks.id) AS responses"
            " FROM tasks"
        )
        return {row["id"]: _task(row) for row in self._rows(query, "id", ids)}

    def _shuffle(self, task: str) -> int:
        """A number of 63 bits that is random among tasks and fixed by the store's seed."""
        return int(identity("shuffle", self.seed, task)[:16], 16) >> 1

    def _rows(self, query: str, key: str, ids: Iterable[str] | None) -> list[sqlite3.Row]:
        with self._read() as connection:
            if ids is None:
                return connection.execute(query).fetchall()
            wanted = json.dumps(list(ids))
            return connection.execute(f"{query} WHERE {key} IN (SELECT value FROM json_each(?))", (wanted,)).fetchall()

    def _add(
        self,
        table: str,
        key: str,
        items: Iterable[ItemT],
        name: Callable[[ItemT], str],
        values: Callable[[ItemT], tuple[Any, ...]],
    ) -> list[str]:
        """Inserts the rows that are not there, a transaction a batch; returns the keys of all."""
        ids = []
        for batch in batches(items):
            named = [(name(item), item) for item in batch]
            ids += [item_id for item_id, _ in named]
            with self._write() as connection:
                there = _existing(connection, table, key, ids[-len(named) :])
                rows = {item_id: (item_id, *values(item)) for item_id, item in named if item_id not in there}
                if not rows:
                    continue
                marks = ", ".join("?" * len(next(iter(rows.values()))))
                try:
                    connection.executemany(f"INSERT INTO {table} VALUES ({marks})", rows.values())
                except sqlite3.IntegrityError as error:
                    if error.sqlite_errorname != "SQLITE_CONSTRAINT_FOREIGNKEY":
                        raise
                    raise DataError(
                        f"{table} for the preference store {self.path} name a prompt or a policy that it does not "
                        "have; add prompts and policies first"
                    ) from error
        return ids


def batches(items: Iterable[ItemT]) -> Iterator[list[ItemT]]:
    """The items in lists of the size of one transaction."""
    rest = iter(items)
    while batch := list(islice(rest, _BATCH)):
        yield batch


def _existing(connection: sqlite3.Connection, table: str, key: str, ids: Iterable[str]) -> set[str]:
    query = f"SELECT {key} FROM {table} WHERE {key} IN (SELECT value FROM json_each(?))"
    return {row[0] for row in connection.execute(query, (json.dumps(list(ids)),))}


def _prompt_row(prompt: Prompt) -> tuple[str, str, str]:
    key = f"{prompt_hash(prompt.prompt):016x}"
    return key, canonical_json(prompt_to_json(prompt.prompt)), canonical_json(dict(prompt.columns))


def _response_row(response: Response) -> tuple[Any, ...]:
    for name, value in (("seed", response.seed), ("number", response.number)):
        if value is not None and not -(2**63) <= value < 2**63:
            raise DataError(f"the {name} of a response is a whole number of 64 bits with sign, not {value}")
    sampling = canonical_json(dict(response.sampling))
    return response.prompt, response.text, response.policy, sampling, response.seed, response.number


def _check_plan(connection: sqlite3.Connection, plan: TaskPlan) -> str:
    """The id of the prompt that all responses answer. Raises `DataError` for a plan that does not hold together."""
    least, greatest = NUM_RESPONSES[plan.kind]
    if not least <= len(plan.responses) <= greatest or len(set(plan.responses)) != len(plan.responses):
        wanted = f"{least}" if least == greatest else f"{least} to {greatest}"
        raise DataError(f"a {plan.kind} task has {wanted} different responses; got {list(plan.responses)}")
    if plan.num_labels < 0 or plan.round < 0 or not math.isfinite(plan.priority):
        raise DataError(f"a task's num_labels and round are at least 0 and its priority is finite; got {plan!r:.300}")
    if (plan.scale is None) == (plan.kind == "rating") or (plan.scale is not None and plan.scale < 2):
        raise DataError(f"a rating task, and no other, has a scale of at least 2; a {plan.kind} task got {plan.scale}")
    if plan.gold is not None:
        _check_gold(plan)
    query = "SELECT DISTINCT prompt, COUNT(*) FROM responses WHERE id IN (SELECT value FROM json_each(?)) GROUP BY 1"
    found = connection.execute(query, (json.dumps(plan.responses),)).fetchall()
    if len(found) != 1 or found[0][1] != len(plan.responses):
        raise DataError(
            f"the responses of a task have been added and answer one prompt; of {list(plan.responses)} the store has "
            f"{sum(row[1] for row in found)}, to {len(found)} prompts"
        )
    if plan.repeat_of is not None:
        _check_repeat(connection, plan, plan.repeat_of)
    prompt: str = found[0][0]
    return prompt


def _check_gold(plan: TaskPlan) -> None:
    try:
        if isinstance(plan.gold, Skip) or plan.gold is None:
            raise ValueError("a skip is no gold answer")
        check_answer(plan.kind, plan.responses, plan.scale, plan.gold)
    except ValueError as error:
        raise DataError(f"the gold answer of a task must be possible: {error}") from error


def _check_repeat(connection: sqlite3.Connection, plan: TaskPlan, original: str) -> None:
    row = connection.execute("SELECT kind, scale FROM tasks WHERE id = ?", (original,)).fetchone()
    found = connection.execute("SELECT response FROM task_responses WHERE task = ? ORDER BY response", (original,))
    if row is None or tuple(row) != (plan.kind, plan.scale) or [row[0] for row in found] != list(plan.responses):
        raise DataError(f"repeat_of names a task with the same kind, responses and scale; {original!r} is none")


def _insert_task(connection: sqlite3.Connection, task: Task, shuffle: int) -> None:
    plan = task.plan
    connection.execute(
        "INSERT INTO tasks (id, kind, prompt, num_labels, priority, shuffle, round, strategy, score, audience, scale,"
        " gold_kind, gold, repeat_of) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            *(task.id, plan.kind, task.prompt, plan.num_labels, plan.priority, shuffle, plan.round, plan.strategy),
            *(plan.score, plan.audience, plan.scale),
            *((None, None) if plan.gold is None else (answer_kind(plan.gold), answer_to_json(plan.gold))),
            plan.repeat_of,
        ),
    )
    pairs: Sequence[tuple[str, str]] = [(task.id, response) for response in plan.responses]
    connection.executemany("INSERT INTO task_responses VALUES (?, ?)", pairs)


def _task(row: sqlite3.Row) -> Task:
    """A row of `tasks` with `responses`, a JSON list of ids."""
    gold_kind: LabelKind | None = row["gold_kind"]
    plan = TaskPlan(
        kind=row["kind"],
        responses=tuple(sorted(json.loads(row["responses"]))),
        gold=None if gold_kind is None else answer_from_json(gold_kind, row["gold"]),
        **{name: row[name] for name in _PLAN_COLUMNS},
    )
    return Task(row["id"], row["prompt"], plan)
