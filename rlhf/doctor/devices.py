"""torch and the GPUs, asked in a child process: importing a broken torch can crash or hang whoever does it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field

from rlhf.config import RLHFConfig
from rlhf.doctor.finding import Finding, green, red, yellow
from rlhf.runs import machine

PROBE_SECONDS = 90.0
# The first one with bfloat16 units.
_BF16_CAPABILITY = (8, 0)
_CUDA_TORCH = "install the CUDA build of torch for this driver (see pytorch.org, pip install torch --index-url ...)"


@dataclass(frozen=True)
class Device:
    """A GPU as torch sees it."""

    name: str
    memory_bytes: int
    capability: tuple[int, int]


@dataclass(frozen=True)
class Probe:
    """What torch said of itself; `error` when it could not."""

    devices: tuple[Device, ...] = ()
    backends: dict[str, str | None] = field(default_factory=dict)
    cuda: str | None = None
    complaint: str = ""
    error: str | None = None


def probe_torch(seconds: float = PROBE_SECONDS) -> Probe:
    """Asks torch in a child process, for at most `seconds`."""
    try:
        answer = subprocess.run(
            [sys.executable, "-m", "rlhf.doctor.torch_probe"],
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        return Probe(error=f"importing it and asking for GPUs took more than {seconds:g} s")
    if answer.returncode != 0:
        last = next(iter(answer.stderr.strip().splitlines()[-1:]), "")
        return Probe(error=last or f"the process that imported it ended with {answer.returncode}")
    told = json.loads(answer.stdout.strip().splitlines()[-1])
    devices = tuple(
        Device(entry["name"], entry["memory_bytes"], (entry["capability"][0], entry["capability"][1]))
        for entry in told["devices"]
    )
    return Probe(devices, told["backends"], told["cuda"], told["complaint"])


def check_torch(probe: Probe, config: RLHFConfig) -> list[Finding]:
    """Whether torch works, the GPUs it sees, and what ranks can talk over."""
    if probe.error is not None:
        remedy = "install it anew (pip install --force-reinstall torch); a driver that hangs shows in nvidia-smi too"
        return [red("torch works", probe.error, remedy)]
    return [_gpus(probe, config), _backends(probe)]


def _gpus(probe: Probe, config: RLHFConfig) -> Finding:
    name = "GPUs"
    wanted = config.distributed.device == "cuda"
    driver_sees = machine.gpus()
    if not probe.devices:
        if driver_sees:
            found = f"nvidia-smi shows {len(driver_sees)}, torch none" + (
                f": {probe.complaint}" if probe.complaint else ""
            )
            if probe.cuda is None:
                found = f"nvidia-smi shows {len(driver_sees)}, but this torch is a CPU build"
            return red(name, found, _CUDA_TORCH) if wanted else yellow(name, f"{found}; runs use the CPU", _CUDA_TORCH)
        if wanted:
            return red(name, "none, but distributed.device=cuda", "set distributed.device=cpu, or check nvidia-smi")
        return green(name, "none: runs use the CPU")
    driver = f", driver {driver_sees[0]['driver']}" if driver_sees else ""
    listed = "; ".join(
        f"{device.name}, {device.memory_bytes / 2**30:.0f} GiB, compute capability "
        f"{device.capability[0]}.{device.capability[1]}"
        for device in probe.devices
    )
    found = f"{len(probe.devices)}: {listed}; CUDA {probe.cuda}{driver}"
    ranks = config.distributed.num_processes
    if config.distributed.device == "cpu":
        return green(name, f"{found}; distributed.device=cpu leaves them alone")
    if ranks > len(probe.devices):
        remedy = f"set distributed.num_processes to at most {len(probe.devices)}, or distributed.device=cpu"
        return red(name, f"{found}, for {ranks} processes", remedy)
    if any(device.capability < _BF16_CAPABILITY for device in probe.devices):
        if config.distributed.precision == "bf16":
            return red(name, f"{found}; no bfloat16 units", "set distributed.precision=fp32")
        return yellow(
            name, f"{found}; no bfloat16 units, so runs use fp32", "it works, slower; newer GPUs (8.0 and up) have them"
        )
    return green(name, f"{found}; bf16")


def _backends(probe: Probe) -> Finding:
    name = "backends"
    found = ", ".join(f"{backend}: {said or 'not in this torch'}" for backend, said in probe.backends.items())
    if probe.backends.get("gloo") is None:
        return red(name, found, "install a torch with torch.distributed and gloo (the wheels for Linux have both)")
    if len(probe.devices) > 1 and probe.backends.get("nccl") is None:
        return red(name, found, "several GPUs need NCCL: " + _CUDA_TORCH)
    return green(name, found)
