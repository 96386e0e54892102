"""Frozen models under ZeRO-3: every rank holds its share of each layer and gathers a layer for its forward pass.

The layers are the items of the outermost module lists (a transformer's blocks). What lies outside of them (embeddings,
the last norm, heads) is gathered once for a whole scoring phase, because scoring also reads the head's weights by
themselves, a different number of times on every rank. What remains is one gather a layer in each forward pass: ranks
must run equally many, of texts of any length.

DeepSpeed partitions and gathers. Its own hooks are not used: they follow forward passes of the root module, and scoring
calls backbone and head apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from rlhf.distributed.placing import share_out

if TYPE_CHECKING:
    from rlhf.config.zero import ZeroConfig
    from rlhf.distributed.runtime import Runtime

RowT = TypeVar("RowT")


class FrozenShards:
    """A loaded model, taken apart over the ranks for good. Rank 0's weights are everybody's; all ranks make it.

    The model is called within `ready`, without gradients. Shares lie on the rank's device, or in CPU memory with
    `zero.offload_parameters`.
    """

    def __init__(self, model: nn.Module, runtime: Runtime, zero: ZeroConfig) -> None:
        from accelerate.state import PartialState

        # DeepSpeed on CPU works only when Accelerate learns of the ranks before it learns of DeepSpeed.
        PartialState(cpu=runtime.device.type == "cpu")
        model.requires_grad_(False)
        self.model = model
        self._runtime = runtime
        layers = _layers(model)
        inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
        self._groups = [list(layer.parameters()) for layer in layers]
        self._outside = [parameter for parameter in model.parameters() if id(parameter) not in inside]
        share_out(
            model,
            runtime,
            remote_device="cpu" if zero.offload_parameters else None,
            pin_memory=zero.offload_parameters and runtime.device.type == "cuda",
        )
        for layer in layers:
            _gather_for_forward(layer)

    @contextmanager
    def ready(self) -> Iterator[None]:
        """The model may be called, equally often on all ranks, which enter and leave together."""
        with _gathered(self._outside):
            yield

    def state_dict(self) -> dict[str, Tensor]:
        """On rank 0 the whole weights on the CPU, a layer gathered at a time; on the others nothing. All ranks call."""
        names = {id(value): name for name, value in self.model.named_parameters()}
        state: dict[str, Tensor] = {}
        for group in (self._outside, *self._groups):
            with _gathered(group):
                if self._runtime.is_main:
                    state |= {names[id(value)]: value.detach().to("cpu", copy=True) for value in group}
        if not self._runtime.is_main:
            return {}
        for name, value in self.model.named_parameters(remove_duplicate=False):
            state[name] = state[names[id(value)]]
        stored = set(self.model.state_dict())
        return state | {
            name: value.detach().to("cpu", copy=True) for name, value in self.model.named_buffers() if name in stored
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes over the weights of rank 0's `state`, which has all names of `state_dict`. All ranks call it."""
        names = {id(value): name for name, value in self.model.named_parameters()}
        for group in (self._outside, *self._groups):
            with _gathered(group, modifier_rank=0):
                if self._runtime.is_main:
                    for value in group:
                        value.copy_(state[names[id(value)]])
        buffers = {name: value for name, value in self.model.named_buffers() if name in set(self.model.state_dict())}
        for name, buffer in buffers.items():
            if self._runtime.is_main:
                buffer.copy_(state[name])
            torch.distributed.broadcast(buffer, src=0)


@contextmanager
def on_device(model: nn.Module, runtime: Runtime, zero: ZeroConfig) -> Iterator[None]:
    """`model`, which was loaded on the CPU, may be called on the rank's device without gradients.

    Under ZeRO-3 it is taken apart for good: ranks then call it equally often, as `equal_batches` makes them.
    """
    if zero.stage == 3:
        with FrozenShards(model, runtime, zero).ready():
            yield
    else:
        nn.Module.to(model, runtime.device)
        yield


def equal_batches(rows: Sequence[RowT], size: int, runtime: Runtime) -> Iterator[Sequence[RowT]]:
    """This rank's rows, every `world_size`-th one, in batches of `size`; the last may be smaller.

    All ranks get equally many batches: one that has run out of rows gets an empty one.
    """
    mine = rows[runtime.rank :: runtime.world_size]
    for start in range(0, len(rows[:: runtime.world_size]), size):
        yield mine[start : start + size]


def _layers(model: nn.Module) -> list[nn.Module]:
    """The items of the outermost module lists."""
    found: list[nn.Module] = []
    for child in model.children():
        found += list(child) if isinstance(child, nn.ModuleList) else _layers(child)
    return found


def _gathered(parameters: list[nn.Parameter], modifier_rank: int | None = None) -> Any:
    """Whole weights within the context; what `modifier_rank` changed is shared out on leaving."""
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=modifier_rank)


def _gather_for_forward(layer: nn.Module) -> None:
    """The layer's weights are whole during its forward pass, and dropped behind it, also when that fails."""
    entered: list[Any] = []

    def gather(module: nn.Module, arguments: object) -> None:
        entered.append(_gathered(list(layer.parameters())))
        entered[-1].__enter__()

    def release(module: nn.Module, arguments: object, output: object) -> None:
        if entered:  # an always-called hook also runs where the gathering itself failed
            entered.pop().__exit__(None, None, None)

    layer.register_forward_pre_hook(gather)
    layer.register_forward_hook(release, always_call=True)
