"""The labels of a preference store: in versions, with their screens, and the figures made of them."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from rlhf.preferences.store import (
    AnnotatorFigures,
    Answer,
    BothBad,
    Choice,
    Flag,
    MadeLabel,
    PreferenceStore,
    Ranking,
    Rating,
    RefusedError,
    RoundProgress,
    Skip,
    TaskPlan,
    Tie,
    agrees,
)
from rlhf.records import Prompt
from tests.unit.preference_store_example import START, HandClock, add_pair, add_responses, lease, make_store


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
def store(tmp_path: Path, clock: HandClock) -> PreferenceStore:
    return make_store(tmp_path, clock)


def submit(store: PreferenceStore, name: str, answer: Answer | None, token: str, flags: tuple[Flag, ...] = ()) -> int:
    """Answers the annotator's next task; the id of the assignment."""
    assignment = lease(store, name)
    store.submit(assignment, name, answer, token=token, flags=flags)
    return assignment


@pytest.mark.parametrize(
    ("kind", "number", "answer"),
    [
        ("pairwise", 2, Choice("1", 3)),
        ("pairwise", 2, Tie()),
        ("pairwise", 2, BothBad()),
        ("pairwise", 2, Skip()),
        ("ranking", 4, Ranking((("2",), ("0", "3"), ("1",)))),
        ("rating", 1, Rating(4.5)),
    ],
)
def test_every_answer_comes_back(
    store: PreferenceStore, clock: HandClock, kind: str, number: int, answer: Answer
) -> None:
    ids = add_responses(store, "q", number)
    if isinstance(answer, Choice):
        answer = Choice(ids[int(answer.preferred)], answer.strength)
    if isinstance(answer, Ranking):
        answer = Ranking(tuple(tuple(ids[int(n)] for n in tier) for tier in answer.tiers))
    store.add_tasks([TaskPlan(kind, ids, scale=5 if kind == "rating" else None)])  # type: ignore[arg-type]
    clock.move(3)
    assignment = lease(store, "a")
    clock.move(20.5)
    flags = (Flag("broken"), Flag("unsafe", ids[0]))
    label = store.submit(assignment, "a", answer, token="t", seconds=19.5, flags=flags, comment="why\n'\"")
    assert store.current_labels() == [label]
    assert (label.answer, label.flags, label.comment, label.seconds) == (answer, flags, "why\n'\"", 19.5)
    assert label.made_at == START + timedelta(seconds=23.5)


@pytest.mark.parametrize(
    ("kind", "answer", "message"),
    [
        ("pairwise", Choice("elsewhere"), "prefers one of the task's responses"),
        ("pairwise", Choice("0", 4), "strength of a choice is 1, 2 or 3, not 4"),
        ("pairwise", Rating(1), "answered by Choice, Tie, BothBad, Skip"),
        ("pairwise", None, "an answer or a flag"),
        ("ranking", Ranking((("0", "1"), ("2",))), "each of the 4 responses once"),
        ("ranking", Ranking((("0", "1"), ("2", "3", "3"))), "each of the 4 responses once"),
        ("ranking", Ranking((("0", "1"), (), ("2", "3"))), "each of the 4 responses once"),
        ("ranking", Tie(), "answered by Ranking, Skip"),
        ("rating", Rating(0.5), "between 1 and 5, not 0.5"),
        ("rating", Rating(float("nan")), "between 1 and 5, not nan"),
    ],
)
def test_an_answer_that_does_not_fit_is_refused(
    store: PreferenceStore, kind: str, answer: Answer | None, message: str
) -> None:
    ids = add_responses(store, "q", {"pairwise": 2, "ranking": 4, "rating": 1}[kind])
    if isinstance(answer, Choice) and answer.preferred == "0":
        answer = Choice(ids[0], answer.strength)
    if isinstance(answer, Ranking):
        answer = Ranking(tuple(tuple(ids[int(n)] for n in tier) for tier in answer.tiers))
    store.add_tasks([TaskPlan(kind, ids, scale=5 if kind == "rating" else None)])  # type: ignore[arg-type]
    assignment = lease(store, "a")
    with pytest.raises(RefusedError, match=message) as caught:
        store.submit(assignment, "a", answer, token="t")
    assert caught.value.reason == "invalid_answer"
    assert [found.id for found in store.held("a")] == [assignment]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token": ""}, "has a token"),
        ({"seconds": -1.0}, "seconds taken"),
        ({"seconds": float("inf")}, "seconds taken"),
        ({"flags": [Flag("rude")]}, "unsafe, personal_data, broken, not 'rude'"),  # type: ignore[arg-type]
        ({"flags": [Flag("unsafe", "elsewhere")]}, "not 'elsewhere'"),
        ({"comment": "\ud800"}, "surrogates not allowed"),
    ],
)
def test_a_submission_that_cannot_be_kept_is_refused(
    store: PreferenceStore, change: dict[str, object], message: str
) -> None:
    add_pair(store)
    arguments = {"token": "t", **change}
    with pytest.raises(RefusedError, match=message):
        store.submit(lease(store, "a"), "a", Tie(), **arguments)  # type: ignore[arg-type]
    assert store.current_labels() == []


def test_a_retry_adds_nothing(store: PreferenceStore, clock: HandClock) -> None:
    task = add_pair(store, num_labels=2)
    assignment = lease(store, "a")
    label = store.submit(assignment, "a", Tie(), token="t", seconds=4.0)
    clock.move(1000)
    # The client may have measured on while it waited for the lost reply.
    assert store.submit(assignment, "a", Tie(), token="t", seconds=9.0) == label
    retracted = store.retract(assignment, "a", token="u")
    assert store.retract(assignment, "a", token="u") == retracted
    # A retry that comes late does not undo the undo.
    assert store.submit(assignment, "a", Tie(), token="t") == label
    assert store.current_labels() == []
    assert store.history(task) == [label, retracted]
    with pytest.raises(RefusedError, match="used for another submission"):
        store.submit(assignment, "a", BothBad(), token="t")
    with pytest.raises(RefusedError, match="used for another submission"):
        store.submit(assignment, "a", Tie(), token="t", comment="more")
    with pytest.raises(RefusedError, match="used for another submission"):
        store.retract(assignment, "a", token="t")


def test_a_correction_is_a_new_version(store: PreferenceStore) -> None:
    task = add_pair(store)
    assignment = submit(store, "a", Tie(), "1")
    store.submit(assignment, "a", Skip(), token="2")
    assert store.progress()[0].num_missing == 1
    last = store.submit(assignment, "a", BothBad(), token="3")
    history = store.history(task)
    assert [(label.version, label.supersedes, label.kind) for label in history] == [
        (1, None, "tie"),
        (2, history[0].id, "skip"),
        (3, history[1].id, "both_bad"),
    ]
    assert store.current_labels() == [last]
    assert store.progress()[0].num_missing == 0


def test_current_labels_can_be_narrowed_down(store: PreferenceStore) -> None:
    first, second = add_pair(store, "x", num_labels=2, priority=1), add_pair(store, "y", round=3)
    submit(store, "a", Tie(), "1")
    submit(store, "b", Skip(), "2")
    submit(store, "a", BothBad(), "3")

    def tokens(**narrow: object) -> list[str]:
        return [label.token for label in store.current_labels(**narrow)]  # type: ignore[arg-type]

    assert tokens() == ["1", "2", "3"]
    assert tokens(tasks=[first]) == ["1", "2"]
    assert tokens(round=3) == tokens(tasks=[second]) == ["3"]
    assert tokens(annotators=["a"], kinds=["tie", "skip"]) == ["1"]
    assert tokens(tasks=[]) == []


def test_a_label_is_reconstructed_exactly(store: PreferenceStore, clock: HandClock) -> None:
    text = "Choose the *better* one.\n"
    instructions = store.add_instructions(text)
    task = add_pair(store, "Why?")
    clock.move(7)
    assignment = store.next_assignment("b", lease_seconds=60, instructions=instructions, page="page-9")
    assert assignment is not None
    clock.move(31)
    label = store.submit(assignment.id, "b", Choice(assignment.shown[1], 2), token="t", seconds=30.25)
    seen = store.reconstruct(label.id)
    assert seen.label == label
    assert label.clicked == 1
    assert seen.screen.prompt == Prompt("Why?")
    # Looked up on another way: the texts by the ids in the order shown.
    texts = [store.responses()[response].text for response in assignment.shown]
    assert [response.text for response in seen.screen.responses] == texts
    assert sorted(texts) == ["Why?: text 0", "Why?: text 1"]
    assert (seen.screen.instructions, seen.screen.assignment.page) == (text, "page-9")
    assert (seen.screen.assignment.leased_at, label.made_at) == (
        START + timedelta(seconds=7),
        START + timedelta(seconds=38),
    )
    assert (seen.screen.task.id, seen.label.seconds) == (task, 30.25)
    with pytest.raises(KeyError, match="no label 99"):
        store.reconstruct(99)


def test_progress_counts_each_task_once(store: PreferenceStore, clock: HandClock) -> None:
    add_pair(store, "done", priority=9)
    submit(store, "a", Tie(), "1")
    add_pair(store, "started", num_labels=3, priority=8)
    submit(store, "a", Tie(), "2")
    submit(store, "b", Skip(), "3")
    add_pair(store, "held and started", num_labels=3, priority=10)
    submit(store, "a", Tie(), "4")
    lease(store, "b")
    add_pair(store, "waiting", num_labels=2)
    responses = add_responses(store, "gold", 2)
    store.add_tasks([TaskPlan("pairwise", responses, num_labels=5, gold=Tie(), round=2)])
    first = RoundProgress(
        round=0,
        num_tasks=4,
        num_done=1,
        num_in_work=1,
        num_started=1,
        num_waiting=1,
        num_answered=3,
        num_declined=1,
        num_leased=1,
        num_missing=2 + 2 + 2,
        num_missing_checks=0,
    )
    second = RoundProgress(2, 1, 0, 0, 0, 1, 0, 0, 0, 0, 5)
    assert store.progress() == [first, second]
    # A lease that has ended is in nobody's work, although no write has noticed.
    for seconds in (60, 1):
        clock.move(seconds)
        assert store.progress()[0] == replace(first, num_in_work=0, num_started=2, num_leased=0)


def test_figures_of_annotators(store: PreferenceStore) -> None:
    """Annotator a: first, first, second, tie on six tasks, a skip, a retracted answer; gold 1 of 2; repeat 0 of 1."""
    (original,) = [add_pair(store, "x", priority=9)]
    plan = store.tasks()[original].plan
    right = plan.responses[0]
    gold = [
        TaskPlan("pairwise", add_responses(store, "g1", 2), priority=7, gold=Tie()),
        TaskPlan("pairwise", add_responses(store, "g2", 2), priority=6, gold=Tie()),
    ]
    store.add_tasks([replace(plan, priority=8, repeat_of=original), *gold])
    add_pair(store, "y", priority=5)
    add_pair(store, "z", priority=4)

    def choose(answer: Answer | int, seconds: float | None) -> int:
        assignment = store.next_assignment("a", lease_seconds=60, repeat_gap=0)
        assert assignment is not None
        made = Choice(assignment.shown[answer], 2) if isinstance(answer, int) else answer
        store.submit(assignment.id, "a", made, token=str(assignment.id), seconds=seconds)
        return assignment.id

    choose(Choice(right, 1), 1.0)
    choose(Choice(plan.responses[1], 1), 9.0)
    choose(Tie(), 4.0)
    choose(0, None)
    choose(Skip(), 100.0)
    store.retract(choose(0, 50.0), "a", token="undo")
    figures = {found.name: found for found in store.annotator_figures()}
    first = sum(label.clicked == 0 for label in store.current_labels() if isinstance(label.answer, Choice))
    assert figures["a"] == AnnotatorFigures(
        name="a",
        kind="human",
        num_answered=4,
        num_declined=1,
        num_choices=3,
        num_first=first,
        num_timed=3,
        median_seconds=4.0,
        total_seconds=14.0,
        num_gold=2,
        num_gold_right=1,
        num_repeats=1,
        num_repeats_same=0,
    )
    assert 1 <= first <= 3
    assert figures["b"] == AnnotatorFigures("b", "human", 0, 0, 0, 0, 0, None, 0.0, 0, 0, 0, 0)


@pytest.mark.parametrize(
    ("answer", "other", "expected"),
    [
        (Choice("x", 1), Choice("x", 3), True),
        (Choice("x"), Choice("y"), False),
        (Choice("x"), Tie(), False),
        (Tie(), Tie(), True),
        (Tie(), BothBad(), False),
        (Rating(3), Rating(3.0), True),
        (Rating(3), Rating(4), False),
        (Ranking((("x", "y"), ("z",))), Ranking((("y", "x"), ("z",))), True),
        (Ranking((("x", "y"), ("z",))), Ranking((("x",), ("y", "z"))), False),
    ],
)
def test_answers_that_say_the_same(answer: Answer, other: Answer, expected: bool) -> None:
    assert agrees(answer, other) == agrees(other, answer) == expected


def test_labels_made_elsewhere_count_as_others_do(store: PreferenceStore, clock: HandClock) -> None:
    first, second = add_pair(store, "x", num_labels=2), add_pair(store, "y")
    shown = store.tasks()[first].plan.responses[::-1]
    made = [
        MadeLabel(first, "a", Choice(shown[1], 2), "1", shown=shown, seconds=2.0, page="file", made_at=START),
        MadeLabel(first, "b", Choice(shown[1]), "2"),
        MadeLabel(second, "a", Skip(), "3"),
    ]
    clock.move(100)
    assert [store.record(made), store.record(made)] == [3, 0]
    labels = store.current_labels()
    assert [(label.token, label.clicked, label.made_at) for label in labels] == [
        ("1", 1, START),
        ("2", None, START + timedelta(seconds=100)),
        ("3", None, START + timedelta(seconds=100)),
    ]
    figures = {found.name: (found.num_choices, found.num_first) for found in store.annotator_figures()}
    assert figures == {"a": (1, 0), "b": (0, 0), "c": (0, 0)}
    assert store.progress()[0].num_missing == 1
    # To decline needs no place.
    assert store.record([MadeLabel(first, "c", Skip(), "no place")]) == 1
    # The order is not known: the canonical one.
    unknown = store.reconstruct(labels[1].id).screen
    assert [store.responses()[key] for key in sorted(shown)] == list(unknown.responses)
    assert store.retract(labels[0].assignment, "a", token="4").supersedes == labels[0].id


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"annotator": "b"}, "no_room"),
        ({"annotator": "a"}, "already_labelled"),
        ({"annotator": "nobody"}, "unknown_annotator"),
        ({"task": "nothing"}, "unknown_task"),
        ({"shown": ("x", "y")}, "invalid_answer"),
        ({"answer": Rating(1)}, "invalid_answer"),
        ({"token": "old"}, "token_reused"),
    ],
)
def test_labels_made_elsewhere_that_do_not_fit(store: PreferenceStore, change: dict[str, str], reason: str) -> None:
    full, free = add_pair(store, "x"), add_pair(store, "y")
    store.record([MadeLabel(full, "a", Tie(), "old")])
    fine = MadeLabel(free, "c", Tie(), "fine")
    wrong = replace(MadeLabel(full, "c", Tie(), "new"), **change)  # type: ignore[arg-type]
    with pytest.raises(RefusedError) as caught:
        store.record([fine, wrong])
    assert caught.value.reason == reason
    assert [label.token for label in store.current_labels()] == ["old"]
