"""A run that is started in the background, to be told to end or killed."""

from __future__ import annotations

import json
import os
import subprocess
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

from tests.command import SMOKE, command, environment


class Run:
    """A command that was started, with everything that it starts."""

    def __init__(
        self, folder: Path, *arguments: str, extra: Mapping[str, str] | None = None, output: int | None = None
    ) -> None:
        """`output` is where standard output and error go; else the first goes nowhere and `stop` returns the second."""
        self.mark = f"RLHF_TEST_MARK_{uuid.uuid4().hex}"
        self.path = folder / "run"
        self.process = subprocess.Popen(
            command("run", *SMOKE, "run.dir=run", *arguments),
            cwd=folder,
            env=environment({self.mark: "1", **(extra or {})}),
            stdout=subprocess.DEVNULL if output is None else output,
            stderr=subprocess.PIPE if output is None else output,
            text=True,
        )

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

    def wait_until(self, there: Callable[[], bool], what: str) -> None:
        """Returns when it is there; fails when the command ends first."""
        end = time.monotonic() + 120
        while not there():
            assert self.process.poll() is None, f"the command ended with {self.process.returncode} before {what}"
            assert time.monotonic() < end, f"no {what}"
            time.sleep(0.005)

    def stop(self, number: int) -> tuple[int, str, float]:
        """Sends the signal and waits: exit code, what was said on standard error, seconds. No process is left."""
        began = time.monotonic()
        self.process.send_signal(number)
        _, said = self.process.communicate(timeout=60)
        seconds = time.monotonic() - began
        self.check_nothing_left()
        assert self.process.returncode is not None
        return self.process.returncode, said, seconds

    def processes(self) -> list[int]:
        """Living processes that were started by this command, however indirectly: they have its mark."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                try:
                    environ = (entry / "environ").read_bytes()
                    state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                except OSError:
                    continue
                if self.mark.encode() in environ and state != "Z":
                    found.append(int(entry.name))
        return found

    def check_nothing_left(self) -> None:
        """No process of the run is left after 15 s."""
        end = time.monotonic() + 15
        while (left := self.processes()) and time.monotonic() < end:
            time.sleep(0.05)
        assert left == [], [psutil.Process(number).cmdline() for number in left]

    def ranks(self) -> list[psutil.Process]:
        """The rank processes, rank 0 first."""
        return [
            child for child in psutil.Process(self.process.pid).children() if "rlhf.worker" in " ".join(child.cmdline())
        ]
