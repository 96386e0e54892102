"""A training on disk, in a form that any number of ranks at any ZeRO stage can go on from. No file can run code.

Each rank writes the pieces it holds (`rlhf.distributed.pieces`), once: `weights-<rank>.safetensors` in the optimiser's
precision, one `<state>-<rank>.safetensors` for each state of the optimiser (`exp_avg`, `exp_avg_sq`), and
`pieces-<rank>.json`, which says what they are pieces of; rank 0's also has the shapes of all. A reader takes from all
of them what it holds itself.

Frozen weights are not written unless they have changed: the run's inputs have them. Their checksum is, so that a
training does not go on with others.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rlhf.distributed.pieces import BUFFERS, FROZEN, WEIGHTS, Piece, Slot, TrainingPieces
from rlhf.errors import ArtifactError

_CHUNK_ELEMENTS = 1 << 22
_PRIME = 65521


def write_training(folder: Path, pieces: TrainingPieces, rank: int, *, with_frozen: bool) -> Iterator[Path]:
    """Writes this rank's part into `folder`, and yields each file when it is written: a file is written when the next
    one is asked for. Every rank calls it; what all have alike, rank 0 writes alone.

    Raises `OSError` or `SafetensorError` when the disk refuses.
    """
    slots = pieces.trained if rank == 0 or not pieces.replicated else []
    groups = {WEIGHTS: [slot.piece for slot in slots], BUFFERS: pieces.buffers if rank == 0 else [], FROZEN: []}
    if with_frozen and (rank == 0 or not pieces.frozen_replicated):
        groups[FROZEN] = pieces.frozen
    scalars: dict[str, dict[str, Any]] = {}
    for slot in slots:
        for key, value in pieces.optimizer.state.get(slot.holder, {}).items():
            if isinstance(value, Tensor) and value.numel() == slot.holder.numel() and value.dim():
                groups.setdefault(key, []).append(slot.state(value))
            else:
                scalars.setdefault(slot.piece.name, {})[key] = _plain(value)
    for group, members in groups.items():
        if members:
            tensors = {piece.name: piece.tensor.detach().to("cpu", copy=True) for piece in members}
            save_file(tensors, path := _file(folder, group, rank))
            yield path
    index = {
        "pieces": {group: {piece.name: [piece.start, piece.stop] for piece in all_} for group, all_ in groups.items()},
        "scalars": scalars,
        **({"shapes": pieces.shapes} if rank == 0 else {}),
    }
    path = folder / f"pieces-{rank:05d}.json"
    path.write_text(json.dumps(index), encoding="utf-8")
    yield path


def read_training(folder: Path, pieces: TrainingPieces, *, with_frozen: bool) -> None:
    """Overwrites this rank's part of the training by what `folder` has of it. Every rank calls it.

    The writer may have had another number of ranks and another ZeRO stage. Where it counted optimiser steps for each
    parameter and this optimiser counts them for many together, the largest count holds. Raises `ArtifactError` when
    something is missing, or the names or shapes of weights and buffers are others.
    """
    with ExitStack() as stack:
        source = _Source(folder, stack)
        source.require_shapes(pieces.shapes)
        source.require_optimizer_state(slot.piece.name for slot in pieces.trained)
        with torch.no_grad():
            for slot in pieces.trained:
                source.fill(WEIGHTS, slot.piece)
            _make_states(pieces, source)
            for slot in pieces.trained:
                for group in source.optimizer_groups if slot.holder in pieces.optimizer.state else []:
                    source.fill(group, slot.state(pieces.optimizer.state[slot.holder][group]))
            for piece in pieces.buffers:
                source.fill(BUFFERS, piece)
            for piece in pieces.frozen if with_frozen else []:
                source.fill(FROZEN, piece)
    pieces.written()


def frozen_checksum(pieces: TrainingPieces, sum_over_ranks: Callable[[Tensor], Tensor]) -> dict[str, int]:
    """Checksum of the frozen weights by dtype, the same for every sharding. Every rank calls it.

    The sum over a parameter's elements of their bits, taken as an integer, times (position mod 65521) + 1, modulo 2^62:
    integers add up exactly in any order.
    """
    totals: dict[str, int] = {}
    for dtype in sorted({str(piece.tensor.dtype) for piece in pieces.frozen}):
        own = [piece for piece in pieces.frozen if str(piece.tensor.dtype) == dtype]
        total = torch.tensor(sum(map(_checksum, own)) % (1 << 62), dtype=torch.int64)
        totals[dtype] = int(total if pieces.frozen_replicated else sum_over_ranks(total)) % (1 << 62)
    return totals


def _checksum(piece: Piece) -> int:
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = piece.tensor.detach().view(kinds[piece.tensor.element_size()])
    total = 0
    for begin in range(0, bits.numel(), _CHUNK_ELEMENTS):
        part = bits[begin : begin + _CHUNK_ELEMENTS].long()
        first = piece.start + begin
        positions = torch.arange(first, first + part.numel(), device=part.device).remainder_(_PRIME).add_(1)
        total += int((part * positions).sum())
    return total


class _Source:
    """The files of all ranks that wrote a checkpoint, to be read piece by piece."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder, self._stack = folder, stack
        self._files: dict[tuple[str, int], Any] = {}
        # group → parameter → (rank, start, stop) of the pieces there are
        self._places: dict[str, dict[str, list[tuple[int, int, int]]]] = defaultdict(lambda: defaultdict(list))
        self.scalars: dict[str, dict[str, Any]] = {}
        self._shapes: dict[str, dict[str, list[int]]] = {}
        for path in sorted(folder.glob("pieces-*.json")):
            rank = int(path.stem.removeprefix("pieces-"))
            index = json.loads(path.read_text(encoding="utf-8"))
            for group, members in index["pieces"].items():
                for name, (start, stop) in members.items():
                    self._places[group][name].append((rank, start, stop))
            for name, values in index["scalars"].items():
                self.scalars.setdefault(name, {}).update(values)
            self._shapes |= index.get("shapes", {})

    @property
    def optimizer_groups(self) -> list[str]:
        """The states the optimiser has for each element."""
        return [group for group, members in self._places.items() if members and group not in (WEIGHTS, FROZEN, BUFFERS)]

    def require_shapes(self, shapes: Mapping[str, Mapping[str, Sequence[int]]]) -> None:
        """Raises `ArtifactError` where they are not the writer's: flat pieces would fill another shape as well."""
        for group, now in shapes.items():
            saved = self._shapes.get(group, {})
            for name in sorted(saved.keys() | now.keys()):
                if saved.get(name) != now.get(name):
                    raise ArtifactError(
                        f"{self._folder} was written by a training of another model: of {group} it has {name} with "
                        f"shape {saved.get(name, 'none')}, and this run has it with shape {now.get(name, 'none')}. "
                        "Give the model of that training, or remove the folder and run again."
                    )

    def require_optimizer_state(self, names: Iterable[str]) -> None:
        """Raises `ArtifactError` when there is none at all: reading that would go through, and train otherwise."""
        if not self.optimizer_groups and any(True for _ in names):
            raise ArtifactError(
                f"the optimiser's state in {self._folder} is empty, so training cannot go on from there. Remove the "
                "folder and run again."
            )

    def fill(self, group: str, piece: Piece) -> None:
        """Overwrites the piece's elements. A parameter that the optimiser never stepped on keeps the state it has."""
        places = self._places[group].get(piece.name, [])
        if not places and group in self.optimizer_groups:
            return
        missing = piece.tensor.numel()
        for rank, start, stop in places:
            low, high = max(start, piece.start), min(stop, piece.stop)
            if low < high:
                saved = self._open(group, rank).get_slice(piece.name)[low - start : high - start]
                piece.tensor[low - piece.start : high - piece.start].copy_(saved)
                missing -= high - low
        if missing:
            raise ArtifactError(
                f"{self._folder} lacks {missing} of the {piece.tensor.numel()} elements of {group} of {piece.name} "
                "that this run needs: another model or another version wrote it. Remove the folder and run again."
            )

    def _open(self, group: str, rank: int) -> Any:
        key = (group, rank)
        if key not in self._files:
            path = _file(self._folder, group, rank)
            try:
                self._files[key] = self._stack.enter_context(safe_open(path, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise ArtifactError(f"{path} cannot be read: {error}") from error
        return self._files[key]


def _make_states(pieces: TrainingPieces, source: _Source) -> None:
    """Gives every holder a state of zeros, to be filled, and the numbers that belong to it as a whole."""
    by_holder: dict[int, list[Slot]] = defaultdict(list)
    for slot in pieces.trained:
        by_holder[id(slot.holder)].append(slot)
    for slots in by_holder.values():
        holder = slots[0].holder
        known = [source.scalars[slot.piece.name] for slot in slots if slot.piece.name in source.scalars]
        pieces.optimizer.state.pop(holder, None)
        if not known:  # the optimiser has never stepped on any of it
            continue
        state = {group: torch.zeros_like(holder, requires_grad=False) for group in source.optimizer_groups}
        for key in sorted({key for values in known for key in values}):
            state[key] = _unplain([values[key] for values in known if key in values])
        pieces.optimizer.state[holder] = state


def _plain(value: Any) -> list[Any]:
    """A number of the optimiser with what it is kept as: `[3.0, "float32"]` for a tensor, `[3, null]` for Python's."""
    if isinstance(value, Tensor):
        return [value.item(), str(value.dtype).removeprefix("torch.")]
    return [value, None]


def _unplain(values: Sequence[Sequence[Any]]) -> Any:
    number = max(value for value, _ in values)
    dtype = values[0][1]
    return number if dtype is None else torch.tensor(number, dtype=getattr(torch, dtype))


def _file(folder: Path, group: str, rank: int) -> Path:
    return folder / f"{group}-{rank:05d}.safetensors"
