"""Importing what labelling tools export: Label Studio's tasks and Argilla's records."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from rlhf.errors import DataError
from rlhf.preferences.exchange import ImportOptions, ImportReport
from rlhf.preferences.store import BothBad, Choice, Flag, PreferenceStore, Ranking, Rating, Skip, Tie
from tests.unit.preference_files import import_rows, new_store, said

PROMPT, FIRST, SECOND = "Why is the sky blue?", "Scattering.", "Paint."


def pairwise(side: str) -> dict[str, Any]:
    return {"id": "x", "type": "pairwise", "from_name": "pw", "to_name": "a1,a2", "value": {"selected": side}}


def choices(*words: str) -> dict[str, Any]:
    return {"type": "choices", "from_name": "c", "to_name": "prompt", "value": {"choices": list(words)}}


def annotation(by: Any, *results: dict[str, Any], **rest: Any) -> dict[str, Any]:
    return {"id": 7, "completed_by": by, "result": list(results), "was_cancelled": False, "ground_truth": False, **rest}


def studio(*annotations: dict[str, Any], **data: Any) -> dict[str, Any]:
    texts = data or {"prompt": PROMPT, "answer1": FIRST, "answer2": SECOND}
    return {"id": 1, "data": texts, "annotations": list(annotations), "predictions": [], "project": 3}


def load(folder: Path, row: dict[str, Any], **options: Any) -> tuple[PreferenceStore, ImportReport]:
    store = new_store(folder)
    return store, import_rows(store, [row], name="export.json", options=ImportOptions(**options))


def test_pairwise_results_keep_side_time_seconds_and_annotator(tmp_path: Path) -> None:
    row = studio(
        annotation(1, pairwise("left"), lead_time=12.5, created_at="2026-02-03T10:00:00.5Z"),
        annotation({"id": 2, "email": "ben@x.org"}, pairwise("right")),
        annotation(3, pairwise("left"), was_cancelled=True),
    )
    store, report = load(tmp_path, row)
    assert report.format == "label_studio"
    assert said(store) == {(PROMPT, "1", FIRST), (PROMPT, "ben@x.org", SECOND), (PROMPT, "3", "Skip")}
    first, second, cancelled = store.current_labels()
    assert (first.seconds, first.made_at) == (12.5, datetime(2026, 2, 3, 10, 0, 0, 500000, UTC))
    # Left is shown first: one chose the first side, the other the second.
    assert (first.clicked, second.clicked, cancelled.answer) == (0, 1, Skip())
    # A skip fills no place.
    assert next(iter(store.tasks().values())).plan.num_labels == 3


def test_choices_are_answers_flags_or_comments(tmp_path: Path) -> None:
    note = {"type": "textarea", "from_name": "why", "to_name": "prompt", "value": {"text": ["too short"]}}
    row = studio(
        annotation(1, choices("Tie")),
        annotation(2, choices("Both bad")),
        annotation(3, choices("answer2"), note),
        annotation(4, pairwise("left"), choices("unsafe", "funny")),
        annotation(5, choices("PII")),
        annotation(6, choices("Left is better")),
    )
    store, _ = load(tmp_path, row)
    found = {label.annotator: label for label in store.current_labels()}
    assert [found[name].answer for name in "12"] == [Tie(), BothBad()]
    assert (PROMPT, "3", SECOND) in said(store)
    assert (PROMPT, "6", FIRST) in said(store)
    assert found["3"].comment == "too short"
    assert (found["4"].flags, found["4"].comment) == ((Flag("unsafe"),), "funny")
    assert (found["5"].answer, found["5"].flags) == (None, (Flag("personal_data"),))


def test_ratings_of_label_studio_are_tasks_of_their_own(tmp_path: Path) -> None:
    def rating(name: str, value: int) -> dict[str, Any]:
        return {"type": "rating", "from_name": f"r-{name}", "to_name": name, "value": {"rating": value}}

    row = studio(
        annotation(1, pairwise("left"), rating("answer1", 5), rating("answer2", 2)), annotation(2, rating("answer1", 4))
    )
    store, report = load(tmp_path, row)
    kinds = sorted(task.plan.kind for task in store.tasks().values())
    assert kinds == ["pairwise", "rating", "rating"]
    values = sorted(
        (label.annotator, label.answer.value)
        for label in store.current_labels(kinds=["rating"])
        if isinstance(label.answer, Rating)
    )
    assert values == [("1", 2), ("1", 5), ("2", 4)]
    assert report.num_labels == 4
    with pytest.raises(DataError, match="rating_scale=3"):
        import_rows(
            new_store(tmp_path, "three.sqlite"), [row], name="export.json", options=ImportOptions(rating_scale=3)
        )


def test_the_fields_of_a_task_may_be_named(tmp_path: Path) -> None:
    row = studio(annotation(1, pairwise("right")), thing=PROMPT, foo=FIRST, bar=SECOND)
    with pytest.raises(
        DataError, match=r"cannot tell which fields are the responses.*thing, foo, bar.*response_fields="
    ):
        load(tmp_path, row)
    store = new_store(tmp_path, "named.sqlite")
    options = ImportOptions(prompt_field="thing", response_fields=("foo", "bar"))
    import_rows(store, [row], name="export.json", options=options)
    assert said(store) == {(PROMPT, "1", SECOND)}
    with pytest.raises(DataError, match="prompt_field=NAME"):
        import_rows(store, [row], name="export.json", options=ImportOptions(response_fields=("foo", "bar")))
    # The names that a pairwise result gives are taken when the task has them, left first.
    swapped = {**pairwise("left"), "to_name": "bar,foo"}
    own = new_store(tmp_path, "own.sqlite")
    import_rows(own, [studio(annotation(1, swapped), prompt=PROMPT, foo=FIRST, bar=SECOND)], name="export.json")
    assert said(own) == {(PROMPT, "1", SECOND)}


def test_a_task_without_annotations_waits_in_the_queue(tmp_path: Path) -> None:
    store, _ = load(tmp_path, studio())
    assert store.progress()[0].num_waiting == 1


def argilla_one(*responses: dict[str, Any], **fields: str) -> dict[str, Any]:
    texts = fields or {"prompt": PROMPT, "response-1": FIRST, "response-2": SECOND}
    return {"fields": texts, "metadata": {}, "responses": list(responses), "suggestions": [], "external_id": None}


def user(name: str, status: str = "submitted", **values: Any) -> dict[str, Any]:
    return {
        "user_id": name,
        "status": status,
        "values": {key.replace("_", "-"): {"value": value} for key, value in values.items()},
    }


def test_argilla_version_1_labels_rankings_and_statuses(tmp_path: Path) -> None:
    ranked = [{"rank": 1, "value": "response-2"}, {"rank": 2, "value": "response-1"}]
    equal = [{"rank": 1, "value": "response-2"}, {"rank": 1, "value": "response-1"}]
    row = argilla_one(
        user("u1", preference=ranked),
        user("u2", preference=equal, why="cannot tell"),
        user("u3", choice="response-1"),
        user("u4", "discarded", choice="response-1"),
        user("u5", "draft", choice="response-1"),
    )
    store, report = load(tmp_path, row)
    assert report.format == "argilla"
    assert said(store) == {
        (PROMPT, "u1", SECOND),
        (PROMPT, "u2", "tie"),
        (PROMPT, "u3", FIRST),
        (PROMPT, "u4", "Skip"),
    }
    assert dict(report.notes) == {"a draft was left out": 1}
    assert {label.comment for label in store.current_labels()} == {"", "why: cannot tell"}


def test_argilla_version_2_has_responses_by_question(tmp_path: Path) -> None:
    row = {
        "id": "r1",
        "fields": {"instruction": PROMPT, "answer_a": FIRST, "answer_b": SECOND},
        "responses": {
            "preference": [
                {"user_id": "u1", "value": ["answer_b", "answer_a"], "status": "submitted"},
                {"user_id": "u2", "value": ["answer_a", "answer_b"]},
            ],
            "answer_a-rating": [{"user_id": "u1", "value": 4}],
        },
        "suggestions": {},
        "vectors": {},
    }
    store, _ = load(tmp_path, row)
    pairs = {(label.annotator, type(label.answer)) for label in store.current_labels()}
    assert pairs == {("u1", Choice), ("u1", Rating), ("u2", Choice)}
    assert {(PROMPT, "u1", SECOND), (PROMPT, "u2", FIRST)} <= said(store)


def test_rankings_of_four_are_rankings_and_of_three_all_pairs(tmp_path: Path) -> None:
    four = {"prompt": PROMPT, **{f"response-{number}": f"text {number}" for number in range(1, 5)}}
    order = [{"rank": rank, "value": f"response-{number}"} for number, rank in ((3, 1), (1, 2), (4, 2), (2, 3))]
    store, _ = load(tmp_path, argilla_one(user("u1", rank=order), **four))
    (label,) = store.current_labels()
    assert isinstance(label.answer, Ranking)
    texts = store.responses()
    assert [sorted(texts[one].text for one in tier) for tier in label.answer.tiers] == [
        ["text 3"],
        ["text 1", "text 4"],
        ["text 2"],
    ]
    three = {name: text for name, text in four.items() if name != "response-4"}
    pairs = new_store(tmp_path, "pairs.sqlite")
    shown = [{"rank": rank, "value": f"response-{number}"} for number, rank in ((2, 1), (3, 2), (1, 3))]
    import_rows(pairs, [argilla_one(user("u1", rank=shown), **three)])
    chosen = sorted(text for _, _, text in [(p, a, t) for p, a, t in said(pairs)])
    assert len(pairs.tasks()) == 3
    assert len(pairs.current_labels()) == 3
    assert chosen == ["text 2", "text 3"]
    incomplete = argilla_one(user("u1", rank=order[:3]), **four)
    with pytest.raises(DataError, match="names each of the 4 responses"):
        import_rows(pairs, [incomplete])


def test_tool_exports_are_imported_once(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    rows = [studio(annotation(1, pairwise("left")), annotation(1, pairwise("right")))]
    assert import_rows(store, rows, name="export.json").num_new_labels == 2
    assert import_rows(store, rows, name="again.json").num_new_labels == 0
    # The same annotator twice is a blind repeat.
    assert store.annotator_figures()[0].num_repeats == 1


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (studio(annotation(1, {"type": "pairwise", "value": {"selected": "up"}})), "selects left or right"),
        (studio(annotation(1, {"type": "pairwise"})), "an object with type and value"),
        ({**studio(), "annotations": ["x"]}, "JSON_MIN"),
        (argilla_one({"user_id": "u", "status": "lost", "values": {}}), "status of a response"),
        (argilla_one({"user_id": "u", "values": []}), "no field"),
        ({"fields": {"prompt": "p", "text": "q"}, "responses": []}, "cannot tell which fields"),
    ],
)
def test_what_makes_no_sense_is_said(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    if reason == "no field":
        row["responses"][0]["values"] = ["x"]
        reason = "an object by question"
    with pytest.raises(DataError, match=reason):
        load(tmp_path, row)
