"""What ranks can talk over here, for messages: nothing in a run asks this beforehand."""

from __future__ import annotations

from typing import Any

import torch
import torch.cuda.nccl
import torch.distributed


def available_backends() -> dict[str, str | None]:
    """`gloo` and `nccl`, each with its version, "available" where it has none, or None when torch lacks it."""
    if not torch.distributed.is_available():
        return {"gloo": None, "nccl": None}
    nccl = None
    if torch.distributed.is_nccl_available():
        library: Any = torch.cuda.nccl  # has no types
        nccl = ".".join(map(str, library.version())) if torch.cuda.is_available() else "available"
    return {"gloo": "available" if torch.distributed.is_gloo_available() else None, "nccl": nccl}
