"""A run that is started in the background, to be told to end or killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from tests.command import ROOT, SMOKE, command, environment

# Every Python process of a held run loads this first. The wait begins where a training asks whether it is to stop, so
# that a test, however late it comes, finds the stage in the middle.
_HOLD = """
import os, sys, time
if "rlhf.worker" in sys.orig_argv and {stage!r} in sys.orig_argv and os.environ.get("RANK", "0") == "0":
    from rlhf.distributed import stopping
    times, agreed = 0, stopping.StopPoll.agreed
    def hold(self):
        global times
        times += self._runtime is not None
        if times == {times}:
            open({held!r}, "x").close()
            while stopping.requested() is None and os.path.exists({held!r}):
                time.sleep(0.01)
        return agreed(self)
    stopping.StopPoll.agreed = hold
"""

# Says that the first update of PPO has begun, which takes no signal until it is over.
_ANNOUNCE_UPDATE = """
import sys
if "rlhf.worker" in sys.orig_argv and "ppo" in sys.orig_argv:
    from rlhf.distributed import stopping
    agreed = stopping.StopPoll.agreed
    def patch(self):  # in the rollout, when the stage's modules are loaded
        from rlhf.stages.ppo.update import Updater
        optimise, stopping.StopPoll.agreed = Updater.optimise, agreed
        def announce(*arguments):
            open({begun!r}, "w").close()
            return optimise(*arguments)
        Updater.optimise = announce
        return agreed(self)
    stopping.StopPoll.agreed = patch
"""


def hook(folder: Path, name: str, code: str) -> dict[str, str]:
    """The variables for a command of which every Python process runs `code` before anything else."""
    place = folder / f"hook-{name}"
    place.mkdir(exist_ok=True)
    (place / "sitecustomize.py").write_text(code)
    return {"PYTHONPATH": f"{place}{os.pathsep}{ROOT}"}


def held(folder: Path, stage: str, times: int) -> tuple[Path, dict[str, str]]:
    """A file, and the variables for a command whose `stage` creates it in the middle of training and then waits.

    It waits the `times`-th time that rank 0 asks whether to stop, until it is told to or the file is removed. SFT and
    the reward model ask before the first step and after each, PPO in each rollout (under ZeRO-3 with sharded frozen
    models twice) and after each update.
    """
    file = folder / "held"
    file.unlink(missing_ok=True)
    return file, hook(folder, f"{stage}-{times}", _HOLD.format(stage=stage, times=times, held=str(file)))


def announced_update(folder: Path) -> tuple[Path, dict[str, str]]:
    """A file, and the variables for a command of one rank that creates it when the first update of PPO begins."""
    file = folder / "begun"
    return file, hook(folder, "update", _ANNOUNCE_UPDATE.format(begun=str(file)))


def marked_processes(mark: str) -> list[int]:
    """Living processes other than this one that have a variable of this name."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                environ = (entry / "environ").read_bytes()
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if mark.encode() in environ and state != "Z":
                found.append(int(entry.name))
    return found


class Run:
    """A command that was started, with everything that it starts; leaving the context kills what is left of it."""

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        extra: Mapping[str, str] | None = None,
        output: int | None = None,
        hold: tuple[str, int] | None = None,
    ) -> None:
        """`output` is where standard output and error go; else the first goes nowhere and `stop` returns the second.

        `hold`: a stage and when it is to wait, see `held`.
        """
        self.mark = f"RLHF_TEST_MARK_{uuid.uuid4().hex}"
        self.path = folder / "run"
        self._held: Path | None = None
        holding: dict[str, str] = {}
        if hold is not None:
            self._held, holding = held(folder, *hold)
        self.process = subprocess.Popen(
            command("run", *SMOKE, "run.dir=run", *arguments),
            cwd=folder,
            env=environment({self.mark: "1", **holding, **(extra or {})}),
            stdout=subprocess.DEVNULL if output is None else output,
            stderr=subprocess.PIPE if output is None else output,
            text=True,
        )

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # The supervisor first, which would start no more ranks then.
        for number in (self.process.pid, *self.processes()) if self.process.poll() is None else self.processes():
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        self.process.communicate()

    def lines(self, stage: str) -> list[dict[str, Any]]:
        """The stage's lines of the metrics so far."""
        try:
            found = (self.path / "metrics.jsonl").read_text().splitlines(keepends=True)
        except FileNotFoundError:
            return []
        whole = [json.loads(line) for line in found if line.endswith("\n")]
        return [line for line in whole if line["stage"] == stage]

    def wait_for_step(self, stage: str, step: int) -> None:
        """Returns when the stage has logged `step` or a later one."""
        self.wait_until(lambda: any(line["step"] >= step for line in self.lines(stage)), f"{stage} step {step}")

    def wait_for_hold(self) -> None:
        """Returns when the stage of `hold` waits in the middle of its training."""
        assert self._held is not None, "the run was not started with `hold`"
        self.wait_until(self._held.exists, f"a wait in {self._held}")

    def wait_until(self, there: Callable[[], bool], what: str) -> None:
        """Returns when it is there; fails when the command ends first."""
        end = time.monotonic() + 900
        while not there():
            assert self.process.poll() is None, f"the command ended with {self.process.returncode} before {what}"
            assert time.monotonic() < end, f"no {what}"
            time.sleep(0.005)

    def stop(self, number: int) -> tuple[int, str, float]:
        """Sends the signal and waits: exit code, what was said on standard error, seconds. No process is left."""
        began = time.monotonic()
        self.process.send_signal(number)
        _, said = self.process.communicate(timeout=200)
        seconds = time.monotonic() - began
        self.check_nothing_left()
        assert self.process.returncode is not None
        return self.process.returncode, said, seconds

    def processes(self) -> list[int]:
        """Living processes that were started by this command, however indirectly: they have its mark."""
        return marked_processes(self.mark)

    def check_nothing_left(self) -> None:
        """No process of the run is left, after a minute at most."""
        end = time.monotonic() + 60
        while (left := self.processes()) and time.monotonic() < end:
            time.sleep(0.05)
        assert left == [], [psutil.Process(number).cmdline() for number in left]

    def ranks(self) -> list[psutil.Process]:
        """The rank processes, rank 0 first."""
        found = {}
        for child in psutil.Process(self.process.pid).children():
            # The supervisor starts other programs as well, which may have ended by now.
            with suppress(psutil.NoSuchProcess):
                if "rlhf.worker" in child.cmdline():
                    found[int(child.environ()["RANK"])] = child
        return [found[rank] for rank in sorted(found)]
