"""Writing to a terminal or a pipe that may be gone: what nobody reads any more is no reason for a run to fail.

Ctrl-C in `rlhf run ... | tee log` ends `tee` as well, a closed terminal takes its lines with it, and `| head` leaves
when it has seen enough. The training goes on, or writes its checkpoint, whether or not anybody is told.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

# What may pass: there may be room again when the next line comes.
_PASSING = (errno.ENOSPC, errno.EDQUOT, errno.EAGAIN)


def say(text: str, stream: TextIO | None = None) -> None:
    """Prints a line on `stream`, standard output unless given, if there is still somebody who reads it.

    What the stream's encoding cannot hold becomes a question mark.
    """
    stream = sys.stdout if stream is None else stream
    if stream is None:  # the process was started with it closed
        return
    encoding = getattr(stream, "encoding", None) or "utf-8"
    with unread(stream):
        print(text.encode(encoding, errors="replace").decode(encoding), file=stream, flush=True)


def warn(text: str) -> None:
    """`say` on standard error."""
    if sys.stderr is not None:
        say(text, sys.stderr)


@contextmanager
def unread(stream: TextIO) -> Iterator[None]:
    """Ends the block, and raises nothing, where writing to `stream` fails; a reader that is gone is not tried again."""
    try:
        yield
    except OSError as error:
        if error.errno not in _PASSING:
            _forget(stream)
    except ValueError:
        if not stream.closed:
            raise


def _forget(stream: TextIO) -> None:
    """Points a stream without a reader at the null device, with what it still holds: the end of Python flushes it."""
    with suppress(OSError, ValueError):  # a stream that has no descriptor
        descriptor = stream.fileno()
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, descriptor)
        os.close(null)


class Forgiving:
    """A text stream whose writing never fails; everything else is the stream's own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes what can be written; says that all was."""
        with unread(self._stream):
            self._stream.write(text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Writes the lines."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flushes if there is a reader."""
        with unread(self._stream):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def forgiving(stream: TextIO) -> TextIO:
    """`stream` as libraries may use it that would fail, or end the process, where its reader is gone."""
    return stream if isinstance(stream, Forgiving) else cast(TextIO, Forgiving(stream))


def forgive_all() -> None:
    """Standard output and error never fail from here on, whoever prints: a reward function, a library, a warning."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - open as long as the process
        setattr(sys, name, forgiving(stream))


def flush_all() -> None:
    """Writes out what standard output and error still hold, if anybody reads it."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            try:
                stream.flush()
            except (OSError, ValueError):
                _forget(stream)
