"""Checkpoint folders: whole or not there, whatever happened to them."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from rlhf.distributed.checkpoints import (
    MARKER,
    CheckpointShape,
    checkpoint_folder,
    commit,
    disk_errors,
    latest_checkpoint,
    partial_folder,
    prune_checkpoints,
    verify,
)
from rlhf.errors import ArtifactError, DiskFullError

SHAPE = CheckpointShape(world_size=2, zero_stage=3, precision="fp32")


def write(parent: Path, step: int, content: str = "weights") -> Path:
    folder = checkpoint_folder(parent, step)
    partial = partial_folder(folder)
    (partial / "zero").mkdir(parents=True)
    (partial / "zero" / "weights.pt").write_text(content)
    (partial / "rank0.pt").write_text("generators")
    commit(folder, SHAPE)
    return folder


def test_a_committed_checkpoint_is_whole(tmp_path: Path) -> None:
    folder = write(tmp_path, 10)
    assert verify(folder) == SHAPE
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-10"]
    assert SHAPE.describe() == "2 ranks, zero.stage=3, fp32"


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    write(tmp_path, 10, "old")
    folder = write(tmp_path, 10, "new")
    assert (folder / "zero" / "weights.pt").read_text() == "new"
    assert verify(folder) == SHAPE
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-10"]


def damage(folder: Path, kind: str) -> None:
    weights = folder / "zero" / "weights.pt"
    if kind == "missing":
        weights.unlink()
    elif kind == "short":
        weights.write_text("weigh")
    elif kind == "altered":
        weights.write_text("wEights")
    elif kind == "no marker":
        (folder / MARKER).unlink()
    elif kind == "torn marker":
        (folder / MARKER).write_text((folder / MARKER).read_text()[:40])
    elif kind == "strange marker":
        (folder / MARKER).write_text("[]")
    else:
        (folder / MARKER).write_text((folder / MARKER).read_text().replace('"format": 1', '"format": 9'))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "weights.pt is missing"),
        ("short", "has 5 bytes instead of 7"),
        ("altered", "was altered"),
        ("no marker", "cannot be read"),
        ("torn marker", "cannot be read"),
        ("strange marker", "cannot be read"),
        ("format", "format 9"),
    ],
)
def test_a_broken_checkpoint_is_named_and_passed_over(tmp_path: Path, kind: str, message: str) -> None:
    whole, broken = write(tmp_path, 9), write(tmp_path, 10)
    damage(broken, kind)
    with pytest.raises(ArtifactError, match=message):
        verify(broken)
    with pytest.warns(UserWarning, match="checkpoint-10"):
        assert latest_checkpoint(tmp_path) == whole


def test_latest_goes_by_number_and_ignores_what_is_no_checkpoint(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "nowhere") is None
    assert latest_checkpoint(tmp_path) is None
    newest = [write(tmp_path, step) for step in (10, 100, 20)][1]
    partial_folder(checkpoint_folder(tmp_path, 200)).mkdir()
    (tmp_path / "model").mkdir()
    assert latest_checkpoint(tmp_path) == newest


def test_pruning_keeps_the_newest_and_sweeps_up(tmp_path: Path) -> None:
    for step in (1, 2, 10, 9):
        write(tmp_path, step)
    partial_folder(checkpoint_folder(tmp_path, 11)).mkdir()
    (tmp_path / "checkpoint-1.removed").mkdir()
    prune_checkpoints(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-9"]
    prune_checkpoints(tmp_path, keep=5)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_full_disk_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def raise_in_context(error: Exception) -> None:
        with disk_errors(tmp_path / "not" / "there" / "yet"):
            raise error

    with pytest.raises(DiskFullError, match="no space is left"):
        raise_in_context(OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(PermissionError):
        raise_in_context(PermissionError(errno.EACCES, "no"))
    with pytest.raises(RuntimeError, match="size mismatch"):
        raise_in_context(RuntimeError("size mismatch"))

    class Usage:
        free = 4096

    def almost_full(path: Any) -> Usage:
        return Usage()

    monkeypatch.setattr("shutil.disk_usage", almost_full)
    with pytest.raises(DiskFullError):
        raise_in_context(RuntimeError("PytorchStreamWriter failed writing file data/0"))
