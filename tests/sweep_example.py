"""A sweep over a stand-in for a training, whose trials take milliseconds.

The stand-in writes its metric step by step, keeps a checkpoint after each step, goes on from it when it is started
again, and notes every attempt and every end, so that a test can count them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rlhf.sweeps.check import check_sweep
from rlhf.sweeps.file import read_sweep_file
from rlhf.sweeps.folder import JOURNAL_STORAGE, Sweep, SweepFolder, create, open_sweep

PROGRAM = """
import json, os, signal, sys, time
from pathlib import Path

given = dict(one.removeprefix("--").split("=", 1) for one in sys.argv[1:])
folder = Path(os.environ["RLHF_TRIAL_FOLDER"])
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
checkpoint = folder / "step"
done = int(checkpoint.read_text()) if checkpoint.exists() else 0
with (folder / "attempts").open("a") as file:
    file.write(f"{done}\\n")
if given.get("fail") == "True":
    sys.exit("there is no such thing")
x, steps = float(given.get("x", 0)), int(given.get("steps", 3))
noise = 0.01 * int(given.get("seed", 0))
(folder / "manifest.json").write_text(json.dumps({"code": {"commit": given.get("code", "abc"), "diff_hash": None}}))
for step in range(done + 1, steps + 1):
    while step == 2 and os.path.exists(given.get("wait_while", "")):
        time.sleep(0.01)
    time.sleep(60 if step == 5 and x > float(given.get("stuck_above", x)) else float(given.get("pause", 0)))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"stage": "s", "step": step, "score": -((x - 3) ** 2) + noise - 1 / step}) + "\\n")
    checkpoint.write_text(str(step))
with (folder / "ends").open("a") as file:
    file.write("end\\n")
"""


def write_file(folder: Path, text: str, *, metric: bool = True) -> Path:
    """A sweep file over the stand-in: what `text` says, with the metric and the command."""
    program = folder / "program.py"
    program.write_text(PROGRAM)
    head = "metric: {name: score, goal: maximize}\n" if metric else ""
    # Without the site packages it starts in milliseconds.
    command = f'command: ["{sys.executable}", "-S", "-E", "${{program}}", "${{args}}"]\nprogram: {program}\n'
    path = folder / "sweep-file.yaml"
    path.write_text(head + command + text)
    return path


def make_sweep(
    folder: Path,
    text: str,
    *,
    metric: bool = True,
    storage: str = JOURNAL_STORAGE,
    lease_seconds: float = 60.0,
    seed: int = 1,
) -> Sweep:
    """A sweep over the stand-in."""
    file = read_sweep_file(write_file(folder, text, metric=metric))
    space = check_sweep(file)
    create(file, space, SweepFolder(folder / "sweep"), seed=seed, storage=storage, lease_seconds=lease_seconds)
    return open_sweep(str(folder / "sweep"))


def lines_of(path: Path) -> list[str]:
    """The lines of a file; none where there is no file."""
    return path.read_text().splitlines() if path.exists() else []


def values_of(sweep: Sweep) -> list[dict[str, Any]]:
    """The settings in their order."""
    return [record.values for record in sweep.journal.look().settings.values()]


def published() -> dict[str, Any]:
    """What W&B's own package `sweeps` 0.3.0 answered when it was asked (it cannot be installed beside numpy 2)."""
    body = json.loads((Path(__file__).parent / "unit" / "wandb_sweeps.json").read_text())
    assert isinstance(body, dict)
    return body
