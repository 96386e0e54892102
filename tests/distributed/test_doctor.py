"""`rlhf doctor` for real: ranks that sum and step, and a whole visit as a user makes it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf.config import RLHFConfig
from rlhf.doctor.ranks import check_ranks, planned_checks
from tests.command import rlhf_command
from tests.run_example import hook

pytestmark = pytest.mark.distributed

# How long the checks may take on a busy machine, and the doctor's own limits as such.
SECONDS = 600.0
PATIENCE = """
import sys
if "doctor" in sys.orig_argv:
    from rlhf.doctor import devices, ranks
    devices.probe_torch.__defaults__ = ranks.check_ranks.__defaults__ = ({seconds},)
"""


def test_a_visit_on_this_machine_finds_nothing_red(tmp_path: Path) -> None:
    """Without a GPU's help, a W&B account or a network: a fresh machine."""
    extra = {"HOME": str(tmp_path / "home"), "HF_HOME": str(tmp_path / "hf"), "NETRC": str(tmp_path / "netrc")}
    extra |= hook(tmp_path, "patience", PATIENCE.format(seconds=SECONDS))
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    arguments = ["doctor", "--json", "zero=stage3", "distributed.device=cpu"]
    done = rlhf_command(*arguments, cwd=tmp_path / "work", extra=extra)
    report = json.loads(done.stdout)
    levels = {entry["name"]: entry["level"] for entry in report["findings"]}
    # How full the disk is says nothing about the doctor.
    full = levels.pop("run folder") == "red"
    assert "red" not in levels.values(), done.stdout + done.stderr
    assert (done.returncode, report["ready"]) == (int(full), not full)
    assert report["verdict"].startswith("ready (CPU)") is not full
    assert {levels[name] for name in ("torch", "trl", "backends", "loopback", "2 ranks on CPU")} == {"green"}
    (ranks,) = [entry["found"] for entry in report["findings"] if entry["name"] == "2 ranks on CPU"]
    assert ranks.startswith("all-reduce and a ZeRO-3 step in ")
    assert list((tmp_path / "work").iterdir()) == []


def test_the_stage_that_the_config_asks_for_is_tried() -> None:
    zero = {"stage": 1, "offload_optimizer": True}
    config = RLHFConfig.model_validate({"zero": zero, "distributed": {"device": "cpu", "precision": "bf16"}})
    (check,) = planned_checks(config, 0)
    finding = check_ranks(check, SECONDS)
    assert finding.level == "green", finding
    assert "ZeRO-1" in finding.found


def test_ranks_that_compute_something_else_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose sums are wrong: every rank loads this before anything else."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "if 'rank' in sys.argv:\n"
        "    import rlhf.distributed.runtime as runtime\n"
        "    right = runtime.Runtime.sum_over_ranks\n"
        "    runtime.Runtime.sum_over_ranks = lambda self, tensor: right(self, tensor) + self.rank\n"
    )
    root = str(Path(__file__).parents[2])
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{root}")
    (check,) = planned_checks(RLHFConfig.model_validate({"distributed": {"device": "cpu"}}), 0)
    finding = check_ranks(check, SECONDS)
    assert finding.level == "red"
    assert "all-reduce gave 4.0 on rank 1 instead of 3.0" in finding.found
