"""The process of a trial: started as W&B's agent does, told to end in good order, and gone when its agent is."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from rlhf.errors import UserError
from rlhf.runs.files import disk_errors
from rlhf.runs.processes import group_lives

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)
# What a trial may take to write its checkpoint before it is killed; W&B's server waits as long.
STOP_SECONDS = 30.0
TAIL_LINES = 12
_TAIL_BYTES = 16_384


class TrialProcess:
    """A running trial in a process group of its own; standard input is closed, the output goes to `log`."""

    def __init__(self, words: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        with disk_errors(log):
            log.parent.mkdir(parents=True, exist_ok=True)
            self._output = log.open("ab")
        self.log = log
        self._begins_at = self._output.tell()
        parent = os.getpid()

        def end_with_parent() -> None:
            # SIGTERM, not SIGKILL: the trial writes its checkpoint, and whoever takes it over goes on from there.
            _LIBC.prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
            if os.getppid() != parent:
                os._exit(143)

        try:
            self._child = subprocess.Popen(
                words,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=subprocess.STDOUT,
                process_group=0,
                preexec_fn=end_with_parent,  # agents have one thread
            )
        except OSError as error:
            self._output.close()
            raise UserError(
                f"the sweep's program cannot be started: {error.strerror}: {words[0]}. Its command is {list(words)}"
            ) from error

    @property
    def group(self) -> int:
        """The process group."""
        return self._child.pid

    def poll(self) -> int | None:
        """The exit code once it has ended: 128 + the signal where one ended it."""
        code = self._child.poll()
        if code is None:
            return None
        return 128 - code if code < 0 else code

    def stop(self, seconds: float = STOP_SECONDS) -> int:
        """Tells it to end, waits, and kills what is left. Returns the exit code."""
        with suppress(ProcessLookupError):
            if self._child.poll() is None:
                self._child.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self._child.wait(timeout=seconds)
        self.kill()
        code = self.poll()
        assert code is not None
        return code

    def kill(self) -> None:
        """Ends the whole group at once, also what the process has left behind."""
        with suppress(ProcessLookupError):
            os.killpg(self.group, signal.SIGKILL)
        self._child.wait()

    def clean(self, seconds: float = 2.0) -> None:
        """After the end of the process: what it started and left behind ends too."""
        self._output.close()
        end = time.monotonic() + seconds
        while group_lives(self.group) and time.monotonic() < end:
            with suppress(ProcessLookupError):
                os.killpg(self.group, signal.SIGKILL)
            time.sleep(0.02)

    def tail(self) -> tuple[str, ...]:
        """The last lines that it printed in this attempt."""
        with self.log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(self._begins_at, size - _TAIL_BYTES))
            lines = file.read().decode("utf-8", errors="replace").splitlines()
        return tuple(line.rstrip() for line in lines if line.strip())[-TAIL_LINES:]
