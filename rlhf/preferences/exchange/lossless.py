"""Our own label format: everything about a store's tasks, every version of every label, nothing lost.

JSON Lines. The first line (`preference_store/1`) holds annotators, policies and instructions; each further line
(`labelled_task/1`) one task with its prompt, its responses and all versions of its labels, the oldest first. Ids are
hashes of content, so they are the same in the store that reads it. What a lease that led to no label was, is not kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from rlhf.data.formats import RowError
from rlhf.errors import DataError
from rlhf.preferences.exchange.items import Fields
from rlhf.preferences.store import (
    Annotator,
    Answer,
    Assignment,
    Flag,
    Label,
    MadeLabel,
    Policy,
    PreferenceStore,
    Response,
    Task,
    TaskPlan,
    prompt_id,
    response_id,
    task_id,
    utc_now,
)
from rlhf.preferences.store.answers import answer_from_json, answer_kind, answer_to_json
from rlhf.records import Prompt, prompt_from_json, prompt_to_json

HEADER, TASK = "preference_store/1", "labelled_task/1"
_PLAN = ("num_labels", "priority", "round", "strategy", "score", "audience", "scale", "repeat_of")


@dataclass(frozen=True)
class Header:
    """The first line."""

    annotators: tuple[Annotator, ...]
    policies: tuple[Policy, ...]
    instructions: tuple[str, ...]


@dataclass(frozen=True)
class Version:
    """One version of a label of the file's assignment `assignment`."""

    assignment: int
    version: int
    annotator: Annotator
    label: MadeLabel
    retracts: bool


@dataclass(frozen=True)
class LabelledTask:
    """A task with everything that belongs to it; `id` is the same in every store."""

    id: str
    prompt: Prompt
    responses: tuple[Response, ...]
    plan: TaskPlan
    versions: tuple[Version, ...]


def fits(row: Fields) -> bool:
    """A line of this format."""
    return row.get("schema") in (HEADER, TASK)


# --- writing ----------------------------------------------------------------------------------------------------------


def rows(store: PreferenceStore, tasks: Iterable[Task]) -> Iterator[dict[str, Any]]:
    """The lines of the format for these tasks, an original always before its repeats."""
    chosen = sorted(tasks, key=lambda task: task.plan.repeat_of is not None)
    prompts = store.prompts(dict.fromkeys(task.prompt for task in chosen))
    responses = store.responses(dict.fromkeys(one for task in chosen for one in task.plan.responses))
    histories = {task.id: (store.assignments(task.id), store.history(task.id)) for task in chosen}
    used = {label.annotator for _, history in histories.values() for label in history}
    shown = {one.instructions for held, _ in histories.values() for one in held if one.instructions}
    made = {response.policy for response in responses.values()}
    yield {
        "schema": HEADER,
        "annotators": [vars(one) for name, one in store.annotators().items() if name in used],
        "policies": [vars(policy) for key, policy in store.policies().items() if key in made],
        "instructions": _instructions(store, histories.values(), shown),
    }
    for task in chosen:
        held, history = histories[task.id]
        yield _task_row(task, prompts[task.prompt], responses, {one.id: one for one in held}, history)


def _instructions(
    store: PreferenceStore, histories: Iterable[tuple[list[Assignment], list[Label]]], wanted: set[str]
) -> list[str]:
    """The texts of these hashes, each by one assignment that showed it."""
    example = {one.instructions: one.id for held, _ in histories for one in held if one.instructions}
    return [store.screen(example[key]).instructions or "" for key in sorted(wanted)]


def _task_row(
    task: Task,
    prompt: Prompt,
    responses: Mapping[str, Response],
    assignments: Mapping[int, Assignment],
    history: Iterable[Label],
) -> dict[str, Any]:
    plan = task.plan
    gold = None if plan.gold is None else {"kind": answer_kind(plan.gold), "answer": answer_to_json(plan.gold)}
    return {
        "schema": TASK,
        "id": task.id,
        "kind": plan.kind,
        "prompt": prompt_to_json(prompt.prompt),
        "columns": dict(prompt.columns),
        "responses": [_response_row(one, responses[one]) for one in plan.responses],
        **{name: getattr(plan, name) for name in _PLAN},
        "gold": gold,
        "labels": [_label_row(label, assignments[label.assignment]) for label in history],
    }


def _response_row(name: str, response: Response) -> dict[str, Any]:
    fields = {key: value for key, value in vars(response).items() if key != "prompt"}
    return {"id": name, **fields, "sampling": dict(response.sampling)}


def _label_row(label: Label, assignment: Assignment) -> dict[str, Any]:
    return {
        "assignment": label.assignment,
        "version": label.version,
        "annotator": label.annotator,
        "annotator_kind": label.annotator_kind,
        "kind": label.kind,
        "answer": None if label.answer is None else answer_to_json(label.answer),
        "flags": [[flag.kind, flag.response] for flag in label.flags],
        "comment": label.comment,
        "seconds": label.seconds,
        "shown": list(label.shown),
        "made_at": label.made_at.isoformat(),
        "leased_at": assignment.leased_at.isoformat(),
        "instructions": assignment.instructions,
        "page": assignment.page,
        "token": label.token,
    }


# --- reading ----------------------------------------------------------------------------------------------------------


def read(row: Fields) -> Header | LabelledTask:
    """A line of the format. Raises `RowError` when it is none, or its ids are not those of its content."""
    if row.get("schema") not in (HEADER, TASK):
        raise RowError(f"expected the schema {HEADER} or {TASK}, found {row.get('schema')!r}")
    try:
        return _header(row) if row["schema"] == HEADER else _task(row)
    except (KeyError, TypeError, AttributeError) as error:
        raise RowError(f"a line of {row['schema']} lacks or misspells a field: {error!r}") from error


def _header(row: Fields) -> Header:
    annotators = tuple(Annotator(one["name"], one["kind"], one["description"]) for one in row["annotators"])
    policies = tuple(Policy(one["hash"], one["description"]) for one in row["policies"])
    return Header(annotators, policies, tuple(str(text) for text in row["instructions"]))


def _task(row: Fields) -> LabelledTask:
    prompt = Prompt(prompt_from_json(row["prompt"]), dict(row["columns"]))
    key = prompt_id(prompt)
    responses = []
    for one in row["responses"]:
        response = Response(key, one["text"], one["policy"], one["sampling"], one["seed"], one["number"])
        if response_id(response) != one["id"]:
            raise RowError(f"the response {one['id']!r} is not what its id says; was the file edited?")
        responses.append(response)
    gold = row["gold"]
    plan = TaskPlan(
        row["kind"],
        tuple(one["id"] for one in row["responses"]),
        gold=None if gold is None else answer_from_json(gold["kind"], gold["answer"]),
        **{name: row[name] for name in _PLAN},
    )
    if task_id(plan) != row["id"]:
        raise RowError(f"the task {row['id']!r} is not what its id says; was the file edited?")
    versions = tuple(_version(row["id"], one) for one in row["labels"])
    return LabelledTask(row["id"], prompt, tuple(responses), plan, versions)


def _version(task: str, one: Mapping[str, Any]) -> Version:
    answer: Answer | None = answer_from_json(one["kind"], one["answer"])
    made = MadeLabel(
        task,
        one["annotator"],
        answer,
        one["token"],
        shown=tuple(one["shown"]),
        seconds=one["seconds"],
        flags=tuple(Flag(kind, response) for kind, response in one["flags"]),
        comment=one["comment"],
        page=one["page"],
        made_at=datetime.fromisoformat(one["made_at"]),
        instructions=one["instructions"],
        leased_at=datetime.fromisoformat(one["leased_at"]),
    )
    who = Annotator(one["annotator"], one["annotator_kind"])
    return Version(one["assignment"], one["version"], who, made, one["kind"] == "retract")


def replay(store: PreferenceStore, tasks: Iterable[LabelledTask]) -> int:
    """Appends every version of the labels of tasks that have been added, at their own times; returns how many were new.

    Raises `RefusedError` for one that the store cannot take.
    """
    simple: list[MadeLabel] = []
    corrected: list[LabelledTask] = []
    for task in tasks:
        if all(version.version == 1 for version in task.versions):
            simple += [version.label for version in task.versions]
        else:
            corrected.append(task)
    new = store.record(simple)
    if corrected:
        time = [utc_now()]
        # Corrections are dated by the store's clock, so they need a store whose clock is that of the file.
        with PreferenceStore.open(store.path, clock=lambda: time[0]) as dated:
            for task in corrected:
                new += _replay_task(dated, task, time)
    return new


def _replay_task(store: PreferenceStore, task: LabelledTask, time: list[datetime]) -> int:
    known = {label.token: label.assignment for label in store.history(task.id)}
    num_before = len(known)
    assignments: dict[int, int] = {}
    for version in task.versions:
        made = version.label
        time[0] = made.made_at or time[0]
        if version.version == 1:
            if made.token not in known:
                store.record([made])
                known = {label.token: label.assignment for label in store.history(task.id)}
            assignments[version.assignment] = known[made.token]
            continue
        if version.assignment not in assignments:
            raise DataError(f"task {task.id}: version {version.version} of a label comes before version 1")
        place = assignments[version.assignment]
        if version.retracts:
            store.retract(place, made.annotator, token=made.token, comment=made.comment)
        else:
            store.submit(
                place,
                made.annotator,
                made.answer,
                token=made.token,
                seconds=made.seconds,
                flags=made.flags,
                comment=made.comment,
            )
    return len(store.history(task.id)) - num_before
