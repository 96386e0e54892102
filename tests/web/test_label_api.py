"""The labelling page's server as a browser meets it: over HTTP, from uvicorn in a thread."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from rlhf.preferences.page import progress as progress_module
from rlhf.preferences.page.desk import DeskSettings
from rlhf.preferences.page.progress import Progress, per_hour
from rlhf.preferences.store import Annotator, Choice, Label, PreferenceStore, Skip, Totals
from tests.unit.preference_store_example import START, HandClock
from tests.web.label_example import (
    IMPOSSIBLE_ANSWERS,
    IMPOSSIBLE_FIELDS,
    NO_BODIES,
    RANKED,
    RunningPage,
    add_pairs,
    add_task,
    fill,
    running_page,
)

LEASE = 60.0


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
def store(tmp_path: Path, clock: HandClock) -> Iterator[PreferenceStore]:
    with PreferenceStore.create(tmp_path / "store.sqlite", seed=1, clock=clock) as made:
        yield made


@pytest.fixture
def page(store: PreferenceStore) -> Iterator[RunningPage]:
    settings = DeskSettings(lease_seconds=LEASE, repeat_gap=1, instructions="# Be *kind*", page="rlhf label test")
    with running_page(store, settings) as running:
        yield running


def post(client: httpx.Client, path: str, body: Any = None, *, status: int = 200) -> dict[str, Any]:
    """The body of the reply, which has the status expected."""
    reply = client.post(path, json={} if body is None else body)
    assert reply.status_code == status, (reply.status_code, reply.text)
    made: dict[str, Any] = reply.json()
    return made


def next_task(client: httpx.Client) -> dict[str, Any]:
    """The next task, which there must be."""
    given = post(client, "/api/next")
    assert given["state"] == "task"
    task: dict[str, Any] = given["task"]
    return task


def submit(client: httpx.Client, task: dict[str, Any], answer: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """Submits an answer to a task under a token made of its assignment, unless another is given."""
    token = f"token-of-{task['assignment']}"
    status = fields.pop("status", 200)
    body = {"assignment": task["assignment"], "token": token, "answer": answer, **fields}
    return post(client, "/api/submit", body, status=status)


CHOICE = {"kind": "choice", "position": 1, "strength": 3}


def only_label(store: PreferenceStore) -> Label:
    (label,) = store.current_labels()
    return label


def test_a_choice_is_stored_with_what_was_on_the_screen(
    store: PreferenceStore, page: RunningPage, clock: HandClock
) -> None:
    add_task(store, "Which?", ("left text", "right text"))
    anna = page.client("anna")
    task = next_task(anna)
    assert task == {
        "assignment": 1,
        "given": START.isoformat(),
        "kind": "pairwise",
        "prompt": {"text": "Which?"},
        "responses": task["responses"],
        "scale": None,
        "strengths": 3,
        "lease_seconds": LEASE,
        "previous": None,
        "number": 1,
    }
    assert sorted(response["text"] for response in task["responses"]) == ["left text", "right text"]
    clock.move(7)
    flags = [{"kind": "unsafe", "position": 0}, {"kind": "broken"}]
    made = submit(anna, task, CHOICE, flags=flags, comment="so", seconds=5.5)
    assert (made["label"], made["undo"]) == (1, True)
    found = store.reconstruct(1)
    shown = [response.text for response in found.screen.responses]
    assert shown == [response["text"] for response in task["responses"]]
    assert found.screen.instructions == "# Be *kind*"
    assert found.screen.assignment.page == "rlhf label test"
    label = found.label
    assert label.answer == Choice(label.shown[1], 3)
    assert {(flag.kind, flag.response) for flag in label.flags} == {("unsafe", label.shown[0]), ("broken", None)}
    assert (label.comment, label.seconds, label.annotator) == ("so", 5.5, "anna")


def test_seconds_are_at_most_those_since_the_task_was_given(
    store: PreferenceStore, page: RunningPage, clock: HandClock
) -> None:
    add_pairs(store, 4)
    anna = page.client("anna")
    for claimed, kept in ((5.0, 5.0), (900.0, 7.0), (0, 0.0), (None, None)):
        task = next_task(anna)
        clock.move(7)
        submit(anna, task, CHOICE, seconds=claimed)
        assert store.current_labels()[-1].seconds == kept


def test_answers_without_fields(store: PreferenceStore, page: RunningPage) -> None:
    add_pairs(store, 3)
    anna = page.client("anna")
    for kind in ("tie", "both_bad", "skip"):
        submit(anna, next_task(anna), {"kind": kind})
        assert store.current_labels()[-1].kind == kind


def test_a_ranking_with_a_shared_tier_and_a_rating(store: PreferenceStore, page: RunningPage) -> None:
    ranked = add_task(store, *RANKED, kind="ranking")
    add_task(store, "Rate", ("text",), kind="rating", scale=7)
    anna = page.client("anna")
    tiers = [[2], [0, 1], [3]]
    for _ in range(2):
        task = next_task(anna)
        if task["kind"] == "ranking":
            submit(anna, task, {"kind": "ranking", "tiers": tiers})
        else:
            assert task["scale"] == 7
            submit(anna, task, {"kind": "rating", "ratings": [6]})
    (ranking,) = store.current_labels(kinds=["ranking"])
    assert ranking.task == ranked
    assert vars(ranking.answer) == {
        "tiers": tuple(tuple(ranking.shown[position] for position in tier) for tier in tiers)
    }
    (rating,) = store.current_labels(kinds=["rating"])
    assert vars(rating.answer) == {"value": 6}
    undone = post(anna, "/api/undo")["task"]["previous"]
    assert undone["kind"] in ("ranking", "rating")
    earlier = post(anna, "/api/undo")["task"]["previous"]
    by_kind = {one["kind"]: one for one in (undone, earlier)}
    assert by_kind["ranking"]["tiers"] == tiers
    assert by_kind["rating"]["ratings"] == [6]


def test_flags_alone(store: PreferenceStore, page: RunningPage) -> None:
    add_pairs(store, 1)
    anna, ben = page.client("anna"), page.client("ben")
    task = next_task(anna)
    refused = submit(anna, task, {"kind": "flag_only"}, status=422)
    assert refused["reason"] == "invalid_answer"
    submit(anna, task, {"kind": "flag_only"}, flags=[{"kind": "personal_data", "position": 1}])
    label = only_label(store)
    assert (label.kind, label.answer) == ("flag", None)
    # Flags fill no place: somebody else is asked.
    assert next_task(ben)["assignment"] != task["assignment"]


def test_impossible_submissions_leave_no_label(store: PreferenceStore, page: RunningPage) -> None:
    (task_id,) = add_pairs(store, 1)
    anna = page.client("anna")
    good = {"assignment": next_task(anna)["assignment"], "token": "abcdefgh", "answer": {"kind": "tie"}}
    for change in [*({"answer": answer} for answer in IMPOSSIBLE_ANSWERS), *IMPOSSIBLE_FIELDS]:
        # Half a surrogate pair can be written in JSON, and by json alone.
        content = json.dumps({**good, **change})
        reply = anna.post("/api/submit", content=content, headers={"content-type": "application/json"})
        assert reply.status_code == 422, (change, reply.text)
        assert reply.json()["reason"] in ("invalid_body", "invalid_answer")
        assert not any(response in reply.text for response in store.tasks()[task_id].plan.responses)
    assert store.history(task_id) == []
    post(anna, "/api/submit", good)


def test_what_is_no_body_is_refused(page: RunningPage) -> None:
    anna = page.client("anna")
    for path in ("/api/next", "/api/submit", "/api/undo", "/api/extend", "/api/annotator"):
        for content in NO_BODIES:
            reply = anna.post(path, content=content, headers={"content-type": "application/json"})
            assert reply.status_code == 422, (path, content[:9], reply.status_code, reply.text)
            assert reply.json()["reason"] == "invalid_body"


def test_a_retried_submission_makes_one_label(store: PreferenceStore, page: RunningPage) -> None:
    add_pairs(store, 2)
    anna = page.client("anna")
    task = next_task(anna)
    first = submit(anna, task, CHOICE, seconds=1)
    assert submit(anna, task, CHOICE, seconds=2)["label"] == first["label"]
    assert submit(anna, task, {"kind": "tie"}, status=409)["reason"] == "token_reused"
    corrected = submit(anna, task, {"kind": "tie"}, token="another-token")
    assert corrected["label"] != first["label"]
    label = only_label(store)
    assert (label.kind, label.version) == ("tie", 2)


def test_reloading_gives_the_same_task_with_the_full_time(
    store: PreferenceStore, page: RunningPage, clock: HandClock
) -> None:
    add_pairs(store, 3)
    anna = page.client("anna")
    task = next_task(anna)
    clock.move(LEASE - 1)
    assert next_task(anna) == task
    (held,) = store.held("anna")
    assert held.lease_ends == START + timedelta(seconds=2 * LEASE - 1)


@pytest.mark.usefixtures("exact_progress")
def test_two_annotators_get_different_tasks_until_nothing_is_left(store: PreferenceStore, page: RunningPage) -> None:
    add_pairs(store, 2)
    anna, ben = page.client("anna"), page.client("ben")
    first, second = next_task(anna), next_task(ben)
    assert first["prompt"] != second["prompt"]
    submit(anna, first, CHOICE)
    waiting = post(anna, "/api/next")
    assert (waiting["task"], waiting["state"]) == (None, "others")
    submit(ben, second, CHOICE)
    assert post(anna, "/api/next")["state"] == "finished"
    assert waiting["progress"]["remaining"] == 0
    assert post(ben, "/api/next")["progress"]["done"] == 2


def test_an_abandoned_task_goes_to_others_and_the_late_answer_is_refused(
    store: PreferenceStore, page: RunningPage, clock: HandClock
) -> None:
    add_pairs(store, 1)
    anna, ben = page.client("anna"), page.client("ben")
    task = next_task(anna)
    clock.move(LEASE)
    submit(ben, next_task(ben), CHOICE)
    refused = submit(anna, task, CHOICE, status=409)
    assert refused["reason"] == "no_room"
    assert "went to others" in refused["error"]
    assert post(anna, "/api/extend", {"assignment": task["assignment"]}, status=409)["reason"] == "no_room"
    assert only_label(store).annotator == "ben"


def test_a_late_answer_counts_while_the_place_is_free(
    store: PreferenceStore, page: RunningPage, clock: HandClock
) -> None:
    add_pairs(store, 1)
    anna = page.client("anna")
    task = next_task(anna)
    clock.move(10 * LEASE)
    submit(anna, task, CHOICE)
    assert only_label(store).annotator == "anna"


def test_extending_keeps_a_task_and_releasing_gives_it_back(
    store: PreferenceStore, page: RunningPage, clock: HandClock
) -> None:
    add_pairs(store, 1)
    anna, ben = page.client("anna"), page.client("ben")
    lease = {"assignment": next_task(anna)["assignment"]}
    clock.move(LEASE - 1)
    assert post(anna, "/api/extend", lease) == {"lease_seconds": LEASE}
    clock.move(LEASE - 1)
    assert post(ben, "/api/next")["state"] == "others"
    assert post(ben, "/api/release", lease, status=409)["reason"] == "unknown_assignment"
    assert post(anna, "/api/release", lease) == {}
    assert next_task(ben)["number"] == 1


def test_undo_goes_back_step_by_step_and_keeps_every_version(store: PreferenceStore, page: RunningPage) -> None:
    add_pairs(store, 3)
    anna = page.client("anna")
    first = next_task(anna)
    submit(anna, first, CHOICE, comment="why", flags=[{"kind": "broken", "position": 0}])
    second = next_task(anna)
    submit(anna, second, {"kind": "tie"})
    third = next_task(anna)
    undone = post(anna, "/api/undo")
    tie = {"kind": "tie", "flags": [], "comment": ""}
    assert undone["task"] == {**second, "previous": tie, "number": 2}
    assert undone["progress"]["labelled"] == 1
    again = post(anna, "/api/undo")["task"]
    choice = {**CHOICE, "flags": [{"kind": "broken", "position": 0}], "comment": "why"}
    assert again == {**first, "previous": choice, "number": 1}
    assert post(anna, "/api/undo", status=409)["reason"] == "nothing_to_retract"
    # A reload shows what was taken back; then come the others that are held.
    assert next_task(anna) == again
    submit(anna, again, CHOICE, token="once-more")
    assert next_task(anna)["previous"] == tie
    submit(anna, second, {"kind": "both_bad"}, token="once-more-2")
    assert next_task(anna) == third
    kinds = [label.kind for task in store.tasks() for label in store.history(task)]
    assert sorted(kinds) == ["both_bad", "choice", "choice", "retract", "retract", "tie"]
    assert len(store.current_labels()) == 2


def test_a_retried_undo_goes_back_once(store: PreferenceStore, page: RunningPage) -> None:
    add_pairs(store, 2)
    anna = page.client("anna")
    for _ in range(2):
        submit(anna, next_task(anna), CHOICE)
    undone = post(anna, "/api/undo", {"token": "undo-token"})
    assert post(anna, "/api/undo", {"token": "undo-token"}) == undone
    assert len(store.current_labels()) == 1
    ben = page.client("ben")
    assert post(ben, "/api/undo", {"token": "undo-token"}, status=409)["reason"] == "token_reused"


def test_nobody_undoes_the_labels_of_others_or_of_another_program(store: PreferenceStore, page: RunningPage) -> None:
    add_pairs(store, 1, num_labels=2)
    store.add_annotator(Annotator("anna", "human"))
    assignment = store.next_assignment("anna", lease_seconds=60, page="another program")
    assert assignment is not None
    store.submit(assignment.id, "anna", Skip(), token="elsewhere")
    for name in ("anna", "ben"):
        assert post(page.client(name), "/api/undo", status=409)["reason"] == "nothing_to_retract"
    assert len(store.current_labels()) == 1


def test_a_skip_that_others_made_up_for_cannot_be_answered_any_more(store: PreferenceStore, page: RunningPage) -> None:
    add_pairs(store, 1)
    anna, ben = page.client("anna"), page.client("ben")
    submit(anna, next_task(anna), {"kind": "skip"})
    submit(ben, next_task(ben), CHOICE)
    assert post(anna, "/api/undo", status=409)["reason"] == "no_room"
    assert [label.annotator for label in store.current_labels()] == ["ben"]


def test_tasks_say_nothing_but_what_is_to_be_judged(store: PreferenceStore, page: RunningPage) -> None:
    fill(store)
    anna = page.client("anna")
    seen = []
    while (given := post(anna, "/api/next"))["task"] is not None:
        task = given["task"]
        seen.append(task)
        answers: dict[str, dict[str, Any]] = {
            "pairwise": CHOICE,
            "ranking": {"kind": "ranking", "tiers": [[0], [1], [2], [3]]},
            "rating": {"kind": "rating", "ratings": [1]},
        }
        submit(anna, task, answers[task["kind"]])
    assert len(seen) == 10
    keys = {
        "assignment", "given", "kind", "prompt", "responses", "scale", "strengths", "lease_seconds", "previous",
        "number",
    }  # fmt: skip
    assert all(set(task) == keys for task in seen)
    assert all(set(response) == {"text"} for task in seen for response in task["responses"])
    told = json.dumps(seen)
    hidden = [*store.responses(), *store.prompts(), *store.tasks(), "secret"]
    assert [one for one in hidden if one in told] == []
    # The blind repeat looks like the original and comes with sides of its own.
    assert sum(task["prompt"] == {"text": "Name a colour."} for task in seen) == 2
    chats = [task["prompt"]["messages"] for task in seen if "messages" in task["prompt"]]
    assert [message["role"] for message in chats[0]] == ["system", "user", "assistant", "user"]


@pytest.mark.usefixtures("exact_progress")
def test_progress_and_pace(store: PreferenceStore, page: RunningPage, clock: HandClock) -> None:
    add_pairs(store, 4, num_labels=2)
    anna = page.client("anna")
    empty = {"wanted": 8, "done": 0, "labelled": 0, "labelled_today": 0}
    assert anna.get("/api/me").json()["progress"] == {
        **empty, "remaining": 4, "per_hour": None, "median_seconds": None
    }  # fmt: skip
    for seconds in (10, 20, 30):
        task = next_task(anna)
        clock.move(seconds)
        progress = submit(anna, task, CHOICE, seconds=seconds)["progress"]
    # Three labels, with 20 and 30 seconds between them: two in 50 seconds.
    assert progress == {
        "wanted": 8, "done": 3, "labelled": 3, "labelled_today": 3, "remaining": 1,
        "per_hour": 144.0, "median_seconds": 20.0,
    }  # fmt: skip
    clock.move(86400)
    later = post(anna, "/api/next")["progress"]
    assert (later["labelled"], later["labelled_today"], later["remaining"]) == (3, 0, 1)


def test_what_costs_the_processor_is_not_counted_for_every_request(
    store: PreferenceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    cheap = 0.02
    counted: list[str] = []

    def count(annotator: str, totals: Totals) -> int:
        counted.append(annotator)
        if annotator == "works":
            end = time.thread_time() + 2 * cheap
            while time.thread_time() < end:
                pass
        else:
            time.sleep(2 * cheap)
        return len(counted)

    monkeypatch.setattr(store, "num_open_for", count)
    monkeypatch.setattr(progress_module, "_CHEAP_SECONDS", cheap)
    # What is kept is kept for an hour at least.
    monkeypatch.setattr(progress_module, "_SHARE", cheap / 3600)
    shown = Progress(store)
    for name in ("works", "works", "waits", "waits"):
        shown.of(name)
    assert counted == ["works", "waits", "waits"]


def test_a_break_is_no_part_of_the_pace() -> None:
    minutes = [START + timedelta(minutes=minute) for minute in (0, 1, 2, 62, 63)]
    assert per_hour(minutes) == 60.0
    assert per_hour(minutes[:1]) is None
