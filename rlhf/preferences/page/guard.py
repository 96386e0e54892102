"""What every request passes before the application sees it, and every response on its way out.

Plain ASGI, around everything: routes, static files, unknown paths, errors. In this order: who is it (401 and nothing
else), is it us who are addressed (400, against DNS rebinding), may it change state (403, against other sites), is its
body small and quick enough (413, 408).
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs, urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rlhf.preferences.page.tokens import Tokens, Visitor

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
HEADERS = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "cache-control": "no-store",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
_RAW_HEADERS = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
_ADMIN_PREFIXES = ("/admin", "/api/admin")
COOKIE_DAYS = 30
_MAX_VERIFIED = 1000
# A page whose address holds the token; the browser goes on from here by itself. Without an icon it would ask for one.
_ENTRY = (
    b'<!doctype html><html lang="en"><title>rlhf label</title><link rel="icon" href="/static/icon.svg">'
    b'<p><a href="%s">Go on to the page</a>'
)


@dataclass(frozen=True)
class GuardSettings:
    """`hosts` are the names under which the page is reached, in lower case and without a port; the address that a
    connection came in by is one as well. `origin` is the page's own where a proxy with TLS stands in front.

    `access_log` is told of every response: the visitor, method, path, status and seconds; no token is in any of them.
    """

    cookie: str
    hosts: Collection[str]
    origin: str | None = None
    max_body_bytes: int = 65536
    body_seconds: float = 10.0
    wrong_token_seconds: float = 0.2
    access_log: Callable[[str], None] | None = None


class Guard:
    """The middleware. The application finds the `Visitor` in `scope["state"]["visitor"]`."""

    def __init__(self, app: ASGIApp, tokens: Tokens, settings: GuardSettings) -> None:
        self._app = app
        self._tokens = tokens
        self._settings = settings
        # Cookies that were found genuine: a signature costs more than the rest of the guard together.
        self._verified: dict[str, Visitor] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request; anything but HTTP is closed at once, but for the start and end of the server."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        start = time.monotonic()
        statuses: list[int] = []

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])
                kept = [pair for pair in message.get("headers", []) if pair[0].decode("latin-1") not in HEADERS]
                message = {**message, "headers": [*kept, *_RAW_HEADERS]}
            await send(message)

        try:
            await self._handle(scope, receive, send_guarded)
        finally:
            if self._settings.access_log is not None:
                who = _describe(scope.get("state", {}).get("visitor"))
                took = time.monotonic() - start
                status = statuses[0] if statuses else "-"
                self._settings.access_log(f"{who} {scope['method']} {scope['path']!r} {status} {1000 * took:.0f} ms")

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        visitor, token_given = self._visitor(scope, headers)
        if visitor is None:
            if token_given:
                await asyncio.sleep(self._settings.wrong_token_seconds)
            await respond(send, 401, "unauthorized")
            return
        scope.setdefault("state", {})["visitor"] = visitor
        if not self._is_own_host(scope, headers.get("host", "")):
            await _refuse(send, 400, "wrong_host", "The page is not served under this name. See `hosts` of rlhf label.")
            return
        if scope["method"] == "GET" and scope["path"] in ("/", "/admin") and b"token=" in scope["query_string"]:
            await self._enter(scope, headers, visitor, send)
            return
        if scope["method"] not in _SAFE_METHODS:
            problem = self._foreign(headers)
            if problem is not None:
                await _refuse(send, 403, "foreign_request", problem)
                return
        try:
            body = await asyncio.wait_for(
                read_body(receive, headers.get("content-length", ""), self._settings.max_body_bytes),
                self._settings.body_seconds,
            )
        except TimeoutError:
            await _refuse(send, 408, "slow_body", "The request took too long to arrive.")
            return
        if body is None:
            limit = self._settings.max_body_bytes
            await _refuse(send, 413, "large_body", f"A request has at most {limit} bytes.")
            return
        await self._app(scope, _replay(body, receive), send)

    def _visitor(self, scope: Scope, headers: dict[str, str]) -> tuple[Visitor | None, bool]:
        """Who it is, and whether a token or cookie was given. What is given in the request itself beats a cookie."""
        wants_admin = _is_admin(scope["path"])
        query = parse_qs(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        cookies = _cookies(headers.get("cookie", ""))
        names = (f"{self._settings.cookie}_admin", self._settings.cookie)
        sessions = [self._session(cookies.get(name)) for name in names]
        admin_session, session = (
            visitor if visitor is not None and visitor.admin == admin else None
            for visitor, admin in zip(sessions, (True, False), strict=True)
        )
        entry = scope["method"] == "GET" and scope["path"] in ("/", "/admin") and "token" in query
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        if entry or "authorization" in headers:
            token = query["token"][0] if entry else bearer.strip() if scheme.lower() == "bearer" else ""
            visitor = self._tokens.visitor(token)
            if visitor is not None and not visitor.fixed:
                # A program says its name once and keeps it in the cookie, as a browser does.
                known = admin_session if visitor.admin else session
                visitor = Visitor(visitor.admin, known.name if known is not None and not known.fixed else None)
        elif wants_admin:
            visitor = admin_session
        else:
            visitor = session or admin_session
            if session is not None and admin_session is not None:
                scope.setdefault("state", {})["also_admin"] = True
        if visitor is not None and wants_admin and not visitor.admin:
            visitor = None
        return visitor, bool(entry or "authorization" in headers or any(name in cookies for name in names))

    def _session(self, cookie: str | None) -> Visitor | None:
        if cookie is None or cookie in self._verified:
            return None if cookie is None else self._verified[cookie]
        visitor = self._tokens.verify(cookie)
        if visitor is not None:
            if len(self._verified) >= _MAX_VERIFIED:
                self._verified.clear()
            self._verified[cookie] = visitor
        return visitor

    def _is_own_host(self, scope: Scope, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname
        except ValueError:
            return False
        server = scope.get("server")
        # Nobody else's name leads to a bare address, so the one that the connection came in by is always ours.
        return name is not None and (name in self._settings.hosts or (server is not None and name == server[0]))

    def _foreign(self, headers: dict[str, str]) -> str | None:
        """Why a request that changes state does not come from our own page; None when it does."""
        if headers.get("x-rlhf") != "1":
            return "The header X-RLHF: 1 is missing."
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            return "The body must be sent as application/json."
        if headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
            return "The request comes from another site."
        origin = headers.get("origin")
        own = {f"http://{headers.get('host', '')}", self._settings.origin}
        if origin is not None and origin.lower() not in {known.lower() for known in own if known}:
            return "The request comes from another origin."
        return None

    async def _enter(self, scope: Scope, headers: dict[str, str], visitor: Visitor, send: Send) -> None:
        """Exchanges the token of a link for a cookie and goes on to the address without it."""
        target = scope["path"]
        head = {"set-cookie": self.set_cookie(visitor)}
        if headers.get("sec-fetch-site", "none") in ("none", "same-origin"):
            await respond(send, 303, "", {**head, "location": target})
            return
        # The link stood on another site. To the browser a redirect would still be that site's doing, and it would
        # withhold a strict cookie; a page of ours that goes on is our own.
        head |= {"refresh": f"0; url={target}", "content-type": "text/html; charset=utf-8"}
        await respond(send, 200, (_ENTRY % target.encode()).decode(), head)

    def set_cookie(self, visitor: Visitor) -> str:
        """The value of the header that makes the browser remember a visitor."""
        name = f"{self._settings.cookie}_admin" if visitor.admin else self._settings.cookie
        secure = "; Secure" if (self._settings.origin or "").startswith("https:") else ""
        return (
            f"{name}={self._tokens.sign(visitor)}; Max-Age={COOKIE_DAYS * 86400}; Path=/; HttpOnly; "
            f"SameSite=Strict{secure}"
        )


async def respond(send: Send, status: int, text: str, headers: dict[str, str] | None = None) -> None:
    """A short response in plain text, unless the headers say otherwise."""
    body = text.encode()
    head = {"content-type": "text/plain; charset=utf-8", "content-length": str(len(body)), **(headers or {})}
    raw = [(name.encode(), value.encode()) for name, value in head.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


async def read_body(receive: Receive, declared: str, limit: int) -> bytes | None:
    """The whole body of a request; None for one above the limit, which is then not read to its end."""
    if declared.isdigit() and int(declared) > limit:
        return None
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return b"".join(parts)
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > limit:
            return None
        if not message.get("more_body", False):
            return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    waiting = [body]

    async def replayed() -> Message:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        return await receive()

    return replayed


async def _refuse(send: Send, status: int, reason: str, text: str) -> None:
    body: dict[str, Any] = {"error": text, "reason": reason}
    await respond(send, status, json.dumps(body), {"content-type": "application/json"})


def _is_admin(path: str) -> bool:
    return any(path == prefix or path.startswith(f"{prefix}/") for prefix in _ADMIN_PREFIXES)


def _cookies(header: str) -> dict[str, str]:
    try:
        return {name: morsel.value for name, morsel in SimpleCookie(header).items()}
    except CookieError:
        return {}


def _describe(visitor: Visitor | None) -> str:
    if visitor is None:
        return "nobody"
    name = "-" if visitor.name is None else repr(visitor.name)
    return f"admin {name}" if visitor.admin else name
