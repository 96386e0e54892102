"""A server with OpenAI's interface whose replies a test decides."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Reply:
    """What the server says: a status, the body (an object as JSON, bytes as they are), and headers."""

    status: int
    body: Any
    headers: Mapping[str, str] = field(default_factory=dict)


def said(text: str | None, prompt_tokens: int = 10, response_tokens: int = 5, **more: Any) -> Reply:
    """A chat completion with this text."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"} | more
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": response_tokens}
    return Reply(200, {"object": "chat.completion", "choices": [choice], "usage": usage})


@dataclass
class ChatServer:
    """Where the server is, and all that it was sent: bodies and headers, in order."""

    address: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[Mapping[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    busy: int = 0
    most_busy: int = 0


# The reply to a request: its body, and how many came before it.
Script = Callable[[dict[str, Any], int], Reply]


@contextlib.contextmanager
def chat_server(script: Script) -> Iterator[ChatServer]:
    """A running server; it ends with the block."""
    state = ChatServer()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with state.lock:
                number = len(state.bodies)
                state.bodies.append(body)
                state.headers.append(dict(self.headers))
                state.paths.append(self.path)
                state.busy += 1
                state.most_busy = max(state.busy, state.most_busy)
            try:
                reply = script(body, number)
            finally:
                with state.lock:
                    state.busy -= 1
            content = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
            # The client of a test of timeouts is gone.
            with contextlib.suppress(ConnectionError):
                self.send_response(reply.status)
                self.send_header("Content-Length", str(len(content)))
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state.address = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
