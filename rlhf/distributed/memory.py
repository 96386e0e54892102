"""How much memory this process has needed."""

from __future__ import annotations

import resource
from dataclasses import dataclass
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
# What clear_refs takes to set the largest resident size so far to the present one.
_FORGET_PEAK = "5"


def peak_memory_bytes(device: torch.device) -> int:
    """Peak of this process so far: allocated device memory on CUDA, resident memory on CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    # Linux reports kibibytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _status_bytes(name: str) -> int | None:
    """An entry of Linux's status of this process; None where there is none."""
    try:
        lines = _STATUS.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
    return int(found[0]) * 1024 if found else None


@dataclass(frozen=True)
class Measured:
    """Bytes of one rank: the largest ever, and the largest since the meter started above what there was then."""

    peak: int
    growth: int


@dataclass(frozen=True)
class MemoryMeter:
    """Measures what a stage adds to the process. On CPU resident memory, on CUDA what tensors take.

    Where Linux does not let a process forget its peak, growth counts from the earlier peak on.
    """

    device: torch.device
    before: int
    peak_before: int

    @classmethod
    def start(cls, device: torch.device) -> MemoryMeter:
        """Starts to measure; libraries should be imported by then."""
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return cls(device, int(torch.cuda.memory_allocated(device)), 0)
        peak_before = peak_memory_bytes(device)
        try:
            _CLEAR.write_text(_FORGET_PEAK, encoding="ascii")
        except OSError:
            return cls(device, peak_before, peak_before)
        return cls(device, _status_bytes("VmRSS") or peak_before, peak_before)

    def read(self) -> Measured:
        """What was needed since the start."""
        if self.device.type == "cuda":
            peak = peak_memory_bytes(self.device)
        else:
            peak = _status_bytes("VmHWM") or peak_memory_bytes(self.device)
        return Measured(max(peak, self.peak_before), max(0, peak - self.before))
