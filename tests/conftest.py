"""Settings of every test: no network, one thread for each process, the same random numbers each time."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

# Before any library is imported: these are read at import.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "disabled"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import pytest
import torch
from hypothesis import settings

# A shell starts a background job with these ignored, and every process that a test starts would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# The same examples in every run, and no time limit for one of them: machines that run tests are slow at times.
settings.register_profile("rlhf", derandomize=True, deadline=None, max_examples=40)
settings.load_profile("rlhf")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups in a hook of the same name
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where pytest-xdist shares the tests out (`-n 2 --dist loadgroup`), a file of unit tests stays together.

    All tests that start processes are one group, so that never two of them compete for the cores.
    """
    unit = Path(__file__).parent / "unit"
    for item in items:
        group = item.path.name if item.path.is_relative_to(unit) else "processes"
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
