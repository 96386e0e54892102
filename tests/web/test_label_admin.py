"""The admin page in a browser: its figures are those of the server, its texts are text, and its export downloads."""

from __future__ import annotations

import re
import zipfile

from playwright.sync_api import Route, expect

from rlhf.preferences.store import PreferenceStore
from tests.web.attacks import MARKUP
from tests.web.conftest import Sit, needs_chromium
from tests.web.label_example import add_pairs, running_page

pytestmark = needs_chromium


def test_the_admin_page(store: PreferenceStore, sit: Sit) -> None:
    add_pairs(store, 4, num_labels=3)
    names = ["ada", MARKUP[0][:80], "chen"]
    with running_page(store) as running:
        # Everybody takes the left one of the first three tasks; chen flags, comments, and skips the fourth.
        for name in names:
            client = running.client(name)
            for number in range(4):
                task = client.post("/api/next", json={}).json()["task"]
                skips = name == "chen" and number == 3
                answer = {"kind": "skip"} if skips else {"kind": "choice", "position": 0, "strength": 2}
                body = {"assignment": task["assignment"], "token": f"token-{task['assignment']:04}", "answer": answer}
                if name == "chen" and number == 0:
                    body |= {"flags": [{"kind": "personal_data", "position": 1}], "comment": MARKUP[5]}
                assert client.post("/api/submit", json={**body, "seconds": 0.0}).status_code == 200
        seat = sit(running, link=running.admin_link)
        page = seat.page
        expect(page.locator("#tiles")).to_contain_text("11 of 12")
        rows = page.locator("#annotators tbody tr")
        expect(rows).to_have_count(3)
        expect(rows.filter(has_text="chen").locator("td").first).to_have_text("3")
        expect(rows.filter(has_text="ada")).to_contain_text("100 %n 4")
        expect(rows.filter(has_text=MARKUP[0][:80])).to_have_count(1)
        expect(page.get_by_role("img", name=re.compile("Left chosen: 100 %")).first).to_be_visible()
        expect(page.get_by_role("img", name=re.compile("Percent agreement: "))).to_be_visible()
        expect(page.locator("#cohen tbody tr")).to_have_count(3)
        expect(page.locator("#flag-list article")).to_contain_text("personal data")
        expect(page.locator("#comment-list article")).to_contain_text(MARKUP[5])
        assert page.evaluate("window.attacked") is None
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")

        # A refresh shows what the server says then; the server itself may give the figures of a moment ago.
        def later(route: Route) -> None:
            summary = route.fetch().json()
            route.fulfill(json={**summary, "progress": {"wanted": 12, "done": 12}})

        page.route("**/api/admin/summary", later)
        page.get_by_role("button", name="Refresh").click()
        expect(page.locator("#tiles")).to_contain_text("12 of 12")

        seat.allowed = ("download: ",)
        page.get_by_label("Format").select_option("jsonl")
        with page.expect_download() as download:
            page.get_by_role("button", name="Download").click()
        with zipfile.ZipFile(download.value.path()) as packed:
            assert any(name.endswith(".jsonl") for name in packed.namelist())
        # A refusal is shown, not saved.
        seat.allowed = ("download: ", "422")
        refusal = {"error": "There is nothing to export."}
        page.route("**/api/admin/export*", lambda route: route.fulfill(status=422, json=refusal))
        page.get_by_role("button", name="Download").click()
        expect(page.get_by_role("alert").filter(has_text="There is nothing to export.")).to_be_visible()


def test_an_annotator_has_no_admin_page(store: PreferenceStore, sit: Sit) -> None:
    add_pairs(store, 1)
    with running_page(store) as running:
        seat = sit(running, "anna")
        expect(seat.page.get_by_role("link", name="Admin")).to_be_hidden()
        # The browser looks for an icon of a page that is plain text.
        seat.allowed = ("401", "404")
        seat.page.goto(f"{running.url}/admin")
        assert seat.page.locator("body").inner_text() == "unauthorized"
