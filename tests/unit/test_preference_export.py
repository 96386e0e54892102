"""From labels to records: rules, splits by prompt, rankings, ratings, flags, margins, and what stays out."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf.config.data import SplitConfig
from rlhf.data.splits import split_of
from rlhf.errors import ConfigError
from rlhf.preferences.exchange import ExportOptions, export_labels
from rlhf.preferences.exchange.card import make_card
from rlhf.preferences.exchange.selection import pairs_of, select
from rlhf.preferences.resolution import ResolutionRule
from rlhf.preferences.store import (
    Annotator,
    Answer,
    BothBad,
    Choice,
    Flag,
    MadeLabel,
    PreferenceStore,
    Ranking,
    Rating,
    Response,
    Skip,
    TaskPlan,
    Tie,
)
from rlhf.records import Comparison, Prompt, prompt_key
from tests.unit.preference_store_example import add_pair, add_responses, make_store

MAJORITY, MEAN, ALL = ResolutionRule(), ResolutionRule("mean"), ResolutionRule("all")


def give(store: PreferenceStore, task: str, answers: dict[str, Answer | None], **more: object) -> None:
    """Labels of a task by annotator; the first response is shown first."""
    shown = store.tasks([task])[task].plan.responses
    for name, answer in answers.items():
        store.replan([task], num_labels=9)
        label = MadeLabel(task, name, answer, f"{task}-{name}", shown=shown, **more)  # type: ignore[arg-type]
        store.record([label])


def one_split(store: PreferenceStore, rule: ResolutionRule = MAJORITY, **how: object) -> list[Comparison]:
    exported = export_labels(store, rule=rule, split_of=lambda prompt: "train", **how)  # type: ignore[arg-type]
    return exported.comparisons.train


def texts(store: PreferenceStore, task: str) -> tuple[str, str]:
    first, second = store.tasks([task])[task].plan.responses
    return store.responses()[first].text, store.responses()[second].text


@pytest.mark.parametrize(
    ("rule", "answers", "expected"),
    [
        (MAJORITY, "112", [(1, None, 2 / 3, 3)]),
        (MAJORITY, "12", []),
        (ResolutionRule(on_tied_vote="tie"), "12", [(0, 0.5, 0.0, 2)]),
        (MAJORITY, "00", [(0, 0.5, 1.0, 2)]),
        (MAJORITY, "0b", [(0, 0.5, 1.0, 2)]),
        (ResolutionRule(both_bad="leave_out"), "2b", [(2, None, 1.0, 1)]),
        (MAJORITY, "s1", [(1, None, 1.0, 1)]),
        (MEAN, "112", [(1, 2 / 3, 2 / 3, 3)]),
        (MEAN, "022", [(2, 5 / 6, 2 / 3, 3)]),
        (ALL, "12", [(1, None, 1.0, 1), (2, None, 1.0, 1)]),
    ],
)
def test_labels_are_resolved_by_the_rule(
    tmp_path: Path, rule: ResolutionRule, answers: str, expected: list[tuple[int, float | None, float, int]]
) -> None:
    """By hand: side that is better (0 a tie), probability, agreement, number of annotators."""
    store = make_store(tmp_path)
    task = add_pair(store)
    first, second = store.tasks([task])[task].plan.responses
    meaning: dict[str, Answer] = {"1": Choice(first), "2": Choice(second), "0": Tie(), "b": BothBad(), "s": Skip()}
    give(store, task, {name: meaning[answer] for name, answer in zip("abc", answers, strict=False)})
    made = one_split(store, rule)
    assert len(made) == len(expected)
    for record, (side, probability, agreement, count) in zip(made, expected, strict=True):
        assert side == 0 or record.chosen == texts(store, task)[side - 1]
        assert record.probability == (None if probability is None else pytest.approx(probability))
        assert record.agreement == pytest.approx(agreement)
        assert record.num_annotators == count


def test_who_decided_and_on_which_side_is_kept(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    alone, both = add_pair(store, "one"), add_pair(store, "two")
    second = store.tasks([alone])[alone].plan.responses[1]
    give(store, alone, {"a": Choice(second)})
    give(store, both, {name: Choice(store.tasks([both])[both].plan.responses[0]) for name in "ab"})
    one, two = one_split(store)
    assert (one.annotator, one.chosen_shown_first) == ("a", False)
    assert (two.annotator, two.chosen_shown_first) == ("a, b", None)
    assert one.source == "given"


def test_the_order_is_that_of_the_tasks_and_rounds_choose(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    tasks = [add_pair(store, question, round=number) for number, question in enumerate(("x", "y", "z"))]
    for task in reversed(tasks):
        give(store, task, {"a": Choice(store.tasks([task])[task].plan.responses[0])})
    assert [one.prompt for one in one_split(store)] == ["x", "y", "z"]
    assert [one.prompt for one in one_split(store, tasks=[tasks[2], tasks[0]])] == ["z", "x"]
    assert [one.prompt for one in one_split(store, rounds={1})] == ["y"]
    with pytest.raises(ConfigError, match="has no task 'nowhere'"):
        one_split(store, tasks=["nowhere"])


def test_a_prompt_never_straddles_and_the_split_is_that_of_its_key(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    splits = SplitConfig(validation=0.3, test=0.3, salt="s")
    for number in range(30):
        for spelling in (f"question {number}", f"question   {number} "):
            task = add_pair(store, spelling)
            give(store, task, {"a": Choice(store.tasks([task])[task].plan.responses[0])})
    exported = export_labels(store, rule=MAJORITY, splits=splits).comparisons
    places = {
        name: {prompt_key(one.prompt) for one in exported.named(name)} for name in ("train", "validation", "test")
    }
    assert all(places.values())
    assert sum(map(len, places.values())) == 30
    for name, keys in places.items():
        assert all(split_of(key, splits) == name for key in keys)
        assert len(exported.named(name)) == 2 * len(keys)  # type: ignore[arg-type]
    chosen = export_labels(store, rule=MAJORITY, split_of=lambda prompt: "test" if "7" in str(prompt) else "train")
    assert len(chosen.comparisons.test) == 6
    assert not chosen.comparisons.validation


def test_a_ranking_becomes_all_its_pairs(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    ids = add_responses(store, "q", 4)
    (task,) = store.add_tasks([TaskPlan("ranking", ids, num_labels=2)])
    give(store, task, {"a": Ranking(((ids[2],), (ids[0], ids[3]), (ids[1],)))})
    names = {store.responses()[one].text: number for number, one in enumerate(ids)}
    made = one_split(store)
    pairs = {(names[one.chosen], names[one.rejected]) for one in made if one.probability is None}
    assert pairs == {(2, 0), (2, 3), (2, 1), (0, 1), (3, 1)}
    (tie,) = [one for one in made if one.probability == 0.5]
    assert {names[tie.chosen], names[tie.rejected]} == {0, 3}
    # A second ranking that turns one pair round leaves its vote tied.
    give(store, task, {"b": Ranking(((ids[0],), (ids[2],), (ids[3],), (ids[1],)))})
    resolved = export_labels(store, rule=MAJORITY).resolved
    assert (len(resolved.resolutions), resolved.reasons(tasks=True)) == (4, {"tied vote": 2})


def test_ratings_stay_ratings_and_become_pairs_when_asked(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    ids = add_responses(store, "q", 3)
    tasks = store.add_tasks(TaskPlan("rating", (one,), num_labels=2, scale=5) for one in ids)
    for task, a, b in zip(tasks, (5, 3, 3), (1, 2, None), strict=True):
        give(store, task, {"a": Rating(a)} if b is None else {"a": Rating(a), "b": Rating(b)})
    exported = export_labels(store, rule=MEAN, split_of=lambda prompt: "train")
    assert [one.rating for one in exported.ratings.train] == [3.0, 2.5, 3.0]
    assert not exported.comparisons.train
    every = export_labels(store, rule=ALL, split_of=lambda prompt: "train").ratings.train
    assert [(one.rating, one.annotator) for one in every] == [
        (5.0, "a"),
        (1.0, "b"),
        (3.0, "a"),
        (2.0, "b"),
        (3.0, "a"),
    ]
    pairs = one_split(store, MEAN, options=ExportOptions(ratings_as_pairs=True))
    # a: 0 > 1, 0 > 2, 1 = 2; b: 1 > 0. Nobody is compared with somebody else.
    found = {frozenset((one.chosen[-1], one.rejected[-1])): (one.chosen[-1], one.probability) for one in pairs}
    assert found[frozenset("01")][1] == 0.5
    assert found[frozenset("02")] == ("0", None)
    assert found[frozenset("12")][1] == 0.5


def test_what_is_flagged_can_be_left_out(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    tasks = [add_pair(store, question) for question in ("fine", "unsafe", "whole")]
    for task in tasks:
        give(store, task, {"a": Choice(store.tasks([task])[task].plan.responses[0])})
    bad = store.tasks([tasks[1]])[tasks[1]].plan.responses[1]
    give(store, tasks[1], {"b": None}, flags=(Flag("unsafe", bad),))
    give(store, tasks[2], {"b": None}, flags=(Flag("personal_data"),))
    # Whichever of the two is flagged.
    for side in (0, 1):
        task = add_pair(store, f"side {side}")
        pair = pairs_of(select(store), store.tasks([task])[task])[0]
        give(store, task, {"a": Choice(pair.first)})
        give(store, task, {"b": None}, flags=(Flag("unsafe", (pair.first, pair.second)[side]),))
    rating = store.add_tasks([TaskPlan("rating", (bad,), num_labels=1, scale=5)])[0]
    give(store, rating, {"a": Rating(2)})
    assert [one.prompt for one in one_split(store)] == ["fine", "unsafe", "whole", "side 0", "side 1"]
    options = ExportOptions(leave_out_flagged=("unsafe", "personal_data"))
    exported = export_labels(store, rule=MAJORITY, split_of=lambda prompt: "train", options=options)
    assert [one.prompt for one in exported.comparisons.train] == ["fine"]
    assert not exported.ratings.train
    assert exported.left_out == {
        "task flagged": 1,
        "pair with a flagged response": 3,
        "rating of a flagged response": 1,
    }
    only = ExportOptions(leave_out_flagged=("broken",))
    assert len(one_split(store, options=only)) == 5
    with pytest.raises(ConfigError, match="not 'rude'"):
        one_split(store, options=ExportOptions(leave_out_flagged=("rude",)))  # type: ignore[arg-type]


def test_gold_questions_and_repeats_are_measured_and_not_exported(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    task = add_pair(store)
    plan = store.tasks([task])[task].plan
    first, second = plan.responses
    repeat, gold = store.add_tasks(
        [
            TaskPlan("pairwise", plan.responses, repeat_of=task),
            TaskPlan("pairwise", add_responses(store, "gold", 2), gold=Choice(add_responses(store, "gold", 2)[0])),
        ]
    )
    give(store, task, {"a": Choice(first), "b": Choice(first)})
    give(store, repeat, {"a": Choice(second), "b": Choice(first)})
    right = store.tasks([gold])[gold].plan.gold
    give(store, gold, {"a": right, "b": Tie()})
    assert len(one_split(store)) == 1
    # One record a label of the ordinary task, none of the others.
    assert [(one.prompt, one.annotator) for one in one_split(store, ALL)] == [("q", "a"), ("q", "b")]
    assert len(one_split(store, tasks=[gold])) == 0  # one for it, one tie: a tied vote
    assert "| a | human | 3 | 0 | 0 |" in export_labels(store, rule=MAJORITY).card()
    made = make_card(export_labels(store, rule=MAJORITY))
    assert made["annotators"]["a"]["gold_right"]["value"] == 1
    assert made["annotators"]["b"]["gold_right"]["value"] == 0
    same = {name: one["comparisons"]["agreement"]["value"] for name, one in made["self_consistency"].items()}
    assert same == {"a": 0.0, "b": 1.0}


def test_margins_of_an_import_or_of_strengths(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    (prompt,) = store.add_prompts([Prompt("p")])
    ids = sorted(store.add_responses(Response(prompt, text) for text in ("s", "t")))
    task = store.add_tasks([TaskPlan("pairwise", tuple(ids), num_labels=3, strategy="imported", score=-1.5)])[0]
    give(store, task, {"a": Choice(ids[1], 3), "b": Choice(ids[1], 1), "c": Choice(ids[0], 1)})
    # The score is that of the first id over the second, and the second was chosen.
    assert [one.margin for one in one_split(store)] == [1.5]
    assert [one.margin for one in one_split(store, options=ExportOptions(margins="none"))] == [None]
    assert [one.margin for one in one_split(store, options=ExportOptions(margins="strength"))] == [pytest.approx(1.0)]
    with pytest.raises(ConfigError, match="margins is"):
        one_split(store, options=ExportOptions(margins="wide"))  # type: ignore[arg-type]
    # What chose a task here gives it a score that is no margin.
    others = add_responses(store, "other", 2)
    other = store.add_tasks([TaskPlan("pairwise", others, strategy="near_tie", score=0.1)])[0]
    give(store, other, {"a": Choice(others[0])})
    assert [one.margin for one in one_split(store)] == [1.5, None]


def test_strength_moves_the_probability(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    task = add_pair(store)
    first = store.tasks([task])[task].plan.responses[0]
    give(store, task, {"a": Choice(first, 1)})
    (one,) = one_split(store, ResolutionRule("mean", use_strength=True))
    assert one.probability == pytest.approx(2 / 3)


def test_an_empty_store_gives_an_empty_export(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    store.add_annotator(Annotator("d", "judge"))
    exported = export_labels(store, rule=MAJORITY)
    assert not exported.comparisons.train
    assert "Not defined: no labels." in exported.card()
