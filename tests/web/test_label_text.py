"""What a model wrote is shown as text: nothing of it is run, loaded or hidden, and Markdown becomes what it means."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from rlhf.preferences.store import Choice, PreferenceStore
from rlhf.records import Message
from tests.web.attacks import ATTACKS, COSTLY
from tests.web.conftest import Seat, Sit, labels_of, needs_chromium, shown_texts
from tests.web.label_example import add_task, running_page

pytestmark = needs_chromium
# Every element that the renderer makes, with the attributes that it may have.
TAGS = {
    "p", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "li", "pre", "code", "em", "strong", "s", "span", "div",
    "blockquote", "hr", "table", "thead", "tbody", "tr", "th", "td", "mark", "button",
}  # fmt: skip
ATTRIBUTES = {"class", "dir", "title", "tabindex", "role", "aria-label", "type", "start"}
# The characters of `CHARACTERS` that are no honest part of a text where they stand.
HIDDEN = set(
    "\x00\x07\x0b\x0c\x1b\x7f\x85\xad\u115f\u1160\u180e\u200b\u2028\u2029\u202c\u202e\u2060\u2066\u2069\u3164\ufe01\ufeff"
    "\uffa0\U000e0041\U000e0042\U000e0101"
)
INSIDE = """(place) => {
  const found = [...document.querySelectorAll(place)];
  const made = found.flatMap((body) => [...body.querySelectorAll("*")]);
  return {
    texts: found.map((body) => body.textContent),
    tags: [...new Set(made.map((element) => element.localName))],
    attributes: [...new Set(made.flatMap((element) => element.getAttributeNames()))],
    alien: made.filter((element) => element.namespaceURI !== "http://www.w3.org/1999/xhtml").length,
    attacked: window.attacked ?? Object.prototype.attacked ?? null,
    wide: document.documentElement.scrollWidth > window.innerWidth,
  };
}"""

# Everything that the page does with a text, off the screen.
SHOW = """async (text) => {
  const { appendMarkdown, appendRaw } = await import("/static/markdown.js");
  const { difference } = await import("/static/difference.js");
  appendMarkdown(document.createElement("div"), text);
  appendRaw(document.createElement("div"), text);
  difference(text, [...text].reverse().join(""));
}"""


def visible(text: str) -> str:
    """What a raw text shows: hidden characters as code points, the rest as it is."""
    text = text.replace("\r\n", "\n").replace("carriage\r", "carriageU+000D").replace("\u200b" * 3, "U+200B ×3")
    if "zero\u200bwidth" in text:
        text = text.replace("\u200c", "U+200C").replace("\u200d", "U+200D")
    return "".join(f"U+{ord(character):04X}" if character in HIDDEN else character for character in text)


def inspect(seat: Seat, place: str = ".response .text, #prompt .text") -> dict[str, Any]:
    """What the renderer made of the texts on the screen, which must be harmless."""
    found: dict[str, Any] = seat.page.evaluate(INSIDE, place)
    assert set(found["tags"]) <= TAGS
    assert set(found["attributes"]) <= ATTRIBUTES
    assert (found["alien"], found["attacked"], found["wide"]) == (0, None, False)
    return found


def test_attacks_are_text(store: PreferenceStore, sit: Sit) -> None:
    assert len(ATTACKS) >= 40
    assert len(ATTACKS) % 3 == 0
    for first, second, third in zip(ATTACKS[::3], ATTACKS[1::3], ATTACKS[2::3], strict=False):
        add_task(store, (Message("system", first), Message("user", third)), (first, second))
        add_task(store, third, (third, f"{first}\n\n{second}"))
    num_tasks = 2 * (len(ATTACKS) // 3)
    with running_page(store) as running:
        seat = sit(running, "anna")
        shown: set[str] = set()
        for number in range(1, num_tasks + 1):
            seat.number(number)
            inspect(seat)
            seat.press("d")
            inspect(seat)
            seat.press("d", "m")
            shown |= set(inspect(seat)["texts"])
            seat.press("m", "1", "Enter")
        seat.message("All done")
    labels = labels_of(store)
    assert len(labels) == num_tasks
    assert all(isinstance(label.answer, Choice) for label in labels)
    # What the raw view showed is what the store has, hidden characters made visible.
    assert shown >= {visible(text) for label in labels for text in shown_texts(store, label)}


def test_hostile_names_and_comments_on_the_way(store: PreferenceStore, sit: Sit) -> None:
    add_task(store, ATTACKS[0], ATTACKS[:5], kind="ranking")
    add_task(store, ATTACKS[1], [ATTACKS[5]], kind="rating", scale=5)
    with running_page(store) as running:
        seat = sit(running, '<img src=x onerror="window.attacked=1">')
        for number in (1, 2):
            seat.number(number)
            inspect(seat)
            inspect(seat, "#answer .snippet, #store, #settings-name")
            seat.press("c")
            seat.page.keyboard.type(ATTACKS[0])
            seat.press("Escape", *("12345" if seat.page.locator(".board").is_visible() else "3"), "Enter")
        seat.message("All done")
    assert [label.comment for label in labels_of(store)] == [ATTACKS[0]] * 2


def test_costly_texts_are_shown_at_once(store: PreferenceStore, sit: Sit) -> None:
    add_task(store, "Long?", ("a" * 15_000 + "\n" + "b" * 10_000, "short"))
    with running_page(store) as running:
        seat = sit(running, "anna")
        page = seat.page
        page.get_by_role("button", name="Show 5,001 more characters").click()
        assert max(len(text) for text in inspect(seat)["texts"]) == 25_001
        session = seat.context.new_cdp_session(page)
        session.send("Performance.enable")

        def processor_seconds() -> float:
            metrics = session.send("Performance.getMetrics")["metrics"]
            return float(next(one["value"] for one in metrics if one["name"] == "ThreadTime"))

        seconds = []
        for text in COSTLY:
            before = processor_seconds()
            page.evaluate(SHOW, text)
            seconds.append(processor_seconds() - before)
        assert 0 < max(seconds) < 3, seconds


RENDERED = [
    ("plain *em* **strong** ***both***", "p[plain em[em] strong[strong] strong[em[both]]]"),
    ("snake_case_name and 2 * 3 * 4", "p[snake_case_name and 2 * 3 * 4]"),
    ("~~gone~~ ~kept~", "p[s[gone] ~kept~]"),
    ("`a *b* c` ``x`y``", "p[code[a *b* c] code[x`y]]"),
    (r"\*no\* \(x^2\) \[y\]", r"p[*no* \(x^2\) \[y\]]"),
    ("# One\n## Two ##\ntext", "h3[One]h4[Two]p[text]"),
    ("a\nb\n\nc", "p[a\nb]p[c]"),
    ("- a\n- b\n  - c\n- d", "ul[li[p[a]]li[p[b]ul[li[p[c]]]]li[p[d]]]"),
    ("3. a\n4. b\n\n   more", "ol[li[p[a]]li[p[b]p[more]]]"),
    ("> quoted\n> > twice", "blockquote[p[quoted]blockquote[p[twice]]]"),
    ("```python\nx < 1\n\n# no\n```\nafter", "div[span[python]pre[code[x < 1\n\n# no]]]p[after]"),
    ("```\nnever closed", "div[pre[code[never closed]]]"),
    ("---", "hr[]"),
    ("a | b\n---|---\n1 | `c`", "div[table[thead[tr[th[a]th[b]]]tbody[tr[td[1]td[code[c]]]]]]"),
    ("[text](https://a.example/b_(c))", "p[span[text span[https://a.example/b_(c)]]]"),
    ("[https://a.example](https://a.example) [open", "p[span[https://a.example] [open]"),
    ("![cat](c.png)", "p[span[span[image not loaded ]cat span[c.png]]]"),
    ("<https://a.example> <b>", "p[span[https://a.example] <b>]"),
    ("**never *closed", "p[**never *closed]"),
    ("5 < 6 & 7 > 3", "p[5 < 6 & 7 > 3]"),
]
OUTLINE = """async (text) => {
  const { appendMarkdown } = await import("/static/markdown.js");
  const outline = (node) =>
    node.nodeType === 3 ? node.data : `${node.localName}[${[...node.childNodes].map(outline).join("")}]`;
  const parent = document.createElement("div");
  appendMarkdown(parent, text);
  return [...parent.childNodes].map(outline).join("");
}"""


@pytest.fixture
def page(store: PreferenceStore, sit: Sit) -> Any:
    """A page from which the modules can be imported."""
    add_task(store, "?", ("a", "b"))
    with running_page(store) as running:
        yield sit(running, "anna").page


def longest_common(left: list[str], right: list[str]) -> int:
    """The length of the longest common subsequence, by the recurrence of the textbook."""
    lengths = [[0] * (len(right) + 1) for _ in range(len(left) + 1)]
    for row, first in enumerate(left, 1):
        for column, second in enumerate(right, 1):
            best = max(lengths[row - 1][column], lengths[row][column - 1])
            lengths[row][column] = lengths[row - 1][column - 1] + 1 if first == second else best
    return lengths[-1][-1]


def test_markdown_becomes_what_it_means(page: Page) -> None:
    made = [page.evaluate(OUTLINE, text) for text, _ in RENDERED]
    assert made == [outline for _, outline in RENDERED]


def test_differences_are_the_least_possible(page: Page) -> None:
    generator = random.Random(1)
    pairs = [[[generator.choice("abcd") for _ in range(generator.randint(0, 12))] for _ in range(2)] for _ in range(60)]
    call = """async (pairs) => {
      const { matching } = await import("/static/difference.js");
      return pairs.map(([left, right]) => matching(left, right));
    }"""
    for (left, right), runs in zip(pairs, page.evaluate(call, pairs), strict=True):
        assert [token for first, _, _ in runs for token in first] == left
        assert [token for _, second, _ in runs for token in second] == right
        assert all(first == second for first, second, same in runs if same)
        assert sum(len(first) for first, _, same in runs if same) == longest_common(left, right)


def test_the_difference_view(store: PreferenceStore, sit: Sit) -> None:
    add_task(store, "?", ("The red fox jumps.", "The brown fox sleeps."))
    add_task(store, "?", ("same\n" * 3000 + "one", "same\n" * 3000 + "two"))
    with running_page(store) as running:
        seat = sit(running, "anna")
        for number in (1, 2):
            seat.number(number)
            seat.press("d")
            marks = seat.page.locator(".response mark").all_text_contents()
            expect(seat.page.locator("#remark")).to_contain_text(re.compile(r"\d+ % of the text is common"))
            assert set(marks) in ({"red", "brown", "jumps", "sleeps"}, {"one", "two"})
            seat.press("d")
            expect(seat.page.locator(".response mark")).to_have_count(0)
            seat.press("4", "Enter")
        seat.message("All done")
