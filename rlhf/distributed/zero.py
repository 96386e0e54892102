"""The DeepSpeed configuration of a ZeRO stage. Pure: the same for our own engine and for a Hugging Face trainer."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any, Literal

from rlhf.config.zero import ZeroConfig

# Elements in a communication buffer. DeepSpeed's own 500 million would take 2 GB a rank before the first step.
_BUCKET_ELEMENTS = 50_000_000


def deepspeed_json(
    zero: ZeroConfig,
    *,
    precision: Literal["fp32", "bf16"],
    micro_batch_size: int,
    accumulation_steps: int,
    max_grad_norm: float,
    device_type: Literal["cpu", "cuda"],
) -> dict[str, Any] | None:
    """The configuration as DeepSpeed, Accelerate and `TrainingArguments(deepspeed=...)` take it; None at stage 0.

    `micro_batch_size` is one rank's examples a forward pass, `accumulation_steps` its forward passes an optimiser step.
    The optimiser and the learning-rate schedule are the caller's own. `zero.extra` is merged in last, key by key.
    """
    if zero.stage == 0:
        return None
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps,
        "gradient_clipping": max_grad_norm,
        "zero_optimization": _zero_section(zero, device_type),
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
    if zero.offload_optimizer:
        config["zero_force_ds_cpu_optimizer"] = False  # torch's optimiser works there without compiling C++
    if precision == "bf16":
        config["bf16"] = {"enabled": True}
    return _merged(config, zero.extra)


def _zero_section(zero: ZeroConfig, device_type: Literal["cpu", "cuda"]) -> dict[str, Any]:
    section: dict[str, Any] = {
        "stage": zero.stage,
        "overlap_comm": device_type == "cuda",  # on CPU there is no second stream to overlap with
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "reduce_bucket_size": _BUCKET_ELEMENTS,
        "allgather_bucket_size": _BUCKET_ELEMENTS,
    }
    if zero.stage == 3:
        section |= {
            "stage3_prefetch_bucket_size": _BUCKET_ELEMENTS,
            "stage3_param_persistence_threshold": 100_000,
            "stage3_max_live_parameters": 1_000_000_000,
            "stage3_max_reuse_distance": 1_000_000_000,
            "stage3_gather_16bit_weights_on_model_save": True,
        }
    if zero.offload_optimizer:
        section["offload_optimizer"] = {"device": "cpu", "pin_memory": device_type == "cuda"}
    if zero.offload_parameters:
        section["offload_param"] = {"device": "cpu", "pin_memory": device_type == "cuda"}
    return section


def _merged(base: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    """`extra` on top of `base`: objects are merged key by key, anything else replaces what was there."""
    result = deepcopy(dict(base))
    for name, value in extra.items():
        old = result.get(name)
        result[name] = _merged(old, value) if isinstance(old, dict) and isinstance(value, Mapping) else deepcopy(value)
    return result
