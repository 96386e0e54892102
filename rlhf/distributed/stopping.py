"""Ending well when told to: SIGTERM, Ctrl-C and SIGHUP become a checkpoint and an exit code. Needs no torch.

`install` sets the handlers. The first signal raises `Stopped` where the process happens to be, unless a training polls:
inside `polled` it only sets a flag, and the training looks at it where it can stop without losing anything.

Ranks hear of a signal at different moments, or not all of them, and one that leaves alone would leave the others
waiting in their next collective operation. So nothing that another rank would notice follows from the flag itself:
`StopPoll.agreed` is a collective operation, called equally often on all ranks, in which a signal that any rank has seen
counts for all. The flag alone (`StopPoll.asked`) may cut short work that this rank does on its own.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING

from rlhf.distributed.launch import SUPERVISOR_PID
from rlhf.errors import EXIT_INTERRUPTED, Stopped
from rlhf.terminal import warn

if TYPE_CHECKING:
    from rlhf.distributed.runtime import Runtime

# Where ranks have seen different ones, the first of these counts.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# Other launchers pass on a signal that the rank may have got itself: what follows so soon is the same request.
_ECHO_SECONDS = 1.0


class WorkGivenUp(Exception):  # noqa: N818 - it says what was done, nothing went wrong
    """This rank gave up work of its own because a stop is asked for; whoever catches it has the ranks agree."""


@dataclass
class _Requests:
    """What this process was told; signals belong to the process, so there is one of it."""

    process: int | None = None
    repeats_after: float | None = None
    number: int | None = None
    seen_at: float = 0.0
    polled: bool = False


_requests = _Requests()


def install() -> None:
    """Sets the handlers in this process; signals that it was started to ignore (nohup) stay ignored.

    A repeated signal ends the process at once, without anything being written. Not so in a rank of our own supervisor:
    there the supervisor decides when it is enough, and a service manager that signals all processes of a job reaches
    the rank twice, once directly and once through the supervisor.
    """
    if threading.current_thread() is not threading.main_thread():
        return  # Python has signals handled by the main thread alone
    _requests.process = os.getpid()
    _requests.number = None
    _requests.repeats_after = 0.0
    if SUPERVISOR_PID in os.environ:
        _requests.repeats_after = None
    elif "RANK" in os.environ or "SLURM_PROCID" in os.environ:
        _requests.repeats_after = _ECHO_SECONDS
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _on_signal)


def requested() -> int | None:
    """The signal that asked this process to end; None when none did."""
    return _requests.number


def explain_stop(error: KeyboardInterrupt) -> int:
    """Says on standard error how the process was stopped; the exit code."""
    if isinstance(error, Stopped):
        warn(f"rlhf: {error}")
        return error.exit_code
    warn("rlhf: interrupted; the same command goes on where it stopped")
    return EXIT_INTERRUPTED


def _on_signal(number: int, frame: FrameType | None) -> None:
    if os.getpid() != _requests.process:
        # A forked helper inherited this handler: it has nothing to save, and its parent may wait for its end.
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        return
    if _requests.number is not None:
        after = _requests.repeats_after
        if after is not None and time.monotonic() - _requests.seen_at >= after:
            os._exit(128 + number)
        return
    _requests.number, _requests.seen_at = number, time.monotonic()
    if not _requests.polled:
        raise Stopped(number)


class StopPoll:
    """What a training asks whether it is to stop. `runtime=None`: there is no way to stop it in good order."""

    def __init__(self, runtime: Runtime | None = None) -> None:
        self._runtime = runtime
        self._looked_at = time.monotonic()
        self._said_so = False

    @property
    def asked(self) -> bool:
        """Whether this rank has been told to stop. No other rank may notice what is done about it."""
        return self._runtime is not None and _requests.number is not None

    def give_up_if_asked(self) -> None:
        """Raises `WorkGivenUp` when this rank has been told to stop."""
        self._looked_at = time.monotonic()
        if self.asked:
            raise WorkGivenUp

    def agreed(self) -> int | None:
        """The signal by which all ranks stop here, None when they go on. All ranks call it and get the same answer."""
        if self._runtime is None:
            return None
        self._mind_the_time(self._runtime)
        if self._runtime.world_size == 1:
            return _requests.number
        import torch

        flags = torch.tensor([float(_requests.number == number) for number in SIGNALS], device=self._runtime.device)
        counts = self._runtime.sum_over_ranks(flags).tolist()
        for number, count in zip(SIGNALS, counts, strict=True):
            if count:
                if _requests.number is None:
                    # Told by the others: if the signal still comes, it is no news.
                    _requests.number, _requests.seen_at = number, time.monotonic()
                return int(number)
        return None

    def _mind_the_time(self, runtime: Runtime) -> None:
        """Rank 0 says once what will be lost where a step takes longer than a stop may."""
        before, self._looked_at = self._looked_at, time.monotonic()
        seconds = self._looked_at - before
        if seconds > runtime.stop_seconds and runtime.is_main and not self._said_so:
            self._said_so = True
            warn(
                f"rlhf: for {seconds:.0f} s the training could not have stopped, and distributed.stop_seconds="
                f"{runtime.stop_seconds:g} is less: a stop would have killed it, and what was trained since the newest "
                "checkpoint were lost. Raise the key, and the time that your scheduler leaves, or lower save_every."
            )

    def stop_if_agreed(self) -> None:
        """Raises `Stopped` on all ranks when one of them has been told to stop. All ranks call it."""
        number = self.agreed()
        if number is not None:
            raise Stopped(number)


@contextmanager
def polled(runtime: Runtime) -> Iterator[StopPoll]:
    """While the block runs a signal only sets the flag that the yielded poll looks at. All ranks enter together.

    A signal that came after the last look raises `Stopped` on leaving.
    """
    # From here on a rank answers a signal in the next collective operation: none may be left behind who would not.
    runtime.barrier()
    _requests.polled = True
    try:
        yield StopPoll(runtime)
    finally:
        _requests.polled = False
    if _requests.number is not None:
        raise Stopped(_requests.number)
