"""What decides in which order, and in which precision, a rank adds numbers up: for the manifest."""

from __future__ import annotations

import os
from typing import Any

import torch

from rlhf.distributed.runtime import Runtime

# Variables that change which kernels run, or how they add.
_VARIABLES = (
    "CUBLAS_WORKSPACE_CONFIG",
    "MKL_CBWR",
    "ATEN_CPU_CAPABILITY",
    "DNNL_MAX_CPU_ISA",
    "FLASH_ATTENTION_DETERMINISTIC",
    "NCCL_ALGO",
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
)


def compute_facts(runtime: Runtime) -> dict[str, Any]:
    """Device, precision, ranks, threads, the CPU's vector units as torch uses them, and torch's settings of kernels.

    Two runs of the same code, config, data and seed whose facts are equal, on processors of the same model, give equal
    bits on CPU.
    """
    facts: dict[str, Any] = {
        "device": runtime.device.type,
        "precision": runtime.precision,
        "world_size": runtime.world_size,
        "num_threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "deterministic": ("off", "warn", "error")[torch.get_deterministic_debug_mode()],
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }
    if runtime.device.type == "cuda":
        facts |= {
            "gpu": torch.cuda.get_device_name(runtime.device),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
            "cudnn_benchmark": torch.backends.cudnn.benchmark,
            "cudnn_tf32": torch.backends.cudnn.allow_tf32,
        }
    variables = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    return facts | ({"variables": variables} if variables else {})
