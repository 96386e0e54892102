"""The run folder says which stages are finished, and keeps two runs from sharing it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.errors import ArtifactError, UserError
from rlhf.runs import files
from rlhf.runs.folder import RunFolder, StageResult


def test_result_round_trip_and_broken_ones(tmp_path: Path) -> None:
    stage = RunFolder(tmp_path).stage("sft")
    assert stage.name == "sft"
    assert stage.read_result() is None
    result = StageResult("sft", "f", 1.5, {"model": "hash"}, {"loss": {"value": 1.0, "low": 0.5, "high": 2.0}})
    stage.write_result(result)
    assert stage.read_result() == result
    whole = stage.result.read_bytes()
    for cut in (0, 1, len(whole) // 2, len(whole) - 3):
        stage.result.write_bytes(whole[:cut])
        assert stage.read_result() is None
    for foreign in ("[]", "{}", '{"stage": "sft", "fingerprint": 3, "seconds": 1, "outputs": {}, "summary": {}}'):
        stage.result.write_text(foreign)
        assert stage.read_result() is None


def test_begin_resumes_only_the_same_fingerprint(tmp_path: Path) -> None:
    stage = RunFolder(tmp_path).stage("ppo")
    assert not stage.begin("one", {"seed": 1})
    files.write_text(stage.checkpoints / "state", "1")
    assert stage.begin("one", {"seed": 1})
    assert (stage.checkpoints / "state").exists()
    stage.write_result(StageResult("ppo", "one", 1.0))
    assert not stage.begin("two", {})
    assert stage.read_result() is None
    assert not stage.checkpoints.exists()
    assert stage.read_fingerprint() == "two"


def test_outputs_are_verified(tmp_path: Path) -> None:
    stage = RunFolder(tmp_path).stage("sft")
    files.write_text(stage.model / "config.json", "{}")
    files.write_text(stage.path / "metrics", "1")
    result = StageResult("sft", "f", 1.0, stage.hash_outputs(["model", "metrics"]))
    assert stage.altered_outputs(result) == []
    files.write_text(stage.model / "config.json", "{ }")
    (stage.path / "metrics").unlink()
    assert set(stage.altered_outputs(result)) == {"model", "metrics"}
    with pytest.raises(ArtifactError, match="metrics"):
        stage.hash_outputs(["metrics"])


def test_clean_partial_touches_only_its_own(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.create()
    theirs = [tmp_path / "download.partial", tmp_path / ".bashrc.old", tmp_path / "other" / "x.partial"]
    ours = [tmp_path / ".manifest.json.0123abcd.partial", run.stage("sft").path / "model.partial"]
    for path in (*theirs, *ours):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    assert set(run.clean_partial()) == set(ours)
    assert all(path.exists() for path in theirs)


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        RunFolder(tmp_path / "file").create()
    with pytest.raises(UserError, match="is a file"):
        RunFolder(tmp_path / "file" / "run").create()


def test_lock_is_exclusive_and_dies_with_its_process(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    code = (
        "import sys, time; from pathlib import Path; from rlhf.runs.folder import RunFolder\n"
        "with RunFolder(Path(sys.argv[1])).lock():\n    print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another process"), run.lock():
            pass
        holder.kill()
    with run.lock():
        pass


def test_runs_never_imports_heavy_libraries() -> None:
    code = (
        "import sys, rlhf.runs.tracking, rlhf.runs.report, rlhf.runs.manifest, rlhf.runs.console\n"
        "print(sorted({'torch', 'numpy', 'wandb', 'transformers'} & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout == "[]\n"
