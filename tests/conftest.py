"""Settings of every test: no network, one thread for each process, the same random numbers each time."""

from __future__ import annotations

import os
import random
import signal
from typing import Any

# Before any library is imported: these are read at import.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "disabled"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# The servers of tests are on this machine, which no proxy leads to.
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost,::1"

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

TIMED = ("tests/pipeline/test_stopping.py", "tests/pipeline/test_sweep_agent.py", "tests/web/test_label_load.py")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """How pytest-xdist shares the tests out (`-n 2`): a file stays together.

    The tests that start several ranks, and the files of `TIMED`, are one group, so that never two of them compete for
    the cores. Each of these keeps several processes busy at once with work of seconds, or measures how fast a server
    answers while it is under load. A test that only starts small processes and waits for them does not belong there:
    it waits for what it needs to happen, and its limits are for what hangs.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):  # type: ignore[misc]  # pytest-xdist ships no types
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::", 1)[0]
            return "processes" if file.startswith("tests/distributed/") or file in TIMED else file

    return ByGroup(config, log)


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
