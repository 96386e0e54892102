"""A folder that may no longer be written, in the middle of a run: a message, and afterwards the run goes on."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

from rlhf.runs.files import hash_path
from tests.command import SMOKE, command, environment
from tests.ppo_example import write_models
from tests.read_only import make_read_only, respect_permissions
from tests.run_example import held


def start(arguments: list[str], folder: Path, extra: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """The command in `folder`, by somebody whom permissions stop; `extra` are variables of its environment."""
    return subprocess.Popen(
        command(*arguments),
        cwd=folder,
        env=environment(extra),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=respect_permissions,
    )


def wait_for_hold(file: Path, process: subprocess.Popen[str]) -> None:
    """Returns when the training waits in its middle, see `held`."""
    end = time.monotonic() + 900
    while not file.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, f"{file} was not there after 900 s"
        time.sleep(0.02)


def check_refusal(process: subprocess.Popen[str], folder: Path, reason: str) -> None:
    """The command ended with one message, which names the folder."""
    _, stderr = process.communicate(timeout=900)
    assert process.returncode == 1, stderr
    assert "Traceback" not in stderr
    assert stderr.count("cannot be written") == 1, stderr
    assert f"rlhf: error: the folder {folder}" in stderr
    assert reason in stderr
    assert "give the same command again" in stderr


def check_continued(process: subprocess.Popen[str], run: Path, stage: str, num_steps: int) -> None:
    """The same command went on from the checkpoint, and every step is there once."""
    stdout, stderr = process.communicate(timeout=900)
    assert process.returncode == 0, stderr
    assert "goes on where it was interrupted" in stdout
    lines = [line for line in (run / "metrics.jsonl").read_text().splitlines() if f'"{stage}/' in line]
    steps = [json.loads(line)["step"] for line in lines]
    assert [step for step in steps if step > 0] == list(range(1, num_steps + 1))
    assert (run / "stages" / stage / "result.json").is_file()


def test_a_disk_that_turns_read_only_while_it_is_written_to(tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = ["sft", *SMOKE, f"run.dir={run}", "sft.max_steps=14", "sft.save_every=5"]
    file, hook = held(tmp_path, "sft", times=8)  # after step 7
    process = start(arguments, tmp_path, hook)
    wait_for_hold(file, process)
    checkpoint = run / "stages/sft/checkpoints/checkpoint-5"
    with make_read_only(run):
        before = hash_path(checkpoint)
        file.unlink()
        check_refusal(process, run, "its file system is read-only")
        assert hash_path(checkpoint) == before
        # As long as it lasts, the same command says the same at once.
        check_refusal(start(arguments, tmp_path), run, "its file system is read-only")
    check_continued(start(arguments, tmp_path), run, "sft", 14)


def test_a_checkpoint_folder_that_loses_its_permission(tmp_path: Path) -> None:
    inputs = write_models(tmp_path / "models")
    run, checkpoints = tmp_path / "run", tmp_path / "run/stages/ppo/checkpoints"
    arguments = ["ppo", *SMOKE, f"run.dir={run}", "ppo.num_updates=5", "ppo.save_every=2"]
    arguments += [f"ppo.{name}={inputs[name]}" for name in ("policy", "reward_model")]
    file, hook = held(tmp_path, "ppo", times=6)  # after the third update
    process = start(arguments, tmp_path, hook)
    wait_for_hold(file, process)
    checkpoint = checkpoints / "checkpoint-2"
    checkpoints.chmod(0o555)
    before = hash_path(checkpoint)
    file.unlink()
    check_refusal(process, checkpoints, "no permission for user")
    assert hash_path(checkpoint) == before
    checkpoints.chmod(0o755)
    check_continued(start(arguments, tmp_path), run, "ppo", 5)
