"""One thread that scores; requests that come together share its forward passes."""

from __future__ import annotations

import threading
import time
import traceback
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from rlhf.errors import UserError
from rlhf.serving.requests import RequestProblem, ScoreRequest
from rlhf.serving.scoring import ServedRewards
from rlhf.terminal import warn

Scores = list[float | None]


@dataclass
class _Waiting:
    request: ScoreRequest
    came_at: float
    future: Future[Scores] = field(default_factory=Future)


@dataclass
class Counts:
    """What the thread has done."""

    requests: int = 0
    responses: int = 0
    passes: int = 0


class Batcher:
    """Scores requests in the order they come, several in one pass where they fit, each as if it were alone.

    A pass begins when `max_batch_size` responses wait, or `max_wait_seconds` after the first of them came. Requests
    whose columns have other names are not put together, because a missing column is not the same as an empty one.
    """

    def __init__(self, served: ServedRewards, max_wait_seconds: float, max_waiting_rows: int) -> None:
        self.counts = Counts()
        self._served = served
        self._max_wait_seconds = max_wait_seconds
        self._max_waiting_rows = max_waiting_rows
        self._queue: deque[_Waiting] = deque()
        self._num_rows = 0
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="rlhf-scores", daemon=True)
        self._thread.start()

    def submit(self, request: ScoreRequest) -> Future[Scores]:
        """The scores of a request, when they are there. Raises `RequestProblem` (503) when too much waits."""
        with self._changed:
            if self._closing:
                raise RequestProblem(503, "the server is stopping")
            if self._num_rows and self._num_rows + len(request) > self._max_waiting_rows:
                raise RequestProblem(
                    503, f"{self._num_rows} responses wait already (serve.max_waiting_rows={self._max_waiting_rows})"
                )
            waiting = _Waiting(request, time.monotonic())
            self._queue.append(waiting)
            self._num_rows += len(request)
            self._changed.notify()
        return waiting.future

    @property
    def num_waiting(self) -> int:
        """Responses that wait for their pass."""
        return self._num_rows

    def close(self) -> None:
        """Scores what has come, takes nothing more, and returns when the thread has ended."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while True:
            batch = self._next()
            if not batch:
                return
            # A client that has gone away needs no score.
            self._answer([waiting for waiting in batch if waiting.future.set_running_or_notify_cancel()])

    def _next(self) -> list[_Waiting]:
        """Requests for one pass; a request larger than a pass comes alone. Empty when the server stops."""
        with self._changed:
            while not self._queue:
                if self._closing:
                    return []
                self._changed.wait()
            end = self._queue[0].came_at + self._max_wait_seconds
            while self._num_rows < self._served.max_batch_size and not self._closing:
                left = end - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
            batch = [self._queue.popleft()]
            size = len(batch[0].request)
            while self._queue and self._fits(self._queue[0], batch[0], size):
                batch.append(self._queue.popleft())
                size += len(batch[-1].request)
            self._num_rows -= size
            return batch

    def _fits(self, waiting: _Waiting, first: _Waiting, size: int) -> bool:
        same_columns = waiting.request.columns.keys() == first.request.columns.keys()
        return same_columns and size + len(waiting.request) <= self._served.max_batch_size

    def _answer(self, batch: Sequence[_Waiting]) -> None:
        ready = [waiting for waiting in batch if self._is_readable(waiting)]
        if len(ready) > 1:
            try:
                scores = self._served.score([waiting.request for waiting in ready])
            except BaseException:  # noqa: BLE001 - one of them is to blame, and is found by scoring each alone
                pass
            else:
                self.counts.passes += 1
                for waiting, values in zip(ready, scores, strict=True):
                    self._deliver(waiting, values)
                return
        for waiting in ready:
            try:
                scores = self._served.score([waiting.request])
            except BaseException as error:  # noqa: BLE001 - a function's sys.exit() too would end the thread unseen
                waiting.future.set_exception(_problem(error))
            else:
                self.counts.passes += -(-len(waiting.request) // self._served.max_batch_size)
                self._deliver(waiting, scores[0])

    def _is_readable(self, waiting: _Waiting) -> bool:
        try:
            self._served.check(waiting.request)
        except Exception as error:  # noqa: BLE001 - no request may end the server; the client is told
            waiting.future.set_exception(_problem(error))
            return False
        return True

    def _deliver(self, waiting: _Waiting, values: Scores) -> None:
        self.counts.requests += 1
        self.counts.responses += len(values)
        waiting.future.set_result(values)


def _problem(error: BaseException) -> RequestProblem:
    """What the client is told: why its rows cannot be scored, or that the server is at fault, whose log says more."""
    if isinstance(error, RequestProblem):
        return error
    if isinstance(error, UserError):
        return RequestProblem(422, f"the rows cannot be scored: {error}")
    warn("rlhf serve: while scoring a request:\n" + "".join(traceback.format_exception(error)).rstrip())
    return RequestProblem(500, f"scoring failed: {type(error).__name__}: {str(error)[:300]}")
