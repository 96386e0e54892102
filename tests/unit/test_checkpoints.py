"""Checkpoint folders: whole or not there, whatever happened to them."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from rlhf.distributed.checkpoints import (
    MARKER,
    CheckpointShape,
    ForeignCheckpointError,
    checkpoint_folder,
    checkpoints_in,
    commit,
    hash_and_sync,
    partial_folder,
    prune_checkpoints,
    read_marker,
)
from rlhf.distributed.runtime import Runtime
from rlhf.distributed.training_checkpoints import find_checkpoint
from rlhf.errors import ArtifactError, UserError

RUNTIME = Runtime(0, 1, 0, torch.device("cpu"), "fp32")
SHAPE = CheckpointShape(world_size=2, zero_stage=3, precision="fp32")


def find(parent: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint and what is said about others; the shape is another one's affair."""
    found, notes = find_checkpoint(parent, RUNTIME, SHAPE.zero_stage)
    return found, [note for note in notes if "was written by" not in note]


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
    assert read_marker(folder)[0] == SHAPE
    assert find(tmp_path) == (folder, [])
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-10"]
    assert SHAPE.describe() == "2 ranks, zero.stage=3, fp32"


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    write(tmp_path, 10, "old")
    folder = write(tmp_path, 10, "new")
    assert (folder / "weights-00000.safetensors").read_text() == "new"
    assert read_marker(folder)[0] == SHAPE
    assert find(tmp_path) == (folder, [])
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
        (folder / MARKER).write_text((folder / MARKER).read_text().replace('"format": 3', '"format": 9'))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "weights-00000.safetensors is missing"),
        ("short", "has 5 bytes instead of 7"),
        ("altered", "was altered"),
        ("no marker", "its marker checkpoint.json is missing"),
        ("torn marker", "cannot be read"),
        ("strange marker", "cannot be read"),
        ("altered marker", "its marker checkpoint.json was altered"),
        ("format", "its marker checkpoint.json was altered"),
    ],
)
def test_a_broken_checkpoint_is_named_passed_over_and_set_aside(tmp_path: Path, kind: str, message: str) -> None:
    whole, broken = write(tmp_path, 9), write(tmp_path, 10)
    damage(broken, kind)
    found, notes = find(tmp_path)
    assert found == whole
    assert "checkpoint-10" in notes[0]
    assert message in notes[0]
    assert len(notes) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10.damaged", "checkpoint-9"]
    # Also the next time, as who was to be told may have been killed.
    assert find(tmp_path) == (whole, notes)
    # It stays until there are as many whole ones as are kept.
    prune_checkpoints(tmp_path, keep=2)
    assert (tmp_path / "checkpoint-10.damaged").exists()
    # What comes after it is kept in its place.
    write(tmp_path, 11)
    prune_checkpoints(tmp_path, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-11"]


@pytest.mark.parametrize("name", ["weights-00000.safetensors", MARKER])
def test_a_file_that_cannot_be_read_stops_the_run_and_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    newest = [write(tmp_path, step) for step in (9, 10)][1]
    real = open

    def stale(path: Path, *arguments: Any, **keywords: Any) -> Any:
        if Path(path).name == name:
            raise OSError(errno.ESTALE, "Stale file handle")
        return real(path, *arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr("io.open", stale)
        with pytest.raises(UserError, match=rf"checkpoint-10/{name} cannot be read \(Stale file handle\)") as caught:
            find(tmp_path)
    assert not isinstance(caught.value, ArtifactError)
    assert find(tmp_path) == (newest, [])


class OtherRank(Runtime):
    """Rank 0 of two, of which the other's part of every gathering is given."""

    others: ClassVar[Any] = None

    def gather_objects(self, item: Any) -> list[Any]:
        return [item, self.others]

    def broadcast_object(self, item: Any) -> Any:
        return item


def test_what_another_rank_cannot_read_stops_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 10)
    two = OtherRank(0, 2, 0, torch.device("cpu"), "fp32")
    monkeypatch.setattr(OtherRank, "others", UserError("there is no such file on host b"))
    with pytest.raises(UserError, match="no such file on host b"):
        find_checkpoint(tmp_path, two, SHAPE.zero_stage)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-10"]
    monkeypatch.setattr(OtherRank, "others", None)
    assert find_checkpoint(tmp_path, two, SHAPE.zero_stage) == (tmp_path / "checkpoint-10", [])


def test_an_index_that_the_marker_does_not_know_is_damage(tmp_path: Path) -> None:
    write(tmp_path, 10)
    (tmp_path / "checkpoint-10" / "pieces-00001.json").write_text("{}")
    found, notes = find(tmp_path)
    assert found is None
    assert "pieces-00001.json is no file of it" in notes[0]
    assert notes[1] == "no whole checkpoint is left: the training starts over"


def test_one_of_another_version_is_neither_used_nor_removed(tmp_path: Path) -> None:
    folder = write(tmp_path, 10)
    marker = json.loads((folder / MARKER).read_text())
    del marker["sha256"]
    (folder / MARKER).write_text(json.dumps({**marker, "format": 1}))
    with pytest.raises(ForeignCheckpointError, match=r"written in format 1 by another version of rlhf.*reads format 3"):
        find(tmp_path)
    assert (folder / MARKER).exists()


def test_latest_goes_by_number_and_ignores_what_is_no_checkpoint(tmp_path: Path) -> None:
    assert find(tmp_path / "nowhere") == (None, [])
    assert find(tmp_path) == (None, [])
    newest = [write(tmp_path, step) for step in (10, 100, 20)][1]
    partial_folder(checkpoint_folder(tmp_path, 200)).mkdir()
    (tmp_path / "model").mkdir()
    assert find(tmp_path) == (newest, [])
    assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-10", "checkpoint-20", "checkpoint-100"]


def test_pruning_keeps_the_newest_and_sweeps_up(tmp_path: Path) -> None:
    for step in (1, 2, 10, 9):
        write(tmp_path, step)
    partial_folder(checkpoint_folder(tmp_path, 11)).mkdir()
    (tmp_path / "checkpoint-1.removed").mkdir()
    prune_checkpoints(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-9"]
    prune_checkpoints(tmp_path, keep=5)
    assert len(list(tmp_path.iterdir())) == 2


def test_what_a_removal_left_is_swept_up_at_the_start(tmp_path: Path) -> None:
    folder = write(tmp_path, 2)
    (tmp_path / "checkpoint-1.removed").mkdir()
    assert find(tmp_path) == (folder, [])
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def test_what_cannot_be_removed_ends_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2, 3):
        write(tmp_path, step)
    elsewhere = tmp_path / "elsewhere"
    (tmp_path / "checkpoint-1").rename(elsewhere)
    (tmp_path / "checkpoint-1").symlink_to(elsewhere)
    prune_checkpoints(tmp_path, keep=2)
    assert not (tmp_path / "checkpoint-1").exists()
    assert elsewhere.is_dir()

    def rmtree(path: Path) -> None:
        raise OSError(errno.ENOTEMPTY, "Directory not empty")

    monkeypatch.setattr("shutil.rmtree", rmtree)
    prune_checkpoints(tmp_path, keep=1)
    assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-3"]


def test_a_file_system_that_syncs_no_folders_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(descriptor)

    monkeypatch.setattr("os.fsync", fsync)
    assert find(write(tmp_path, 3).parent) == (tmp_path / "checkpoint-3", [])
