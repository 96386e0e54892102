"""Which GPUs of this host a run takes, so that runs at the same time take different ones. Needs no torch.

The supervisor claims them for as long as it runs. A claim is a socket bound to an abstract name (unix(7)): no two
processes can hold the same one, whoever they belong to, nothing lies on a disk, and the kernel gives it back with the
process, however that ends.
"""

from __future__ import annotations

import contextlib
import errno
import shutil
import socket
import subprocess
from collections.abc import Iterator, MutableMapping
from contextlib import ExitStack
from dataclasses import dataclass

from rlhf.config.distributed import DistributedConfig
from rlhf.errors import ConfigError

VISIBLE = "CUDA_VISIBLE_DEVICES"
_QUERY = ("--query-gpu=index,uuid,mig.mode.current,compute_cap", "--format=csv,noheader")
_QUERY_SECONDS = 30


@dataclass(frozen=True)
class _GPU:
    number: int
    uuid: str
    partitioned: bool
    capability: float


@contextlib.contextmanager
def claimed_gpus(config: DistributedConfig, env: MutableMapping[str, str]) -> Iterator[None]:
    """In the block `CUDA_VISIBLE_DEVICES` in `env` names `num_processes` GPUs that no other run on this host has.

    Only the newest kind of GPU counts, which CUDA would take first too. Leaves `env` alone where it has the variable
    already, with `distributed.device=cpu`, where a single GPU leaves no choice or one is partitioned (MIG), where there
    are fewer than processes, and where `nvidia-smi` tells nothing. Raises `ConfigError` when other runs have too many.
    """
    gpus = [] if config.device == "cpu" or VISIBLE in env else _gpus()
    if len(gpus) < max(2, config.num_processes) or any(gpu.partitioned for gpu in gpus):
        yield
        return
    with ExitStack() as claims:
        chosen: list[_GPU] = []
        taken: list[_GPU] = []
        for gpu in gpus:
            (chosen if _claim(gpu.uuid, claims) else taken).append(gpu)
            if len(chosen) == config.num_processes:
                break
        else:
            raise ConfigError(
                f"distributed.num_processes is {config.num_processes}, but of this host's {len(gpus)} GPUs other runs "
                f"have {', '.join(str(gpu.number) for gpu in taken)}: each process needs its own. Wait for them, or "
                f"lower it; {VISIBLE}=... chooses GPUs whoever else has them."
            )
        env[VISIBLE] = ",".join(gpu.uuid for gpu in chosen)
        try:
            yield
        finally:
            del env[VISIBLE]


def _gpus() -> list[_GPU]:
    """This host's GPUs of the newest kind; none where `nvidia-smi` is missing or fails."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    try:
        result = subprocess.run([tool, *_QUERY], capture_output=True, text=True, timeout=_QUERY_SECONDS, check=True)
        rows = [[field.strip() for field in line.split(",")] for line in result.stdout.splitlines() if line.strip()]
        found = [_GPU(int(row[0]), row[1], row[2] == "Enabled", float(row[3])) for row in rows]
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return []  # a driver that is broken or too old: torch says what is wrong with it
    newest = max((gpu.capability for gpu in found), default=0.0)
    return [gpu for gpu in found if gpu.capability == newest]


def _claim(uuid: str, claims: ExitStack) -> bool:
    """Whether this process may take the GPU, which is its own until `claims` is closed."""
    holder = socket.socket(socket.AF_UNIX)
    try:
        holder.bind(f"\0rlhf-{uuid}")
    except OSError as error:
        holder.close()
        return error.errno != errno.EADDRINUSE  # where claims cannot be made nobody is kept out
    claims.enter_context(holder)
    return True
