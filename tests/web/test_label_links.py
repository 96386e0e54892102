"""The secrets of the links: where they are kept, who can read them, and two pages that start at once."""

from __future__ import annotations

import errno
import os
import re
import socket
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from rlhf.errors import DataError, StorageError
from rlhf.preferences.page import command as label_command
from rlhf.preferences.page.command import run_label
from rlhf.preferences.page.tokens import Visitor, cookie_name, load_tokens, token_file
from rlhf.preferences.store import PreferenceStore
from tests.web.test_label_server import NoServer


def test_the_tokens_survive_a_restart_in_a_file_that_others_cannot_read(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    made = load_tokens(path, ["anna"])
    file = token_file(path)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert len({made.annotator, made.admin, made.people["anna"]}) == 3
    # 32 bytes are 43 letters of base 64.
    assert {len(token) for token in (made.annotator, made.admin, made.people["anna"])} == {43}
    file.chmod(0o644)
    assert load_tokens(path, ["anna"]) == made
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    both = load_tokens(path, ["anna", "ben"])
    assert both.people["anna"] == made.people["anna"]
    cookie = made.sign(Visitor(False, "anna", fixed=True))
    assert both.verify(cookie) == Visitor(False, "anna", fixed=True)
    without = load_tokens(path, ["ben"])
    assert (without.visitor(made.people["anna"]), without.verify(cookie)) == (None, None)
    renewed = load_tokens(path, ["anna"], renew=True)
    for token in (made.annotator, made.admin, made.people["anna"]):
        assert renewed.visitor(token) is None
    assert renewed.verify(cookie) is None
    assert [one.name for one in tmp_path.iterdir()] == ["store.sqlite.tokens"]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"annotator": "a", "admin": "b", "people": {}}'])
def test_a_damaged_token_file_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "store.sqlite"
    token_file(path).write_text(text)
    with pytest.raises(DataError, match="new_tokens=true"):
        load_tokens(path, [])
    assert load_tokens(path, [], renew=True).admin


def test_pages_of_two_stores_keep_their_cookies_apart(tmp_path: Path) -> None:
    assert cookie_name(tmp_path / "a.sqlite") != cookie_name(tmp_path / "b.sqlite")


def test_pages_that_start_at_once_have_the_same_links(tmp_path: Path) -> None:
    for number in range(5):
        together = Barrier(8)

        def start(name: int, store: Path = tmp_path / f"{number}.sqlite", together: Barrier = together) -> str:
            together.wait()
            return load_tokens(store, [str(name)]).admin

        with ThreadPoolExecutor(8) as pool:
            assert len(set(pool.map(start, range(8)))) == 1
        assert len(load_tokens(tmp_path / f"{number}.sqlite", list("01234567")).people) == 8


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        load_tokens(tmp_path / "store.sqlite", [])
    assert list(tmp_path.iterdir()) == []


def test_the_browser_is_opened_without_a_token_among_its_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Everybody on a machine sees the arguments of all programs; the file with the link is the owner's alone."""
    path = tmp_path / "a & b.sqlite"
    PreferenceStore.create(path, seed=1).close()
    page = tmp_path / "a & b.sqlite.open.html"
    opened: list[str] = []

    class Looks(NoServer):
        def run(self, sockets: list[socket.socket]) -> None:
            assert stat.S_IMODE(page.stat().st_mode) == 0o600
            opened.append(page.read_text())

    monkeypatch.setattr(label_command, "make_server", lambda app: Looks())
    addresses: list[str] = []
    monkeypatch.setattr("webbrowser.open", addresses.append)
    run_label([f"store={path}", "port=0", "open_browser=true"])
    link = re.search(r"http\S+token=\S+", capsys.readouterr()[0])
    assert link is not None
    assert f'url={link[0]}"' in opened[0]
    assert addresses == [page.as_uri()]
    assert not page.exists()
