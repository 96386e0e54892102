"""Where the state of a training lies on this rank: which part of which parameter, in which tensor, at every ZeRO stage.

A parameter is thought of as flat. Whatever shards it, each rank holds consecutive elements of it, so a checkpoint that
says which elements it has can be read by any number of ranks at any stage. What is read here of DeepSpeed has no public
name (the public functions gather whole parameters); the tests of resuming across shapes fail when it changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

WEIGHTS, FROZEN, BUFFERS = "weights", "frozen", "buffers"


@dataclass(frozen=True)
class Piece:
    """Elements `start` to `start + tensor.numel()` of the flat parameter or buffer `name`; `tensor` is a 1-D view."""

    name: str
    start: int
    tensor: Tensor

    @property
    def stop(self) -> int:
        """One behind the last element."""
        return self.start + self.tensor.numel()


@dataclass(frozen=True)
class Slot:
    """A piece of a trained parameter within `holder`, a tensor that the optimiser steps on and keeps its state by.

    `offset`: where the piece begins in `holder`, flat. The piece's tensor has the weights in the optimiser's precision.
    """

    piece: Piece
    holder: Tensor
    offset: int

    def state(self, values: Tensor) -> Piece:
        """The part of `values`, a state of the holder with a number for each of its elements, that is this piece's."""
        return Piece(self.piece.name, self.piece.start, _flat(values)[self.offset :][: self.piece.tensor.numel()])


@dataclass(frozen=True)
class TrainingPieces:
    """This rank's part of a training.

    `trained`: the weights the optimiser holds. `frozen`, `buffers`: as the module holds them. `replicated`,
    `frozen_replicated`: every rank has the same trained, or frozen, pieces; buffers always are. `shapes`: the
    module's own, by `WEIGHTS`, `FROZEN` or `BUFFERS` and by name. `written`: to be called after the pieces were
    overwritten, on all ranks: it brings the module in line with the optimiser.
    """

    optimizer: Optimizer
    trained: list[Slot]
    frozen: list[Piece]
    buffers: list[Piece]
    replicated: bool
    frozen_replicated: bool
    shapes: dict[str, dict[str, list[int]]]
    written: Callable[[], None]


def training_pieces(module: nn.Module, optimizer: Optimizer, sharded: Any = None) -> TrainingPieces:
    """The pieces of `module` under torch's `optimizer`; `sharded`: DeepSpeed's engine around it, if there is one.

    Names are those of `module`, so they are the same at every stage. The tensors are views: writing to them, and then
    calling `written`, changes the training. Raises `RuntimeError` for an optimiser that swaps to NVMe.
    """
    stage = 0 if sharded is None else int(sharded.zero_optimization_stage())
    kept = module.state_dict().keys()
    buffers = [Piece(name, 0, _flat(value)) for name, value in module.named_buffers() if name in kept]
    frozen = [(name, value) for name, value in module.named_parameters() if not value.requires_grad]
    shapes = {
        WEIGHTS: {name: _shape(value) for name, value in module.named_parameters() if value.requires_grad},
        FROZEN: {name: _shape(value) for name, value in frozen},
        BUFFERS: {name: _shape(value) for name, value in module.named_buffers() if name in kept},
    }
    if stage == 3:
        if sharded.optimizer.swap_optimizer:
            raise RuntimeError("a training whose optimiser is swapped to NVMe cannot be saved or resumed")
        return TrainingPieces(
            optimizer=sharded.optimizer.optimizer,
            trained=list(_slots_of_stage3(module, sharded.optimizer)),
            frozen=[_own_part(name, value) for name, value in frozen],
            buffers=buffers,
            replicated=False,
            frozen_replicated=False,
            shapes=shapes,
            written=lambda: _take_over_stage3(sharded.optimizer),
        )
    whole = [Piece(name, 0, _flat(value.data)) for name, value in frozen]
    if stage == 0:
        trained = [
            Slot(Piece(name, 0, _flat(value.data)), value, 0)
            for name, value in module.named_parameters()
            if value.requires_grad
        ]
        return TrainingPieces(optimizer, trained, whole, buffers, True, True, shapes, lambda: None)
    return TrainingPieces(
        optimizer=sharded.optimizer.optimizer,
        trained=list(_slots_of_stage12(module, sharded.optimizer)),
        frozen=whole,
        buffers=buffers,
        replicated=False,
        frozen_replicated=True,
        shapes=shapes,
        written=lambda: _take_over_stage12(sharded.optimizer),
    )


def _flat(tensor: Tensor) -> Tensor:
    """A view; parameters and what optimisers keep of them are contiguous."""
    return tensor.detach().view(-1)


def _shape(value: Any) -> list[int]:
    """The whole one, also of a parameter that DeepSpeed has taken apart."""
    return list(getattr(value, "ds_shape", value.shape))


def _names(module: nn.Module) -> dict[int, str]:
    return {id(value): name for name, value in module.named_parameters()}


def _slots_of_stage12(module: nn.Module, zero: Any) -> Iterator[Slot]:
    """Each group is one flat tensor, in even parts on the ranks; a parameter may lie across a border."""
    names = _names(module)
    bf16 = not hasattr(zero, "single_partition_of_fp32_groups")  # DeepSpeed's BF16_Optimizer has its own words
    groups = zero.bf16_groups if bf16 else zero.bit16_groups
    holders = zero.fp32_groups_flat_partition if bf16 else zero.single_partition_of_fp32_groups
    for parameters, holder in zip(groups, holders, strict=True):
        flat = _flat(holder.data)
        for parameter in parameters:
            mapping = parameter._hp_mapping
            if mapping is not None:  # else no part of it is here
                whole, own = mapping.lp_fragment_address, mapping.hp_fragment_address
                part = flat[own.start : own.start + own.numel]
                yield Slot(Piece(names[id(parameter)], whole.start, part), holder, own.start)


def _take_over_stage12(zero: Any) -> None:
    zero._hp_optimizer_states_linked = False  # the states are new tensors
    zero.update_lp_params()


def _slots_of_stage3(module: nn.Module, zero: Any) -> Iterator[Slot]:
    """Each parameter is in even parts on the ranks, the last padded; a sub-group's parts are one flat tensor."""
    names = _names(module)
    for parameters, holder in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True):
        flat, offset = _flat(holder.data), 0
        for parameter in parameters:
            start, numel = _own_range(parameter)
            if numel:
                yield Slot(Piece(names[id(parameter)], start, flat[offset : offset + numel]), holder, offset)
            offset += parameter.partition_numel()


def _own_range(parameter: Any) -> tuple[int, int]:
    """The first element of this rank's part of a partitioned parameter, and how many it has without the padding."""
    share = parameter.partition_numel()
    start = share * torch.distributed.get_rank(parameter.ds_process_group)
    return start, max(0, min(share, parameter.ds_numel - start))


def _own_part(name: str, parameter: Any) -> Piece:
    start, numel = _own_range(parameter)
    return Piece(name, start, _flat(parameter.ds_tensor.data)[:numel])


def _take_over_stage3(zero: Any) -> None:
    # Small parameters stay whole on every rank: their copies are dropped before and gathered anew afterwards.
    zero.checkpoint_event_prologue()
    for number, holder in enumerate(zero.fp32_partitioned_groups_flat):
        flat = zero.fp16_partitioned_groups_flat[number]
        if holder.numel():
            flat.data.copy_(holder.data)
        parts = zero.fp16_partitioned_groups[number]
        for part, value in zip(parts, zero.unflatten(flat, parts), strict=True):
            part.data = value.data
    zero.checkpoint_event_epilogue()
