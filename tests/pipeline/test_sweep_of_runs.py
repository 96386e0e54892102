"""A sweep whose trials are runs of `rlhf`, in folders that the agent gives them."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from rlhf.sweeps.folder import open_sweep
from tests.command import SMOKE, rlhf_command

FILE = {
    "method": "grid",
    "metric": {"name": "sft/validation_loss", "goal": "minimize"},
    "parameters": {"sft": {"parameters": {"learning_rate": {"values": [1e-2, 1e-3]}}}},
    "command": ["rlhf", "run", *SMOKE, "stages=[sft]", "${args_no_hyphens}"],
}


def test_a_sweep_of_runs(tmp_path: Path) -> None:
    (tmp_path / "lr.yaml").write_text(yaml.safe_dump(FILE, sort_keys=False))
    made = rlhf_command("sweep", "lr.yaml", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert "grid over sft.learning_rate: 2 settings = 2 trials" in made.stdout
    worked = rlhf_command("agent", "lr", cwd=tmp_path)
    assert worked.returncode == 0, worked.stdout + worked.stderr
    assert "done: 2 finished" in worked.stdout
    sweep = open_sweep("lr", tmp_path / "sweeps")
    state = sweep.journal.look()
    for number, learning_rate in enumerate((1e-2, 1e-3)):
        folder = sweep.folder.trial(number)
        manifest = json.loads((folder / "manifest.json").read_text())
        assert manifest["status"] == "finished"
        assert manifest["config"]["sft"]["learning_rate"] == learning_rate
        assert state.trials[number].value == manifest["stages"]["sft"]["summary"]["validation_loss"]
        assert "sft" in sweep.folder.log(number).read_text()
    # A handful of steps at the higher rate learns more.
    losses = [state.settings[number].value for number in (0, 1)]
    assert losses[0] is not None
    assert losses[1] is not None
    assert losses[0] < losses[1]
    shown = rlhf_command("sweep", "status", "lr", cwd=tmp_path)
    assert "trials: 2 of 2: 2 finished" in shown.stdout
