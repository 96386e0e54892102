"""The whole pipeline at its smallest size, as a user runs it: finish, skip, redo."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.command import ROOT, SMOKE, command, environment, rlhf_command, wait_for
from tests.small_disk import small_disk
from tests.stage_example import metrics_of, weight_bytes

STAGES = ("sft", "collect", "reward_model", "ppo", "evaluate")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the smoke experiment."""
    folder = tmp_path_factory.mktemp("smoke")
    result = rlhf_command("run", *SMOKE, "run.dir=run", cwd=folder)
    assert result.returncode == 0, result.stderr
    assert f"Report: {folder}/run/report.html" in result.stdout
    return folder / "run"


def _manifest(run: Path) -> dict[str, Any]:
    body: dict[str, Any] = json.loads((run / "manifest.json").read_text())
    return body


def _trained(run: Path) -> list[bytes]:
    return [weight_bytes(run, stage) for stage in ("sft", "reward_model", "ppo")]


def _all_metrics(run: Path) -> list[Any]:
    return [metrics_of(run, stage) for stage in STAGES]


def test_a_finished_run_has_everything(finished: Path) -> None:
    manifest = _manifest(finished)
    assert manifest["status"] == "finished"
    assert {stage: manifest["stages"][stage]["status"] for stage in STAGES} == dict.fromkeys(STAGES, "finished")
    for stage in ("sft", "reward_model", "ppo"):
        memory = [manifest["stages"][stage][f"{name}_bytes"] for name in ("predicted_memory", "memory_growth")]
        assert all(2**20 < number < 2**33 for number in memory), (stage, memory)
        assert manifest["stages"][stage]["peak_memory_bytes"] > memory[1]
    assert len(metrics_of(finished, "ppo")) == 3
    samples = [json.loads(line) for line in (finished / "samples.jsonl").read_text().splitlines()]
    assert {"ppo", "evaluate"} <= {sample["stage"] for sample in samples}
    report = (finished / "report.html").read_text()
    assert "win" in report.lower()
    for stage, folders in {"sft": ["model"], "reward_model": ["model"], "ppo": ["model", "value_model"]}.items():
        for name in folders:
            assert (finished / "stages" / stage / name / "model.safetensors").is_file()


def test_the_same_command_finds_nothing_to_do(finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (finished / "stages").rglob("*")}
    result = rlhf_command("run", *SMOKE, "run.dir=run", cwd=finished.parent)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("nothing to do") == len(STAGES)
    assert before == {path: path.stat().st_mtime_ns for path in (finished / "stages").rglob("*")}


def test_part_of_the_pipeline_on_models_from_elsewhere(finished: Path, tmp_path: Path) -> None:
    result = rlhf_command(
        "run",
        *SMOKE,
        "run.dir=part",
        "stages=[ppo,evaluate]",
        f"ppo.policy={finished}/stages/sft/model",
        f"ppo.reward_model={finished}/stages/reward_model/model",
        f"evaluate.baseline={finished}/stages/sft/model",
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert weight_bytes(tmp_path / "part", "ppo") == weight_bytes(finished, "ppo")
    assert not (tmp_path / "part/stages/sft").exists()


def test_a_changed_key_runs_again_what_depends_on_it_and_nothing_else(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    subprocess.run(["cp", "-a", str(finished), str(run)], check=True)
    result = rlhf_command("run", *SMOKE, "run.dir=run", "ppo.learning_rate=1e-5", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("nothing to do") == 3
    assert weight_bytes(run, "sft") == weight_bytes(finished, "sft")
    assert weight_bytes(run, "ppo") != weight_bytes(finished, "ppo")
    assert len(metrics_of(run, "ppo")) == 3


def test_the_notebook_reads_a_run(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUN", str(finished))
    notebook = json.loads((ROOT / "notebooks/quickstart.ipynb").read_text())
    names: dict[str, Any] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert len(names["ppo"]) == 3
    assert len(names["shown"]) == 4


def test_two_commands_never_write_to_one_folder(tmp_path: Path) -> None:
    process = subprocess.Popen(
        command("run", *SMOKE, "run.dir=run"), cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL
    )
    wait_for(tmp_path / "run/stages/sft", process)
    second = rlhf_command("run", *SMOKE, "run.dir=run", cwd=tmp_path)
    assert second.returncode == 1
    assert "another process is working in run" in second.stderr
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=200) == 143


@pytest.mark.parametrize("verb", ["sft", "collect", "reward-model", "ppo", "evaluate", "report"])
def test_every_stage_has_its_verb(verb: str, finished: Path) -> None:
    result = rlhf_command(verb, *SMOKE, "run.dir=run", cwd=finished.parent)
    assert result.returncode == 0, result.stderr
    if verb != "report":
        assert "nothing to do" in result.stdout


def test_the_supervisor_never_imports_torch(tmp_path: Path) -> None:
    code = "import sys, rlhf.supervisor; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=environment(), cwd=tmp_path, check=False).returncode == 0


def test_a_full_disk_is_said_and_the_run_goes_on_later(finished: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "small", "700k") as small:
        result = rlhf_command("run", *SMOKE, f"run.dir={small}/run", cwd=tmp_path)
        assert result.returncode == 1
        assert "no space left" in result.stderr
        assert "Traceback" not in result.stderr
        subprocess.run(["mount", "-o", "remount,size=64m", str(small)], check=True)
        again = rlhf_command("run", *SMOKE, f"run.dir={small}/run", cwd=tmp_path)
        assert again.returncode == 0, again.stderr
        # Whatever happened: the same seed gives the same weights and numbers.
        assert _trained(small / "run") == _trained(finished)
        assert _all_metrics(small / "run") == _all_metrics(finished)
