"""The W&B run of a run folder: kept in its `wandb_id` and in every checkpoint, from which a lost one comes back."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from rlhf.distributed.plain_state import write_state
from rlhf.runs.wandb_logger import run_id
from tests.stage_example import make_context, tiny_config


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B as installed and offline, outside a sweep."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    for name in ("WANDB_MODE", "WANDB_DISABLED", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


def test_a_lost_id_is_found_again_in_the_newest_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(tmp_path, tracking={"wandb": "offline"})
    context = make_context(config, tmp_path / "run", "ppo")
    # PPO asks before W&B is started.
    first = context.provenance
    assert first["wandb_run_id"] == context.run.wandb_id.read_text().strip()
    for step, provenance in ((2, {"wandb_run_id": "older"}), (4, first), (6, {"fingerprint": "of a run without W&B"})):
        folder = context.stage.checkpoints / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        write_state(folder, "shared", {"shared": {"provenance": provenance}})
        os.utime(folder / "shared.json", (step, step))
    context.run.wandb_id.unlink()
    assert run_id(context.run) == first["wandb_run_id"]
    assert context.run.wandb_id.read_text().strip() == first["wandb_run_id"]
    monkeypatch.setenv("WANDB_RUN_ID", "the-agents")
    assert run_id(context.run) == "the-agents"


def test_without_wandb_no_id_is_made(tmp_path: Path) -> None:
    context = make_context(tiny_config(tmp_path, tracking={"wandb": "disabled"}), tmp_path / "run", "ppo")
    assert context.provenance == {}
    assert not context.run.wandb_id.exists()
