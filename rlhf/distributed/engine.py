"""Optimises one module on any number of ranks, plainly or sharded by ZeRO, with the same numbers. For our own loops.

Stage 0 uses Accelerate for device and precision and adds gradients up itself, without the DDP wrapper: one summed
all-reduce in `step` is exact for any number of micro-batches, needs no averaging to be undone, and cannot hang when
ranks run forward passes of their own in between. Stages 1 to 3 go through Accelerate's DeepSpeed plugin.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from rlhf.config.zero import ZeroConfig
from rlhf.distributed.placing import place
from rlhf.distributed.runtime import Runtime, reset_library_state
from rlhf.distributed.training_checkpoints import TrainingCheckpoints, find_checkpoint
from rlhf.distributed.zero import deepspeed_json

_ALL_REDUCE_ELEMENTS = 50_000_000


@dataclass
class TrainingEngine:
    """A module, its optimiser and its schedule, ready to train.

    `module` is what training forwards call; `unwrapped` is the caller's own module. In each optimiser step every rank
    calls `backward` exactly `accumulation_steps` times and then `step` once.
    """

    module: nn.Module
    unwrapped: nn.Module
    optimizer: Optimizer
    scheduler: LRScheduler
    runtime: Runtime
    zero_stage: int
    accumulation_steps: int
    max_grad_norm: float
    _accelerator: Any
    _micro_batches: int = field(default=0, init=False)
    _frozen_changed: bool = field(default=False, init=False)

    @classmethod
    def prepare(
        cls,
        module: nn.Module,
        optimizer: Optimizer,
        scheduler: LRScheduler,
        *,
        runtime: Runtime,
        zero: ZeroConfig,
        micro_batch_size: int,
        accumulation_steps: int,
        max_grad_norm: float,
    ) -> TrainingEngine:
        """Places `module` on the device, shards as `zero` says, and makes rank 0's weights everybody's.

        `module` comes in float32 and `optimizer` holds its parameters. `scheduler` advances once an optimiser step. One
        engine at a time: several models that are trained together are put into one module.
        """
        reset_library_state()
        from accelerate import Accelerator
        from accelerate.state import PartialState

        # DeepSpeed on CPU works only when Accelerate learns of the ranks before it learns of DeepSpeed.
        PartialState(cpu=runtime.device.type == "cpu")
        config = deepspeed_json(
            zero,
            precision=runtime.precision,
            micro_batch_size=micro_batch_size,
            accumulation_steps=accumulation_steps,
            max_grad_norm=max_grad_norm,
            device_type="cuda" if runtime.device.type == "cuda" else "cpu",
            overlap=not runtime.strict,
        )
        place(module, runtime, config)
        if config is None:
            accelerator = Accelerator(mixed_precision="bf16" if runtime.precision == "bf16" else "no")
            wrapped = accelerator.prepare_model(module, evaluation_mode=True)  # precision and device, without DDP
        else:
            from accelerate.utils import DeepSpeedPlugin

            plugin = DeepSpeedPlugin(hf_ds_config=config, zero3_init_flag=False)
            accelerator = Accelerator(deepspeed_plugin=plugin, gradient_accumulation_steps=accumulation_steps)
            wrapped, _ = accelerator.prepare(module, optimizer)
            # Else every model that is loaded from now on would be sharded too, the frozen ones included.
            plugin.dschf = None
        if accelerator.num_processes != runtime.world_size:
            raise RuntimeError(
                f"Accelerate sees {accelerator.num_processes} processes, the run has {runtime.world_size}: "
                "each rank would train a copy of its own"
            )
        return cls(
            module=wrapped,
            unwrapped=module,
            optimizer=optimizer,
            scheduler=scheduler,
            runtime=runtime,
            zero_stage=zero.stage,
            accumulation_steps=accumulation_steps,
            max_grad_norm=max_grad_norm,
            _accelerator=accelerator,
        )

    @property
    def _sharded(self) -> Any:
        """DeepSpeed's engine: `module` at stages 1 to 3. DeepSpeed has no types."""
        return self.module

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision training forwards run in, for calling parts of `unwrapped` by themselves.

        bf16 at stage 0 keeps float32 weights and needs it; under ZeRO the weights themselves are bfloat16.
        """
        if self.zero_stage == 0 and self.runtime.precision == "bf16":
            return torch.autocast(self.runtime.device.type, dtype=torch.bfloat16)
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        """Adds one micro-batch's gradient.

        `loss` is a scalar, already divided by whatever the whole optimiser step counts over all ranks. Nothing is
        averaged: the gradient of a step is d(sum of all losses passed, over ranks and micro-batches).
        """
        if self._micro_batches == self.accumulation_steps:
            raise RuntimeError(f"step() is due: {self.accumulation_steps} micro-batches were passed to backward()")
        self._micro_batches += 1
        if self.zero_stage == 0:
            loss.backward()  # type: ignore[no-untyped-call]
            return
        # DeepSpeed averages over the ranks; the division by the accumulation steps is switched off.
        self._sharded.backward(loss * self.runtime.world_size, scale_wrt_gas=False)
        if self._micro_batches < self.accumulation_steps:
            self._sharded.step()  # only counts the micro-batch

    def step(self, *, advance_schedule: bool = True) -> float:
        """Clips, updates, clears the gradients, and advances the schedule unless the caller does that by himself.

        Returns the global gradient norm before clipping, equal on all ranks.
        """
        if self._micro_batches != self.accumulation_steps:
            raise RuntimeError(
                f"step() after {self._micro_batches} micro-batches, but accumulation_steps is {self.accumulation_steps}"
            )
        self._micro_batches = 0
        if self.zero_stage == 0:
            self._sum_gradients()
            norm = nn.utils.clip_grad_norm_(self.unwrapped.parameters(), self.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        else:
            self._sharded.step()
            norm = self._sharded.get_global_grad_norm()
        if advance_schedule:
            self.scheduler.step()
        return float(norm)

    def _sum_gradients(self) -> None:
        """Replaces every gradient by its sum over the ranks.

        A parameter that no rank used keeps no gradient, so the optimiser passes over it as it does on one rank.
        """
        if self.runtime.world_size == 1:
            return
        parameters = [parameter for parameter in self.unwrapped.parameters() if parameter.requires_grad]
        used = torch.tensor([parameter.grad is not None for parameter in parameters], device=self.runtime.device)
        counts = self.runtime.sum_over_ranks(used.int()).tolist()
        gradients = []
        for parameter, count in zip(parameters, counts, strict=True):
            if count:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                gradients.append(parameter.grad)
        for bucket in _buckets(gradients):
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            torch.distributed.all_reduce(flat)
            parts = torch.split(flat, [gradient.numel() for gradient in bucket])
            for gradient, part in zip(bucket, parts, strict=True):
                gradient.copy_(part.view_as(gradient))

    @contextmanager
    def gathered(self) -> Iterator[nn.Module]:
        """Yields `unwrapped` with whole weights, to be called any number of times, also unequally often on the ranks.

        For generation, scoring and saving, not for training. ZeRO-3 gathers once on entering and drops the copies on
        leaving, so the whole module must fit; all ranks enter and leave together.
        """
        with self.autocast():
            if self.zero_stage < 3:
                yield self.unwrapped
                return
            import deepspeed
            from trl.models.utils import add_hooks, remove_hooks

            with deepspeed.zero.GatheredParameters(list(self.unwrapped.parameters())):
                remove_hooks(self.module)  # they would drop a layer's weights after its first forward pass
                try:
                    yield self.unwrapped
                finally:
                    add_hooks(self.module)

    @contextmanager
    def modified(self) -> Iterator[nn.Module]:
        """Yields `unwrapped` with whole weights that may be changed in place, equally on all ranks.

        As `gathered`, but under ZeRO-3 what rank 0 holds on leaving is shared out again. From here on checkpoints have
        the frozen weights too.
        """
        self._frozen_changed = True
        if self.zero_stage < 3:
            yield self.unwrapped
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(self.unwrapped.parameters()), modifier_rank=0):
            yield self.unwrapped

    def state_dict_for_saving(self, prefix: str = "", names: Set[str] | None = None) -> dict[str, torch.Tensor]:
        """On rank 0 the whole weights on the CPU, without `prefix` and only those that have it; on the others nothing.

        `names` are the ones that are wanted, in the module's own words; None: all. float32, except bfloat16 under ZeRO
        with bf16. Every rank must call it. Weights that share memory still do.
        """
        state: Mapping[str, torch.Tensor] | None
        if self.zero_stage == 3:
            state = self._accelerator.get_state_dict(self.module)
        else:
            state = self.unwrapped.state_dict() if self.runtime.is_main else {}
        if not self.runtime.is_main or state is None:
            return {}
        copies: dict[tuple[Any, ...], torch.Tensor] = {}
        result = {}
        for name, value in state.items():
            if name.startswith(prefix) and (names is None or name in names):
                key = (value.data_ptr(), value.shape, value.stride(), value.dtype)
                result[name.removeprefix(prefix)] = copies.setdefault(key, value.detach().to("cpu", copy=True))
        return result

    def save_checkpoint(
        self, folder: Path, extra: Mapping[str, Any] | None = None, shared: Mapping[str, Any] | None = None
    ) -> None:
        """Writes everything a bit-identical continuation needs: weights, optimiser, schedule, every rank's generators.

        `extra` is this rank's own state, `shared` is rank 0's and read by all; both of plain values and tensors. The
        folder appears under its name only when it is whole. Every rank must call it, between optimiser steps.
        """
        if self._micro_batches:
            raise RuntimeError("a checkpoint is written between optimiser steps, not within one")
        body = {
            "scheduler": self.scheduler.state_dict(),
            "frozen_changed": self._frozen_changed,
            "shared": dict(shared or {}),
        }
        self._checkpoints.save(folder, shared=body, own=extra, frozen_changed=self._frozen_changed)

    def load_checkpoint(self, folder: Path, *, verified: bool = False) -> dict[str, Any]:
        """Restores what `save_checkpoint` wrote and returns `shared` with this rank's `extra` on top of it.

        Every rank must call it. The checkpoint may be of another number of ranks or another ZeRO stage: the training
        then goes on as it would have but for rounding, if its global batches stay what they were. `verified`: the
        folder comes from `find_checkpoint`, which has read and hashed it.

        Tensors of `shared` are parts of the file: copy what is kept. Raises `ArtifactError`, on all ranks, when the
        folder is not whole or belongs to another training.
        """
        body, extra = self._checkpoints.load(folder, verified=verified)
        self._checkpoints.set_generators(folder)
        self.scheduler.load_state_dict(body["scheduler"])
        self._frozen_changed = body["frozen_changed"]
        self._micro_batches = 0
        return {**body["shared"], **extra}

    def find_checkpoint(self, parent: Path) -> tuple[Path | None, list[str]]:
        """See `rlhf.distributed.training_checkpoints.find_checkpoint`."""
        return find_checkpoint(parent, self.runtime, self.zero_stage)

    @cached_property
    def _checkpoints(self) -> TrainingCheckpoints:
        sharded = self._sharded if self.zero_stage else None
        return TrainingCheckpoints(self.unwrapped, self.optimizer, self.runtime, sharded)


def _buckets(tensors: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Consecutive tensors of one dtype, together at most `_ALL_REDUCE_ELEMENTS` elements unless one alone is larger."""
    bucket: list[torch.Tensor] = []
    elements = 0
    for tensor in tensors:
        if bucket and (elements + tensor.numel() > _ALL_REDUCE_ELEMENTS or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, elements = [], 0
        bucket.append(tensor)
        elements += tensor.numel()
    if bucket:
        yield bucket
