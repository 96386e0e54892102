"""`plan`: the machine that `rlhf plan` answers for. Nothing here changes a run."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rlhf.config.base import NonNegativeFloat, PositiveFloat, Section

GPUName = Literal["a100-40gb", "a100-80gb", "h100", "h200"]


class PlanConfig(Section):
    """The GPU of a plan and how much of it a training gets. A plan for the CPU takes this machine's memory."""

    gpu: GPUName = Field("a100-80gb", description="GPU that a plan is for, unless distributed.device is cpu")
    gpu_memory_gib: PositiveFloat | None = Field(
        None, description="memory of a GPU in GiB; null is what plan.gpu reports to torch"
    )
    reserved_gib: NonNegativeFloat = Field(
        2.0, description="memory of a GPU that no tensor gets: CUDA context, NCCL, what the allocator cannot use"
    )
    efficiency: PositiveFloat = Field(
        0.4,
        description="share of the peak FLOP/s that matrix products reach, and of the bandwidth while decoding",
        le=1,
    )
