"""Mathematical answers compared as mathematics by math-verify, in processes that can be killed (`math_worker`)."""

from __future__ import annotations

import json
import os
import queue
import select
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from rlhf.config.rewards import MathReward
from rlhf.rewards.math_worker import HARD_LIMIT_FACTOR, HARD_LIMIT_SECONDS
from rlhf.rewards.protocol import RewardBatch, RewardError, shown

Verdict = Literal["correct", "wrong", "unparsable", "timeout", "unknown"]
# What starting Python and importing sympy may take on a busy machine.
_START_SECONDS = 120.0


class Checker:
    """One process that compares answers; it is started when it is first needed, and again after it had to end.

    It may be used from any thread, by one at a time: the limit of time is kept in the other process.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._end: weakref.finalize[Any, Any] | None = None
        self._buffer = b""

    def check(self, expected: str, response: str) -> Verdict:
        """The verdict on one response; `timeout` also where the process had to be killed. Raises `RewardError`."""
        task = json.dumps({"expected": expected, "response": response, "seconds": self._seconds}).encode() + b"\n"
        try:
            try:
                process = self._asked(task)
            except BrokenPipeError:
                # It was killed while it had nothing to do.
                self.close()
                process = self._asked(task)
            # Longer than what the process itself keeps to: this is for one that was stopped from outside.
            reply = self._line(process, HARD_LIMIT_FACTOR * self._seconds + 2 * HARD_LIMIT_SECONDS)
        except BaseException:  # a signal as well: its reply would be taken for that to the next question
            self.close()
            raise
        if reply is None:
            self.close()
            return "timeout"
        verdict: Verdict = json.loads(reply)
        return verdict

    def close(self) -> None:
        """Ends the process."""
        if self._end is not None:
            self._end()
        self._process = self._end = None

    def _asked(self, task: bytes) -> subprocess.Popen[bytes]:
        process = self._running()
        assert process.stdin is not None
        process.stdin.write(task)
        process.stdin.flush()
        return process

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None:
            return self._process
        worker = Path(__file__).with_name("math_worker.py")
        process = subprocess.Popen(
            # -P: the modules beside the file must not hide those of the library.
            [sys.executable, "-P", str(worker)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._process, self._buffer = process, b""
        self._end = weakref.finalize(self, _kill, process)
        reply = self._line(process, _START_SECONDS)
        start = {"error": "it ended, or said nothing"} if reply is None else json.loads(reply)
        if not start.get("ready"):
            self.close()
            raise RewardError(
                f"a reward of type math cannot start its comparing process: {start['error']}. Install math-verify with "
                '`pip install "math-verify[antlr4_9_3]"`.'
            )
        return process

    def _line(self, process: subprocess.Popen[bytes], seconds: float) -> bytes | None:
        """The next line of the process; None when it ends, or is silent for `seconds`."""
        assert process.stdout is not None
        end = time.monotonic() + seconds
        while b"\n" not in self._buffer:
            left = end - time.monotonic()
            if left <= 0 or not select.select([process.stdout], [], [], left)[0]:
                return None
            piece = os.read(process.stdout.fileno(), 1 << 16)
            if not piece:
                return None
            self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        with suppress(BrokenPipeError):  # a question that was not read to its end
            pipe.close()
    process.wait()


@dataclass
class _Pool:
    """Checkers that are free, at most `size` in all; they are made as they are needed."""

    size: int
    seconds: float
    free: queue.SimpleQueue[Checker] = field(default_factory=queue.SimpleQueue)
    num_made: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def check(self, expected: str, response: str) -> Verdict:
        checker = self._take()
        try:
            return checker.check(expected, response)
        finally:
            self.free.put(checker)

    def _take(self) -> Checker:
        with self.lock:
            if self.free.empty() and self.num_made < self.size:
                self.num_made += 1
                return Checker(self.seconds)
        return self.free.get()


class MathRule:
    """`correct`, `wrong` or `unparsable`, by the column with the right answer. A row without one is not scored."""

    may_abstain: ClassVar[bool] = True

    def __init__(self, config: MathReward) -> None:
        self.config = config
        self._pool = _Pool(config.num_workers, config.timeout_seconds)

    def score(self, batch: RewardBatch) -> Tensor:
        """Scores (B,), NaN where the column is null.

        A response that takes longer than `timeout_seconds` counts as `unparsable`. Raises `RewardError` when the data
        has no such column, when a value of it holds no answer, and when math-verify is not installed.
        """
        config = self.config
        if config.column not in batch.columns:
            known = ", ".join(batch.columns) or "none"
            raise RewardError(
                f"a math reward compares with the column {config.column}, which the data does not have; its columns "
                f"are: {known}. Set `column` to the one with the answer."
            )
        values = batch.columns[config.column]
        tasks = [
            (str(value), _tail(response, config.max_characters))
            for response, value in zip(batch.responses, values, strict=True)
            if value is not None
        ]
        verdicts = iter(self._verdicts(tasks))
        scores = []
        for value in values:
            verdict = None if value is None else next(verdicts)
            if verdict == "unknown":
                raise RewardError(
                    f"the column {config.column} holds {shown(str(value))}, in which math-verify finds no answer. "
                    "Expected a number or LaTeX, or a solution that ends with `#### answer` or \\boxed{answer}."
                )
            scores.append(float("nan") if verdict is None else self._score_of(verdict))
        return torch.tensor(scores, dtype=torch.float32)

    def _verdicts(self, tasks: Sequence[tuple[str, str]]) -> list[Verdict]:
        if self.config.num_workers == 1 or len(tasks) < 2:
            return [self._pool.check(*task) for task in tasks]
        threads = ThreadPoolExecutor(self.config.num_workers)
        try:
            return list(threads.map(lambda task: self._pool.check(*task), tasks))
        finally:
            # Nobody waits for what is not needed any more, such as after Ctrl-C.
            threads.shutdown(wait=False, cancel_futures=True)

    def _score_of(self, verdict: Verdict) -> float:
        if verdict == "correct":
            return self.config.correct
        return self.config.wrong if verdict == "wrong" else self.config.unparsable


def _tail(response: str, length: int) -> str:
    """The end of a response, where the answer is."""
    # A lone surrogate cannot be written as UTF-8.
    return response[-length:].encode("utf-8", errors="replace").decode()
