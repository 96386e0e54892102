"""From sampled responses to tasks in the preference store, with gold questions and blind repeats among them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.config.data import EmbeddedData
from rlhf.config.preferences import PreferencesConfig, pool_size, single_annotators
from rlhf.data import load_comparisons
from rlhf.data.embedded import gold_reward
from rlhf.data.splits import SPLITS, SplitName
from rlhf.errors import DataError
from rlhf.preferences.annotators import audience_of
from rlhf.preferences.asked import AskedTasks
from rlhf.preferences.store import AnnotatorKind, Choice, Policy, PreferenceStore, Response, TaskPlan, task_id
from rlhf.records import Prompt, PromptContent
from rlhf.runs.files import hash_path
from rlhf.stages.response_pool import Asked, Draw

if TYPE_CHECKING:
    from rlhf.config import RLHFConfig
    from rlhf.stages.context import StageContext

GOLD_STRATEGY = "gold"
REPEAT_STRATEGY = "repeat"
# Of so many spare pairs for each gold question the clearest are taken.
SPARE_PAIRS = 4
# Rounds have turns and random numbers of their own: theirs are this far apart.
_ROUND_STEP = 2**32


class Asker:
    """Puts the tasks of one collection into a store. Adding is idempotent: what is there already stays."""

    def __init__(self, context: StageContext, store: PreferenceStore) -> None:
        self._config: RLHFConfig = context.config
        self._store = store
        self._policy = _policy_of(context)
        store.add_policies([self._policy])
        section = self._config.collect.sampling
        names = ("temperature", "max_response_tokens", "min_response_tokens", "stop_tokens")
        values = section.model_dump(mode="json")
        self._sampling = {name: values[name] for name in names} | {"round": self._config.preferences.round}

    @property
    def _section(self) -> PreferencesConfig:
        return self._config.preferences

    def ask(self, asked: Mapping[SplitName, Sequence[Asked]], spare: Sequence[Draw]) -> AskedTasks:
        """Adds the tasks of every split, and the checks among those of training; `spare` gives gold questions.

        What the gold reward labels and holds equal is not asked.
        """
        tasks: dict[SplitName, tuple[str, ...]] = {}
        numbers: dict[str, int] = {}
        plans: list[TaskPlan] = []
        for split in SPLITS:
            by_gold = split == "test" and self._section.gold_labels_test
            items = [item for item in asked[split] if not by_gold or _gold_gap(item.draw, item.indices)]
            made = self._plans(items, gold_labelled=by_gold)
            ids = self._add(made)
            offset = self._section.round * _ROUND_STEP
            numbers |= {task: offset + item.number for task, item in zip(ids, items, strict=True)}
            tasks[split] = tuple(dict.fromkeys(ids))
            if split == "train":
                plans = made
        checks = [*self._gold_questions(len(tasks["train"]), spare), *self._repeats(plans, numbers)]
        scores = {split: self._gold_mean(asked[split]) for split in SPLITS}
        return AskedTasks(tasks, tuple(checks), numbers, scores)

    def _add(self, plans: Sequence[TaskPlan]) -> list[str]:
        """Adds the tasks; one that is there, from another collection, wants as many labels as this one does."""
        ids = self._store.add_tasks(plans)
        there = self._store.tasks(ids)
        stale: dict[int, list[str]] = {}
        for task, plan in dict(zip(ids, plans, strict=True)).items():
            if there[task].plan.num_labels != plan.num_labels:
                stale.setdefault(plan.num_labels, []).append(task)
        for num_labels, tasks in stale.items():
            self._store.replan(tasks, num_labels=num_labels)
        return ids

    def _plans(self, items: Sequence[Asked], *, gold_labelled: bool) -> list[TaskPlan]:
        prompts = [_stored_prompt(item.draw) for item in items]
        prompt_ids = self._store.add_prompts(prompts)
        responses = [self._responses(item, key) for item, key in zip(items, prompt_ids, strict=True)]
        flat = iter(self._store.add_responses(response for group in responses for response in group))
        ids = [tuple(next(flat) for _ in group) for group in responses]
        section = self._section
        kind = "pairwise" if gold_labelled else section.kind
        return [
            TaskPlan(
                kind,
                group,
                num_labels=1 if gold_labelled else section.labels_per_task,
                round=section.round,
                strategy=item.strategy,
                score=None if item.score is None or not math.isfinite(item.score) else item.score,
                audience="rule" if gold_labelled else self._audience(item.draw.prompt.content),
                scale=section.rating_scale if kind == "rating" else None,
            )
            for item, group in zip(items, ids, strict=True)
        ]

    def _audience(self, prompt: PromptContent) -> AnnotatorKind:
        return audience_of(self._section.annotator, self._config.seed, prompt)

    def _responses(self, item: Asked, prompt_id: str) -> list[Response]:
        return [
            Response(
                prompt_id,
                item.draw.texts[index],
                policy=self._policy.hash,
                sampling=self._sampling,
                seed=self._config.seed,
                number=item.draw.sample(index),
            )
            for index in item.indices
        ]

    def _gold_mean(self, items: Sequence[Asked]) -> float | None:
        if not isinstance(self._config.data, EmbeddedData) or not items:
            return None
        scores = [
            gold_reward(item.draw.prompt.content, item.draw.texts[index]) for item in items for index in item.indices
        ]
        return sum(scores) / len(scores)

    def _gold_questions(self, num_tasks: int, spare: Sequence[Draw]) -> list[str]:
        """Pairs whose answer is known: the clearest of spare pairs by the gold reward, else the data's comparisons."""
        wanted = num_gold_questions(self._section, num_tasks)
        if not wanted:
            return []
        if isinstance(self._config.data, EmbeddedData):
            plans = self._clearest(spare, wanted)
        else:
            plans = self._own_comparisons(wanted)
        return self._add(plans)

    def _clearest(self, spare: Sequence[Draw], wanted: int) -> list[TaskPlan]:
        gaps = {draw.place: _gold_gap(draw, (0, 1)) for draw in spare}
        clear = sorted(
            (draw for draw in spare if gaps[draw.place]), key=lambda draw: (-abs(gaps[draw.place]), draw.place)
        )[:wanted]
        items = [Asked(draw, (0, 1), 0, GOLD_STRATEGY, abs(gaps[draw.place])) for draw in clear]
        return [
            replace(plan, kind="pairwise", scale=None, gold=Choice(plan.responses[0 if gaps[draw.place] > 0 else 1]))
            for plan, draw in zip(self._plans(items, gold_labelled=False), clear, strict=True)
        ]

    def _own_comparisons(self, wanted: int) -> list[TaskPlan]:
        found = load_comparisons(self._config.data).train
        seed = self._config.seed
        if len(found) < wanted:
            raise DataError(
                f"preferences.gold_share wants {wanted} gold questions, and the data has {len(found)} comparisons for "
                "training; lower it"
            )
        chosen = sorted(range(len(found)), key=lambda n: (_hash(seed, "gold", n), n))[:wanted]
        plans = []
        for record in (found[number] for number in sorted(chosen)):
            (prompt,) = self._store.add_prompts([Prompt(record.prompt)])
            better, worse = self._store.add_responses(
                [Response(prompt, record.chosen), Response(prompt, record.rejected)]
            )
            plans.append(
                TaskPlan(
                    "pairwise",
                    (better, worse),
                    num_labels=self._section.labels_per_task,
                    round=self._section.round,
                    strategy=GOLD_STRATEGY,
                    audience=self._audience(record.prompt),
                    gold=Choice(better),
                )
            )
        return plans

    def _repeats(self, plans: Sequence[TaskPlan], numbers: dict[str, int]) -> list[str]:
        """Some of the training tasks once more, blind; programs have the same turns and random numbers of their own."""
        seed, section = self._config.seed, self._section
        originals = {task_id(plan): plan for plan in plans}
        wanted = round(section.repeat_share * len(originals))
        chosen = set(sorted(originals, key=lambda task: (_hash(seed, "repeat", task), task))[:wanted])
        repeated = [task for task in originals if task in chosen]
        again = [replace(originals[task], repeat_of=task, strategy=REPEAT_STRATEGY, score=None) for task in repeated]
        ids = self._add(again)
        sizes = [size for one in single_annotators(section.annotator) if (size := pool_size(one)) is not None]
        # The same turn of every pool, and a negative number: no original of any round has it.
        step = math.lcm(*sizes)
        numbers |= {
            repeat: numbers[task] - step * (2 * numbers[task] + 1) for repeat, task in zip(ids, repeated, strict=True)
        }
        return ids


def num_gold_questions(section: PreferencesConfig, num_tasks: int) -> int:
    """How many questions with a known answer go with so many training tasks."""
    return round(section.gold_share * num_tasks)


def _gold_gap(draw: Draw, indices: Sequence[int]) -> float:
    """By how much the gold reward prefers the first of two responses of a draw."""
    first, second = (gold_reward(draw.prompt.content, draw.texts[index]) for index in indices)
    return first - second


def _stored_prompt(draw: Draw) -> Prompt:
    """The prompt with those of its columns that JSON can hold; the store keeps no others."""
    return Prompt(draw.prompt.content, {name: value for name, value in draw.prompt.columns.items() if _is_plain(value)})


def _is_plain(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


def _hash(*parts: object) -> bytes:
    return hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()


def _policy_of(context: StageContext) -> Policy:
    """What wrote the responses, named by the content of its folder, or by its hub id and revision."""
    path, revision = context.inputs["policy"], context.config.model.revision
    if Path(path).exists():
        return Policy(hash_path(Path(path)), {"path": _within_run(path), "experiment": context.config.experiment})
    return Policy(f"hub:{path}@{revision or 'main'}", {"path": path, "experiment": context.config.experiment})


def _within_run(path: str) -> str:
    """A model folder's place in its run, `stages/sft/model`: the data that a run makes must not say where the run lies.

    Else a stage that reads the data, and every replay in another folder, would have another input.
    """
    parts = Path(path).parts
    start = max((number for number, part in enumerate(parts) if part == "stages"), default=len(parts) - 1)
    return "/".join(parts[start:])
