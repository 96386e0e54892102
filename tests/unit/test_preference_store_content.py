"""What a preference store asks about: kept as it was, once, and refused where it does not hold together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from rlhf.errors import DataError
from rlhf.preferences.store import (
    Annotator,
    Choice,
    Policy,
    PreferenceStore,
    Rating,
    Response,
    Skip,
    TaskPlan,
)
from rlhf.records import Message, Prompt, prompt_hash
from tests.unit.preference_store_example import add_responses, make_store


@pytest.fixture
def store(tmp_path: Path) -> PreferenceStore:
    return make_store(tmp_path)


def test_content_comes_back_as_it_was(store: PreferenceStore) -> None:
    chat = (Message("system", "Be kind."), Message("user", "<b>é\0\u2028 𝄞"))
    prompts = [Prompt("  two  spaces\n", {"level": [1, {"deep": None}]}), Prompt(chat)]
    ids = store.add_prompts(prompts)
    store.add_policies([Policy("aa11", {"step": 20})])
    made = Response(ids[1], "<script>\0\r\n𝄞", "aa11", {"temperature": 0.7}, seed=-(2**63), number=3)
    (response,) = store.add_responses([made])
    assert [store.prompts()[key] for key in ids] == prompts
    assert store.responses([response]) == {response: made}
    assert store.policies() == {"aa11": Policy("aa11", {"step": 20})}
    with store._read() as connection:
        assert [row[0] for row in connection.execute("SELECT key FROM prompts WHERE id = ?", (ids[1],))] == [
            f"{prompt_hash(chat):016x}"
        ]


def test_adding_again_adds_nothing(store: PreferenceStore) -> None:
    plan = TaskPlan("ranking", add_responses(store, "q", 5), num_labels=2, score=0.5)
    for _ in range(2):
        ids = store.add_prompts([Prompt("x"), Prompt("x"), Prompt(" x"), Prompt("x", {"row": 1})])
        # White space tells code apart, and columns belong to the row.
        assert len({*ids}) == 3
        assert ids[0] == ids[1]
        responses = store.add_responses([Response(ids[0], "same", number=n) for n in (1, 2, 1)])
        assert responses[0] == responses[2] != responses[1]
        tasks = store.add_tasks([plan])
        store.add_annotator(Annotator("a", "human"))
    assert (len(store.prompts()), len(store.responses()), len(store.tasks())) == (4, 7, 1)
    assert store.tasks()[tasks[0]].plan == replace(plan, responses=tuple(sorted(plan.responses)))


def test_a_swapped_pair_is_the_same_task_and_another_round_is_not(store: PreferenceStore) -> None:
    first, second = add_responses(store, "q", 2)
    plan = TaskPlan("pairwise", (first, second))
    ids = store.add_tasks([plan, TaskPlan("pairwise", (second, first)), replace(plan, round=1)])
    assert ids[0] == ids[1] != ids[2]


def test_many_rows_go_in_in_batches(store: PreferenceStore) -> None:
    ids = store.add_prompts(Prompt(str(number)) for number in range(4100))
    assert len({*ids}) == len(store.prompts()) == 4100
    assert store.prompts([ids[4000]]) == {ids[4000]: Prompt("4000")}


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (TaskPlan("pairwise", ("0", "1", "2")), "a pairwise task has 2 different responses"),
        (TaskPlan("pairwise", ("0", "0")), "2 different responses"),
        (TaskPlan("ranking", ("0", "1", "2")), "4 to 9 different responses"),
        (TaskPlan("rating", ("0",)), "has a scale of at least 2"),
        (TaskPlan("pairwise", ("0", "1"), scale=5), "has a scale of at least 2"),
        (TaskPlan("pairwise", ("0", "other")), "of .* the store has 2, to 2 prompts"),
        (TaskPlan("pairwise", ("0", "unknown")), "the store has 1, to 1 prompts"),
        (TaskPlan("pairwise", ("0", "1"), num_labels=-1), "num_labels and round are at least 0"),
        (TaskPlan("pairwise", ("0", "1"), gold=Skip()), "a skip is no gold answer"),
        (TaskPlan("pairwise", ("0", "1"), gold=Choice("2")), "prefers one of the task's responses"),
        (TaskPlan("rating", ("0",), scale=5, gold=Rating(6)), "between 1 and 5, not 6"),
        (TaskPlan("pairwise", ("0", "1"), repeat_of="nothing"), "'nothing' is none"),
    ],
)
def test_a_plan_that_does_not_hold_together_is_refused(store: PreferenceStore, plan: TaskPlan, message: str) -> None:
    names = dict(zip("012", add_responses(store, "q", 3), strict=True))
    (names["other"],) = add_responses(store, "another", 1)
    gold = plan.gold if not isinstance(plan.gold, Choice) else Choice(names[plan.gold.preferred])
    with pytest.raises(DataError, match=message):
        store.add_tasks([replace(plan, responses=tuple(names.get(r, r) for r in plan.responses), gold=gold)])
    assert store.tasks() == {}


def test_responses_need_their_prompt_and_annotators_keep_their_name(store: PreferenceStore) -> None:
    (prompt,) = store.add_prompts([Prompt("q")])
    for wrong in (Response("nowhere", "x"), Response(prompt, "x", policy="unknown")):
        with pytest.raises(DataError, match="add prompts and policies first"):
            store.add_responses([Response(prompt, "fine"), wrong])
    assert store.responses() == {}
    with pytest.raises(DataError, match=r"'a' of .* is human with {}, not judge"):
        store.add_annotator(Annotator("a", "judge"))
    with pytest.raises(DataError, match="keeps text and JSON values"):
        store.add_prompts([Prompt("half \ud800 a pair")])
