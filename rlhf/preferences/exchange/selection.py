"""What an export takes from the store: the tasks, their labels, and what each label says of a pair or of a response."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import get_args

from rlhf.errors import ConfigError
from rlhf.preferences.resolution import Choice as Side
from rlhf.preferences.resolution import PairwiseLabel
from rlhf.preferences.store import (
    Annotator,
    Answer,
    BothBad,
    Choice,
    FlagKind,
    Label,
    Policy,
    PreferenceStore,
    Ranking,
    Rating,
    Response,
    Skip,
    Task,
)
from rlhf.records import Prompt


@dataclass(frozen=True)
class Selection:
    """The tasks of an export in their order, what they are about, and their current labels.

    `checks` are the gold questions and blind repeats of the tasks' rounds with their labels: they are measured, never
    exported. Responses of a task go by number, then by id (`order`): "first" and "second" mean that order.
    """

    tasks: tuple[Task, ...]
    checks: tuple[Task, ...]
    prompts: Mapping[str, Prompt]
    responses: Mapping[str, Response]
    labels: Mapping[str, tuple[Label, ...]]
    annotators: Mapping[str, Annotator]
    policies: Mapping[str, Policy]
    seed: int

    def order(self, task: Task) -> tuple[str, ...]:
        """A task's responses (ids): the samples in their order; those without a number by id."""
        return tuple(sorted(task.plan.responses, key=lambda one: (self.responses[one].number or 0, one)))

    def labels_of(self, task: Task) -> tuple[Label, ...]:
        """The current labels of a task, the oldest first."""
        return self.labels.get(task.id, ())


@dataclass(frozen=True)
class Pair:
    """Two responses (ids) of a task that were compared; `key` names the pair in labels and resolutions."""

    key: str
    task: Task
    first: str
    second: str


def select(
    store: PreferenceStore, tasks: Sequence[str] | None = None, rounds: Collection[int] | None = None
) -> Selection:
    """The tasks of these ids and rounds; without ids all in the order of creation but for checks.

    Raises `ConfigError` for an unknown id.
    """
    there = store.tasks()
    in_rounds = {key: task for key, task in there.items() if rounds is None or task.plan.round in rounds}
    if tasks is None:
        chosen = [task for task in in_rounds.values() if not _is_check(task)]
    else:
        unknown = [key for key in tasks if key not in there]
        if unknown:
            raise ConfigError(f"the preference store {store.path} has no task {unknown[0]!r}; add it first")
        chosen = [in_rounds[key] for key in dict.fromkeys(tasks) if key in in_rounds]
        own = {task.plan.round for task in chosen}
        in_rounds = {key: task for key, task in in_rounds.items() if task.plan.round in own}
    names = {task.id for task in chosen}
    measured = set(names)
    checks = []
    for task in in_rounds.values():
        # A repeat comes after what it repeats, which may be a repeat as well.
        original = task.plan.repeat_of
        if _is_check(task) and task.id not in names and (original is None or original in measured):
            checks.append(task)
            measured.add(task.id)
    labels: dict[str, list[Label]] = {}
    for label in store.current_labels(tasks=[task.id for task in (*chosen, *checks)]):
        labels.setdefault(label.task, []).append(label)
    used = dict.fromkeys(one for task in (*chosen, *checks) for one in task.plan.responses)
    return Selection(
        tuple(chosen),
        tuple(checks),
        store.prompts(dict.fromkeys(task.prompt for task in (*chosen, *checks))),
        store.responses(used),
        {task: tuple(given) for task, given in labels.items()},
        store.annotators(),
        store.policies(),
        store.seed,
    )


def _is_check(task: Task) -> bool:
    return task.plan.gold is not None or task.plan.repeat_of is not None


def pairs_of(selection: Selection, task: Task) -> list[Pair]:
    """The pair of a pairwise task; all pairs of a ranking; none of a rating."""
    order = selection.order(task)
    if task.plan.kind == "rating":
        return []
    if task.plan.kind == "pairwise":
        return [Pair(task.id, task, *order)]
    return [Pair(f"{task.id}/{i}-{j}", task, order[i], order[j]) for i, j in combinations(range(len(order)), 2)]


def side_of(answer: Answer | None, first: str, second: str) -> tuple[Side, int | None] | None:
    """What an answer says of two responses, and how strongly; None for a rating and for flags alone."""
    if answer is None or isinstance(answer, Rating):
        return None
    if isinstance(answer, Choice):
        return ("first" if answer.preferred == first else "second"), answer.strength
    if isinstance(answer, Ranking):
        places = {one: place for place, tier in enumerate(answer.tiers) for one in tier}
        if places[first] == places[second]:
            return "tie", None
        # A ranking says nothing of how far apart two places are.
        return ("first" if places[first] < places[second] else "second"), 1
    return ("skip" if isinstance(answer, Skip) else "both_bad" if isinstance(answer, BothBad) else "tie"), None


def pairwise_labels(selection: Selection, pair: Pair) -> Iterator[PairwiseLabel]:
    """The labels of a pair in the words of `rlhf.preferences.resolution`."""
    for label in selection.labels_of(pair.task):
        said = side_of(label.answer, pair.first, pair.second)
        if said is not None:
            yield PairwiseLabel(pair.key, label.annotator, *said)


def flagged(selection: Selection, kinds: Collection[FlagKind]) -> tuple[set[str], set[str]]:
    """The responses and the tasks (ids) that anybody flagged as one of these kinds. Raises `ConfigError` for others."""
    for kind in kinds:
        if kind not in get_args(FlagKind):
            raise ConfigError(f"leave_out_flagged takes {', '.join(get_args(FlagKind))}, not {kind!r}")
    responses: set[str] = set()
    tasks: set[str] = set()
    for given in selection.labels.values():
        for label in given:
            for flag in label.flags:
                if flag.kind in kinds:
                    (tasks if flag.response is None else responses).add(flag.response or label.task)
    return responses, tasks
