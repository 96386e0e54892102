"""Ends what the ranks started when their supervisor was killed outright. Needs nothing but Python.

The kernel kills a rank whose supervisor dies (`die_with_parent`), but not the rank's own children: the workers of a
data loader or of a reward, a compiler. They are in the rank's process group, and the process of this file, one for each
launch, kills those groups. It reads their numbers from a pipe whose other end the supervisor alone holds, so that the
kernel closes it with the supervisor, however that ends. It has a session of its own, out of the terminal's reach.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from types import TracebackType


class Watchdog:
    """The supervisor's end; leaving the context ends the process, which then kills nothing."""

    def __enter__(self) -> Watchdog:
        # Without site and the environment's settings it starts within milliseconds and imports nobody's code.
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,  # whoever reads the supervisor's output is not to wait for this process
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Before its pipe is closed, so that the end is not taken for the supervisor's.
        self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()

    def guard(self, group: int) -> None:
        """From now on the process group `group` ends with the supervisor."""
        self._tell(f"+{group}\n")

    def release(self, group: int) -> None:
        """The process group has ended: its number may become somebody else's."""
        self._tell(f"-{group}\n")

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        # Somebody may have killed it: the run is worth more than its watchdog.
        with contextlib.suppress(OSError):
            os.write(self._process.stdin.fileno(), line.encode())


def _watch(lines: Iterable[str]) -> None:
    groups = set()
    for line in lines:
        if line.startswith("+"):
            groups.add(int(line[1:]))
        else:
            groups.discard(int(line[1:]))
    for group in groups:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # who signals all processes of a job means the supervisor and the ranks
    _watch(sys.stdin)
