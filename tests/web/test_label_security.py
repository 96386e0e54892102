"""What the labelling page refuses: no token, other sites, other names, other paths, large and slow bodies."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import hashlib
import hmac
import http.client
import json
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from rlhf.preferences.page.guard import CONTENT_SECURITY_POLICY, GuardSettings
from rlhf.preferences.page.serving import host_names
from rlhf.preferences.page.tokens import Visitor
from rlhf.preferences.store import PreferenceStore
from tests.web.label_example import TIMEOUT, RunningPage, add_pairs, fill, running_page

GUARD = GuardSettings("", host_names("127.0.0.1"), body_seconds=TIMEOUT, wrong_token_seconds=0.05)
POSTS: dict[str, Any] = {
    "/api/annotator": {"name": "mallory"},
    "/api/next": {},
    "/api/submit": {"assignment": 1, "token": "abcdefgh", "answer": {"kind": "tie"}},
    "/api/undo": {},
    "/api/extend": {"assignment": 1},
    "/api/release": {"assignment": 1},
}
ADMIN_POSTS: dict[str, Any] = {"/api/admin/replan": {"num_labels": 0}}
GETS = ["/", "/api/me", "/static/label.js", "/static/nothing.js"]
ADMIN_GETS = ["/admin", "/api/admin/summary", "/api/admin/export", "/admin/", "/api/admin", "/api/admin/nothing"]
NOWHERE = ["/docs", "/redoc", "/openapi.json", "/nothing", "/favicon.ico", "/.well-known/x", "//", "/api/", "/static/"]
METHODS = ["GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE", "TRACE", "PROPFIND"]
HEADERS = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "cache-control": "no-store",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
ALL_PATHS = [*GETS, *ADMIN_GETS, *NOWHERE, *POSTS, *ADMIN_POSTS]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningPage]:
    """One page for all: none of these requests may change its store."""
    path = tmp_path_factory.mktemp("page") / "store.sqlite"
    with PreferenceStore.create(path, seed=1) as store:
        fill(store, num_labels=3)
        with running_page(store, guard=GUARD) as running:
            yield running
            assert store.current_labels() == []
            assert {task.plan.num_labels for task in store.tasks().values()} == {3}


def send(
    page: RunningPage, method: str, path: str, headers: dict[str, str] | None = None, body: Any = None
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of a request with exactly this path and these headers, which httpx would tidy up."""
    address = page.url.removeprefix("http://")
    with closing(http.client.HTTPConnection(address, timeout=TIMEOUT)) as connection:
        content = None if body is None else json.dumps(body)
        connection.request(method, path, content, headers or {})
        reply = connection.getresponse()
        return reply.status, {name.lower(): value for name, value in reply.getheaders()}, reply.read()


def session(page: RunningPage, *, admin: bool = False, name: str | None = "anna") -> dict[str, str]:
    """The headers of the page's own requests, with the cookie of an annotator or of the admin."""
    cookie = f"{page.cookie}_admin" if admin else page.cookie
    value = page.tokens.sign(Visitor(admin, name))
    return {"Cookie": f"{cookie}={value}", "X-RLHF": "1", "Content-Type": "application/json"}


def check_headers(headers: dict[str, str]) -> None:
    assert {name: headers.get(name) for name in HEADERS} == HEADERS
    assert "server" not in headers


def check_unauthorized(method: str, reply: tuple[int, dict[str, str], bytes]) -> None:
    """401 and nothing else: the same for everything, whatever is there."""
    status, headers, body = reply
    assert status == 401
    assert body == (b"" if method == "HEAD" else b"unauthorized")
    check_headers(headers)
    assert set(headers) - set(HEADERS) <= {"date", "content-type", "content-length", "connection"}
    assert headers["content-type"] == "text/plain; charset=utf-8"


@pytest.mark.parametrize("method", METHODS)
def test_without_a_token_everything_is_unauthorized(page: RunningPage, method: str) -> None:
    for path in ALL_PATHS:
        check_unauthorized(method, send(page, method, path))
        check_unauthorized(method, send(page, method, path, {"X-RLHF": "1", "Content-Type": "application/json"}, {}))


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Bearer "},
        {"Authorization": "Basic YTpi"},
        {"Authorization": "Bearer t\xf6ken"},
        {"Cookie": "COOKIE=x"},
        {"Cookie": "COOKIE=W10=.W10="},
        {"Cookie": "COOKIE=W251bGwsbnVsbCxudWxsXQ==.AAAA"},
        # A body that is no session: a name that no dict can hold, and one too deep to be parsed.
        {"Cookie": f"COOKIE={base64.urlsafe_b64encode(b'[false, [], true]').decode()}.AAAA"},
        {"Cookie": f"COOKIE={base64.urlsafe_b64encode(b'[' * 20000).decode()}.AAAA"},
        {"Cookie": "COOKIE=\xff.\xff; COOKIE_admin=;;;"},
        {"Cookie": "rlhf_00000000=SIGNED"},
        {"Cookie": "COOKIE_admin=SIGNED"},
        {"Cookie": "COOKIE=FORGED"},
        # A wrong token counts, whatever else there is.
        {"Cookie": "COOKIE=SIGNED", "Authorization": "Bearer wrong"},
    ],
)
def test_a_wrong_token_is_no_token(page: RunningPage, headers: dict[str, str]) -> None:
    signed = page.tokens.sign(Visitor(False, "anna"))
    forged = page.tokens.sign(Visitor(False, "ben")).partition(".")[0] + "." + signed.partition(".")[2]
    words = {"COOKIE": page.cookie, "SIGNED": signed, "FORGED": forged}
    for word, value in words.items():
        headers = {name: text.replace(word, value) for name, text in headers.items()}
    for method, path in (("GET", "/api/me"), ("POST", "/api/next"), ("GET", "/static/label.js"), ("GET", "/admin")):
        check_unauthorized(method, send(page, method, path, headers, {} if method == "POST" else None))


def test_the_token_of_a_link_signs_no_cookie(page: RunningPage) -> None:
    """Whoever has a link could else take the name of a judge, or one of others whose links are theirs."""
    key = page.tokens.annotator.encode()
    for name in ("judge", ["x"]):
        body = json.dumps([False, name, False]).encode()
        parts = (body, hmac.digest(key, b"session " + body, hashlib.sha256))
        cookie = ".".join(base64.urlsafe_b64encode(part).decode() for part in parts)
        headers = {**session(page), "Cookie": f"{page.cookie}={cookie}"}
        check_unauthorized("POST", send(page, "POST", "/api/next", headers, {}))


@pytest.mark.parametrize("path", ["/?token=wrong", "/?token=", "/admin?token=wrong", "/?token=TOKEN%00", "/?token=%ff"])
def test_a_wrong_link_opens_nothing(page: RunningPage, path: str) -> None:
    path = path.replace("TOKEN", page.tokens.annotator)
    check_unauthorized("GET", send(page, "GET", path))
    check_unauthorized("GET", send(page, "GET", path, session(page)))


def test_a_token_in_the_address_opens_the_entries_alone(page: RunningPage) -> None:
    query = f"?token={page.tokens.admin}"
    for method, path in (("GET", "/api/me"), ("GET", "/static/label.js"), ("POST", "/api/next"), ("POST", "/")):
        check_unauthorized(method, send(page, method, path + query))
    check_unauthorized("HEAD", send(page, "HEAD", "/" + query))


def test_an_annotator_is_no_admin(page: RunningPage) -> None:
    check_unauthorized("GET", send(page, "GET", f"/admin?token={page.tokens.annotator}"))
    bearer = {"Authorization": f"Bearer {page.tokens.annotator}"}
    renamed = {"Cookie": session(page)["Cookie"].replace(page.cookie, f"{page.cookie}_admin")}
    for headers in (session(page), bearer, renamed):
        for path in [*ADMIN_GETS, *ADMIN_POSTS]:
            check_unauthorized("GET", send(page, "GET", path, headers))
            check_unauthorized("POST", send(page, "POST", path, {**session(page), **headers}, {}))


def test_the_link_gives_a_cookie_that_scripts_and_other_sites_do_not_get(page: RunningPage) -> None:
    for query, name, target in (
        (f"/?token={page.tokens.annotator}", page.cookie, "/"),
        (f"/admin?token={page.tokens.admin}", f"{page.cookie}_admin", "/admin"),
    ):
        status, headers, body = send(page, "GET", query)
        assert (status, headers["location"], body) == (303, target, b"")
        check_headers(headers)
        value, *attributes = headers["set-cookie"].split("; ")
        assert value.startswith(f"{name}=")
        assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= set(attributes)
        assert page.tokens.annotator not in value
        assert page.tokens.admin not in value
        assert send(page, "GET", "/api/me", {"Cookie": value})[0] == 200
        # Where the link stood on another site, the browser would withhold the cookie along a redirect.
        status, headers, body = send(page, "GET", query, {"Sec-Fetch-Site": "cross-site"})
        assert (status, headers["refresh"]) == (200, f"0; url={target}")
        assert headers["set-cookie"].startswith(name)
        assert b"token" not in body


def test_programs_send_the_token_itself(page: RunningPage) -> None:
    for token, admin in ((page.tokens.annotator, False), (page.tokens.admin, True)):
        status, _, body = send(page, "GET", "/api/me", {"Authorization": f"Bearer {token}"})
        assert (status, json.loads(body)["admin"]) == (200, admin)


def test_one_browser_holds_both_links(page: RunningPage) -> None:
    both = {"Cookie": f"{session(page)['Cookie']}; {session(page, admin=True, name=None)['Cookie']}"}
    me = json.loads(send(page, "GET", "/api/me", both)[2])
    assert (me["annotator"], me["admin"]) == ("anna", True)
    assert send(page, "GET", "/api/admin/summary", both)[0] == 200
    assert json.loads(send(page, "GET", "/api/me", session(page))[2])["admin"] is False


FOREIGN: list[dict[str, str]] = [
    {"X-RLHF": ""},
    {"X-RLHF": "2"},
    {"Content-Type": "text/plain"},
    {"Content-Type": "application/x-www-form-urlencoded"},
    {"Content-Type": ""},
    {"Origin": "http://evil.example"},
    {"Origin": "null"},
    {"Origin": "http://127.0.0.1:1"},
    {"Origin": "https://HOST"},
    {"Origin": "http://HOST.evil.example"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
]


@pytest.mark.parametrize("change", FOREIGN)
def test_no_other_site_changes_anything(page: RunningPage, change: dict[str, str]) -> None:
    host = page.url.removeprefix("http://")
    change = {name: value.replace("HOST", host) for name, value in change.items()}
    for admin, posts in ((False, POSTS), (True, ADMIN_POSTS)):
        for path, body in posts.items():
            status, headers, text = send(page, "POST", path, {**session(page, admin=admin), **change}, body)
            assert status == 403, (path, text)
            assert json.loads(text)["reason"] == "foreign_request"
            check_headers(headers)
    for method in ("PUT", "DELETE", "PATCH"):
        assert send(page, method, "/api/next", {**session(page), **change}, {})[0] == 403


def test_our_own_page_is_let_through(page: RunningPage) -> None:
    own = {"Origin": page.url, "Sec-Fetch-Site": "same-origin", "Content-Type": "application/json; charset=utf-8"}
    status, _, body = send(page, "POST", "/api/annotator", {**session(page), **own}, {"name": "anna"})
    assert (status, json.loads(body)["annotator"]) == (200, "anna")


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "10.0.0.1", "", "[", "@"]
)
def test_another_name_for_the_address_is_refused(page: RunningPage, host: str) -> None:
    for path in ["/", "/api/me", "/static/label.js", f"/?token={page.tokens.annotator}"]:
        status, headers, body = send(page, "GET", path, {**session(page), "Host": host})
        assert (status, json.loads(body)["reason"]) == (400, "wrong_host")
        assert "set-cookie" not in headers
        check_headers(headers)
    assert send(page, "POST", "/api/next", {**session(page), "Host": host}, {})[0] == 400


@pytest.mark.parametrize("host", ["127.0.0.1:9", "localhost:8600", "LOCALHOST", "[::1]:5"])
def test_names_of_this_machine_with_any_port_are_ours(page: RunningPage, host: str) -> None:
    """A tunnel may end at another port."""
    assert send(page, "GET", "/api/me", {**session(page), "Host": host})[0] == 200


@pytest.mark.parametrize(
    "path",
    [
        "/static/../app.py",
        "/static/..%2fapp.py",
        "/static/%2e%2e/app.py",
        "/static/..\\app.py",
        "/static/....//app.py",
        "/static//etc/passwd",
        "/static/%2fetc%2fpasswd",
        "/static/.hidden.js",
        "/static/label.js%00.html",
        "/static/label.js/",
        "/static/../tokens.py",
        "/static",
        "/static/%c0%ae%c0%ae/app.py",
        "/static/" + "a/" * 2000 + "x.js",
    ],
)
def test_no_path_leads_out_of_the_static_files(page: RunningPage, path: str) -> None:
    status, headers, body = send(page, "GET", path, session(page))
    assert (status, json.loads(body)) == (404, {"error": "Not Found", "reason": "http"})
    check_headers(headers)


@pytest.mark.parametrize("path", NOWHERE)
def test_what_is_not_there_is_not_there(page: RunningPage, path: str) -> None:
    """No documentation of the interface either."""
    status, headers, _ = send(page, "GET", path, session(page))
    assert status == 404
    check_headers(headers)


def test_other_methods_are_not_allowed_and_carry_the_headers(page: RunningPage) -> None:
    for method in ("HEAD", "OPTIONS", "PUT", "DELETE"):
        status, headers, _ = send(page, method, "/api/next", session(page), {})
        assert status == 405
        check_headers(headers)
        assert "access-control-allow-origin" not in headers


def reply_to_part(page: RunningPage, path: str, length: int, body: str) -> bytes:
    """How the reply begins to a request that announces a body of that length and sends but this."""
    host, port = page.url.removeprefix("http://").split(":")
    headers = {"Host": "127.0.0.1", **session(page), "Content-Length": str(length)}
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    with socket.create_connection((host, int(port)), timeout=TIMEOUT) as connection:
        connection.sendall(f"POST {path} HTTP/1.1\r\n{head}\r\n{body}".encode())
        return connection.recv(100)


def test_a_large_body_is_refused_without_being_read(page: RunningPage) -> None:
    assert reply_to_part(page, "/api/submit", 10**12, "").startswith(b"HTTP/1.1 413")

    def chunks() -> Iterator[bytes]:
        for _ in range(100):
            yield b" " * 1000

    reply = httpx.post(f"{page.url}/api/submit", headers=session(page), content=chunks(), timeout=TIMEOUT)
    assert (reply.status_code, reply.json()["reason"]) == (413, "large_body")


def test_a_slow_body_is_given_up(tmp_path: Path) -> None:
    guard = dataclasses.replace(GUARD, body_seconds=0.3)
    with PreferenceStore.create(tmp_path / "store.sqlite", seed=1) as store, running_page(store, guard=guard) as page:
        assert reply_to_part(page, "/api/next", 10, "{").startswith(b"HTTP/1.1 408")


def test_wrong_tokens_wait_and_hold_nobody_up(tmp_path: Path) -> None:
    seconds, number = 1.0, 40
    guard = dataclasses.replace(GUARD, wrong_token_seconds=seconds)

    async def tries(page: RunningPage) -> None:
        async with httpx.AsyncClient(base_url=page.url, verify=False, timeout=TIMEOUT) as client:
            replies = await asyncio.gather(*(client.get(f"/?token=wrong{one}") for one in range(number)))
        assert {reply.status_code for reply in replies} == {401}

    with PreferenceStore.create(tmp_path / "store.sqlite", seed=1) as store, running_page(store, guard=guard) as page:
        start = time.monotonic()
        asyncio.run(tries(page))
        # Far less than one after the other.
        assert seconds <= time.monotonic() - start < seconds * number / 2


def test_a_websocket_is_not_opened(page: RunningPage) -> None:
    upgrade = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "YQ==",
    }
    check_unauthorized("GET", send(page, "GET", "/api/me", upgrade))


def test_behind_a_proxy_the_page_is_the_one_of_its_url(tmp_path: Path) -> None:
    guard = GuardSettings("", {"label.example.org"}, origin="https://label.example.org")
    with PreferenceStore.create(tmp_path / "store.sqlite", seed=1) as store:
        add_pairs(store, 1)
        with running_page(store, guard=guard) as page:
            host = {"Host": "label.example.org"}
            status, headers, _ = send(page, "GET", f"/?token={page.tokens.annotator}", host)
            assert (status, headers["set-cookie"].endswith("; Secure")) == (303, True)
            for origin, expected in (("https://label.example.org", 200), ("https://example.org", 403)):
                own = {**session(page), **host, "Origin": origin}
                assert send(page, "POST", "/api/annotator", own, {"name": "anna"})[0] == expected
            assert send(page, "GET", "/api/me", {**session(page), "Host": "localhost"})[0] == 400


def test_the_access_log_has_no_secrets(tmp_path: Path) -> None:
    lines: list[str] = []
    guard = GuardSettings("", host_names("127.0.0.1"), wrong_token_seconds=0, access_log=lines.append)
    with PreferenceStore.create(tmp_path / "store.sqlite", seed=1) as store, running_page(store, guard=guard) as page:
        client = page.client("anna")
        client.post("/api/next", json={})
        client.get("/nothing?token=guess")
        httpx.get(f"{page.url}/?token=guess", timeout=TIMEOUT)
    # A line is written behind the reply; now all are there.
    text = "\n".join(lines)
    assert "'anna' POST '/api/next' 200" in text
    assert "nobody GET '/' 401" in text
    assert not any(secret in text for secret in (page.tokens.annotator, "guess", "token"))
