"""Which process groups the watchdog of a launch ends."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator

import pytest

from rlhf.distributed.watchdog import Watchdog, _watch


@pytest.fixture
def groups() -> Iterator[list[subprocess.Popen[bytes]]]:
    processes = [subprocess.Popen(["sleep", "60"], start_new_session=True) for _ in range(2)]
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def test_what_is_guarded_ends_with_the_pipe_and_what_was_released_does_not(
    groups: list[subprocess.Popen[bytes]],
) -> None:
    kept, released = (process.pid for process in groups)
    _watch([f"+{released}\n", f"+{kept}\n", f"-{released}\n"])
    assert groups[0].wait(timeout=10) == -signal.SIGKILL
    assert groups[1].poll() is None


def test_an_orderly_end_ends_nothing_else_and_a_lost_watchdog_no_run(groups: list[subprocess.Popen[bytes]]) -> None:
    with Watchdog() as watchdog:
        watchdog.guard(groups[0].pid)
    assert watchdog._process.returncode == -signal.SIGKILL
    with Watchdog() as watchdog:
        watchdog._process.kill()
        watchdog._process.wait()
        watchdog.guard(groups[0].pid)
        watchdog.release(groups[0].pid)
    assert groups[0].poll() is None
