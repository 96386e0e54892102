"""What a verb that starts runs prints where: with --json, standard output is the answer's alone."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rlhf.errors import ConfigError


def refuse_launchers(verb: str) -> None:
    """Raises `ConfigError` under torchrun, srun and the like: the verb starts the processes of its runs itself."""
    if {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        raise ConfigError(f"rlhf {verb} starts the processes of its runs itself: run it without torchrun or srun")


@contextmanager
def standard_output_to_error(wanted: bool) -> Iterator[None]:
    """While a run goes on beside --json: whatever it and its processes print goes to standard error."""
    if not wanted:
        yield
        return
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
