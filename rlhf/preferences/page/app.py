"""The routes of the labelling page. Everything around them, from tokens to headers, is in `guard`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from rlhf.errors import UserError
from rlhf.preferences.page.admin import Admin, Prompts, RuleKind
from rlhf.preferences.page.desk import Desk, DeskError
from rlhf.preferences.page.guard import Guard, GuardSettings
from rlhf.preferences.page.payloads import (
    AssignmentBody,
    EmptyBody,
    NameBody,
    ReplanBody,
    SubmitBody,
    UndoBody,
)
from rlhf.preferences.page.serving import limited_threads
from rlhf.preferences.page.tokens import Tokens, Visitor
from rlhf.terminal import warn

STATIC = Path(__file__).with_name("static")
# A name of a static file: no part of it starts with a dot, so none leads out of the folder.
_STATIC_NAME = re.compile(r"[A-Za-z0-9_-][\w.-]*(/[A-Za-z0-9_-][\w.-]*)*", re.ASCII)
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".ico": "image/x-icon",
    ".woff2": "font/woff2",
}


@dataclass(frozen=True)
class Page:
    """Everything that a labelling server is made of."""

    desk: Desk
    tokens: Tokens
    guard: GuardSettings


def make_app(page: Page) -> Guard:
    """The ASGI application."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False, lifespan=limited_threads)
    guard = Guard(app, page.tokens, page.guard)
    _add_errors(app)
    _add_files(app)
    _add_session(app, page.desk, guard)
    _add_tasks(app, page.desk)
    _add_admin(app, Admin(page.desk.store))
    return guard


def visitor_of(request: Request) -> Visitor:
    """Who makes a request; the guard has let them in."""
    visitor: Visitor = request.state.visitor
    return visitor


def _annotator(request: Request) -> str:
    name = visitor_of(request).name
    if name is None:
        raise DeskError(409, "no_name", "Say your name first.")
    return name


def _add_files(app: FastAPI) -> None:
    @app.get("/")
    def index() -> Response:
        return _file("index.html")

    @app.get("/admin")
    def admin() -> Response:
        return _file("admin.html")

    @app.get("/static/{name:path}")
    def static(name: str) -> Response:
        return _file(name)


def _file(name: str) -> Response:
    path = STATIC / name
    kind = _TYPES.get(path.suffix)
    if kind is None or not _STATIC_NAME.fullmatch(name) or not path.is_file():
        raise HTTPException(404)
    return Response(path.read_bytes(), headers={"content-type": kind})


def _add_session(app: FastAPI, desk: Desk, guard: Guard) -> None:
    def me(visitor: Visitor, also_admin: bool) -> dict[str, Any]:
        return {
            "annotator": visitor.name,
            "may_rename": not visitor.fixed,
            "admin": visitor.admin or also_admin,
            "store": desk.store.path.name,
            "instructions": desk.settings.instructions,
            "progress": desk.progress.of(visitor.name),
        }

    @app.get("/api/me")
    def get_me(request: Request) -> Response:
        visitor = visitor_of(request)
        if visitor.name is not None:
            # The links and sessions of a store outlive its file: one that was made anew does not know them yet.
            desk.enrol(visitor.name)
        return JSONResponse(me(visitor, getattr(request.state, "also_admin", False)))

    @app.post("/api/annotator")
    def post_annotator(request: Request, body: NameBody) -> Response:
        visitor = visitor_of(request)
        if visitor.fixed and visitor.name != body.name:
            raise DeskError(409, "fixed_name", f"This link is {visitor.name}'s; the name cannot be changed.")
        named = Visitor(visitor.admin, desk.enrol(body.name), visitor.fixed)
        shown = me(named, getattr(request.state, "also_admin", False))
        return JSONResponse(shown, headers={"set-cookie": guard.set_cookie(named)})


def _add_tasks(app: FastAPI, desk: Desk) -> None:
    # Plain functions: SQLite blocks, so each runs in a thread, which has a connection of its own.
    @app.post("/api/next")
    def post_next(request: Request, body: EmptyBody) -> Response:
        return JSONResponse(desk.next_task(_annotator(request)))

    @app.post("/api/submit")
    def post_submit(request: Request, body: SubmitBody) -> Response:
        return JSONResponse(desk.submit(_annotator(request), body))

    @app.post("/api/undo")
    def post_undo(request: Request, body: UndoBody) -> Response:
        return JSONResponse(desk.undo(_annotator(request), body.token))

    @app.post("/api/extend")
    def post_extend(request: Request, body: AssignmentBody) -> Response:
        return JSONResponse(desk.extend(_annotator(request), body.assignment))

    @app.post("/api/release")
    def post_release(request: Request, body: AssignmentBody) -> Response:
        return JSONResponse(desk.release(_annotator(request), body.assignment))


def _add_admin(app: FastAPI, admin: Admin) -> None:
    # The guard lets nobody but the admin through to these paths.
    @app.get("/api/admin/summary")
    def get_summary() -> Response:
        return JSONResponse(admin.summary())

    @app.get("/api/admin/export")
    def get_export(format: str = "trl", rule: RuleKind = "majority", prompts: Prompts = "all") -> Response:
        name, content = admin.export(format, rule, prompts)
        # The name comes from that of a file, which may hold anything.
        quoted = quote(name)
        head = {"content-type": "application/zip", "content-disposition": f"attachment; filename*=UTF-8''{quoted}"}
        return Response(content, headers=head)

    @app.post("/api/admin/replan")
    def post_replan(body: ReplanBody) -> Response:
        return JSONResponse(admin.replan(body))


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(DeskError)
    def desk_error(request: Request, error: DeskError) -> Response:
        return _error(error.status, error.reason, str(error))

    @app.exception_handler(RequestValidationError)
    def invalid(request: Request, error: RequestValidationError) -> Response:
        where = ", ".join(sorted({".".join(map(str, item["loc"])) for item in error.errors()}))
        return _error(422, "invalid_body", f"The request is not as expected: {where}.")

    @app.exception_handler(HTTPException)
    def http_error(request: Request, error: HTTPException) -> Response:
        if error.status_code == 400:  # what is no JSON, as FastAPI says it
            return _error(422, "invalid_body", "The request is no JSON.")
        return _error(error.status_code, "http", str(error.detail), dict(error.headers or {}))

    @app.exception_handler(UserError)
    def user_error(request: Request, error: UserError) -> Response:
        # A full disk, say: whoever runs the server must hear of it, in full; the annotator only that nothing was kept.
        warn(f"rlhf label: {error}")
        return _error(503, "store", "The store cannot take this now; nothing was kept. Tell whoever runs the page.")

    @app.exception_handler(Exception)
    def failure(request: Request, error: Exception) -> Response:
        return _error(500, "failure", "The server failed; nothing was kept. Tell whoever runs the page.")


def _error(status: int, reason: str, text: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": text, "reason": reason}, status, headers)
