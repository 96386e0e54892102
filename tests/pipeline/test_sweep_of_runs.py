"""A sweep whose trials are runs of `rlhf`: three agents work on it, and one is killed with its trial."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import yaml

from rlhf.sweeps.folder import open_sweep
from tests.command import SMOKE, command, environment, rlhf_command, wait_for
from tests.run_example import held
from tests.stage_example import metrics_of

FILE = {
    "method": "grid",
    "metric": {"name": "sft/validation_loss", "goal": "minimize"},
    "parameters": {"sft": {"parameters": {"learning_rate": {"values": [1e-2]}}}},
    "command": ["rlhf", "run", *SMOKE, "stages=[sft]", "${args_no_hyphens}"],
}


def test_a_killed_trial_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "lr.yaml").write_text(yaml.safe_dump(FILE, sort_keys=False))
    made = rlhf_command("sweep", "lr.yaml", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert "grid over sft.learning_rate: 1 settings = 1 trials" in made.stdout
    # It saves every second step, and waits after the third.
    waiting, extra = held(tmp_path, "sft", 4)
    agents: list[subprocess.Popen[bytes]] = []
    try:
        for variables in (extra, {}, {}):
            agents.append(
                subprocess.Popen(
                    command("agent", "lr"),
                    cwd=tmp_path,
                    env=environment(variables),
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                )
            )
            wait_for(waiting, agents[0])
        sweep = open_sweep("lr", tmp_path / "sweeps")
        lease = json.loads((sweep.folder.path / "leases/0.json").read_text())
        # Stopped, so that the trial does not hear of its agent's end, at which it would write another checkpoint.
        os.killpg(lease["group"], signal.SIGSTOP)
        agents[0].kill()
        os.killpg(lease["group"], signal.SIGKILL)
        said = [agent.communicate(timeout=900)[0].decode() for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
            agent.wait()
    assert [agent.returncode for agent in agents] == [-signal.SIGKILL, 0, 0], said
    assert "trial 0 is handed out again: its agent died" in said[1] + said[2]
    assert sorted("done: 1 finished" in text for text in said) == [False, False, True]
    happened = [(event["event"], event.get("attempt")) for event in sweep.journal.events()]
    assert happened == [
        ("setting", None),
        ("start", 1),
        ("release", 1),
        ("start", 2),
        ("end", 2),
        ("setting_end", None),
    ]
    assert "the training goes on from checkpoint-2" in sweep.folder.log(0).read_text()
    folder = sweep.folder.trial(0)
    assert [line["step"] for line in metrics_of(folder, "sft") if "sft/loss" in line] == [1, 2, 3, 4]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert [attempt["outcome"] for attempt in manifest["attempts"]] == ["killed", "finished"]
    assert manifest["config"]["sft"]["learning_rate"] == 1e-2
    assert sweep.journal.look().trials[0].value == manifest["stages"]["sft"]["summary"]["validation_loss"]
    shown = rlhf_command("sweep", "status", "lr", cwd=tmp_path)
    assert "trials: 1 of 1: 1 finished" in shown.stdout
