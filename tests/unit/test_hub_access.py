"""A hub that does not answer costs seconds: what is in its cache is used, what is not ends with a message."""

from __future__ import annotations

import http.server
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rlhf.data import hub_access
from rlhf.data.hub_access import use_cache_if_hub_is_silent, why_silent
from tests.command import environment
from tests.ppo_example import write_models
from tests.silent_server import black_hole, silent_server

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@contextmanager
def answering(status: int) -> Iterator[str]:
    """The address of a server that answers every question with `status`."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (200, None),
        (401, None),
        (404, None),
        (500, "it answers with HTTP status 500"),
        (503, "it answers with HTTP status 503"),
    ],
)
def test_what_counts_as_an_answer(status: int, reason: str | None) -> None:
    with answering(status) as address:
        assert why_silent(address, 30) == reason


def test_silence_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    started = time.monotonic()
    for server in (silent_server, black_hole):
        with server() as address:
            assert why_silent(address, 0.3) == "no answer within 0.3 s"
    assert why_silent(address, 30) == "Connection refused"

    late = threading.Event()

    def slow(*_: object, **__: object) -> None:
        late.wait(60)
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    assert why_silent("http://hub.invalid", 0.3) == "no answer within 0.3 s"
    # What is not bounded takes a minute, or for ever.
    assert time.monotonic() - started < 30
    late.set()


def test_what_is_no_address_is_a_reason() -> None:
    assert "unknown url type" in str(why_silent("huggingface.co", 30))
    assert "notaport" in str(why_silent("http://127.0.0.1:notaport", 30))


def test_the_hub_is_asked_once_and_then_only_its_cache(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(hub_access, "_asked", {})
    with answering(200) as address:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        assert use_cache_if_hub_is_silent(30) is None
        assert os.environ["HF_HUB_OFFLINE"] == "0"
    assert use_cache_if_hub_is_silent(30) is None  # it is gone by now, and was not asked again
    asked: list[str] = []
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")

    def gone(url: str, _: float) -> str:
        asked.append(url)
        return "gone"

    monkeypatch.setattr(hub_access, "why_silent", gone)
    assert [use_cache_if_hub_is_silent(), use_cache_if_hub_is_silent()] == ["gone", "gone"]
    assert asked == ["http://127.0.0.1:9/api/models?limit=1"]
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert capsys.readouterr().err.count("does not answer (gone); only its cache") == 1


def test_offline_by_choice_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub_access, "_asked", {})
    monkeypatch.setattr(hub_access, "why_silent", lambda *_: pytest.fail("it was asked"))
    assert use_cache_if_hub_is_silent() is None


CODE = """
from rlhf.data import hub_access
hub_access.use_cache_if_hub_is_silent.__defaults__ = (1.0,)
from rlhf.config.data import HubData
from rlhf.data import load_prompts
from rlhf.errors import UserError
from rlhf.models.loading import load_policy, load_tokenizer
for work in (
    lambda: load_policy("owner/cached").config.hidden_size,
    lambda: len(load_tokenizer("owner/cached")) > 0,
    lambda: load_policy("owner/missing"),
    lambda: load_prompts(HubData(path="owner/missing-data")),
):
    try:
        print("got", work())
    except UserError as error:
        print(type(error).__name__, error)
"""


def knocks(server: socket.socket) -> int:
    """How many connections nobody has accepted yet."""
    server.setblocking(False)
    count = 0
    while True:
        try:
            server.accept()[0].close()
        except BlockingIOError:
            return count
        count += 1


def test_with_a_silent_hub_the_cache_is_used_and_the_rest_is_a_message(tmp_path: Path) -> None:
    write_models(tmp_path / "models")
    repository = tmp_path / "hf/hub/models--owner--cached"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(COMMIT)
    (repository / "snapshots").mkdir()
    (tmp_path / "models/policy").rename(repository / "snapshots" / COMMIT)
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        extra = {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": address, "no_proxy": "127.0.0.1"}
        extra |= {"HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0"}
        command = [sys.executable, "-c", CODE]
        done = subprocess.run(command, env=environment(extra), capture_output=True, text=True, check=True, timeout=400)
        # It was asked once, for one second; six patient attempts for each file would be minutes.
        assert knocks(server) == 1
    policy, tokenizer, missing, data = done.stdout.splitlines()
    assert (policy, tokenizer) == ("got 32", "got True")
    silence = "does not answer (no answer within 1 s)"
    assert missing.startswith("ConfigError model.path: owner/missing is not in the cache, and the hub " + silence)
    assert data.startswith("DataError data.path=owner/missing-data: the hub cannot be reached (no answer within 1 s)")
    assert done.stderr.count(f"the hub {address} {silence}; only its cache {tmp_path}/hf/hub is used") == 1
