"""The real thing, small: ranks that meet, sum a number and take one ZeRO step, compared with what must come out."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlhf.config import RLHFConfig
from rlhf.distributed.launch import SUPERVISOR_PID
from rlhf.doctor.finding import Finding, green, red
from rlhf.doctor.rank_check import START_WEIGHTS, STEP_WEIGHTS

# The work takes about two seconds; importing torch and DeepSpeed on a slow disk takes the rest.
DEADLINE_SECONDS = 90.0
_END_SECONDS = 5.0
# bf16 has 8 bits of mantissa.
_TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2}
_REMEDIES = {
    "cpu": "run it again with GLOO_SOCKET_IFNAME=lo; set zero=none if DeepSpeed is to blame",
    "cuda": "run it again with NCCL_DEBUG=INFO; NCCL_P2P_DISABLE=1 or NCCL_SHM_DISABLE=1 often names the culprit",
}


@dataclass(frozen=True)
class RankCheck:
    """What to start: how many ranks, on what, under which ZeRO stage and offload."""

    num_processes: int
    device: Literal["cpu", "cuda"]
    precision: Literal["auto", "fp32", "bf16"]
    zero: dict[str, Any]

    @property
    def name(self) -> str:
        """The line's name."""
        ranks = f"{self.num_processes} rank{'s' if self.num_processes > 1 else ''}"
        return f"{ranks} on {'CPU' if self.device == 'cpu' else 'GPU'}"


def planned_checks(config: RLHFConfig, num_gpus: int) -> list[RankCheck]:
    """Two ranks on CPU, or as many as the run has; on every GPU as well, where there are some that the run may use."""
    distributed = config.distributed
    zero = {
        "stage": config.zero.stage or 2,
        "offload_optimizer": config.zero.offload_optimizer,
        "offload_parameters": config.zero.offload_parameters,
    }
    on_gpus = num_gpus > 0 and distributed.device != "cpu"
    ranks = 2 if on_gpus else max(2, distributed.num_processes)
    checks = [RankCheck(ranks, "cpu", "fp32" if on_gpus else distributed.precision, zero)]
    if on_gpus:
        ranks = distributed.num_processes if distributed.num_processes > 1 else num_gpus
        checks.append(RankCheck(min(ranks, num_gpus), "cuda", distributed.precision, zero))
    return checks


def check_ranks(check: RankCheck, seconds: float = DEADLINE_SECONDS) -> Finding:
    """Starts the ranks as a run does, waits for at most `seconds`, and compares what they computed."""
    with tempfile.TemporaryDirectory(prefix="rlhf-doctor-") as name:
        folder = Path(name)
        (folder / "check.json").write_text(json.dumps(check.__dict__))
        started = time.monotonic()
        code = _run_group(folder, seconds)
        waited = time.monotonic() - started
        said = _last_words(folder)
        if code is None:
            found = f"not done after {seconds:g} s" + (f"; the last it said: {said}" if said else "")
            return red(check.name, found, _REMEDIES[check.device])
        results = [_read(folder / f"rank{rank}.json") for rank in range(check.num_processes)]
    if code != 0:
        return red(check.name, f"ended with exit code {code}: {said or 'without a word'}", _REMEDIES[check.device])
    trouble = difference(results)
    if trouble is not None:
        return red(check.name, trouble, _REMEDIES[check.device])
    work = max(result["seconds"] for result in results if result is not None)
    return green(
        check.name, f"all-reduce and a ZeRO-{check.zero['stage']} step in {work:.1f} s ({waited:.0f} s with the start)"
    )


def difference(results: list[dict[str, Any] | None]) -> str | None:
    """What is not as it must be in the ranks' results; None when all is well."""
    missing = [str(rank) for rank, result in enumerate(results) if result is None]
    if missing:
        return f"no result from rank {', '.join(missing)}"
    done = [result for result in results if result is not None]
    expected_sum = len(done) * (len(done) + 1) / 2
    for rank, result in enumerate(done):
        if result["world_size"] != len(done):
            return f"rank {rank} is one of {result['world_size']} ranks instead of {len(done)}"
        if result["sum"] != expected_sum:
            return f"all-reduce gave {result['sum']} on rank {rank} instead of {expected_sum}"
    for rank, result in enumerate(done):
        tolerance = _TOLERANCE[result["precision"]]
        for name, expected in (("weights", STEP_WEIGHTS), ("norm", [math.hypot(*START_WEIGHTS)])):
            if any(not math.isclose(a, b, rel_tol=tolerance) for a, b in zip(result[name], expected, strict=True)):
                return f"the {name} after a ZeRO step are {result[name]} on rank {rank} instead of {expected}"
    return None


def _run_group(folder: Path, seconds: float) -> int | None:
    """The exit code of the ranks, started by a process of their own whose output goes to a file; None when late."""
    with (folder / "output.log").open("wb") as log:
        group = subprocess.Popen(
            [sys.executable, "-m", "rlhf.doctor.rank_check", "launch", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, SUPERVISOR_PID: str(os.getpid())},
        )
        try:
            return group.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if group.poll() is None:
                group.send_signal(signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    group.wait(_END_SECONDS)
                group.kill()  # its ranks die with it
                group.wait()


def _last_words(folder: Path) -> str:
    """The last line that a rank, the first failing one's first, printed."""
    for path in (folder / "failure.log", folder / "output.log"):
        lines = path.read_text(errors="replace").strip().splitlines() if path.exists() else []
        if lines:
            return lines[-1].strip()
    return ""


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content
