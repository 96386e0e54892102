"""What goes wrong around the labelling page: stores that were replaced, files of another kind, numbers that tell."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import expect

from rlhf.errors import DataError
from rlhf.preferences.page import admin as admin_module
from rlhf.preferences.page import command as label_command
from rlhf.preferences.page.admin import Admin
from rlhf.preferences.page.command import opened, run_label
from rlhf.preferences.page.desk import DeskSettings
from rlhf.preferences.store import PreferenceStore, TaskPlan
from tests.web.conftest import Sit, needs_chromium
from tests.web.label_example import add_pairs, running_page
from tests.web.test_label_api import CHOICE, next_task, post, submit
from tests.web.test_label_server import NoServer


@pytest.fixture
def store(tmp_path: Path) -> Iterator[PreferenceStore]:
    with PreferenceStore.create(tmp_path / "store.sqlite", seed=1) as made:
        yield made


def test_a_store_that_was_made_anew_knows_who_comes_back(tmp_path: Path) -> None:
    """The links and the cookies stay, so that the browser goes on under a name that the new file does not have."""
    path = tmp_path / "store.sqlite"
    with PreferenceStore.create(path, seed=1) as store, running_page(store) as page:
        cookies = page.client("anna").cookies
    for left in tmp_path.glob("store.sqlite*"):
        if left.suffix != ".tokens":
            left.unlink()
    with PreferenceStore.create(path, seed=1) as store, running_page(store) as page:
        add_pairs(store, 1)
        anna = page.client()
        anna.cookies = cookies
        assert anna.get("/api/me").json()["annotator"] == "anna"
        next_task(anna)


def test_an_answer_kept_in_a_tab_is_not_taken_for_another_store_s(tmp_path: Path) -> None:
    kept: dict[str, Any] = {}
    for name in ("first", "second"):
        with PreferenceStore.create(tmp_path / f"{name}.sqlite", seed=1) as store, running_page(store) as page:
            add_pairs(store, 1)
            anna = page.client("anna")
            task = next_task(anna)
            kept = kept or task
            assert task["assignment"] == kept["assignment"]
            if name == "second":
                answer = submit(anna, kept, CHOICE, given=kept["given"], status=409)
                assert answer["reason"] == "unknown_assignment"
                assert store.current_labels() == []
            submit(anna, task, CHOICE, given=task["given"])


@needs_chromium
def test_a_draft_of_another_store_is_not_filled_in(store: PreferenceStore, sit: Sit) -> None:
    add_pairs(store, 1)
    with running_page(store) as page:
        seat = sit(page, "anna")
        seat.number(1)
        seat.press("1")
        expect(seat.page.locator("#submit")).to_be_enabled()
        seat.context.add_init_script("""
            const draft = JSON.parse(sessionStorage.getItem("rlhf-draft"));
            sessionStorage.setItem("rlhf-draft", JSON.stringify({ ...draft, given: "at another time" }));
        """)
        seat.page.reload()
        seat.number(1)
        expect(seat.page.locator("#submit")).to_be_disabled()


@needs_chromium
def test_the_file_that_opens_the_browser_leads_in(
    store: PreferenceStore, tmp_path: Path, sit: Sit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("webbrowser.open", lambda address: None)
    with running_page(store) as page, opened(store.path, page.link()):
        seat = sit(page, link=(tmp_path / "store.sqlite.open.html").as_uri())
        seat.allowed = ("request: file:",)
        seat.page.wait_for_url(f"{page.url}/")
        seat.page.get_by_label("Your name").fill("anna")
        seat.press("Enter")
        seat.message("All done")
        expect(seat.page.locator("#message p")).to_contain_text("There is nothing to label")


@pytest.mark.usefixtures("exact_progress")
def test_what_is_left_does_not_tell_which_tasks_are_repeated(store: PreferenceStore) -> None:
    """The number falls by one with every label, whether the task has a blind repeat, or is one."""
    tasks = add_pairs(store, 4)
    plans = [store.tasks([task])[task].plan for task in tasks[:2]]
    repeats = [
        TaskPlan("pairwise", plan.responses, repeat_of=task) for plan, task in zip(plans, tasks[:2], strict=True)
    ]
    store.add_tasks(repeats)
    with running_page(store, DeskSettings(repeat_gap=2)) as page:
        anna = page.client("anna")
        assert anna.get("/api/me").json()["progress"]["remaining"] == 6
        left = [submit(anna, next_task(anna), CHOICE)["progress"]["remaining"] for _ in range(6)]
        assert left == [5, 4, 3, 2, 1, 0]
        # Nobody can be given the repeat of what others have answered.
        ben = page.client("ben")
        assert ben.get("/api/me").json()["progress"]["remaining"] == 0


@pytest.mark.usefixtures("exact_progress")
def test_a_repeat_whose_original_was_skipped_is_not_left(store: PreferenceStore) -> None:
    (task,) = add_pairs(store, 1)
    store.add_tasks([TaskPlan("pairwise", store.tasks([task])[task].plan.responses, repeat_of=task)])
    with running_page(store) as page:
        anna = page.client("anna")
        assert submit(anna, next_task(anna), {"kind": "skip"})["progress"]["remaining"] == 0
        assert post(anna, "/api/next")["state"] == "finished"


def test_the_first_summary_is_made_once_for_all_who_wait(
    store: PreferenceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []

    def slow(store: PreferenceStore) -> dict[str, Any]:
        made.append(1)
        time.sleep(0.1)
        return {"made": len(made)}

    monkeypatch.setattr(admin_module, "summarise", slow)
    # It stays valid for hours.
    monkeypatch.setattr(admin_module, "_SHARE", 1e-5)
    admin = Admin(store)
    waiting = [threading.Thread(target=admin.summary) for _ in range(4)]
    for thread in waiting:
        thread.start()
    for thread in waiting:
        thread.join()
    assert admin.summary() == {"made": 1}


def test_a_file_to_import_named_as_the_store(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "Which?", "chosen": "This.", "rejected": "That."}\n')
    with pytest.raises(DataError, match=r"rlhf label store=\S+pairs\.sqlite import=\S+pairs\.jsonl"):
        run_label([f"store={path}", "port=0"])


def test_nothing_to_label_is_said_with_what_to_do(
    store: PreferenceStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(label_command, "make_server", lambda app: NoServer())
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "Which?", "chosen": "This.", "rejected": "That."}\n')
    expected = ("import=FILE adds some", "num_labels=N wants N", None)
    for arguments, text in zip(([], [f"import={path}"], ["num_labels=2"]), expected, strict=True):
        run_label([f"store={store.path}", "port=0", *arguments])
        said = capsys.readouterr()[0]
        assert ("Nothing is left to label" in said) == (text is not None)
        assert text is None or text in said
