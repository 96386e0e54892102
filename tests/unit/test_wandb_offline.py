"""What a killed process left of its offline folder is mended, and what W&B had not kept of it is sent again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlhf.config.tracking import TrackingConfig
from rlhf.runs.folder import RunFolder
from rlhf.runs.tracking import Tracker
from rlhf.runs.wandb_offline import mend
from tests.unit import wandb_file
from tests.unit.test_tracking import FakeWandb
from tests.unit.test_tracking import wandb as wandb  # the fixture

OFFLINE = TrackingConfig(wandb="offline")
FILE = "wandb/offline-run-20260101_000000-abcd/run-abcd.wandb"


def test_every_cut_ends_at_the_last_whole_record(tmp_path: Path) -> None:
    """The third record goes over the end of a block; wherever the file is cut off, the whole ones before stay."""
    path = tmp_path / FILE
    whole = wandb_file.write(path, [4, 5, 6], text="x" * 15_000)
    ends = [len(wandb_file.write(path, steps, text="x" * 15_000)) for steps in ([4], [4, 5])]
    for cut in (7, 10, 20, ends[0] - 1, ends[0], ends[0] + 3, ends[1], 32768, 32770, len(whole) - 1, len(whole)):
        path.write_bytes(whole[:cut])
        count = sum(cut >= end for end in (*ends, len(whole)))
        assert mend(RunFolder(tmp_path)) == (4 + count if count else 0)
        assert path.read_bytes() == whole[: [7, *ends, len(whole)][count]]
        assert len(list(wandb_file.records(path))) == count


def test_what_is_not_known_is_not_said(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert mend(run) is None
    path = tmp_path / FILE
    wandb_file.write(path, [])
    assert mend(run) == 0
    # A part of the run went online: the lines may be there.
    (tmp_path / "wandb/run-20260101_000000-abcd").mkdir()
    assert mend(run) is None
    path.write_bytes(b"something else")
    assert mend(run) is None
    assert path.read_bytes() == b"something else"


@pytest.mark.parametrize(("kept", "sent"), [(0, [0, 1, 2, 3, 4, 5]), (3, [3, 4, 5]), (4, [4, 5]), (6, [])])
@pytest.mark.parametrize("where", ["file", "server"])
def test_a_resumed_stage_sends_what_was_lost(
    tmp_path: Path, wandb: FakeWandb, kept: int, sent: list[int], where: str
) -> None:
    """Six lines were written and a process killed; the stage goes on from step 4 and writes 5 and 6 again."""
    run = RunFolder(tmp_path)

    def log(first: int, last: int, resume_step: int = 0) -> list[tuple[int, dict[str, Any]]]:
        with Tracker.open(run, OFFLINE, "ppo", last, resume_step) as tracker:
            for step in range(first, last + 1):
                tracker.log(step, {"ppo/loss": float(step)})
        return wandb.runs[-1].logged

    log(1, 6)
    if where == "file":
        wandb_file.write(tmp_path / FILE, range(kept))
    else:
        # A server that has no line may never have heard of the run.
        wandb.starting_step, sent = kept, sent if kept else []
    rows = log(5, 7, resume_step=4)
    assert rows == [(line, {"ppo/step": line + 1, "ppo/loss": line + 1.0}) for line in [*sent, 6]]
