"""Brings a module that was loaded on the CPU to its device, without holding more of it there than training will."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.distributed.runtime import Runtime

# Before DeepSpeed has replaced it.
_LINEAR = torch.nn.functional.linear


def place(module: nn.Module, runtime: Runtime, config: Mapping[str, Any] | None) -> None:
    """Moves `module` to the device and makes rank 0's weights everybody's; all ranks call it.

    `config` is DeepSpeed's, None without it. Under DeepSpeed the weights take the precision they are trained in before
    they are moved, and at stage 3 one parameter at a time is moved and shared out: it is never whole on a device.
    """
    if config is None:
        module.to(runtime.device)
        _broadcast([*module.parameters(), *module.buffers()], runtime)
        return
    for parameter in module.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(runtime.dtype)
    if config["zero_optimization"]["stage"] == 3:
        share_out(module, runtime, config_dict_or_path=dict(config))
        return
    module.to(runtime.device)
    _broadcast([*module.parameters(), *module.buffers()], runtime)


def share_out(module: nn.Module, runtime: Runtime, **options: Any) -> None:
    """Partitions the parameters of `module` over the ranks for ZeRO-3, rank 0's weights. All ranks call it.

    `options` are those of `deepspeed.zero.Init`.
    """
    import deepspeed

    for part in module.modules():
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = buffer.to(runtime.device)
    _broadcast(list(module.buffers()), runtime)
    deepspeed.zero.Init(
        module=module,
        # Nothing keeps frozen weights for a backward pass. With a configuration, what that says holds instead.
        mem_efficient_linear=False,
        dtype=next(module.parameters()).dtype,
        **options,
    )


@contextmanager
def linear_put_back() -> Iterator[None]:
    """Puts torch's own linear back on leaving, where training under ZeRO-3 has replaced it for the whole process.

    DeepSpeed's keeps no gathered weights from the forward to the backward pass, which training needs; but it rounds in
    another way, and what comes after must not depend on whether there was a training in this process.
    """
    try:
        yield
    finally:
        if str(torch.nn.functional.linear.__module__).startswith("deepspeed"):
            torch.nn.functional.linear = _LINEAR


def _broadcast(tensors: list[Tensor], runtime: Runtime) -> None:
    """Overwrites them with rank 0's."""
    if runtime.world_size > 1:
        for tensor in tensors:
            torch.distributed.broadcast(tensor.data, src=0)
