"""The comparison's page in a browser: nothing is loaded or run but ours, and the sample browser does what it says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from rlhf.runs.comparison.command import run_report
from tests.comparison_example import NUM_PROMPTS, make_methods, make_run
from tests.web.attacks import ATTACKS
from tests.web.conftest import PATIENCE_MS, PHONE, needs_chromium

pytestmark = needs_chromium
ATTACK = "</script><script>window.attacked=1</script>" + "".join(ATTACKS)


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of two methods with three seeds, and one whose names and texts are attacks."""
    folder = tmp_path_factory.mktemp("page")
    make_methods(folder / "runs")
    make_run(folder / "runs" / "x", seed=1, score=1.5, text=ATTACK, config={"model": {"path": ATTACK}})
    run_report([str(folder / "runs"), f"to={folder / 'comparison.html'}"])
    return folder / "comparison.html"


@pytest.fixture
def page(browser: Browser, comparison: Path) -> Iterator[Page]:
    context = browser.new_context()
    context.set_default_timeout(PATIENCE_MS)
    opened = context.new_page()
    problems: list[str] = []
    opened.on("console", lambda message: problems.append(message.text))
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.on("dialog", lambda dialog: problems.append(dialog.message))
    opened.on("request", lambda request: problems.extend([] if request.url.startswith("file:") else [request.url]))
    opened.goto(comparison.as_uri())
    yield opened
    assert opened.evaluate("window.attacked") is None
    assert problems == []
    context.close()


def test_samples_are_filtered_ordered_and_paged(page: Page) -> None:
    count, items = page.locator("#samples-count"), page.locator("#samples-list article")
    expect(count).to_have_text(f"{NUM_PROMPTS} of {NUM_PROMPTS} prompts")
    expect(items).to_have_count(10)
    page.locator("#samples-order").select_option("given")
    expect(items.first).to_contain_text("Prompt 0: what did you think ?")
    # What attacks is on the page as a text.
    assert "<script>window.attacked=1</script>" in items.first.inner_text()
    page.get_by_role("button", name="Next").click()
    expect(items.first).to_contain_text("Prompt 10:")
    expect(page.locator("#samples-page")).to_have_text("Page 2 of 4")
    page.get_by_role("button", name="Back").click()
    expect(items.first).to_contain_text("Prompt 0:")
    page.get_by_label("Filter by words").fill("prompt 17:")
    expect(count).to_have_text(f"1 of {NUM_PROMPTS} prompts")
    expect(items.first.locator(".answer")).to_have_count(3)
    page.locator("#samples-seed").select_option("all")
    expect(items.first.locator(".answer .text")).to_have_count(7)
    page.get_by_label("Filter by words").fill("no such words anywhere")
    expect(page.locator("#samples-list")).to_have_text("No prompt has these words.")


def test_the_largest_disagreement_comes_first(page: Page) -> None:
    def gaps() -> list[float]:
        found: list[float] = page.evaluate(
            """() => {
                const rows = JSON.parse(document.getElementById('samples-data').textContent).rows;
                const of = new Map(rows.map((row) => [row.prompt[0][1], row.gap]));
                return [...document.querySelectorAll('#samples-list .prompt')].map((one) => of.get(one.textContent));
            }"""
        )
        return found

    first = gaps()
    assert first == sorted(first, reverse=True)
    assert len(first) == 10
    page.locator("#samples-order").select_option("best-0")
    assert gaps() != first


def test_curves_change_their_axis(page: Page) -> None:
    shown = page.locator("#curves [data-axis]:visible")
    expect(shown).to_have_count(1)
    expect(shown.locator("svg").first).to_contain_text("step")
    page.locator("#axis").select_option("tokens")
    expect(page.locator("#curves [data-axis=tokens]")).to_be_visible()
    expect(page.locator("#curves [data-axis=step]")).to_be_hidden()
    expect(page.locator("#curves [data-axis=tokens] svg").first).to_contain_text("sampled response tokens")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone(browser: Browser, comparison: Path, scheme: str) -> None:
    context = browser.new_context(**PHONE, color_scheme=scheme)  # type: ignore[arg-type]
    context.set_default_timeout(PATIENCE_MS)
    page = context.new_page()
    page.goto(comparison.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (dark == "rgb(17, 20, 26)") == (scheme == "dark")
    # Every table scrolls by itself, is reached by the keyboard and says what it is.
    for box in page.locator(".tablebox").all():
        assert box.get_attribute("tabindex") == "0"
        assert box.locator("caption").inner_text() if box.is_visible() else True
    context.close()
