"""Compares mathematical answers in a process of its own: one JSON line in, one verdict out. Started by `maths`.

A response is hostile input: `9^{9^{9^9}}` makes sympy compute for ever, or fill the memory, where no Python code can
interrupt it. So the memory is limited, CPU time ends a comparison by a signal, and where that finds no gap between two
byte codes a timer of the C library ends the process. Signals that are meant for the training are ignored: it decides
when it is done, and this process ends with its input. Run as a file, it imports nothing of the package.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import re
import resource
import signal
import sys
from functools import lru_cache
from typing import Any

MAX_MEMORY_BYTES = 4 << 30
# A comparison that CPU time cannot end is ended after this much more of it, on the clock.
HARD_LIMIT_FACTOR, HARD_LIMIT_SECONDS = 3, 5.0
FINAL_MARK = "####"
_MARKED = re.compile(r"\\boxed|\\fbox|\$[^$]+\$|\\\(|\\\[")
_NUMBER_WITH_UNIT = re.compile(r"\$?\s*[-+]?\$?\s*[\d.,]*\d\s*%?(?:\s+[A-Za-z][A-Za-z ]*)?")
# Two words in a row that are no LaTeX commands: a sentence.
_PROSE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}[,;:]?\s+[A-Za-z]{2,}")


class OutOfTime(BaseException):
    """Not an `Exception`, so that sympy's handlers of those let it pass."""


def read_answer(text: str) -> list[Any]:
    """What a text that is an answer says: sympy expressions, or a text that is none; empty where nothing is found.

    Of a worked solution what follows the last `####` counts. Text without any mark of mathematics is read as LaTeX,
    unless it is a number with its unit or a sentence, in which the last expression is looked for.
    """
    from math_verify import parse

    text = text.rpartition(FINAL_MARK)[2].strip().removesuffix(".").strip()
    plain = _MARKED.search(text) or _NUMBER_WITH_UNIT.fullmatch(text) or _PROSE.search(text)
    found: list[Any] = [] if plain else parse(f"${text}$", parsing_timeout=None)
    return found or parse(text, parsing_timeout=None)


@lru_cache(maxsize=4096)
def _expected(text: str) -> tuple[Any, ...]:
    """The right answer of a row: every response to its prompt is compared with it."""
    return tuple(read_answer(text))


def judge(expected: str, response: str) -> str:
    """`correct`, `wrong`, `unparsable` (no answer in the response) or `unknown` (none in `expected`)."""
    from math_verify import parse, verify

    right = list(_expected(expected))
    if not right:
        return "unknown"
    given = read_answer(response) if FINAL_MARK in response else parse(response, parsing_timeout=None)
    if not given:
        return "unparsable"
    return "correct" if verify(right, given, timeout_seconds=None) else "wrong"


def judge_in_time(expected: str, response: str, seconds: float) -> str:
    """`judge`, or `timeout` after `seconds` of CPU time. Ends the process where nothing else would end it."""
    faulthandler.dump_traceback_later(HARD_LIMIT_FACTOR * seconds + HARD_LIMIT_SECONDS, exit=True)
    try:
        # Again and again: whoever catches everything may have swallowed the first.
        signal.setitimer(signal.ITIMER_PROF, seconds, 0.1)
        try:
            return judge(expected, response)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    except OutOfTime:
        return "timeout"
    except (MemoryError, RecursionError):
        return "unparsable"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        faulthandler.cancel_dump_traceback_later()


def _raise(number: int, frame: Any) -> None:
    raise OutOfTime


def main() -> None:
    """Answers until the input ends."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    # What a library prints is no reply.
    os.dup2(2, 1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, _raise)
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.disable(logging.CRITICAL)
    try:
        import math_verify

        start = {"ready": True}
        del math_verify
    except ImportError as error:
        start = {"ready": False, "error": str(error)}  # type: ignore[dict-item]
    print(json.dumps(start), file=replies, flush=True)
    for line in sys.stdin.buffer:
        task = json.loads(line)
        verdict = judge_in_time(task["expected"], task["response"], task["seconds"])
        print(json.dumps(verdict), file=replies, flush=True)


if __name__ == "__main__":
    main()
