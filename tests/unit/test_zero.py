"""The generated DeepSpeed JSON: snapshots of every preset, and the user's last word."""

from __future__ import annotations

import json
from typing import Any, Literal

import pytest

from rlhf.config.zero import ZeroConfig
from rlhf.distributed.zero import deepspeed_json

PRESETS: dict[str, dict[str, Any]] = {
    "stage1": {"stage": 1},
    "stage2": {"stage": 2},
    "stage3": {"stage": 3},
    "stage3_offload": {"stage": 3, "offload_optimizer": True, "offload_parameters": True},
}
COMMON: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 0.5,
    "zero_allow_untested_optimizer": True,
    "steps_per_print": 1000000000,
    "wall_clock_breakdown": False,
}
SHARED_SECTION: dict[str, Any] = {
    "overlap_comm": False,
    "contiguous_gradients": True,
    "reduce_scatter": True,
    "reduce_bucket_size": 50000000,
    "allgather_bucket_size": 50000000,
}
STAGE_3_SECTION: dict[str, Any] = {
    "stage3_prefetch_bucket_size": 50000000,
    "stage3_param_persistence_threshold": 100000,
    "stage3_max_live_parameters": 1000000000,
    "stage3_max_reuse_distance": 1000000000,
    "stage3_gather_16bit_weights_on_model_save": True,
}
SECTIONS: dict[str, dict[str, Any]] = {
    "stage1": {"stage": 1, **SHARED_SECTION},
    "stage2": {"stage": 2, **SHARED_SECTION},
    "stage3": {"stage": 3, **SHARED_SECTION, **STAGE_3_SECTION},
    "stage3_offload": {
        "stage": 3,
        **SHARED_SECTION,
        **STAGE_3_SECTION,
        "offload_optimizer": {"device": "cpu", "pin_memory": False},
        "offload_param": {"device": "cpu", "pin_memory": False},
    },
}


def generated(
    zero: ZeroConfig, precision: Literal["fp32", "bf16"] = "fp32", device_type: Literal["cpu", "cuda"] = "cpu"
) -> dict[str, Any] | None:
    return deepspeed_json(
        zero,
        precision=precision,
        micro_batch_size=4,
        accumulation_steps=2,
        max_grad_norm=0.5,
        device_type=device_type,
    )


def test_stage_0_needs_no_deepspeed() -> None:
    assert generated(ZeroConfig(), "fp32") is None
    assert generated(ZeroConfig(), "bf16") is None


@pytest.mark.parametrize("preset", list(PRESETS))
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_preset_on_cpu(preset: str, precision: Literal["fp32", "bf16"]) -> None:
    expected = {**COMMON, "zero_optimization": SECTIONS[preset]}
    if preset == "stage3_offload":
        expected["zero_force_ds_cpu_optimizer"] = False
    if precision == "bf16":
        expected["bf16"] = {"enabled": True}
    config = generated(ZeroConfig(**PRESETS[preset]), precision)
    assert config == expected
    assert json.loads(json.dumps(config)) == expected


def test_on_cuda_communication_overlaps_and_offloaded_memory_is_pinned() -> None:
    config = generated(ZeroConfig(**PRESETS["stage3_offload"]), "bf16", "cuda")
    assert config is not None
    section = config["zero_optimization"]
    assert section["overlap_comm"] is True
    assert section["offload_optimizer"] == section["offload_param"] == {"device": "cpu", "pin_memory": True}


def test_extra_is_merged_last_and_key_by_key() -> None:
    extra = {
        "zero_optimization": {"reduce_bucket_size": 7, "offload_optimizer": {"ratio": 0.5}},
        "gradient_clipping": 9.0,
        "communication_data_type": "fp32",
    }
    zero = ZeroConfig(stage=2, offload_optimizer=True, extra=extra)
    config, plain = generated(zero), generated(ZeroConfig(stage=2, offload_optimizer=True))
    assert config is not None
    assert plain is not None
    assert config["zero_optimization"]["reduce_bucket_size"] == 7
    assert config["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": False, "ratio": 0.5}
    assert config["zero_optimization"]["allgather_bucket_size"] == 50_000_000
    assert config["gradient_clipping"] == 9.0
    assert config["communication_data_type"] == "fp32"
    assert plain["gradient_clipping"] == 0.5
    config["zero_optimization"]["offload_optimizer"]["ratio"] = 0.1
    assert zero.extra["zero_optimization"]["offload_optimizer"]["ratio"] == 0.5  # the frozen config is not shared
