"""What training a module takes in memory: weights, gradients, optimiser, buffers; whole or sharded by ZeRO.

With bf16 and Adam these are the 2 + 2 + 12 bytes a parameter of Rajbhandari et al. 2020 (arXiv 1910.02054), section 3,
with 4 for the gradient, which is added up in float32. ZeRO-1 divides the 12 by the number of ranks, ZeRO-2 the
gradients too, ZeRO-3 everything. The rest is what DeepSpeed and torch hold besides, read off their code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlhf.config.zero import AUTO, ZeroConfig
from rlhf.distributed.zero import BUCKET_ELEMENTS, MAX_LIVE_PARAMETERS

MASTER_BYTES = 4
MOMENTS_BYTES = 8  # Adam's two, in float32
_FLOAT32, _BFLOAT16 = 4, 2
# Trained parameters that an optimiser step of ZeRO-3 takes at a time, DeepSpeed's own number.
_SUB_GROUP_ELEMENTS = 1_000_000_000
# Elements of a reduction in DeepSpeed's BF16_Optimizer, which no setting changes.
_REDUCED_AT_ONCE = 500_000_000


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

    @property
    def accumulation_width(self) -> int:
        """Bytes of a gradient that waits for the optimiser step: float32 unless a user's own JSON says bf16."""
        wanted = _entry(self, "data_types", "grad_accum_dtype")
        return self.trained_width if wanted in ("bf16", "bfloat16") else _FLOAT32

    @property
    def whole_gradients(self) -> bool:
        """Whether DeepSpeed takes its BF16_Optimizer, which has a float32 gradient of every parameter at all times."""
        widened = self.accumulation_width > self.trained_width
        return self.stage == 1 and widened and not self.zero.offload_optimizer


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
    gradients = trainable * setting.accumulation_width / (ranks if stage >= 2 else 1)
    if setting.whole_gradients:
        gradients += trainable * width  # as the backward pass made them
    host_parameters = host_optimizer = 0.0
    if setting.zero.offload_optimizer:
        # The gradients of the partition wait there in float32, and also as they were reduced.
        host_optimizer = master + moments + trainable * MASTER_BYTES / ranks
        host_optimizer += trainable * (width if stage == 2 else setting.accumulation_width) / ranks
        master = moments = 0.0
        gradients = gradients if stage == 1 else float(module.largest * width)
    if setting.zero.offload_parameters:
        host_parameters, parameters = parameters, 0.0
    return States(parameters, master, moments, gradients, host_parameters, host_optimizer)


def standing_gradients(module: Module, setting: Setting) -> float:
    """What of the gradients is there also between the steps: ZeRO-3's flat buffer, or ZeRO-1's of all in float32."""
    if setting.whole_gradients:
        return float(module.trainable * setting.accumulation_width)
    on_device = setting.stage == 3 and not setting.zero.offload_optimizer
    return module.trainable * setting.accumulation_width / setting.num_ranks if on_device else 0.0


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
    if setting.whole_gradients:
        return 0.0  # they are reduced at the end: see reduction_copies
    bucket = _extra(setting, "reduce_bucket_size", BUCKET_ELEMENTS)
    # On a CPU the pages of a buffer exist once they are written; on a GPU all of it is taken.
    size = bucket if cuda else min(bucket, module.trainable)
    if setting.stage == 3:
        prefetch = _extra(setting, "stage3_prefetch_bucket_size", BUCKET_ELEMENTS) if cuda else 0
        return (size + min(prefetch, module.whole)) * width
    return size * width * (2 if cuda else 1)  # a second one to overlap with the backward pass


def reduction_copies(module: Module, setting: Setting) -> float:
    """Copies of a full bucket while ZeRO-3 reduces it: DeepSpeed's flat one and, on the CPU, gloo's clone of that.

    Its BF16_Optimizer reduces float32 gradients, flat and once more in bfloat16.
    """
    if setting.whole_gradients:
        return min(_REDUCED_AT_ONCE, module.trainable) * float(setting.accumulation_width + setting.trained_width)
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
    if stage == 3:
        share = min(share, _extra(setting, "sub_group_size", _SUB_GROUP_ELEMENTS))  # one sub-group after the other
    if setting.zero.offload_optimizer:
        return 0.0, 2 * share * _FLOAT32
    # ZeRO-1 and 2 use gradients as they are that were added up in float32 for bfloat16 weights.
    in_place = stage < 3 and setting.accumulation_width > setting.trained_width
    flat = share * setting.trained_width if stage < 3 and not in_place else 0.0
    gradient = share * _FLOAT32 if stage == 3 or setting.accumulation_width < _FLOAT32 else 0.0
    adam = share * _FLOAT32 * (1 if setting.device == "cuda" else 2)
    return flat + gradient + adam, 0.0


def weight_copies(multiplied: int, setting: Setting) -> float:
    """The bfloat16 copies of float32 weights that autocast keeps; 0 elsewhere."""
    return multiplied * _BFLOAT16 if setting.autocast else 0.0


def _extra(setting: Setting, name: str, default: int) -> int:
    """An entry of the ZeRO section, which `zero.extra` or a user's own JSON may replace."""
    value = _entry(setting, "zero_optimization", name)
    return int(value) if isinstance(value, int | float) else default


def _entry(setting: Setting, section: str, name: str) -> object:
    """What `zero.extra`, else a user's own JSON, has under a name in a section; None where neither has anything."""
    for source in (setting.zero.extra, setting.zero.content):
        part = source.get(section)
        value = part.get(name) if isinstance(part, dict) else None
        if value not in (None, AUTO):
            return value
    return None
