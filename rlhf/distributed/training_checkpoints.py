"""Saving and resuming a training, our own loop's or a trainer's: weights, optimiser, generators and what is added."""

from __future__ import annotations

import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn
from torch.optim import Optimizer

from rlhf.distributed.checkpoints import (
    CheckpointShape,
    commit,
    hash_and_sync,
    latest_checkpoint,
    partial_folder,
    read_shape,
    verify,
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
        try:
            pieces = self._pieces()
            write_training(partial, pieces, runtime.rank, with_frozen=frozen_changed)
            rank_name = f"rank-{runtime.rank:05d}"
            write_state(partial, rank_name, {"generators": generator_states(runtime.device), "own": dict(own or {})})
            checksum = self._frozen_checksum(pieces)
            if runtime.is_main:
                head = {
                    "frozen": None if frozen_changed else checksum,
                    "learning_rates": [float(group["lr"]) for group in pieces.optimizer.param_groups],
                    "shared": dict(shared),
                }
                write_state(partial, _SHARED, head)
            mine = [
                *partial.glob(f"*-{runtime.rank:05d}.*"),
                *(partial.glob(f"{_SHARED}.*") if runtime.is_main else []),
            ]
            entries = runtime.gather_objects({path.name: hash_and_sync(path) for path in mine})
            if runtime.is_main:
                commit(folder, self.shape, {name: entry for part in entries for name, entry in part.items()})
        except Exception:
            # The other ranks, waiting for this one, end with it. What was written takes room that may be lacking.
            shutil.rmtree(partial, ignore_errors=True)
            raise
        runtime.barrier()

    def load(self, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        """Takes back what `save` wrote and returns `shared` and `own`. Every rank calls it.

        The generators are for the caller to set (`set_generators`), when nothing is drawn any more before training.
        Raises `ArtifactError`, on all ranks, when the folder is not whole or belongs to another training.
        """
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
        """`shared` and `own` alone. Every rank calls it.

        Raises `ArtifactError`, on all ranks, when the folder is not whole.
        """
        trouble = runtime.broadcast_object(_why_not_whole(folder) if runtime.is_main else None)
        if trouble is not None:
            raise ArtifactError(trouble)
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

    A note names a damaged checkpoint that was passed over, and says when another shape wrote the one that is taken.
    """
    shape = CheckpointShape(runtime.world_size, zero_stage, runtime.precision)
    answer = runtime.broadcast_object(_search(parent, shape) if runtime.is_main else None)
    assert answer is not None
    return answer


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


def _search(parent: Path, shape: CheckpointShape) -> tuple[Path | None, list[str]]:
    folder, notes = latest_checkpoint(parent)
    if folder is None:
        return None, [*notes, *(["no whole checkpoint is left: the training starts over"] if notes else [])]
    if notes:
        notes.append(f"the training goes on from {folder.name}")
    writer = read_shape(folder)
    if writer != shape:
        notes.append(
            f"{folder.name} was written by {writer.describe()}; this run is {shape.describe()}: it goes on as that one "
            "would have, but for rounding"
        )
    return folder, notes


def _rank_state(folder: Path, runtime: Runtime) -> dict[str, Any]:
    num_writers = len(list(folder.glob("rank-*.json")))
    return read_state(folder, f"rank-{runtime.rank % num_writers:05d}")


def _why_not_whole(folder: Path) -> str | None:
    try:
        verify(folder)
    except UserError as error:
        return str(error)
    return None
