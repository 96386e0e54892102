"""Checkpoint folders: whole or not there, whatever happened to them."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf.distributed.checkpoints import (
    MARKER,
    CheckpointShape,
    checkpoint_folder,
    commit,
    hash_and_sync,
    latest_checkpoint,
    partial_folder,
    prune_checkpoints,
    verify,
)
from rlhf.errors import ArtifactError

SHAPE = CheckpointShape(world_size=2, zero_stage=3, precision="fp32")


def write(parent: Path, step: int, content: str = "weights") -> Path:
    folder = checkpoint_folder(parent, step)
    partial = partial_folder(folder)
    partial.mkdir(parents=True)
    (partial / "weights-00000.safetensors").write_text(content)
    (partial / "rank-00000.json").write_text("generators")
    commit(folder, SHAPE, {path.name: hash_and_sync(path) for path in partial.iterdir()})
    return folder


def test_a_committed_checkpoint_is_whole(tmp_path: Path) -> None:
    folder = write(tmp_path, 10)
    assert verify(folder) == SHAPE
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-10"]
    assert SHAPE.describe() == "2 ranks, zero.stage=3, fp32"


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    write(tmp_path, 10, "old")
    folder = write(tmp_path, 10, "new")
    assert (folder / "weights-00000.safetensors").read_text() == "new"
    assert verify(folder) == SHAPE
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-10"]


def damage(folder: Path, kind: str) -> None:
    weights = folder / "weights-00000.safetensors"
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
    elif kind == "altered marker":
        (folder / MARKER).write_text((folder / MARKER).read_text().replace('"zero_stage": 3', '"zero_stage": 2'))
    elif kind == "strange marker":
        (folder / MARKER).write_text("[]")
    else:
        (folder / MARKER).write_text((folder / MARKER).read_text().replace('"format": 2', '"format": 9'))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "weights-00000.safetensors is missing"),
        ("short", "has 5 bytes instead of 7"),
        ("altered", "was altered"),
        ("no marker", "cannot be read"),
        ("torn marker", "cannot be read"),
        ("strange marker", "cannot be read"),
        ("altered marker", "its marker checkpoint.json was altered"),
        ("format", "format 9"),
    ],
)
def test_a_broken_checkpoint_is_named_and_passed_over(tmp_path: Path, kind: str, message: str) -> None:
    whole, broken = write(tmp_path, 9), write(tmp_path, 10)
    damage(broken, kind)
    with pytest.raises(ArtifactError, match=message):
        verify(broken)
    found, notes = latest_checkpoint(tmp_path)
    assert found == whole
    assert len(notes) == 1
    assert "checkpoint-10" in notes[0]
    assert message in notes[0]


def test_latest_goes_by_number_and_ignores_what_is_no_checkpoint(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "nowhere") == (None, [])
    assert latest_checkpoint(tmp_path) == (None, [])
    newest = [write(tmp_path, step) for step in (10, 100, 20)][1]
    partial_folder(checkpoint_folder(tmp_path, 200)).mkdir()
    (tmp_path / "model").mkdir()
    assert latest_checkpoint(tmp_path) == (newest, [])


def test_pruning_keeps_the_newest_and_sweeps_up(tmp_path: Path) -> None:
    for step in (1, 2, 10, 9):
        write(tmp_path, step)
    partial_folder(checkpoint_folder(tmp_path, 11)).mkdir()
    (tmp_path / "checkpoint-1.removed").mkdir()
    prune_checkpoints(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-9"]
    prune_checkpoints(tmp_path, keep=5)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_damaged_checkpoint_does_not_count_as_one_of_those_to_keep(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        write(tmp_path, step)
    damage(checkpoint_folder(tmp_path, 3), "short")
    damage(checkpoint_folder(tmp_path, 4), "missing")
    prune_checkpoints(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2"]
