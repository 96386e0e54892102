"""`distributed`: processes, device and precision."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rlhf.config.base import PositiveInt, Section


class DistributedConfig(Section):
    """How many processes work on this host, on what, in which precision."""

    num_processes: PositiveInt = Field(1, description="processes on this host, one for each GPU or, on CPU, as asked")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes CUDA where there is a GPU")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto is bf16 on CUDA and fp32 on CPU")
    num_threads: PositiveInt | None = Field(None, description="CPU threads a process; null shares the cores out")
    timeout_seconds: PositiveInt = Field(600, description="collective operations that wait longer fail")
