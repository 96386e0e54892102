"""The DeepSpeed configuration of a ZeRO stage. Pure: the same for our own engine and for a Hugging Face trainer.

A user's own DeepSpeed JSON (`zero.config`) takes the generated one's place. What the loops decide is filled in where it
is absent or "auto", and must not be contradicted: DeepSpeed would train another run than the configuration says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from typing import Any, Literal

from pydantic import ValidationError

from rlhf.config import RLHFConfig
from rlhf.config.peft import TRAINING_STAGES
from rlhf.config.zero import AUTO, ZeroConfig, contradiction
from rlhf.errors import ConfigError

# Elements in a communication buffer. DeepSpeed's own 500 million would take 2 GB a rank before the first step.
BUCKET_ELEMENTS = 50_000_000
# Gathered parameters that ZeRO-3 keeps at a time, DeepSpeed's own number.
MAX_LIVE_PARAMETERS = 1_000_000_000
# What distributed.precision may turn out to be.
_PRECISIONS: dict[str, tuple[Literal["fp32", "bf16"], ...]] = {
    "fp32": ("fp32",),
    "bf16": ("bf16",),
    "auto": ("fp32", "bf16"),
}
_WHOLE_ON_SAVE = "stage3_gather_16bit_weights_on_model_save"
# What the loops decide, by the key of the JSON: how a contradiction is told, and where it can be mended.
_REASONS = {
    "train_micro_batch_size_per_gpu": ("this stage's micro-batch is", "Set micro_batch_size of the stage to it"),
    "gradient_accumulation_steps": (
        "this stage's batch_size, micro_batch_size and number of processes make it",
        "Choose them to fit",
    ),
    "gradient_clipping": ("max_grad_norm of this stage is", "Set max_grad_norm to it"),
    "zero_allow_untested_optimizer": ("torch's AdamW needs", "Leave it out"),
    "zero_force_ds_cpu_optimizer": ("torch's AdamW on offloaded state needs", "Leave it out"),
    "bf16.enabled": ("distributed.precision makes it", "Set distributed.precision to fit"),
    "stage": ("zero.stage is", "Set zero.stage to it"),
    _WHOLE_ON_SAVE: ("publishing the weights needs", "Leave it out"),
}


def deepspeed_json(
    zero: ZeroConfig,
    *,
    precision: Literal["fp32", "bf16"],
    micro_batch_size: int,
    accumulation_steps: int,
    max_grad_norm: float,
    device_type: Literal["cpu", "cuda"],
    overlap: bool = True,
) -> dict[str, Any] | None:
    """The configuration as DeepSpeed, Accelerate and `TrainingArguments(deepspeed=...)` take it; None at stage 0.

    `micro_batch_size` is one rank's examples a forward pass, `accumulation_steps` its forward passes an optimiser step.
    `overlap` lets DeepSpeed add gradients up while others are computed, whose sums are not the same from run to run.
    The optimiser and the learning-rate schedule are the caller's own. `zero.content`, a user's own JSON, takes the
    place of what is generated; `zero.extra` is merged into either, key by key. Raises `ConfigError` where one of them
    contradicts the other arguments.
    """
    if zero.stage == 0:
        return None
    decided = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps,
        "gradient_clipping": max_grad_norm,
        "zero_allow_untested_optimizer": True,
    }
    if zero.offload_optimizer:
        decided["zero_force_ds_cpu_optimizer"] = False  # torch's optimiser works there without compiling C++
    generated: dict[str, Any] = {
        **decided,
        "zero_optimization": _zero_section(zero, device_type, overlap),
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
    if precision == "bf16":
        generated["bf16"] = {"enabled": True}
        # DeepSpeed would add up micro-batches in bfloat16, in which 256 + 1 is 256.
        generated["data_types"] = {"grad_accum_dtype": "fp32"}
    config = _resolved(_merged(zero.content or generated, zero.extra), generated)
    for key, value in decided.items():
        _decide(config, zero, (key,), value)
    if precision == "bf16" or "bf16" in config:
        _decide(config, zero, ("bf16", "enabled"), precision == "bf16")
    if precision == "bf16":
        config.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    _decide(config, zero, ("zero_optimization", "stage"), zero.stage)
    if zero.stage == 3:
        _decide(config, zero, ("zero_optimization", _WHOLE_ON_SAVE), True)
    for key in ("offload_optimizer", "offload_param"):
        if key in generated["zero_optimization"]:
            config["zero_optimization"].setdefault(key, generated["zero_optimization"][key])
    config.setdefault("steps_per_print", generated["steps_per_print"])
    return config


def check_user_entries(config: RLHFConfig) -> None:
    """Raises `ConfigError` where zero.config or zero.extra contradicts a stage that the run is going to train."""
    precision = config.distributed.precision
    for stage in TRAINING_STAGES if config.zero.content or config.zero.extra else ():
        if stage not in config.stages:
            continue
        section = getattr(config, stage)
        rows = max(1, section.batch_size // config.distributed.world_size)
        if stage == "ppo":
            rows = max(1, rows // section.num_minibatches)
        num_forwards = -(-rows // min(section.micro_batch_size or rows, rows))
        for number, wanted in enumerate(_PRECISIONS[precision], start=1):
            try:
                deepspeed_json(
                    config.zero,
                    precision=wanted,
                    micro_batch_size=-(-rows // num_forwards),
                    accumulation_steps=num_forwards,
                    max_grad_norm=section.max_grad_norm,
                    device_type="cpu",
                )
            except ConfigError as error:
                if number == len(_PRECISIONS[precision]):
                    raise ConfigError(f"stage {stage}: {error}") from error
            else:
                break


def check_with_deepspeed(zero: ZeroConfig) -> None:
    """Raises `ConfigError` where DeepSpeed itself would refuse the section zero_optimization. Imports DeepSpeed."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    section = _resolved(_merged(zero.content, zero.extra).get("zero_optimization", {}), {})
    try:
        DeepSpeedZeroConfig(**section)
    except ValidationError as error:
        problems = "; ".join(
            f"zero_optimization.{'.'.join(str(part) for part in detail['loc'])}: {detail['msg']}"
            for detail in error.errors(include_url=False)
        )
        source = f"zero.config: {zero.file}" if zero.content else "zero.extra"
        raise ConfigError(f"{source}: DeepSpeed refuses {problems}") from error


def _resolved(content: Mapping[str, Any], generated: Mapping[str, Any]) -> dict[str, Any]:
    """`content` with what is generated for every "auto"; where nothing is, the key goes: DeepSpeed's default holds."""
    result: dict[str, Any] = {}
    for key, value in content.items():
        ours = generated.get(key)
        if isinstance(value, Mapping):
            result[key] = _resolved(value, ours if isinstance(ours, Mapping) else {})
        elif value != AUTO:
            result[key] = deepcopy(value)
        elif ours is not None:
            result[key] = deepcopy(ours)
    return result


def _decide(config: dict[str, Any], zero: ZeroConfig, path: tuple[str, ...], value: object) -> None:
    """Fills in what the loops decide. Raises `ConfigError` when the user's JSON says otherwise."""
    extra: Any = zero.extra
    for name in path[:-1]:
        config, extra = config.setdefault(name, {}), extra.get(name, {})
    theirs = config.setdefault(path[-1], value)
    if theirs != value:
        key = ".".join(path)
        wanted, remedy = _REASONS[path[-1] if path[0] == "zero_optimization" else key]
        source = "zero.extra" if path[-1] in extra else f"zero.config: {zero.file}"
        raise ConfigError(contradiction(source, key, theirs, f"{wanted} {json.dumps(value)}", remedy))


def _zero_section(zero: ZeroConfig, device_type: Literal["cpu", "cuda"], overlap: bool) -> dict[str, Any]:
    section: dict[str, Any] = {
        "stage": zero.stage,
        "overlap_comm": overlap and device_type == "cuda",  # on CPU there is no second stream to overlap with
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "reduce_bucket_size": BUCKET_ELEMENTS,
        "allgather_bucket_size": BUCKET_ELEMENTS,
    }
    if zero.stage == 3:
        section |= {
            "stage3_prefetch_bucket_size": BUCKET_ELEMENTS,
            "stage3_param_persistence_threshold": 100_000,
            "stage3_max_live_parameters": MAX_LIVE_PARAMETERS,
            "stage3_max_reuse_distance": 1_000_000_000,
            _WHOLE_ON_SAVE: True,
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
