"""The labelling page in a browser: what people do there is what the store has afterwards."""

from __future__ import annotations

import re
import time
from datetime import timedelta
from pathlib import Path

import httpx
from playwright.sync_api import Route, expect

from rlhf.preferences.page.desk import DeskSettings
from rlhf.preferences.store import BothBad, Choice, Flag, Label, PreferenceStore, Ranking, Rating, Skip, Tie
from tests.unit.preference_store_example import HandClock
from tests.web.conftest import Sit, labels_of, needs_chromium, shown_texts
from tests.web.label_example import TIMEOUT, add_pairs, add_task, running_page

pytestmark = needs_chromium
# Keys, and the answer that they mean: the place on the screen that is preferred and how much, or a kind.
KEYS: list[tuple[tuple[str, ...], tuple[int, int] | type]] = [
    (("1",), (0, 3)),
    (("2",), (0, 2)),
    (("3",), (0, 1)),
    (("4",), Tie),
    (("5",), (1, 1)),
    (("6",), (1, 2)),
    (("7",), (1, 3)),
    (("b",), BothBad),
    (("ArrowLeft",), (0, 1)),
    (("ArrowRight", "ArrowRight"), (1, 2)),
    (("1", *["ArrowRight"] * 9), (1, 3)),
    (("7", *["ArrowLeft"] * 3), Tie),
]
NOTICES = ("409", "ERR_INTERNET_DISCONNECTED", "ERR_FAILED", "503")


def answer_of(label: Label) -> tuple[int, int] | type:
    """A label in the words of `KEYS`."""
    if isinstance(label.answer, Choice):
        return label.shown.index(label.answer.preferred), label.answer.strength
    return type(label.answer)


def tiers_of(label: Label) -> list[list[int]]:
    """A ranking by the places on the screen."""
    assert isinstance(label.answer, Ranking)
    return [sorted(label.shown.index(response) for response in tier) for tier in label.answer.tiers]


def test_thirty_tasks_by_keyboard(store: PreferenceStore, sit: Sit) -> None:
    add_pairs(store, 30)
    with running_page(store) as running:
        start = time.monotonic()
        seat = sit(running)
        expect(seat.page.get_by_role("heading", name="Who is labelling?")).to_be_visible()
        seat.page.keyboard.type("anna")
        seat.press("Enter")
        seen = []
        for number in range(1, 31):
            seat.number(number)
            seen.append([text.strip() for text in seat.texts()])
            seat.press(*KEYS[number % len(KEYS)][0], "Enter")
        seat.message("All done")
        elapsed = time.monotonic() - start
        labels = labels_of(store)
        assert [answer_of(label) for label in labels] == [KEYS[number % len(KEYS)][1] for number in range(1, 31)]
        assert [[text.strip() for text in shown_texts(store, label)] for label in labels] == seen
        assert all(label.annotator == "anna" for label in labels)
        # No second counts for two tasks.
        seconds = [label.seconds or 0.0 for label in labels]
        assert min(seconds) > 0
        assert sum(seconds) < elapsed
        # Both orders occur, so that the side is no hint.
        assert len({texts[0][:6] for texts in seen}) == 2

        # Undo goes back twice, shows what was answered, and the new answers count.
        seat.press("u")
        seat.number(30)
        expect(seat.page.get_by_role("radio", name="B is much better")).to_be_checked()
        assert [text.strip() for text in seat.texts()] == seen[-1]
        seat.press("Control+z")
        seat.number(29)
        expect(seat.page.get_by_role("radio", name="B is clearly better")).to_be_checked()
        seat.press("1")
        seat.submit(30)
        seat.press("b", "Enter")
        seat.message("All done")
    again = {label.task: label for label in labels_of(store)}
    assert [answer_of(again[label.task]) for label in labels[-2:]] == [(0, 3), BothBad]
    assert [label.kind for label in store.history(labels[-1].task)][1] == "retract"


def test_skips_flags_and_comments(store: PreferenceStore, sit: Sit) -> None:
    add_pairs(store, 4)
    with running_page(store) as running:
        seat = sit(running, "anna")
        page = seat.page
        seat.press("Enter")
        expect(page.locator("#live")).to_have_text("Nothing is chosen yet.")
        seat.press("s")
        seat.number(2)
        seat.press("f")
        for name in ("Unsafe: response B", "Personal data: the task as a whole"):
            page.get_by_role("checkbox", name=name).focus()
            seat.press("Space")
        seat.press("Escape")
        expect(page.locator("#open-flags")).to_contain_text("2 flags")
        seat.press("c")
        # Keys are text here.
        page.keyboard.type("7 buses, skip?")
        expect(page.get_by_role("radio", checked=True)).to_have_count(0)
        seat.press("Escape", "3")
        seat.submit(3)
        expect(page.locator("#comment")).to_have_value("")
        seat.press("f")
        expect(page.get_by_role("button", name="Send without an answer")).to_be_disabled()
        page.get_by_role("checkbox", name="Broken: response A").check()
        page.get_by_role("button", name="Send without an answer").click()
        seat.number(4)
        # Undo brings the flag back, too.
        seat.press("u")
        seat.number(3)
        expect(page.locator("#open-flags")).to_contain_text("1 flag")
        seat.press("4")
        seat.submit(4)
    first, second, third = labels_of(store)
    assert first.answer == Skip()
    assert (answer_of(second), second.comment) == ((0, 1), "7 buses, skip?")
    assert set(second.flags) == {Flag("unsafe", second.shown[1]), Flag("personal_data", None)}
    assert (third.answer, third.flags) == (Tie(), (Flag("broken", third.shown[0]),))


def test_ranking_by_keys_and_by_drag(store: PreferenceStore, sit: Sit) -> None:
    for question in ("one", "two"):
        add_task(store, question, [f"{question} {number}" for number in range(5)], kind="ranking")
    with running_page(store) as running:
        seat = sit(running, "anna")
        page = seat.page
        chip = page.locator(".chip:not(.shadow)")
        seat.press(*"35142")
        # 3 5 1 4 2 -> tie 5 with 3 -> 2 goes up past 4 -> 4 is taken out and put back.
        seat.press("5", "t", "2", "ArrowUp", "4", "Backspace")
        expect(page.locator(".tray .chip")).to_have_count(1)
        expect(page.locator("#submit")).to_be_disabled()
        seat.press("4")
        expect(page.locator("#chosen")).to_have_text("3 and 5, then 1, then 2, then 4")
        expect(page.get_by_role("button", name="Response 5, place 1 of 4, tied with 3")).to_be_visible()
        seat.submit(2)

        def drag(number: int, x: float, y: float) -> None:
            box = chip.filter(has_text=re.compile(f"^{number}")).bounding_box()
            assert box is not None
            page.mouse.move(box["x"] + 15, box["y"] + 15)
            page.mouse.down()
            page.mouse.move(x, y, steps=4)
            page.mouse.up()

        def tier(index: int, share: float) -> tuple[float, float]:
            box = page.locator(".tier").nth(index).bounding_box()
            assert box is not None
            return box["x"] + share * box["width"], box["y"] + box["height"] / 2

        board = page.locator(".board").bounding_box()
        assert board is not None
        drag(2, board["x"] + 50, board["y"] + 20)
        drag(4, *tier(0, 0.05))  # before 2
        drag(1, *tier(1, 0.5))  # beside 2
        drag(5, *tier(1, 0.95))  # after both
        drag(3, *tier(0, 0.5))
        drag(3, *tier(2, 0.95))  # from beside 4 to the end
        expect(page.locator("#chosen")).to_have_text("4, then 2 and 1, then 5, then 3")
        # A click after a drag still selects, and the buttons do what the keys do.
        chip.filter(has_text=re.compile("^5")).click()
        page.get_by_role("button", name="Better").click()
        expect(page.locator("#chosen")).to_have_text("4, then 5, then 2 and 1, then 3")
        # Enter on a button presses it, and submits where the mouse was used.
        page.get_by_role("button", name="Worse").focus()
        seat.press("Enter")
        expect(page.locator("#chosen")).to_have_text("4, then 2 and 1, then 5, then 3")
        page.get_by_role("button", name="Better").click()
        seat.press("Enter")
        seat.message("All done")
    assert [tiers_of(label) for label in labels_of(store)] == [[[2, 4], [0], [1], [3]], [[3], [4], [0, 1], [2]]]


def test_ratings(store: PreferenceStore, sit: Sit) -> None:
    for scale in (5, 10, 100):
        add_task(store, f"scale {scale}", ["Some text."], kind="rating", scale=scale)
    with running_page(store) as running:
        seat = sit(running, "anna")
        expected = {}
        for number in range(1, 4):
            seat.number(number)
            title = seat.page.locator("#task-title").inner_text()
            scale = int(re.findall(r"\d+", title)[-1])
            if scale == 5:
                seat.press("2", "ArrowRight", "9")
            elif scale == 10:
                seat.press("0", "ArrowLeft", "ArrowRight", "ArrowRight")
            else:
                seat.page.get_by_role("spinbutton").fill("101")
                expect(seat.page.locator("#submit")).to_be_disabled()
                seat.page.get_by_role("spinbutton").fill("77")
                seat.press("Escape")
            seat.press("Enter")
            expected[scale] = {5: 3, 10: 10, 100: 77}[scale]
        seat.message("All done")
    made = {store.tasks([label.task])[label.task].plan.scale: label.answer for label in labels_of(store)}
    assert made == {scale: Rating(value) for scale, value in expected.items()}


def test_two_browsers_at_once(store: PreferenceStore, sit: Sit) -> None:
    tasks = add_pairs(store, 5, num_labels=2)
    last = add_task(store, "The last one?", ("Yes.", "No."))
    store.replan([last], priority=-1.0)
    with running_page(store) as running:
        anna, ben = sit(running, "anna"), sit(running, "ben")
        for number in range(1, 6):
            for seat, key in ((anna, "2"), (ben, "6")):
                seat.number(number)
                seat.press(key, "Enter")
        anna.number(6)
        ben.message("Nothing for you right now")
        # The page does not look by itself now.
        ben.stop_clock()
        anna.page.get_by_role("button", name="Pause").click()
        anna.message("Paused")
        ben.page.get_by_role("button", name="Look now").click()
        ben.number(6)
        ben.press("4", "Enter")
        ben.message("All done")
        anna.page.get_by_role("button", name="Continue").click()
        anna.message("All done")
    labels = labels_of(store)
    assert {task: sorted(label.annotator for label in labels if label.task == task) for task in [*tasks, last]} == {
        **{task: ["anna", "ben"] for task in tasks},
        last: ["ben"],
    }
    assert {answer_of(label) for label in labels_of(store, "anna")} == {(0, 2)}


def test_a_reload_in_the_middle(store: PreferenceStore, sit: Sit) -> None:
    add_pairs(store, 3)
    with running_page(store) as running:
        seat = sit(running, "anna")
        before = seat.texts()
        seat.press("6", "c")
        seat.page.keyboard.type("half a thought")
        seat.page.reload()
        seat.number(1)
        assert seat.texts() == before
        expect(seat.page.get_by_role("radio", name="B is clearly better")).to_be_checked()
        expect(seat.page.locator("#comment")).to_have_value("half a thought")
        seat.submit(2)
        # Nothing of it is left for the next task.
        expect(seat.page.get_by_role("radio", checked=True)).to_have_count(0)
        expect(seat.page.locator("#comment")).to_have_value("")
    (label,) = labels_of(store)
    assert (answer_of(label), label.comment) == ((1, 2), "half a thought")
    assert len(store.assignments(label.task)) == 1


def test_no_token_is_401_and_nothing_else(store: PreferenceStore, sit: Sit) -> None:
    add_pairs(store, 1)
    with running_page(store) as running:
        seat = sit(running, link=f"{running.url}/")
        seat.allowed = ("401",)
        assert seat.page.locator("body").inner_text() == "unauthorized"
        paths = ("/", "/?token=wrong", "/admin", "/static/label.js", "/api/me", "/api/admin/summary", "/nothing")
        for path in paths:
            response = httpx.get(running.url + path, timeout=TIMEOUT)
            assert (response.status_code, response.text) == (401, "unauthorized")
        # A link that was renewed while the page was open is told in words.
        other = sit(running, "anna")
        other.allowed = ("401",)
        other.context.clear_cookies()
        other.press("4", "Enter")
        other.message("This link is not valid any more")
    assert labels_of(store) == []


def test_a_lost_connection_loses_and_doubles_nothing(store: PreferenceStore, sit: Sit) -> None:
    add_pairs(store, 4)
    with running_page(store) as running:
        seat = sit(running, "anna")
        seat.allowed = NOTICES
        notice = seat.page.locator("#notice")
        seat.context.set_offline(True)
        seat.press("1", "Enter")
        expect(notice).to_contain_text("No connection. Your answer is kept here")
        assert labels_of(store) == []
        seat.context.set_offline(False)
        seat.number(2)
        expect(notice).to_be_hidden()

        # The label arrives and the reply is lost: the same label is sent again.
        def lose(route: Route) -> None:
            route.fetch()
            route.abort()

        seat.page.route("**/api/submit", lose, times=1)
        seat.press("7", "Enter")
        seat.number(3)
        # The tab is reloaded while a label waits: it is sent first.
        seat.page.route("**/api/submit", lambda route: route.abort())
        seat.press("4", "Enter")
        expect(notice).to_be_visible()
        seat.page.unroute("**/api/submit")
        seat.page.reload()
        seat.number(4)
        # A server that cannot write says so, and is asked again: with the time stopped by the button alone, then
        # by the page itself.
        seat.stop_clock()
        refusal = {"error": "The disk is full."}
        seat.page.route("**/api/submit", lambda route: route.fulfill(status=503, json=refusal))
        seat.press("b", "Enter")
        expect(notice).to_contain_text("The disk is full.")
        with seat.page.expect_response("**/api/submit") as again:
            seat.page.get_by_role("button", name="Try now").click()
        assert again.value.status == 503
        seat.page.unroute("**/api/submit")
        seat.page.clock.resume()
        seat.message("All done")
    labels = labels_of(store)
    assert [answer_of(label) for label in labels] == [(0, 3), (1, 3), Tie, BothBad]
    assert all(label.version == 1 for label in labels)


def test_a_lease_that_ended(tmp_path: Path, sit: Sit) -> None:
    clock = HandClock()
    with PreferenceStore.create(tmp_path / "labels.sqlite", seed=1, clock=clock) as store:
        add_pairs(store, 2)
        with running_page(store, DeskSettings(lease_seconds=60)) as running:
            seat = sit(running, "anna")
            seat.allowed = NOTICES
            clock.move(3600)
            ben = running.client("ben")
            for _ in range(2):
                task = ben.post("/api/next", json={}).json()["task"]
                body = {"assignment": task["assignment"], "token": f"of-ben-{task['assignment']:04}"}
                assert ben.post("/api/submit", json={**body, "answer": {"kind": "tie"}}).status_code == 200
            seat.press("1", "Enter")
            expect(seat.page.locator("#notice")).to_contain_text("You held this task too long")
            seat.message("All done")
        assert [label.annotator for label in labels_of(store)] == ["ben", "ben"]


def test_the_clock_runs_while_the_page_is_visible_and_the_lease_while_somebody_works(tmp_path: Path, sit: Sit) -> None:
    clock = HandClock()
    with PreferenceStore.create(tmp_path / "labels.sqlite", seed=1, clock=clock) as store:
        add_pairs(store, 1)
        with running_page(store, DeskSettings(lease_seconds=60)) as running:
            seat = sit(running)
            seat.stop_clock()
            seat.page.get_by_label("Your name").fill("anna")
            seat.press("Enter")
            seat.number(1)
            show = """(state) => {
              Object.defineProperty(document, "visibilityState", { value: state, configurable: true });
              document.dispatchEvent(new Event("visibilitychange"));
            }"""
            for state, seconds in (("visible", 12), ("hidden", 500)):
                seat.page.evaluate(show, state)
                seat.page.clock.run_for(1000 * seconds)
                clock.move(12)
            with seat.page.expect_response("**/api/extend"):
                seat.page.evaluate(show, "visible")
            seat.page.clock.run_for(3000)
            clock.move(3)
            seat.press("4", "Enter")
            seat.message("All done")
        (label,) = labels_of(store)
        assert label.seconds == 15
        assert store.assignments(label.task)[0].lease_ends - label.made_at == timedelta(seconds=57)
