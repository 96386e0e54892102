"""Saving and resuming a training, our own loop's or a trainer's: weights, optimiser, generators and what is added."""

from __future__ import annotations

import errno
import random
import shutil
from collections.abc import Iterator, Mapping
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
    checkpoints_in,
    commit,
    damaged_ones,
    hash_and_sync,
    hash_trouble,
    partial_folder,
    read_marker,
    set_aside,
    size_trouble,
    sweep_removed,
)
from rlhf.distributed.pieces import TrainingPieces, training_pieces
from rlhf.distributed.plain_state import read_state, write_state
from rlhf.distributed.runtime import Runtime
from rlhf.distributed.training_files import frozen_checksum, read_training, write_training
from rlhf.errors import ArtifactError, UserError

_SHARED = "shared"
_PASSED_OVER = "passed over a damaged checkpoint: "


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
        states: dict[str, Mapping[str, Any]] = {
            f"rank-{runtime.rank:05d}": {"generators": generator_states(runtime.device), "own": dict(own or {})}
        }
        if runtime.is_main:
            states[_SHARED] = head
        try:
            entries = self._write(_parts(partial, pieces, states, runtime.rank, with_frozen=frozen_changed))
        except (OSError, SafetensorError):
            if runtime.is_main:
                shutil.rmtree(partial, ignore_errors=True)  # it takes room that may be lacking
            raise
        if runtime.is_main:
            commit(folder, self.shape, entries)
        runtime.barrier()

    def _write(self, parts: Iterator[Path]) -> dict[str, FileEntry]:
        """Lets every rank write its `parts`; all ranks' files for the marker.

        All hear of each other after every file, so that no collective operation waits for longer than a file takes.
        Raises what writing raises, and `OSError` where that is another rank's.
        """
        entries: dict[str, FileEntry] = {}
        while True:
            entry: dict[str, FileEntry] = {}
            failure: Exception | None = None
            try:
                path = next(parts, None)
                entry = {} if path is None else {path.name: hash_and_sync(path)}
            except (OSError, SafetensorError) as error:
                failure = error
            written = self._runtime.gather_objects((entry, None if failure is None else str(failure)))
            for rank, (_, text) in enumerate(written):
                if text is not None:
                    raise failure or OSError(errno.EIO, f"rank {rank} could not write its part of a checkpoint: {text}")
            if not any(part for part, _ in written):
                return entries
            for part, _ in written:
                entries |= part

    def load(self, folder: Path, *, verified: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
        """Takes back what `save` wrote and returns `shared` and `own`. Every rank calls it.

        `verified`: `find_checkpoint` gave the folder, so it has been read and hashed. The generators are for the caller
        to set (`set_generators`), when nothing is drawn any more before training. The tensors of `shared` are parts of
        the file, so that ranks that do not look at them need no memory: what is kept is to be copied. Raises
        `ArtifactError`, on all ranks, when the folder is not whole or belongs to another training.
        """
        if not verified and (trouble := _trouble(folder, self._runtime)) is not None:
            raise ArtifactError(trouble)
        head = read_state(folder, _SHARED, mapped=True)
        own: dict[str, Any] = _rank_state(folder, self._runtime)["own"]
        pieces = self._pieces()
        if head["frozen"] is not None:
            self._check_frozen(folder, head["frozen"], pieces)
        read_training(folder, pieces, with_frozen=head["frozen"] is None)
        for group, rate in zip(pieces.optimizer.param_groups, head["learning_rates"], strict=True):
            group["lr"] = rate
        return head["shared"], own

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


def _parts(
    folder: Path, pieces: TrainingPieces, states: Mapping[str, Mapping[str, Any]], rank: int, *, with_frozen: bool
) -> Iterator[Path]:
    """Writes what is this rank's, and yields each file when it is written."""
    yield from write_training(folder, pieces, rank, with_frozen=with_frozen)
    for name, state in states.items():
        write_state(folder, name, state)
        yield from folder.glob(f"{name}.*")


def find_checkpoint(parent: Path, runtime: Runtime, zero_stage: int) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint in `parent`, and notes for the user. Every rank calls it, all get the same.

    A note names a damaged checkpoint that was passed over, now or earlier, and says when another shape wrote the one
    that is taken. A damaged one is set aside, so that it is not kept in the place of a whole one, and named as long as
    it is there: who was to be told the first time may have been killed. The ranks share the reading and hashing.
    Raises, on all ranks, `ForeignCheckpointError` for one of another version and `UserError` where a file cannot be
    read, which says nothing about the checkpoint.
    """
    shape = CheckpointShape(runtime.world_size, zero_stage, runtime.precision)
    there: tuple[list[Path], list[str]] = ([], [])
    if runtime.is_main:
        sweep_removed(parent)
        there = checkpoints_in(parent)[::-1], damaged_ones(parent)
    folders, troubles = runtime.broadcast_object(there)
    notes = [_PASSED_OVER + trouble for trouble in troubles]
    for folder in folders:
        trouble = _trouble(folder, runtime)
        if trouble is None:
            return folder, notes + _notes(folder, shape, runtime)
        notes.append(_PASSED_OVER + trouble)
        if runtime.is_main:
            set_aside(folder, trouble)
    return None, [*notes, *(["no whole checkpoint is left: the training starts over"] if notes else [])]


def _notes(folder: Path, shape: CheckpointShape, runtime: Runtime) -> list[str]:
    writer = runtime.broadcast_object(read_marker(folder)[0] if runtime.is_main else shape)
    if writer == shape:
        return []
    other = f"{folder.name} was written by {writer.describe()}; this run is {shape.describe()}"
    return [f"{other}: it goes on as that one would have, but for rounding"]


def _trouble(folder: Path, runtime: Runtime) -> str | None:
    """Why a checkpoint cannot be taken; None when all of it is as it was written. The same on every rank, all call it.

    Rank 0 says which files are there: another host may not see them yet. Each rank hashes its share of them, and all
    hear of each other after every file, so that no collective operation waits for longer than a file takes. Raises
    `UserError`, on all ranks, where one cannot read, and `ForeignCheckpointError`.
    """
    head: tuple[dict[str, FileEntry], str | UserError | None] = ({}, None)
    if runtime.is_main:
        try:
            files = read_marker(folder)[1]
            head = files, size_trouble(folder, files)
        except ArtifactError as error:
            head = {}, str(error)
        except UserError as error:
            head = {}, error
    files, wrong = runtime.broadcast_object(head)
    if isinstance(wrong, UserError):
        raise wrong
    if wrong is not None:
        return wrong
    names = sorted(files)
    for begin in range(0, len(names), runtime.world_size):
        own = names[begin : begin + runtime.world_size][runtime.rank : runtime.rank + 1]
        found: str | UserError | None = None
        try:
            found = next((hash_trouble(folder, name, files[name]) for name in own), None)
        except UserError as error:
            found = error
        for result in runtime.gather_objects(found):
            if isinstance(result, UserError):
                raise result
            if result is not None:
                return result
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
