"""`python -m rlhf.doctor.torch_probe`: prints what torch sees, as one line of JSON. Started by `rlhf doctor`."""

from __future__ import annotations

import json
import warnings


def main() -> None:
    """Imports torch, which is the first thing that can go wrong."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        import torch

        there = torch.cuda.is_available()
        properties = [torch.cuda.get_device_properties(n) for n in range(torch.cuda.device_count())] if there else []
    from rlhf.distributed.backends import available_backends

    # torch warns here that the driver is too old, or that it cannot be initialised.
    complaints = [str(entry.message).splitlines()[0] for entry in caught if "CUDA" in str(entry.message)]
    told = {
        "cuda": torch.version.cuda,
        "devices": [
            {"name": entry.name, "memory_bytes": entry.total_memory, "capability": [entry.major, entry.minor]}
            for entry in properties
        ],
        "backends": available_backends(),
        "complaint": complaints[0] if complaints else "",
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
