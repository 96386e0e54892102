"""Makes the pictures of the labelling page for the documentation: `python -m tests.web.screenshots docs/images`."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, expect, sync_playwright

from rlhf.preferences.page.desk import DeskSettings
from rlhf.preferences.store import Annotator, Choice, Flag, PreferenceStore, Tie
from rlhf.records import Message, PromptContent
from tests.unit.preference_store_example import HandClock
from tests.web.conftest import CHROMIUM, PHONE
from tests.web.label_example import RunningPage, add_pairs, add_task, running_page

SUGAR: tuple[str, str] = (
    """Plants make sugar from light, water and air. It happens in two steps:

1. **Light reactions**, in the thylakoid membrane, split water and make ATP and NADPH.
2. **The Calvin cycle**, in the stroma, uses them to fix carbon dioxide.

In one line: `6 CO2 + 6 H2O → C6H12O6 + 6 O2`. Leaves look green because chlorophyll absorbs red and blue light.""",
    """Plants make sugar from light and water. It happens in three steps:

1. **Light reactions**, in the thylakoid membrane, split water and make ATP.
2. **The Calvin cycle**, in the stroma, uses it to fix carbon dioxide.

Leaves look green because chlorophyll absorbs green light. See [this page](https://example.org/leaf).""",
)
REVERSE: PromptContent = (
    Message("system", "You are a patient tutor."),
    Message("user", "How do I reverse a linked list?"),
    Message("assistant", "In place, or may it use more memory?"),
    Message("user", "In place, in Python please."),
)
LOOP = """```python
def reverse(head):
    previous = None
    while head:
        head.next, previous, head = previous, head, head.next
    return previous
```

It takes *O(n)* time and constant space."""
RECURSION = """```python
def reverse(head):
    if head is None or head.next is None:
        return head
    rest = reverse(head.next)
    head.next.next = head
    head.next = None
    return rest
```

A long list overflows the stack."""
MORNINGS = (
    "Dew on the spider's web,\neach drop holds a small morning;\nnobody hurries.",
    "Roses are red,\nviolets are blue,\nthis is no haiku\nbut it is for you.",
    "Mist lifts from the quay.\nOne gull, then the whole harbour,\nthen the sea itself.",
    "A haiku has three lines of five, seven and five syllables.",
)
GUIDE = """# Which one would you rather send?

Prefer the response that is **correct**, then the one that is *clearer*.

- Check facts before style.
- A refusal is right when the request is harmful.
"""
DESK: dict[str, Any] = {"viewport": {"width": 1280, "height": 800}}


def fill(store: PreferenceStore) -> None:
    """The tasks that the pictures show, then plain ones with labels of three annotators."""
    shown = [
        add_task(store, "Explain photosynthesis to a curious twelve-year-old: a sentence and a short list.", SUGAR),
        add_task(store, REVERSE, (RECURSION, LOOP)),
        add_task(store, "Write a haiku about the morning.", MORNINGS, kind="ranking"),
    ]
    for rank, task in enumerate(shown):
        store.replan([task], num_labels=2, priority=9.0 - rank)


def label(store: PreferenceStore, clock: HandClock) -> None:
    """Labels of three annotators who mostly agree."""
    add_pairs(store, 40, num_labels=3)
    for offset, name in enumerate(("ada", "boris", "chen")):
        store.add_annotator(Annotator(name, "human"))
        for number in range(40 - 9 * offset):
            assignment = store.next_assignment(name, lease_seconds=600)
            assert assignment is not None
            best, other = sorted(assignment.shown)
            dissents = (number * 7 + offset * 3) % 9 < offset
            answer = Tie() if number % 11 == 10 else Choice(other if dissents else best, 1 + number % 3)
            flags = [Flag("broken", best)] if number == 5 else []
            comment = "Both miss the question, one is at least polite." if number == 8 else ""
            seconds = 4.0 + (number * 5) % 13
            clock.move(seconds + 3)
            token = f"{name}-{assignment.id:08}"
            store.submit(assignment.id, name, answer, token=token, flags=flags, comment=comment, seconds=seconds)


def enter(browser: Browser, running: RunningPage, name: str, **options: Any) -> Page:
    """The page of an annotator who has read the guide."""
    page = browser.new_page(reduced_motion="reduce", **options)
    page.clock.install()
    page.goto(running.link())
    page.get_by_label("Your name").fill(name)
    page.keyboard.press("Enter")
    expect(page.locator("#help")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#task-title")).to_contain_text("1. ")
    return page


def answer(page: Page, clock: HandClock, key: str, number: int) -> None:
    """Answers after a while and waits for the next task."""
    page.clock.run_for(8000 + 1000 * number)
    clock.move(14)
    page.keyboard.press(key)
    page.keyboard.press("Enter")
    expect(page.locator("#task-title")).to_contain_text(f"{number}. ")


def take(browser: Browser, running: RunningPage, clock: HandClock, folder: Path) -> None:
    """Takes all pictures."""
    page = enter(browser, running, "anna", **DESK)
    page.keyboard.press("d")
    page.keyboard.press("6")
    page.screenshot(path=folder / "label-light.png")
    page.keyboard.press("d")
    answer(page, clock, "6", 2)
    page.emulate_media(color_scheme="dark")
    page.keyboard.press("2")
    page.screenshot(path=folder / "label-dark.png")
    answer(page, clock, "2", 3)
    page.emulate_media(color_scheme="light")
    for key in "213t":
        page.keyboard.press(key)
    page.screenshot(path=folder / "label-ranking.png")
    page.keyboard.press("i")
    page.screenshot(path=folder / "label-guide.png")
    phone = enter(browser, running, "ben", **PHONE, device_scale_factor=1.5)
    phone.get_by_role("radio", name="A is clearly better").tap()
    phone.evaluate("scrollTo(0, 0)")
    phone.screenshot(path=folder / "label-phone.png")
    admin = browser.new_page(viewport={"width": 1280, "height": 1000})
    admin.goto(running.admin_link)
    expect(admin.locator("#annotators table")).to_be_visible()
    admin.screenshot(path=folder / "label-admin.png")


def main(folder: Path) -> None:
    """Takes the pictures into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place, sync_playwright() as playwright:
        clock = HandClock()
        with PreferenceStore.create(Path(place) / "labels.sqlite", seed=2, clock=clock) as store:
            label(store, clock)
            fill(store)
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            with running_page(store, DeskSettings(instructions=GUIDE)) as running:
                take(browser, running, clock, folder)
            browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
