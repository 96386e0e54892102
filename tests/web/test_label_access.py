"""The labelling page on a phone, in the dark, without a mouse and without eyes; its settings and its guide."""

from __future__ import annotations

from typing import Any

import pytest
from playwright.sync_api import CDPSession, Locator, expect

from rlhf.preferences.page.desk import DeskSettings
from rlhf.preferences.store import Choice, PreferenceStore, Ranking, Tie
from tests.web.conftest import PHONE, Sit, labels_of, needs_chromium
from tests.web.label_example import CHAT, add_pairs, add_task, running_page

pytestmark = needs_chromium
GUIDE = "# Which would you send?\n\nPrefer what is **true**. <script>window.attacked = 1</script>"
# The contrast of text with what is behind it, by the formula of WCAG 2; colours are read from a canvas as sRGB.
CONTRASTS = """(places) => {
  const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const layer = (element, name) => {
    context.clearRect(0, 0, 1, 1);
    context.fillStyle = getComputedStyle(element)[name];
    context.fillRect(0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data];
  };
  const luminance = (rgb) => rgb.slice(0, 3).reduce((sum, value, index) => {
    const part = value / 255;
    return sum + [0.2126, 0.7152, 0.0722][index] * (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
  }, 0);
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = layer(at, "backgroundColor");
      if (colour[3] === 255) return colour;
    }
    return [255, 255, 255, 255];
  };
  return Object.fromEntries(places.map((place) => {
    const element = document.querySelector(place);
    const [low, high] = [luminance(layer(element, "color")), luminance(behind(element))].sort((a, b) => a - b);
    return [place, (high + 0.05) / (low + 0.05)];
  }));
}"""
READ = [
    "#store", "#figures span", "#undo", "#task-title", "#toggle-raw", ".role", ".turn .text p", ".response .name",
    ".response[data-position='1'] .name", ".response .text p", ".response .code code", ".response .language",
    ".response .address", ".response .hidden-character", ".response blockquote p", ".ends .A", ".ends .B",
    ".segment.A .number", ".segment.B .number", ".segment.A .word", ".segment.tie .word",
    ".segment:has(:checked) .word", ".segment.bad .word", "#skip", "#chosen", "#submit", "#skip kbd", "#toggle-raw kbd",
]  # fmt: skip
# The element that has the focus, and whether that is seen.
FOCUSED = """() => {
  const element = document.activeElement;
  const style = getComputedStyle(element.closest(".segment") ?? element);
  return [element.id || element.getAttribute("aria-label"), style.outlineStyle];
}"""
RICH = "> quoted\n\n```python\nx = 1\n```\n[link](https://a.example) hidden\u200b"


def touch_drag(session: CDPSession, start: Locator, x: float, y: float) -> None:
    """Drags with a finger from the middle of an element."""
    box = start.bounding_box()
    assert box is not None
    left, top = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    for step in range(6):
        point = {"x": left + (x - left) * step / 5, "y": top + (y - top) * step / 5}
        kind = "touchMove" if step else "touchStart"
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [point]})
    session.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})


def test_a_phone(store: PreferenceStore, sit: Sit) -> None:
    add_task(store, CHAT, ("word " * 300, "x" * 500))
    ranked = add_task(store, "Rank.", [f"text {number}" for number in range(9)], kind="ranking")
    rated = add_task(store, "Rate.", ["text"], kind="rating", scale=10)
    store.replan([ranked], priority=-1.0)
    store.replan([rated], priority=-2.0)
    fits = "document.documentElement.scrollWidth <= innerWidth"
    with running_page(store) as running:
        seat = sit(running, "anna", **PHONE)
        page = seat.page
        first, second = (page.locator(".response").nth(index).bounding_box() for index in (0, 1))
        assert first is not None
        assert second is not None
        assert (second["x"], second["y"] > first["y"] + first["height"]) == (first["x"], True)
        for number in (1, 2, 3):
            seat.number(number)
            assert page.evaluate(fits)
            small = page.evaluate(
                """() => [...document.querySelectorAll("button, .segment, .chip, select")]
                  .filter((element) => element.checkVisibility())
                  .map((element) => [element.id || element.className, element.getBoundingClientRect()])
                  .filter(([, box]) => box.height < 44 || box.width < 44)
                  .map(([name, box]) => `${name} ${box.width}x${box.height}`)"""
            )
            assert small == []
            if number == 1:
                # A tap moves nothing.
                level = page.locator(".segment.B").first.bounding_box()
                assert level is not None
                page.touchscreen.tap(level["x"] + 20, level["y"] + 20)
                expect(page.get_by_role("radio", name="B is slightly better")).to_be_checked()
                assert page.evaluate("scrollY") == 0
                page.get_by_role("radio", name="Both are equally good").tap()
            elif number == 2:
                for place in (2, 1, 3, 9, 4, 5, 6, 7, 8):
                    page.get_by_role("button", name=f"Response {place},").tap()
                # A finger drags the last one in front of the first.
                tier = page.locator(".tier").first.bounding_box()
                assert tier is not None
                session = seat.context.new_cdp_session(page)
                chip = page.get_by_role("button", name="Response 8,")
                touch_drag(session, chip, tier["x"] + 3, tier["y"] + tier["height"] / 2)
                # On any page, Chromium swallows the first tap after an emulated drag where touch does not scroll.
                page.locator("#task-title").tap()
                expect(page.get_by_role("button", name="Response 8, place 1 of 9")).to_be_visible()
            else:
                page.get_by_role("radio", name="7 of 10").tap()
            page.get_by_role("button", name="Submit").tap()
        seat.message("All done")
    pair, ranking, _ = labels_of(store)
    assert pair.answer == Tie()
    assert isinstance(ranking.answer, Ranking)
    assert [ranking.shown.index(tier[0]) + 1 for tier in ranking.answer.tiers] == [8, 2, 1, 3, 9, 4, 5, 6, 7]


def test_dark_and_light(store: PreferenceStore, sit: Sit) -> None:
    add_task(store, CHAT, (RICH, RICH + " more"))
    with running_page(store) as running:
        seat = sit(running, "anna", color_scheme="dark")
        page = seat.page
        paper = "getComputedStyle(document.body).backgroundColor"
        dark = page.evaluate(paper)
        for scheme in ("dark", "light"):
            page.emulate_media(color_scheme=scheme)
            for key in "267b4":
                seat.press(key)
                contrasts: dict[str, float] = page.evaluate(CONTRASTS, READ)
                assert {place: value for place, value in contrasts.items() if value < 4.5} == {}, (scheme, key)
        light = page.evaluate(paper)
        assert dark != light
        # What is chosen in the settings beats the system, also after a reload.
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("Theme").select_option("dark")
        assert page.evaluate(paper) == dark
        page.reload()
        seat.number(1)
        assert page.evaluate(paper) == dark
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("Theme").select_option("auto")
        assert page.evaluate(paper) == light


def test_what_a_screen_reader_says(store: PreferenceStore, sit: Sit) -> None:
    add_task(store, CHAT, ("Some text.", "Other text."))
    with running_page(store) as running:
        seat = sit(running, "anna")
        page = seat.page
        expect(page.locator("#task-title")).to_be_focused()
        expect(page.locator("body")).to_match_aria_snapshot(
            """
            - banner:
              - progressbar "Share of your tasks that is labelled"
              - paragraph: anna
              - toolbar "Page":
                - button "Undo"
                - button "Guide"
                - button "Settings"
            - main:
              - region "1. Which is better?":
                - heading "1. Which is better?" [level=1]
                - toolbar "Text":
                  - button "Differences"
                  - button "Raw"
                - heading "System" [level=2]
                - heading "User" [level=2]
                - heading "Assistant" [level=2]
                - heading "User" [level=2]
              - article "Response A":
                - heading "Response A" [level=2]
              - article "Response B":
                - heading "Response B" [level=2]
            - region "Your answer":
              - group "Which is better?":
                - radio "A is much better"
                - radio "A is clearly better"
                - radio "A is slightly better"
                - radio "Both are equally good"
                - radio "B is slightly better"
                - radio "B is clearly better"
                - radio "B is much better"
                - radio "Both are bad"
              - button "Skip"
              - button "Flag"
              - button "Comment"
              - button "Pause"
              - button "Submit" [disabled]
            """
        )
        live = page.locator("#live")
        seat.press("ArrowRight")
        expect(live).to_have_text("B is slightly better")
        seat.press("f")
        expect(page.get_by_role("dialog", name="What is wrong?")).to_be_visible()
        expect(page.get_by_role("checkbox")).to_have_count(9)
        seat.press("Escape", "Enter")
        expect(live).to_have_text("All done.")
        expect(page.get_by_role("heading", name="All done")).to_be_focused()
        seat.press("u")
        expect(live).to_contain_text("Taken back.")
        expect(page.locator("#task-title")).to_be_focused()
        # Everything is reached by Tab alone, in the order of the page, and the focus is seen.
        reached = []
        for _ in range(12):
            seat.press("Tab")
            name, outline = page.evaluate(FOCUSED)
            reached.append(name)
            assert outline != "none"
            if reached[-1] == "submit":
                break
        assert reached == [
            "toggle-difference", "toggle-raw", "B is slightly better", "skip", "open-flags", "toggle-comment", "pause",
            "submit",
        ]  # fmt: skip


def test_settings(store: PreferenceStore, sit: Sit) -> None:
    add_pairs(store, 5)
    with running_page(store) as running:
        seat = sit(running, "anna")
        page = seat.page

        def switch(name: str) -> None:
            page.get_by_role("button", name="Settings").click()
            page.get_by_role("switch", name=name).click()
            seat.press("Escape")

        switch("Submit at once")
        seat.press("6")
        seat.number(2)
        # Arrows only move; Enter submits.
        seat.press("ArrowLeft", "ArrowLeft")
        expect(page.locator("#chosen")).to_have_text("A is clearly better")
        seat.submit(3)
        page.get_by_role("radio", name="A is much better").click()
        seat.number(4)
        page.reload()
        seat.number(4)
        switch("Single-key shortcuts")
        seat.press("6", "s", "b")
        expect(page.get_by_role("radio", checked=True)).to_have_count(0)
        page.get_by_role("radio", name="Both are equally good").focus()
        seat.press("Space", "Enter")
        seat.number(5)
        # Another name starts labels of its own.
        page.get_by_role("button", name="Settings").click()
        page.get_by_role("button", name="Change").click()
        page.get_by_label("Your name").fill("")
        seat.press("Enter")
        expect(page.get_by_role("alert").filter(has_text="Please enter a name.")).to_be_visible()
        page.get_by_label("Your name").fill("ben")
        seat.press("Enter")
        seat.number(1)
    answers = [label.answer for label in labels_of(store, "anna")]
    assert [answer.strength if isinstance(answer, Choice) else answer for answer in answers] == [2, 2, 3, Tie()]


def test_the_guide(store: PreferenceStore, sit: Sit) -> None:
    add_pairs(store, 1)
    with running_page(store, DeskSettings(instructions=GUIDE), people=["anna"]) as running:
        # A link of one's own asks for no name. The instructions come first, once.
        seat = sit(running, link=running.link("anna"))
        guide = seat.page.get_by_role("dialog", name="Guide")
        expect(guide.get_by_role("heading", name="Which would you send?")).to_be_visible()
        expect(guide).to_contain_text("<script>window.attacked = 1</script>")
        assert seat.page.evaluate("window.attacked") is None
        assert store.assignments(next(iter(store.tasks()))) == []
        seat.press("Enter")
        seat.number(1)
        seat.page.reload()
        seat.number(1)
        expect(guide).to_be_hidden()
        seat.press("?")
        expect(guide).to_contain_text("mark the differences")
        expect(guide).not_to_contain_text("take it out of the ranking")
        seat.press("3", "Escape")
        expect(seat.page.get_by_role("radio", checked=True)).to_have_count(0)


@pytest.mark.parametrize("options", [{}, PHONE], ids=["desk", "phone"])
def test_a_long_prompt_is_folded(store: PreferenceStore, sit: Sit, options: dict[str, Any]) -> None:
    add_task(store, "start\n\n" + "line\n\n" * 200 + "end", ("a", "b"))
    with running_page(store) as running:
        seat = sit(running, "anna", **options)
        expect(seat.page.get_by_text("end", exact=True)).to_be_in_viewport()
        expect(seat.page.locator(".response").first).to_be_in_viewport()
        expect(seat.page.get_by_text("start", exact=True)).not_to_be_in_viewport()
        seat.press("p")
        expect(seat.page.get_by_text("start", exact=True)).to_be_in_viewport()
        assert seat.page.locator("#prompt").evaluate("(prompt) => prompt.scrollHeight === prompt.clientHeight")
