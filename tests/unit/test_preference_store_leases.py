"""Who gets which task of a preference store: places, leases that end, priorities, blind repeats."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from rlhf.preferences.store import (
    Annotator,
    Choice,
    Flag,
    PreferenceStore,
    RefusalReason,
    RefusedError,
    Skip,
    TaskPlan,
    Tie,
)
from tests.unit.preference_store_example import HandClock, add_pair, add_responses, answer_next, lease, make_store


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
def store(tmp_path: Path, clock: HandClock) -> PreferenceStore:
    return make_store(tmp_path, clock)


def refused(call: Callable[[], object]) -> RefusalReason:
    """Why a call is refused, which it must be."""
    with pytest.raises(RefusedError) as caught:
        call()
    return caught.value.reason


def asked(store: PreferenceStore, annotator: str) -> str | None:
    """The id of the task that an annotator is given, which they keep."""
    assignment = store.next_assignment(annotator, lease_seconds=60.0)
    return None if assignment is None else assignment.task


def test_a_task_has_as_many_places_as_it_wants_labels(store: PreferenceStore) -> None:
    task = add_pair(store, num_labels=2)
    assert [asked(store, name) for name in "aabc"] == [task, None, task, None]


def test_a_label_keeps_its_place(store: PreferenceStore, clock: HandClock) -> None:
    add_pair(store)
    assert answer_next(store, "a") is not None
    clock.move(1e6)
    assert [asked(store, name) for name in "ab"] == [None, None]


def test_an_abandoned_lease_comes_back_when_it_ends(store: PreferenceStore, clock: HandClock) -> None:
    task = add_pair(store)
    assert asked(store, "a") == task
    clock.move(59.999)
    assert asked(store, "b") is None
    clock.move(0.001)
    assert asked(store, "b") == task
    assert [found.state for found in store.assignments(task)] == ["lapsed", "leased"]


def test_an_annotator_may_get_their_own_abandoned_task_again(store: PreferenceStore, clock: HandClock) -> None:
    task = add_pair(store)
    first = lease(store, "a")
    clock.move(60)
    second = lease(store, "a")
    assert [found.id for found in store.assignments(task)] == [first, second]
    assert refused(lambda: store.submit(first, "a", Tie(), token="late")) == "asked_again"
    store.submit(second, "a", Tie(), token="second")
    assert len(store.current_labels()) == 1


def test_a_late_answer_is_taken_while_there_is_room(store: PreferenceStore, clock: HandClock) -> None:
    add_pair(store)
    assignment = lease(store, "a")
    clock.move(1000)
    store.submit(assignment, "a", Tie(), token="late")
    assert store.progress()[0].num_done == 1
    assert asked(store, "b") is None


@pytest.mark.parametrize("labelled", [False, True])
def test_a_late_answer_is_refused_when_another_has_the_place(
    store: PreferenceStore, clock: HandClock, labelled: bool
) -> None:
    task = add_pair(store)
    late = lease(store, "a")
    clock.move(60)
    other = lease(store, "b")
    if labelled:
        store.submit(other, "b", Tie(), token="b")
    assert refused(lambda: store.submit(late, "a", Tie(), token="late")) == "no_room"
    assert [label.annotator for label in store.history(task)] == (["b"] if labelled else [])
    # To decline needs no place.
    assert store.submit(late, "a", Skip(), token="skip").kind == "skip"


def test_a_clock_that_goes_back_gives_no_place_twice(store: PreferenceStore, clock: HandClock) -> None:
    add_pair(store)
    late = lease(store, "a")
    clock.move(60)
    lease(store, "b")
    clock.move(-60)
    assert refused(lambda: store.submit(late, "a", Tie(), token="late")) == "no_room"


def test_release_gives_back_at_once(store: PreferenceStore) -> None:
    task = add_pair(store)
    assignment = lease(store, "a")
    assert refused(lambda: store.release(assignment, "b")) == "other_annotator"
    store.release(assignment, "a")
    store.release(assignment, "a")
    assert asked(store, "b") == task
    assert refused(lambda: store.extend_lease(assignment, "a", lease_seconds=60)) == "no_room"


def test_an_extended_lease_ends_later(store: PreferenceStore, clock: HandClock) -> None:
    add_pair(store)
    assignment = lease(store, "a")
    clock.move(50)
    extended = store.extend_lease(assignment, "a", lease_seconds=60)
    assert (extended.lease_ends - extended.leased_at).total_seconds() == 110
    # A shorter one takes nothing away.
    assert store.extend_lease(assignment, "a", lease_seconds=1) == extended
    clock.move(59)
    assert asked(store, "b") is None
    clock.move(1)
    assert store.held("a") == []
    # Nobody took it meanwhile.
    assert store.extend_lease(assignment, "a", lease_seconds=5).state == "leased"
    assert [found.id for found in store.held("a")] == [assignment]


def test_what_is_held_is_shown_again(store: PreferenceStore) -> None:
    for question in "xyz":
        add_pair(store, question)
    ids = [lease(store, "a"), lease(store, "a")]
    lease(store, "b")
    store.submit(ids[0], "a", Tie(), token="1")
    assert [found.id for found in store.held("a")] == ids[1:]


def test_who_declined_is_not_asked_again_and_others_are(store: PreferenceStore) -> None:
    task = add_pair(store)
    store.submit(lease(store, "a"), "a", Skip(), token="a")
    assert asked(store, "a") is None
    store.submit(lease(store, "b"), "b", None, token="b", flags=[Flag("unsafe")])
    assert asked(store, "b") is None
    assert asked(store, "c") == task


def test_the_highest_priority_comes_first(store: PreferenceStore) -> None:
    tasks = {priority: add_pair(store, f"q{priority}", priority=priority) for priority in (1.0, -2.0, 7.5, 3.0)}
    assert [asked(store, "a") for _ in range(4)] == [tasks[priority] for priority in (7.5, 3.0, 1.0, -2.0)]


def test_a_new_plan_changes_priority_and_closes(store: PreferenceStore) -> None:
    first, second = add_pair(store, "x", priority=1.0), add_pair(store, "y")
    store.replan([second], priority=2.0)
    assert asked(store, "a") == second
    store.replan([first], num_labels=0)
    assert asked(store, "a") is None
    # Adding it again does not open it.
    assert add_pair(store, "x", priority=1.0) == first
    assert asked(store, "a") is None
    store.replan([first], num_labels=1)
    assert asked(store, "a") == first


def test_ties_of_priority_are_broken_at_random_and_the_same_way_for_a_seed(tmp_path: Path) -> None:
    orders = []
    for number, seed in enumerate((1, 1, 2)):
        folder = tmp_path / str(number)
        folder.mkdir()
        store = make_store(folder, seed=seed)
        responses = add_responses(store, "q", 11)
        plans = [TaskPlan("pairwise", (responses[0], other)) for other in responses[1:]]
        added = store.add_tasks(plans if number != 1 else plans[::-1])
        orders.append([asked(store, "a") for _ in range(10)])
        assert sorted(filter(None, orders[-1])) == sorted(added)
    assert orders[0] == orders[1] != orders[2]
    assert orders[0] != sorted(filter(None, orders[0]))


def test_each_response_is_shown_first_about_equally_often(store: PreferenceStore) -> None:
    first: Counter[int] = Counter()
    num_alike = 0
    for number in range(60):
        task = add_pair(store, f"q{number}", num_labels=3)
        canonical = store.tasks([task])[task].plan.responses
        sides = []
        for name in "abc":
            assignment = store.next_assignment(name, lease_seconds=60)
            assert assignment is not None
            assert sorted(assignment.shown) == list(canonical)
            sides.append(canonical.index(assignment.shown[0]))
        first.update(sides)
        num_alike += len({*sides}) == 1
    # 180 fair coins: 4 standard deviations are 27.
    assert abs(first[0] - 90) < 27
    # Three coins are alike with probability 1/4: 15 of 60, and 4 standard deviations are 13.4.
    assert abs(num_alike - 15) < 13.4


def test_a_task_for_one_kind_of_annotator(store: PreferenceStore) -> None:
    store.add_annotator(Annotator("judge", "judge", {"model": "small"}))
    responses = add_responses(store, "q", 2)
    (task,) = store.add_tasks([TaskPlan("pairwise", responses, audience="judge")])
    assert asked(store, "a") is None
    assert asked(store, "judge") == task


def test_a_blind_repeat_goes_to_those_who_answered_and_after_a_gap(store: PreferenceStore) -> None:
    original = add_pair(store, "x", priority=9.0)
    others = [add_pair(store, f"q{number}", num_labels=2) for number in range(4)]
    plan = replace(store.tasks([original])[original].plan, num_labels=2, priority=5.0, repeat_of=original)
    (repeat,) = store.add_tasks([plan])
    assert repeat != original

    def give(name: str, gap: int) -> str:
        assignment = store.next_assignment(name, lease_seconds=60, repeat_gap=gap)
        assert assignment is not None
        store.submit(assignment.id, name, Tie(), token=str(assignment.id))
        return assignment.task

    given = [give("a", 2) for _ in range(4)]
    assert given[0] == original
    assert set(given[1:3]) <= set(others)
    assert given[3] == repeat
    # Somebody who did not answer the original never gets it.
    assert {give("b", 0) for _ in range(4)} == set(others)
    assert asked(store, "b") is None


def test_a_blind_repeat_comes_early_when_nothing_else_is_left(store: PreferenceStore) -> None:
    original = add_pair(store)
    (repeat,) = store.add_tasks([replace(store.tasks()[original].plan, repeat_of=original)])
    assert asked(store, "a") == original
    assert asked(store, "a") is None
    store.submit(store.held("a")[0].id, "a", Tie(), token="1")
    assert asked(store, "a") == repeat


def test_after_an_undo_the_annotator_holds_the_task(store: PreferenceStore) -> None:
    task = add_pair(store)
    assignment = store.next_assignment("a", lease_seconds=60)
    assert assignment is not None
    store.submit(assignment.id, "a", Choice(assignment.shown[0]), token="1")
    store.retract(assignment.id, "a", token="2", lease_seconds=60)
    assert store.current_labels() == []
    assert asked(store, "b") is None
    again = store.submit(assignment.id, "a", Choice(assignment.shown[1]), token="3")
    assert (again.version, again.clicked) == (3, 1)
    assert [label.id for label in store.current_labels()] == [again.id]
    assert [label.kind for label in store.history(task)] == ["choice", "retract", "choice"]


def test_after_an_undo_without_a_lease_the_place_is_free(store: PreferenceStore) -> None:
    task = add_pair(store)
    assignment = lease(store, "a")
    store.submit(assignment, "a", Tie(), token="1")
    store.retract(assignment, "a", token="2")
    assert refused(lambda: store.retract(assignment, "a", token="3")) == "nothing_to_retract"
    assert asked(store, "b") == task
    assert refused(lambda: store.submit(assignment, "a", Tie(), token="4")) == "no_room"


def test_an_undone_skip_takes_no_place_that_is_gone(store: PreferenceStore) -> None:
    add_pair(store)
    assignment = lease(store, "a")
    store.submit(assignment, "a", Skip(), token="1")
    assert answer_next(store, "b") is not None
    assert refused(lambda: store.submit(assignment, "a", Tie(), token="2")) == "no_room"
    store.retract(assignment, "a", token="3", lease_seconds=60)
    assert store.held("a") == []
    assert asked(store, "c") is None


def test_unknown_annotators_and_assignments_are_refused(store: PreferenceStore) -> None:
    assert refused(lambda: store.next_assignment("nobody", lease_seconds=60)) == "unknown_annotator"
    assert refused(lambda: store.submit(99, "a", Tie(), token="1")) == "unknown_assignment"
    with pytest.raises(ValueError, match="positive number of seconds"):
        store.next_assignment("a", lease_seconds=0)
