"""The real W&B client against a server: a resumed run goes on in its own rows, and offline folders sync to one run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from rlhf.runs.folder import RunFolder
from rlhf.runs.wandb_offline import sync_command
from tests.command import environment
from tests.unit.wandb_server import wandb_server

CODE = """
import sys
from pathlib import Path
from rlhf.config.tracking import TrackingConfig
from rlhf.errors import Stopped
from rlhf.runs import manifest, wandb_logger
from rlhf.runs.folder import RunFolder, StageResult
from rlhf.runs.tracking import StageSinks, Tracker
# The server here answers: a slow machine is to have the time that this takes.
wandb_logger.INIT_SECONDS = wandb_logger.HURRIED_FINISH_SECONDS = 100.0
run, tracking = RunFolder(Path(sys.argv[1])), TrackingConfig(wandb=sys.argv[2])
config = {"experiment": "x", "seed": 1}
run.create()
manifest.start_manifest(run, command=[], config=config, config_hash="", seed=1, stages=[])
run.stage("ppo").begin("f", {"inputs": {}, "data": [{"type": "embedded"}, "d" * 64]})
for resume_step, first, last in ((0, 1, 3), (2, 3, 4)):
    try:
        with StageSinks(run, tracking, "ppo", config) as sinks:
            with Tracker.open(run, tracking, "ppo", 4, resume_step, config, sinks=sinks) as tracker:
                for step in range(first, last + 1):
                    tracker.log(step, {"ppo/loss": 1 / step, "perf/x": 2.0})
                    tracker.log_samples(step, [{"prompt": "a", "score": 1.0}])
                if last == 3:
                    raise Stopped(15, 2)
            (run.stage("ppo").path / "model").mkdir()
            result = StageResult("ppo", "f", 1.0, run.stage("ppo").hash_outputs(["model"]), {"win_rate": 0.75})
            sinks.record(result, {"policy": "openai/gpt2"})
    except Stopped:
        pass
"""


def test_online_and_synced_runs_are_continued_and_whole(tmp_path: Path) -> None:
    with wandb_server() as received:
        account = {"WANDB_BASE_URL": received.address, "WANDB_API_KEY": "0" * 40, "no_proxy": "127.0.0.1"}
        env = environment({**account, "HOME": str(tmp_path), "WANDB_SILENT": "true"})
        for name in ("WANDB_MODE", "WANDB_SWEEP_ID"):
            env.pop(name, None)
        for mode in ("online", "offline"):
            sweep = {"WANDB_SWEEP_ID": "sweep1"} if mode == "online" else {}
            done = subprocess.run(
                [sys.executable, "-c", CODE, str(tmp_path / mode), mode],
                env={**env, **sweep, "WANDB_RUN_ID": mode},
                capture_output=True,
                text=True,
                check=False,
                timeout=600,
            )
            assert done.returncode == 0, done.stderr
            assert "W&B" not in done.stdout, done.stdout
        assert "offline" not in received.rows
        command = sync_command(RunFolder(tmp_path / "offline"))
        assert command is not None
        path = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
        synced = subprocess.run(command, shell=True, env={**env, "PATH": path}, check=False, timeout=600)
        assert synced.returncode == 0
        # What has been uploaded is not offered again.
        assert sync_command(RunFolder(tmp_path / "offline")) is None
    for run in ("online", "offline"):
        rows = [(row["_step"], row["ppo/step"], row["ppo/loss"], row["perf/x"]) for row in received.rows[run]]
        assert rows == [(0, 1, 1.0, 2.0), (1, 2, 0.5, 2.0), (2, 3, 1 / 3, 2.0), (3, 4, 0.25, 2.0)]
        # The second part goes behind the first, not over it.
        assert received.offsets[run][0] == 0
        assert received.offsets[run][-1] == 3
        assert received.summaries[run]["ppo/win_rate"] == 0.75
        assert all(row["ppo/samples"]["nrows"] == 1 for row in received.rows[run])
        assert sorted(one for one in received.artifacts[run] if not one[0].startswith("run-")) == [
            ("data-embedded", "used"),
            ("hub-openai-gpt2", "used"),
            ("x-ppo-model", "made"),
        ]
        assert received.exits[run] == [143, 0]
    # Told before the end, so that the sweep hands the run out again.
    assert received.preempting == ["online"]
