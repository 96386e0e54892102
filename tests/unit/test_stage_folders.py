"""A stage whose config or inputs changed starts over: what it had made is kept aside, and what changed is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf.config import load_config
from rlhf.pipeline import begin_stage, plan_stage
from rlhf.runs.folder import RunFolder, StageResult

DATA_HASH = "0" * 64


def run_with(path: Path, *arguments: str) -> tuple[RunFolder, bool, str | None]:
    """Begins stage sft of the run folder under these arguments, as a run does."""
    run = RunFolder(path)
    run.create()
    plan = plan_stage(load_config([*arguments, "stages=[sft]"]).config, run, "sft", DATA_HASH)
    return run, *begin_stage(run, plan)


def leave_checkpoint(run: RunFolder, text: str) -> None:
    checkpoint = run.stage("sft").checkpoints / "checkpoint-20"
    checkpoint.mkdir(parents=True)
    (checkpoint / "weights").write_text(text)


def finish(run: RunFolder) -> None:
    stage = run.stage("sft")
    (stage.model).mkdir()
    (stage.model / "weights").write_text("trained")
    fingerprint = stage.read_fingerprint()
    assert fingerprint is not None
    stage.write_result(StageResult("sft", fingerprint, 1.0, stage.hash_outputs(["model"])))


def test_an_interrupted_stage_goes_on_and_nothing_is_said(tmp_path: Path) -> None:
    run, resumes, note = run_with(tmp_path, "sft.max_steps=400")
    assert (resumes, note) == (False, None)
    leave_checkpoint(run, "weeks")
    _, resumes, note = run_with(tmp_path, "sft.max_steps=400", "sft.save_every=7", "zero=stage2")
    assert (resumes, note) == (True, None)
    assert not run.previous.exists()


def test_a_changed_key_keeps_the_checkpoints_aside_and_is_named(tmp_path: Path) -> None:
    run, *_ = run_with(tmp_path, "sft.max_steps=400")
    leave_checkpoint(run, "weeks")
    _, resumes, note = run_with(tmp_path, "sft.max_steps=30", "distributed.precision=fp32", "seed=2")
    assert not resumes
    assert note is not None
    assert "sft starts over: " in note
    for change in ('distributed.precision "auto" → "fp32"', "seed 1 → 2", "sft.max_steps 400 → 30"):
        assert change in note
    kept = run.previous / "sft"
    assert str(kept) in note
    assert (kept / "checkpoints" / "checkpoint-20" / "weights").read_text() == "weeks"
    assert not run.stage("sft").checkpoints.exists()
    # Only the newest is kept, and an attempt that made nothing does not take its place.
    _, _, note = run_with(tmp_path, "sft.max_steps=31")
    assert note is None
    assert (kept / "checkpoints" / "checkpoint-20" / "weights").read_text() == "weeks"
    leave_checkpoint(run, "an hour")
    run_with(tmp_path, "sft.max_steps=32")
    assert (kept / "checkpoints" / "checkpoint-20" / "weights").read_text() == "an hour"


def test_changed_data_is_named_by_its_keys_and_its_content(tmp_path: Path) -> None:
    """Not as the whole of its settings, of which only the beginning would be seen."""
    run, *_ = run_with(tmp_path)
    leave_checkpoint(run, "weeks")
    _, _, note = run_with(tmp_path, "data.num_demonstrations=65")
    assert note is not None
    assert "sft starts over: data.num_demonstrations 6000 → 65. What" in note
    leave_checkpoint(run, "weeks")
    config = load_config(["data.num_demonstrations=65", "stages=[sft]"]).config
    _, note = begin_stage(run, plan_stage(config, run, "sft", "1" * 64))
    assert note is not None
    assert "sft starts over: the data's hash \"000" in note


def test_a_finished_model_is_kept_aside_too(tmp_path: Path) -> None:
    run, *_ = run_with(tmp_path)
    finish(run)
    _, resumes, note = run_with(tmp_path, "sft.learning_rate=0.5")
    assert not resumes
    assert note is not None
    assert "sft.learning_rate 0.001 → 0.5" in note
    assert (run.previous / "sft" / "model" / "weights").read_text() == "trained"


def test_an_altered_output_is_kept_aside_and_named(tmp_path: Path) -> None:
    run, *_ = run_with(tmp_path)
    finish(run)
    (run.stage("sft").model / "weights").write_text("by hand")
    _, _, note = run_with(tmp_path)
    assert note is not None
    assert "its output is not what it had written (model)" in note
    assert (run.previous / "sft" / "model" / "weights").read_text() == "by hand"


@pytest.mark.parametrize("key", ["distributed.device=cpu", "distributed.num_processes=2", "run.root=elsewhere"])
def test_where_it_is_computed_does_not_count(key: str, tmp_path: Path) -> None:
    run, *_ = run_with(tmp_path)
    leave_checkpoint(run, "weeks")
    _, resumes, note = run_with(tmp_path, key)
    assert (resumes, note) == (True, None)
