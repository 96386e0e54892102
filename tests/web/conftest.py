"""A browser for the tests of the labelling page, and people who sit at it."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Dialog, Page, expect, sync_playwright

from rlhf.preferences.page import progress
from rlhf.preferences.store import Label, PreferenceStore
from tests.web.label_example import RunningPage

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium is installed; on Debian it is the package chromium"
)
# How long a browser may take for anything: only what never happens is a failure.
PATIENCE_MS = 60_000
expect.set_options(timeout=PATIENCE_MS)
# What the page may not do is told to the console, where `Seat` hears it.
_REPORT_VIOLATIONS = """
addEventListener("securitypolicyviolation", (event) => {
  console.error(`policy violated: ${event.violatedDirective} ${event.blockedURI} ${event.sample}`);
});
"""
PHONE: dict[str, Any] = {"viewport": {"width": 375, "height": 667}, "has_touch": True, "is_mobile": True}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One browser a file: playwright's event loop must not outlive the tests that need it."""
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=3 * PATIENCE_MS)
        yield opened
        opened.close()


@dataclass
class Seat:
    """A person at the page in a browser of their own; what went wrong there is in `problems`."""

    page: Page
    context: BrowserContext
    url: str
    allowed: tuple[str, ...] = ()
    problems: list[str] = field(default_factory=list)

    def listen(self) -> None:
        """Notes errors, dialogs, and requests that leave for elsewhere."""
        self.page.on("console", self._hear)
        self.page.on("pageerror", lambda error: self.problems.append(f"error: {error}"))
        self.page.on("request", lambda request: self._check(request.url))
        self.page.on("dialog", self._answer)
        self.page.on("popup", lambda popup: self.problems.append(f"popup: {popup.url}"))
        self.page.on("download", lambda download: self.problems.append(f"download: {download.url}"))

    def press(self, *keys: str) -> None:
        """Presses keys one after the other."""
        for key in keys:
            self.page.keyboard.press(key)

    def number(self, number: int) -> None:
        """Waits for the task of that number, which can be answered."""
        expect(self.page.locator("#task-title")).to_contain_text(f"{number}. ")
        expect(self.page.locator("body")).not_to_have_class("busy")

    def submit(self, number: int) -> None:
        """Presses Enter and waits for the task of that number."""
        self.press("Enter")
        self.number(number)

    def message(self, text: str) -> None:
        """Waits for a message in place of a task."""
        expect(self.page.locator("#message h1")).to_have_text(text)
        expect(self.page.locator("body")).not_to_have_class("busy")

    def texts(self) -> list[str]:
        """The texts of the responses, in the order on the screen."""
        return self.page.locator(".response .text").all_text_contents()

    def stop_clock(self) -> None:
        """Stops the time of the page an hour from now: from here on it does nothing but what it is told to."""
        self.page.clock.install()
        self.page.clock.pause_at(datetime.now(UTC) + timedelta(hours=1))

    def check(self) -> None:
        """Fails when something went wrong that is not allowed."""
        wrong = [problem for problem in self.problems if not any(text in problem for text in self.allowed)]
        assert not wrong, wrong

    def _hear(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.problems.append(f"console: {message.text}")

    def _answer(self, dialog: Dialog) -> None:
        # The browser's own question, whether to leave while a label waits to be sent, is wanted.
        if dialog.type == "beforeunload":
            dialog.accept()
        else:
            self.problems.append(f"dialog: {dialog.message}")
            dialog.dismiss()

    def _check(self, url: str) -> None:
        if not url.startswith((f"{self.url}/", "blob:")):
            self.problems.append(f"request: {url}")


Sit = Callable[..., Seat]


@pytest.fixture
def sit(browser: Browser) -> Iterator[Sit]:
    """Makes seats: `sit(running, "anna")` opens the page, and says the name when one is given."""
    seats: list[Seat] = []

    def sit_down(running: RunningPage, name: str | None = None, *, link: str | None = None, **options: Any) -> Seat:
        context = browser.new_context(**{"reduced_motion": "reduce", **options})
        context.set_default_timeout(PATIENCE_MS)
        context.add_init_script(_REPORT_VIOLATIONS)
        seat = Seat(context.new_page(), context, running.url)
        seats.append(seat)
        seat.listen()
        seat.page.goto(link or running.link())
        if name is not None:
            seat.page.get_by_label("Your name").fill(name)
            seat.press("Enter")
            expect(seat.page.locator("#task, #message").and_(seat.page.locator(":visible"))).to_be_visible()
        return seat

    yield sit_down
    for seat in seats:
        seat.check()
        seat.context.close()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[PreferenceStore]:
    """A new store without tasks."""
    with PreferenceStore.create(tmp_path / "labels.sqlite", seed=1) as made:
        yield made


@pytest.fixture
def exact_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """Progress is counted for every request, whatever that costs."""
    monkeypatch.setattr(progress, "_CHEAP_SECONDS", math.inf)


def labels_of(store: PreferenceStore, annotator: str | None = None) -> list[Label]:
    """The labels that count, the oldest first; of one annotator when named."""
    return [label for label in store.current_labels() if annotator in (None, label.annotator)]


def shown_texts(store: PreferenceStore, label: Label) -> list[str]:
    """The texts that were on the screen of a label, in their order."""
    responses = store.responses(label.shown)
    return [responses[response].text for response in label.shown]
