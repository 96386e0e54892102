"""Saving and resuming a training, our own loop's or a trainer's: weights, optimiser, generators and what is added."""

from __future__ import annotations

import errno
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError
from torch import nn
from torch.optim import Optimizer

from rlhf.distributed.checkpoints import (
    CheckpointShape,
    FileEntry,
    ForeignCheckpointError,
    checkpoints_in,
    commit,
    file_trouble,
    hash_and_sync,
    partial_folder,
    read_marker,
    set_aside,
)
from rlhf.distributed.pieces import TrainingPieces, training_pieces
from rlhf.distributed.plain_state import read_state, write_state
from rlhf.distributed.runtime import Runtime
from rlhf.distributed.training_files import frozen_checksum, read_training, write_training
from rlhf.errors import ArtifactError, UserError

_SHARED = "shared"


class TrainingCheckpoints:
    """The checkpoints of one module under one optimiser, written and read by all ranks together.

    A continuation in the same shape (ranks, ZeRO stage, precision) is bit-identical. In another one it is the same but
    for rounding; a rank that was not there before goes on with the generators of rank (its number mod the ranks there
    were).
    """

    def __init__(self, module: nn.Module, optimizer: Optimizer, runtime: Runtime, sharded: Any = None) -> None:
        """`optimizer` is torch's, `sharded` DeepSpeed's engine around both where there is one."""
        self._module, self._optimizer, self._runtime, self._sharded = module, optimizer, runtime, sharded
        self._checksum: dict[str, int] | None = None

    @property
    def shape(self) -> CheckpointShape:
        """Of this run."""
        stage = 0 if self._sharded is None else int(self._sharded.zero_optimization_stage())
        return CheckpointShape(self._runtime.world_size, stage, self._runtime.precision)

    def save(
        self,
        folder: Path,
        *,
        shared: Mapping[str, Any],
        own: Mapping[str, Any] | None = None,
        frozen_changed: bool = False,
    ) -> None:
        """Writes `folder`, which appears under its name only when it is whole. Every rank calls it, between steps.

        `shared` is rank 0's and read by all, `own` this rank's, both of plain values and tensors. `frozen_changed`:
        frozen weights are no longer what the run's inputs say, and are written too. Raises what writing raises.
        """
        partial, runtime = partial_folder(folder), self._runtime
        if runtime.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        runtime.barrier()
        pieces = self._pieces()
        head = {
            "frozen": None if frozen_changed else self._frozen_checksum(pieces),
            "learning_rates": [float(group["lr"]) for group in pieces.optimizer.param_groups],
            "shared": dict(shared),
        }
        entries: dict[str, FileEntry] = {}
        failure: Exception | None = None
        try:
            write_training(partial, pieces, runtime.rank, with_frozen=frozen_changed)
            rank_name = f"rank-{runtime.rank:05d}"
            write_state(partial, rank_name, {"generators": generator_states(runtime.device), "own": dict(own or {})})
            if runtime.is_main:
                write_state(partial, _SHARED, head)
            mine = list(partial.glob(f"*-{runtime.rank:05d}.*"))
            mine += partial.glob(f"{_SHARED}.*") if runtime.is_main else []
            entries = {path.name: hash_and_sync(path) for path in mine}
        except (OSError, SafetensorError) as error:
            failure = error  # the others are still writing, and hear of it below
        written = runtime.gather_objects((entries, None if failure is None else str(failure)))
        failed = [(rank, text) for rank, (_, text) in enumerate(written) if text is not None]
        if failed:
            if runtime.is_main:
                shutil.rmtree(partial, ignore_errors=True)  # it takes room that may be lacking
            raise failure or OSError(
                errno.EIO, f"rank {failed[0][0]} could not write its part of {folder}: {failed[0][1]}"
            )
        if runtime.is_main:
            commit(folder, self.shape, {name: entry for part, _ in written for name, entry in part.items()})
        runtime.barrier()

    def load(self, folder: Path, *, verified: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
        """Takes back what `save` wrote and returns `shared` and `own`. Every rank calls it.

        `verified`: `find_checkpoint` gave the folder, so it has been read and hashed. The generators are for the caller
        to set (`set_generators`), when nothing is drawn any more before training. Raises `ArtifactError`, on all ranks,
        when the folder is not whole or belongs to another training.
        """
        if not verified and (trouble := _trouble(folder, self._runtime)) is not None:
            raise ArtifactError(trouble)
        shared, own = self.read(folder, self._runtime)
        head = read_state(folder, _SHARED)
        pieces = self._pieces()
        if head["frozen"] is not None:
            self._check_frozen(folder, head["frozen"], pieces)
        read_training(folder, pieces, with_frozen=head["frozen"] is None)
        for group, rate in zip(pieces.optimizer.param_groups, head["learning_rates"], strict=True):
            group["lr"] = rate
        return shared, own

    @staticmethod
    def read(folder: Path, runtime: Runtime) -> tuple[dict[str, Any], dict[str, Any]]:
        """`shared` and this rank's `own` alone, of a folder that is known to be whole."""
        return read_state(folder, _SHARED)["shared"], _rank_state(folder, runtime)["own"]

    def set_generators(self, folder: Path) -> None:
        """Sets this process's global random number generators as they were when `folder` was written."""
        set_generator_states(_rank_state(folder, self._runtime)["generators"], self._runtime.device)

    def _pieces(self) -> TrainingPieces:
        return training_pieces(self._module, self._optimizer, self._sharded)

    def _frozen_checksum(self, pieces: TrainingPieces) -> dict[str, int]:
        if self._checksum is None:
            self._checksum = frozen_checksum(pieces, self._runtime.sum_over_ranks)
        return self._checksum

    def _check_frozen(self, folder: Path, saved: Mapping[str, int], pieces: TrainingPieces) -> None:
        now = self._frozen_checksum(pieces)
        # In another precision the same weights have other bits.
        if saved.keys() == now.keys() and dict(saved) != now:
            raise ArtifactError(
                f"{folder} was trained on top of other frozen weights than this run has: an adapter fits the base it "
                "was trained on alone. Give the model of that run, or start anew in another folder."
            )


def find_checkpoint(parent: Path, runtime: Runtime, zero_stage: int) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint in `parent`, and notes for the user. Every rank calls it, all get the same.

    A note names a damaged checkpoint that was passed over, and says when another shape wrote the one that is taken. A
    damaged one is set aside, so that it is not kept in the place of a whole one. The ranks share the reading and
    hashing. Raises `ForeignCheckpointError` for one of another version.
    """
    shape = CheckpointShape(runtime.world_size, zero_stage, runtime.precision)
    notes: list[str] = []
    for folder in runtime.broadcast_object(list(reversed(checkpoints_in(parent))) if runtime.is_main else []):
        trouble = _trouble(folder, runtime)
        if trouble is None:
            return folder, notes + _notes(folder, shape, passed_over=bool(notes), runtime=runtime)
        notes.append(f"passed over a damaged checkpoint: {trouble}")
        if runtime.is_main:
            set_aside(folder)
    return None, [*notes, *(["no whole checkpoint is left: the training starts over"] if notes else [])]


def _notes(folder: Path, shape: CheckpointShape, *, passed_over: bool, runtime: Runtime) -> list[str]:
    notes = [f"the training goes on from {folder.name}"] if passed_over else []
    writer = runtime.broadcast_object(read_marker(folder)[0] if runtime.is_main else shape)
    if writer != shape:
        notes.append(
            f"{folder.name} was written by {writer.describe()}; this run is {shape.describe()}: it goes on as that one "
            "would have, but for rounding"
        )
    return notes


def _trouble(folder: Path, runtime: Runtime) -> str | None:
    """Why a checkpoint cannot be taken; None when all of it is as it was written. The same on every rank, all call it.

    Each rank hashes its share of the files, and all hear of each other after every file, so that no collective
    operation waits for longer than a file takes.
    """
    head: tuple[dict[str, FileEntry], UserError | None] = ({}, None)
    if runtime.is_main:
        try:
            head = read_marker(folder)[1], None
        except UserError as error:
            head = {}, error
    files, wrong = runtime.broadcast_object(head)
    if isinstance(wrong, ForeignCheckpointError):
        raise wrong
    if wrong is not None:
        return str(wrong)
    names = sorted(files)
    for begin in range(0, len(names), runtime.world_size):
        own = names[begin : begin + runtime.world_size][runtime.rank : runtime.rank + 1]
        found = [file_trouble(folder, name, files[name]) for name in own]
        for trouble in [trouble for rank in runtime.gather_objects(found) for trouble in rank]:
            if trouble is not None:
                return trouble
    return None


def check_provenance(folder: Path, saved: Mapping[str, str], own: Mapping[str, str]) -> None:
    """Raises `ArtifactError` for a checkpoint of a training with another config, other data or other inputs."""
    before, now = saved.get("fingerprint"), own.get("fingerprint")
    if before != now:
        raise ArtifactError(
            f"{folder} belongs to another training: its fingerprint is {before}, this one's {now}. A fingerprint is "
            "the hash of the stage's config, data and inputs; remove the folder, or give another run.dir"
        )


def generator_states(device: torch.device) -> dict[str, Any]:
    """The global random number generators, as plain values and tensors."""
    kind, keys, position, has_gauss, cached = numpy.random.get_state()
    version, internal, gauss = random.getstate()
    states: dict[str, Any] = {
        "python": [version, list(internal), gauss],
        "numpy": [kind, numpy.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_generator_states(states: Mapping[str, Any], device: torch.device) -> None:
    """Takes back what `generator_states` gave; a kind of device that it did not have keeps its own."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = states["numpy"]
    numpy.random.set_state((kind, numpy.array(keys, dtype=numpy.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def _rank_state(folder: Path, runtime: Runtime) -> dict[str, Any]:
    num_writers = len(list(folder.glob("rank-*.json")))
    return read_state(folder, f"rank-{runtime.rank % num_writers:05d}")
