"""Runs the `rlhf` command as a user does, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import rlhf

ROOT = Path(rlhf.__file__).parent.parent
SMOKE = ("experiment=smoke", "distributed.device=cpu")


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment, with the package on the path and nobody's W&B account."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **(extra or {})}


def command(*arguments: str) -> list[str]:
    """`rlhf` with arguments."""
    return [sys.executable, "-m", "rlhf", *arguments]


def rlhf_command(
    *arguments: str, cwd: Path, extra: Mapping[str, str] | None = None, timeout: float = 900
) -> subprocess.CompletedProcess[str]:
    """Runs `rlhf` in folder `cwd` to its end."""
    return subprocess.run(
        command(*arguments),
        cwd=cwd,
        env=environment(extra),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def wait_for(path: Path, process: subprocess.Popen[bytes], seconds: float = 600) -> None:
    """Returns when `path`, its name or a pattern, is there; fails when the process ends first or nothing comes."""
    end = time.monotonic() + seconds
    while not any(path.parent.glob(path.name)):
        assert process.poll() is None, f"the command ended with {process.returncode} before {path} was there"
        assert time.monotonic() < end, f"{path} was not there after {seconds} s"
        time.sleep(0.05)
