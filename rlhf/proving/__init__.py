"""`rlhf prove`: a full-scale config proved as far as a CPU can, before GPUs are paid for."""

from rlhf.proving.command import run_prove

__all__ = ["run_prove"]
