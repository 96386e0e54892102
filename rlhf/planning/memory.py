"""What training a module takes in memory: weights, gradients, optimiser, buffers; whole or sharded by ZeRO.

With bf16 and Adam these are the 2 + 2 + 12 bytes a parameter of Rajbhandari et al. 2020 (arXiv 1910.02054), section 3.
ZeRO-1 divides the 12 by the number of ranks, ZeRO-2 the gradients too, ZeRO-3 everything. The rest is what DeepSpeed
and torch hold besides, read off their code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlhf.config.zero import ZeroConfig
from rlhf.distributed.zero import BUCKET_ELEMENTS, MAX_LIVE_PARAMETERS

MASTER_BYTES = 4
MOMENTS_BYTES = 8  # Adam's two, in float32
_FLOAT32, _BFLOAT16 = 4, 2


@dataclass(frozen=True)
class Setting:
    """On what a stage runs. `ranks_per_node` share the host's memory."""

    num_ranks: int
    ranks_per_node: int
    device: Literal["cpu", "cuda"]
    bfloat16: bool
    zero: ZeroConfig

    @property
    def stage(self) -> int:
        """ZeRO stage."""
        return self.zero.stage

    @property
    def autocast(self) -> bool:
        """bf16 without ZeRO: float32 weights, products in bfloat16."""
        return self.bfloat16 and self.stage == 0

    @property
    def runtime_width(self) -> int:
        """Bytes of a number that forward passes compute in and frozen models are held in."""
        return _BFLOAT16 if self.bfloat16 else _FLOAT32

    @property
    def trained_width(self) -> int:
        """Bytes of a trained weight and its gradient: bfloat16 only under ZeRO, which keeps float32 masters."""
        return _BFLOAT16 if self.bfloat16 and self.stage > 0 else _FLOAT32


@dataclass(frozen=True)
class Module:
    """A module in training. Counts of parameters; `largest` is the largest one of those that are trained.

    `frozen_width` are the bytes of a frozen weight without ZeRO; `multiplied` are the weights in matrix products.
    """

    whole: int
    trainable: int
    largest: int
    multiplied: int
    frozen_width: int = _FLOAT32
    tied: bool = False


@dataclass(frozen=True)
class States:
    """Bytes a rank holds while it trains. `host_…` lie in CPU memory because of offload, the rest on the device."""

    parameters: float
    master: float
    moments: float
    gradients: float
    host_parameters: float = 0.0
    host_optimizer: float = 0.0

    @property
    def optimizer(self) -> float:
        """Master weights and moments on the device."""
        return self.master + self.moments


def training_states(module: Module, setting: Setting) -> States:
    """Weights, gradients and optimiser of a rank between backward pass and optimiser step."""
    stage, width, ranks = setting.stage, setting.trained_width, setting.num_ranks
    trainable, frozen = module.trainable, module.whole - module.trainable
    if stage == 0:
        held = trainable * _FLOAT32 + frozen * module.frozen_width
        return States(held, 0.0, trainable * MOMENTS_BYTES, trainable * _FLOAT32)
    parameters = module.whole * width / (ranks if stage == 3 else 1)
    # ZeRO-1 and 2 clone a float32 partition whatever the precision; ZeRO-3 only where the weights have another one.
    has_master = stage < 3 or width < MASTER_BYTES or setting.zero.offload_optimizer
    master = trainable * MASTER_BYTES / ranks if has_master else 0.0
    moments = trainable * MOMENTS_BYTES / ranks
    gradients = trainable * width / (ranks if stage >= 2 else 1)
    host_parameters = host_optimizer = 0.0
    if setting.zero.offload_optimizer:
        # The gradients of the partition wait there in float32, under ZeRO-3 also as they were reduced.
        host_optimizer = master + moments + trainable * MASTER_BYTES / ranks
        host_optimizer += trainable * width / ranks
        master = moments = 0.0
        gradients = gradients if stage == 1 else float(module.largest * width)
    if setting.zero.offload_parameters:
        host_parameters, parameters = parameters, 0.0
    return States(parameters, master, moments, gradients, host_parameters, host_optimizer)


def standing_gradients(module: Module, setting: Setting) -> float:
    """What of the gradients is there also between the steps: ZeRO-3's flat buffer."""
    on_device = setting.stage == 3 and not setting.zero.offload_optimizer
    return module.trainable * setting.trained_width / setting.num_ranks if on_device else 0.0


def whole_parameters(module: Module, setting: Setting) -> float:
    """Bytes of the gathered copies while ZeRO-3 holds the whole module; 0 at the other stages."""
    return module.whole * setting.trained_width if setting.stage == 3 else 0.0


def live_parameters(module: Module, setting: Setting) -> float:
    """Gathered weights that ZeRO-3 keeps at a time in training: released only beyond `stage3_max_live_parameters`."""
    if setting.stage < 3:
        return 0.0
    limit = _extra(setting, "stage3_max_live_parameters", MAX_LIVE_PARAMETERS)
    return min(module.whole, limit) * setting.trained_width


def communication(module: Module, setting: Setting, *, ddp: bool) -> float:
    """Buffers of the reduction of gradients. `ddp`: the trainer of SFT and reward model, which buckets all of them."""
    width, cuda = setting.trained_width, setting.device == "cuda"
    if setting.stage == 0:
        if setting.num_ranks == 1:
            return 0.0
        return module.trainable * width if ddp else min(BUCKET_ELEMENTS, module.trainable) * width
    bucket = _extra(setting, "reduce_bucket_size", BUCKET_ELEMENTS)
    # On a CPU the pages of a buffer exist once they are written; on a GPU all of it is taken.
    size = bucket if cuda else min(bucket, module.trainable)
    if setting.stage == 3:
        prefetch = _extra(setting, "stage3_prefetch_bucket_size", BUCKET_ELEMENTS) if cuda else 0
        return (size + min(prefetch, module.whole)) * width
    return size * width * (2 if cuda else 1)  # a second one to overlap with the backward pass


def reduction_copies(module: Module, setting: Setting) -> float:
    """Copies of a full bucket while ZeRO-3 reduces it: DeepSpeed's flat one and, on the CPU, gloo's clone of that."""
    if setting.stage < 3 or setting.num_ranks == 1:
        return 0.0
    bucket = min(_extra(setting, "reduce_bucket_size", BUCKET_ELEMENTS), module.trainable)
    return bucket * setting.trained_width * (1 if setting.device == "cuda" else 2)


def step_memory(module: Module, setting: Setting) -> tuple[float, float]:
    """What the optimiser step takes besides: bytes on the device and on the host."""
    stage, ranks = setting.stage, setting.num_ranks
    share = module.trainable / (ranks if stage else 1)
    if stage == 0:
        # AdamW on a GPU takes the roots of all second moments at once, on a CPU two copies of one parameter's.
        device = share * _FLOAT32 if setting.device == "cuda" else 2 * module.largest * _FLOAT32
        return device, 0.0
    if setting.zero.offload_optimizer:
        return 0.0, 2 * share * _FLOAT32
    flat = share * setting.trained_width if stage < 3 else 0.0
    gradient = share * _FLOAT32 if stage == 3 or setting.trained_width < _FLOAT32 else 0.0
    adam = share * _FLOAT32 * (1 if setting.device == "cuda" else 2)
    return flat + gradient + adam, 0.0


def weight_copies(multiplied: int, setting: Setting) -> float:
    """The bfloat16 copies of float32 weights that autocast keeps; 0 elsewhere."""
    return multiplied * _BFLOAT16 if setting.autocast else 0.0


def _extra(setting: Setting, name: str, default: int) -> int:
    """An entry of the ZeRO section, which `zero.extra` or a user's own JSON may replace."""
    for source in (setting.zero.extra, setting.zero.content):
        section = source.get("zero_optimization", {})
        value = section.get(name) if isinstance(section, dict) else None
        if isinstance(value, int | float):
            return int(value)
    return default
