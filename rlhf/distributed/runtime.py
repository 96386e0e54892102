"""One rank's view of the run: who it is, on which device, in which precision, and how to talk to the others."""

from __future__ import annotations

import importlib.util
import logging
import os
import random
import socket
import sys
import time
import warnings
import weakref
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar

import numpy
import torch
import torch.distributed

from rlhf.config.distributed import DistributedConfig
from rlhf.config.zero import ZeroConfig
from rlhf.distributed.determinism import apply_determinism, prepare_environment
from rlhf.distributed.launch import die_with_parent, threads_per_rank
from rlhf.distributed.slurm import adopt_slurm, tasks_are_ranks
from rlhf.distributed.zero import check_with_deepspeed
from rlhf.errors import ConfigError

ObjectT = TypeVar("ObjectT")
Precision = Literal["fp32", "bf16"]
_LAST_WORK_SECONDS = 0.2
_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@dataclass(frozen=True)
class Runtime:
    """The process group as one rank sees it.

    `dtype` is what forward passes compute in and what frozen models are held in. A module that is trained is loaded in
    float32 whatever the precision: the engine keeps float32 master weights and lowers the precision of the rest.
    `stop_seconds` is what a stop may take; `strict`: equal runs give equal bits, see `rlhf.distributed.determinism`.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    precision: Precision
    stop_seconds: float = float("inf")
    strict: bool = False

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and metrics."""
        return self.rank == 0

    @property
    def dtype(self) -> torch.dtype:
        """float32 or bfloat16."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    @classmethod
    def start(cls, config: DistributedConfig, zero: ZeroConfig, seed: int) -> Runtime:
        """Sets threads, seeds, device and libraries up for one stage, and joins the process group.

        May be called again in the same process, once for each stage: the process group stays, what Accelerate and
        transformers remember of the stage before is forgotten, the seeds start anew. One rank has a process group only
        when ZeRO needs one. Raises `ConfigError` when the hardware, the number of processes or an installed package is
        not what the configuration asks for.
        """
        die_with_parent()
        adopt_slurm(os.environ)
        rank, world_size, local_rank, local_world_size = _identity(config)
        _quiet_libraries()
        prepare_environment(config, os.environ)
        device = _choose_device(config, local_rank)
        if device.type == "cuda":
            local_rank = device.index  # Accelerate and DeepSpeed take it for the device's number
        # Whoever imports DeepSpeed, and transformers may at stage 0 too, must not let it choose a device of its own.
        os.environ["DS_ACCELERATOR"] = device.type
        precision = _choose_precision(config, device)
        if zero.stage > 0:
            _require_deepspeed()
        reset_library_state()
        _set_threads(threads_per_rank(local_world_size, config.fixed_threads, os.environ))
        apply_determinism(config, device)  # NCCL asks for it when the group is made
        if zero.stage > 0:
            _prepare_deepspeed(device)
        if world_size > 1 or zero.stage > 0:
            _join_process_group(rank, world_size, local_rank, local_world_size, device, config.timeout_seconds)
        else:
            for name in _RANK_VARIABLES:  # else Accelerate and DDP make a group of one and pay for it
                os.environ.pop(name, None)
        if zero.stage > 0:
            check_with_deepspeed(zero)
        _seed_everything(seed)
        strict = config.determinism == "strict"
        return cls(rank, world_size, local_rank, device, precision, config.stop_seconds, strict)

    def barrier(self) -> None:
        """Waits until every rank is here."""
        if self.world_size > 1:
            device_ids = [self.device.index] if self.device.type == "cuda" else None
            torch.distributed.barrier(device_ids=device_ids)

    def gather_objects(self, item: ObjectT) -> list[ObjectT]:
        """Every rank's `item`, in the order of the ranks, on every rank. Items are pickled."""
        if self.world_size == 1:
            return [item]
        gathered: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(gathered, item)
        return gathered

    def broadcast_object(self, item: ObjectT) -> ObjectT:
        """Rank 0's `item` on every rank; what the others pass is ignored."""
        if self.world_size == 1:
            return item
        box = [item]
        torch.distributed.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def sum_over_ranks(self, tensor: torch.Tensor) -> torch.Tensor:
        """A new tensor like `tensor`: the sum over the ranks, with equal bits on every rank."""
        if self.world_size == 1:
            return tensor.clone()
        total = tensor.detach().to(self.device, copy=True)
        torch.distributed.all_reduce(total)
        return total.to(tensor.device)

    def stop(self) -> None:
        """Leaves the process group, at the end of the process's last stage; harmless when there is none.

        Whoever still holds the group, such as an engine of DeepSpeed in a variable of the caller, keeps its threads
        alive. One that lets go of its last tensor needs the interpreter once more, and aborts the process when that
        has gone ("terminate called without an active exception", pytorch/pytorch#179291); so it gets the time.
        """
        reset_library_state()
        if not torch.distributed.is_initialized():
            return
        group = weakref.ref(torch.distributed.distributed_c10d._get_default_group())
        if "deepspeed" in sys.modules and sys.modules["deepspeed"].comm.is_initialized():
            import deepspeed

            deepspeed.comm.destroy_process_group()  # it keeps references of its own
            deepspeed.comm.comm.cdb = None
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        if group() is not None:
            time.sleep(_LAST_WORK_SECONDS)


def reset_library_state() -> None:
    """Forgets what Accelerate and transformers keep for the whole process, so that the next trainer starts clean.

    Their variables go too: Accelerate and `TrainingArguments` write ACCELERATE_* and read them in the next trainer, and
    `accelerate launch` hands settings down in them that would compete with the configuration.
    """
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    if "transformers.integrations.deepspeed" in sys.modules:
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()


def _identity(config: DistributedConfig) -> tuple[int, int, int, int]:
    """Rank, world size, local rank and local world size, checked against the configuration."""
    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size)))
    # Started by another launcher on several hosts, the configuration may count the processes of all of them.
    if config.num_processes not in (local_world_size, world_size):
        raise ConfigError(
            f"distributed.num_processes is {config.num_processes}, but this host runs {local_world_size} "
            f"process{'es' if local_world_size > 1 else ''} (world size {world_size}). "
            f"Set distributed.num_processes={local_world_size}, or start {config.num_processes} with your launcher."
        )
    if config.num_nodes > 1 and world_size != config.world_size:
        raise ConfigError(
            f"distributed.num_nodes ({config.num_nodes}) * distributed.num_processes ({config.num_processes}) is "
            f"{config.world_size}, but the process group has {world_size} ranks. Under another launcher leave both out."
        )
    return rank, world_size, local_rank, local_world_size


def _choose_device(config: DistributedConfig, local_rank: int) -> torch.device:
    if config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(
            "distributed.device is cuda, but torch finds no CUDA device. "
            "Set distributed.device=cpu, or install a CUDA build of torch and check `nvidia-smi`."
        )
    if torch.cuda.device_count() == 1 and tasks_are_ranks(os.environ):
        local_rank = 0  # srun --gpus-per-task=1: each task sees its own GPU alone, and it is number 0 to all of them
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"distributed.num_processes is {config.num_processes}, but this host has {torch.cuda.device_count()} "
            "visible CUDA device(s): each process needs its own. Lower it, or set distributed.device=cpu."
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _choose_precision(config: DistributedConfig, device: torch.device) -> Precision:
    if device.type == "cpu":
        return "fp32" if config.precision == "auto" else config.precision
    native = torch.cuda.get_device_capability(device) >= (8, 0)
    if config.precision == "auto":
        return "bf16" if native else "fp32"
    if config.precision == "bf16" and not native:
        raise ConfigError(
            f"distributed.precision is bf16, but {torch.cuda.get_device_name(device)} has no bfloat16 units "
            "(compute capability 8.0 or newer has). Set distributed.precision=fp32."
        )
    return config.precision


def _require_deepspeed() -> None:
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            "zero.stage above 0 needs DeepSpeed, which is not installed. "
            "Install it with `pip install deepspeed`, or set zero=none."
        )


def _set_threads(threads: int) -> None:
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)


def _seed_everything(seed: int) -> None:
    """The same on every rank: streams that must differ between ranks are keyed by what they draw for."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _join_process_group(
    rank: int, world_size: int, local_rank: int, local_world_size: int, device: torch.device, timeout_seconds: int
) -> None:
    """Initialises torch's process group unless the process is in one already.

    A module that is imported later and has the group of that moment as a default of its functions would keep it for
    good, see `Runtime.stop`; those that are known to are imported before.
    """
    import torch.distributed.nn

    values = (rank, world_size, local_rank, local_world_size)
    for name, value in zip(_RANK_VARIABLES, values, strict=True):  # without them DeepSpeed looks for MPI
        os.environ[name] = str(value)
    if not torch.distributed.is_initialized():
        if world_size == 1:
            os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
            os.environ.setdefault("MASTER_PORT", str(_free_port()))
        torch.distributed.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            timeout=timedelta(seconds=timeout_seconds),
            rank=rank,
            world_size=world_size,
            device_id=device if device.type == "cuda" else None,
        )
    if torch.distributed.get_world_size() != world_size or torch.distributed.get_rank() != rank:
        raise RuntimeError(
            f"the process group has rank {torch.distributed.get_rank()} of {torch.distributed.get_world_size()}, "
            f"but the environment says {rank} of {world_size}"
        )


def _free_port() -> int:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        port: int = holder.getsockname()[1]
        return port


def _quiet_libraries() -> None:
    """Keeps notices that no user of ours can act upon off the terminal; warnings of substance still show."""
    for name in ("accelerate", "DeepSpeed", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for module in (r"deepspeed\.", r"accelerate\.", r"torch\.distributed\."):
        warnings.filterwarnings("ignore", module=module)


def _prepare_deepspeed(device: torch.device) -> None:
    """Imports DeepSpeed for this device. Raises `ConfigError` when the import fails.

    To be called before the process group is made: at import DeepSpeed takes the group of that moment for the default of
    its barriers.
    """
    try:
        import deepspeed
        import deepspeed.comm
    except ImportError as error:
        raise ConfigError(
            f"zero.stage above 0 needs DeepSpeed, which cannot be imported ({error}). "
            "Reinstall it with `pip install deepspeed`, or set zero=none."
        ) from error
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # importing it set the level anew
    if device.type == "cpu":
        # Without this the first initialisation compiles C++ for half a minute, and fails where there is no compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
