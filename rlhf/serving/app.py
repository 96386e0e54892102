"""The HTTP application: `POST /score`, `GET /info`, `GET /health`. JSON in, JSON out, nothing else."""

from __future__ import annotations

import asyncio
import hmac
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from rlhf.config.serve import ServeConfig
from rlhf.serving.batching import Batcher
from rlhf.serving.requests import RequestProblem, parse_request

RETRY_SECONDS = 1


@dataclass(frozen=True)
class Description:
    """What `/info` says besides what changes: see `rlhf.rewards.remote_client.ServerInfo`."""

    body: dict[str, Any]

    @property
    def model(self) -> dict[str, Any]:
        """What comes with every score: enough to notice that something else is served than before."""
        return {"hash": self.body["hash"], "version": self.body["version"]}


def make_app(config: ServeConfig, batcher: Batcher, description: Description, token: str | None) -> FastAPI:
    """The application. With a `token` all but `/health` asks for `Authorization: Bearer TOKEN`."""
    # Its pages of documentation would load scripts from elsewhere.
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    max_bytes = math.floor(config.max_body_mib * 2**20)

    @app.middleware("http")
    async def guard(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        # `request.url` is put together with the Host header, which is the client's to choose.
        if token is not None and request.scope["path"] != "/health" and not _is_known(request, token):
            return JSONResponse({"error": "wrong or missing token"}, 401, {"WWW-Authenticate": "Bearer"})
        return await call_next(request)

    @app.exception_handler(RequestProblem)
    async def problem(request: Request, error: RequestProblem) -> Response:
        headers = {"Retry-After": str(RETRY_SECONDS)} if error.status == 503 else None
        return JSONResponse(error.to_json(), error.status, headers)

    @app.exception_handler(HTTPException)
    async def no_such_thing(request: Request, error: HTTPException) -> Response:
        text = f"{request.method} {request.url.path}: {error.detail}; there are POST /score, GET /info, GET /health"
        return JSONResponse({"error": text}, error.status_code)

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse({"status": "ok", "waiting": batcher.num_waiting})

    @app.get("/info")
    async def info() -> Response:
        counts = batcher.counts
        served = {"requests": counts.requests, "responses": counts.responses, "passes": counts.passes}
        return JSONResponse({**description.body, "served": served})

    @app.post("/score")
    async def score(request: Request) -> Response:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise RequestProblem(415, f"expected Content-Type: application/json, got {kind or 'none'}")
        asked = parse_request(await _body(request, max_bytes), config.max_request_rows)
        scores = await asyncio.wrap_future(batcher.submit(asked))
        return JSONResponse({"scores": scores, "model": description.model})

    return app


def _is_known(request: Request, token: str) -> bool:
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), token.encode())


async def _body(request: Request, max_bytes: int) -> bytes:
    """The body, never more of it in memory than is allowed."""
    problem = RequestProblem(413, f"the request is larger than serve.max_body_mib allows ({max_bytes} bytes)")
    length = request.headers.get("content-length", "0")
    if length.isascii() and length.isdigit() and int(length) > max_bytes:
        raise problem
    pieces, size = [], 0
    try:
        async for piece in request.stream():
            size += len(piece)
            if size > max_bytes:
                raise problem
            pieces.append(piece)
    except ClientDisconnect as error:
        raise RequestProblem(400, "the connection ended before the request did") from error
    return b"".join(pieces)
