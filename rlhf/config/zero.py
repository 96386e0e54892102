"""`zero`: how DeepSpeed ZeRO shards a training stage."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from rlhf.config.base import Section


class ZeroConfig(Section):
    """ZeRO stage and offload. Stage 0 trains without DeepSpeed: one process, or plain data parallelism."""

    stage: Literal[0, 1, 2, 3] = Field(0, description="what is sharded: 1 optimiser, 2 + gradients, 3 + parameters")
    offload_optimizer: bool = Field(False, description="keep optimiser state in CPU memory (stages 1 to 3)")
    offload_parameters: bool = Field(False, description="keep parameters in CPU memory (stage 3)")
    extra: dict[str, Any] = Field({}, description="entries merged into the generated DeepSpeed JSON, last word to you")

    @model_validator(mode="after")
    def _offload_needs_a_stage(self) -> ZeroConfig:
        if self.offload_optimizer and self.stage == 0:
            raise ValueError("offload_optimizer needs zero.stage 1, 2 or 3")
        if self.offload_parameters and self.stage != 3:
            raise ValueError("offload_parameters needs zero.stage 3")
        return self
