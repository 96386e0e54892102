"""A reward server in this process, and one that answers whatever a test wants, for tests of serving."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from rlhf.config import load_config
from rlhf.config.zero import ZeroConfig
from rlhf.distributed.runtime import Runtime
from rlhf.listening import address, listen
from rlhf.serving.app import make_app
from rlhf.serving.batching import Batcher
from rlhf.serving.command import check, describe, load_rewards, served_keys
from rlhf.serving.scoring import ServedRewards
from rlhf.serving.server import Server


class Running:
    """A server of ours: where it is, and what scores behind it."""

    def __init__(self, address: str, batcher: Batcher, served: ServedRewards) -> None:
        self.address = address
        self.batcher = batcher
        self.served = served


@contextmanager
def serving(*arguments: str, token: str | None = None) -> Iterator[Running]:
    """What `rlhf serve ARGUMENTS` serves, on a free port, until the block ends."""
    config = load_config([*served_keys(arguments), "serve.port=0", "distributed.device=cpu"]).config
    check(config.serve)
    runtime = Runtime.start(config.distributed, ZeroConfig(), config.seed)
    rewards = load_rewards(config, runtime)
    served = ServedRewards(rewards, config.serve.max_batch_size, runtime.device)
    batcher = Batcher(served, config.serve.max_wait_ms / 1000, config.serve.max_waiting_rows)
    bound, ready = listen(config.serve.host, config.serve.port, "serve."), threading.Event()
    app = make_app(config.serve, batcher, describe(config, rewards, runtime), token)
    server = Server(app, config.serve, ready.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    try:
        assert ready.wait(60)
        yield Running(address(config.serve.host, bound.getsockname()[1]), batcher, served)
    finally:
        server.should_exit = True
        thread.join()
        batcher.close()
        bound.close()


Reply = tuple[int, Any]


@contextmanager
def scripted(reply: Callable[[str, dict[str, Any], int], Reply]) -> Iterator[str]:
    """The address of a server that answers `reply(path, headers and body, number of the request)`: status and body."""
    numbers = iter(range(10**6))

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            task: dict[str, Any] = json.loads(self.rfile.read(length)) if length else {}
            status, body = reply(self.path, {**task, "headers": dict(self.headers)}, next(numbers))
            content = body.encode() if isinstance(body, str) else json.dumps(body).encode()
            # The client of a test of timeouts is gone.
            with suppress(ConnectionError):
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        do_GET = do_POST = _answer  # noqa: N815 - the library's names

        def log_message(self, format: str, *values: Any) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Returns when `condition` holds; fails when it does not in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)
