"""What W&B gets: every line once, the result under the names on disk, artifacts with their lineage, the sweep's due."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf.config.tracking import TrackingConfig
from rlhf.errors import Stopped
from rlhf.runs import manifest, wandb_logger, wandb_offline
from rlhf.runs.folder import RunFolder, StageResult
from rlhf.runs.sinks import result_metrics
from rlhf.runs.tracking import StageSinks, Tracker, record_result
from tests.unit import wandb_file
from tests.unit.test_tracking import FakeWandb
from tests.unit.test_tracking import wandb as wandb  # the fixture

OFFLINE = TrackingConfig(wandb="offline")
SFT_SUMMARY = {"loss": 1.25, "perf/peak_memory_bytes": 7, "judge": "gold"}


def write_stage(
    run: RunFolder, stage: str, outputs: list[str], inputs: dict[str, str], data: list[Any] | None = None
) -> StageResult:
    """A finished stage on disk, its outputs being folders with a file of their own name."""
    folder = run.stage(stage)
    decisive = {"inputs": inputs, "data": data or [{"type": "embedded"}, "d" * 64]}
    folder.begin(f"fingerprint-{stage}", decisive)
    for name in outputs:
        (folder.path / name).mkdir()
        (folder.path / name / "content").write_text(f"{run.path.name} {stage} {name}")
    summary: dict[str, Any] = {"accuracy": {"value": 0.75, "low": 0.5, "high": 1.0}}
    result = StageResult(stage, f"fingerprint-{stage}", 1.0, folder.hash_outputs(outputs), summary)
    folder.write_result(result)
    return result


def begin_run(path: Path, experiment: str, data: dict[str, Any] | None = None) -> RunFolder:
    run = RunFolder(path)
    run.create()
    config = {"experiment": experiment, "data": data or {"type": "embedded"}}
    manifest.start_manifest(run, command=[], config=config, config_hash="", seed=1, stages=[])
    return run


def test_the_names_of_results() -> None:
    summary = {
        "win_rate": {"value": 0.5, "low": 0.25, "high": 0.75},
        "evaluate/kl": 2,
        "perf/peak_memory_bytes": 9,
        "judge": "gold",
        "shift": None,
        "table": {"gold": 1.5, "of": {"proxy": 2.5}, "rows": [1, 2]},
    }
    assert result_metrics("evaluate", summary) == {
        "evaluate/win_rate": 0.5,
        "evaluate/win_rate.low": 0.25,
        "evaluate/win_rate.high": 0.75,
        "evaluate/kl": 2.0,
        "perf/peak_memory_bytes": 9.0,
        "evaluate/table.gold": 1.5,
        "evaluate/table.of.proxy": 2.5,
    }


def test_a_resumed_stage_sends_nothing_twice_and_one_that_begins_anew_goes_on_above(
    tmp_path: Path, wandb: FakeWandb
) -> None:
    run = RunFolder(tmp_path / "run")

    def log(stage: str, first: int, last: int, resume_step: int = 0) -> list[tuple[int, Any]]:
        with Tracker.open(run, OFFLINE, stage, last, resume_step) as tracker:
            for step in range(first, last + 1):
                tracker.log(step, {f"{stage}/loss": float(step)})
                tracker.log_samples(step, [{"response": "x"}])
        return [(row, values.get(f"{stage}/step", "table")) for row, values in wandb.runs[-1].logged]

    assert log("sft", 1, 2) == [(0, 1), (0, "table"), (1, 2), (1, "table")]
    # Killed at step 4 with a checkpoint of step 2: lines 2 to 5 of the file are there, and sent.
    assert [row for row, _ in log("ppo", 1, 4)] == [2, 2, 3, 3, 4, 4, 5, 5]
    assert log("ppo", 3, 6, resume_step=2) == [(6, 5), (6, "table"), (7, 6), (7, "table")]
    # With another config its six lines go; what comes in their place is new to W&B.
    assert log("ppo", 1, 1) == [(8, 1), (8, "table")]
    assert log("evaluate", 1, 1) == [(9, 1), (9, "table")]
    assert [entry["step"] for entry in map(json.loads, run.metrics.read_text().splitlines())] == [1, 2, 1, 1]
    # A kill after it changes none of this.
    assert log("ppo", 2, 3, resume_step=1) == [(10, 2), (10, "table"), (11, 3), (11, "table")]


@pytest.mark.parametrize("sweep", [True, False])
def test_a_stop_in_a_sweep_hands_the_trial_back(
    tmp_path: Path, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch, sweep: bool
) -> None:
    if sweep:
        monkeypatch.setenv("WANDB_SWEEP_ID", "s")
    run = RunFolder(tmp_path)
    with (
        pytest.raises(Stopped),
        StageSinks(run, OFFLINE, "sft", {}) as sinks,
        Tracker.open(run, OFFLINE, "sft", 2, sinks=sinks),
    ):
        raise Stopped(15, 1)
    assert wandb.runs[0].told == (["preempting"] if sweep else []) + ["finish"]
    assert wandb.runs[0].exit_code == 143
    with pytest.raises(ZeroDivisionError), Tracker.open(RunFolder(tmp_path), OFFLINE, "sft", 2):
        raise ZeroDivisionError
    assert (wandb.runs[1].told, wandb.runs[1].exit_code) == (["finish"], 1)


def test_wandb_stays_open_until_the_result_is_recorded(tmp_path: Path, wandb: FakeWandb) -> None:
    run = begin_run(tmp_path / "seed1", "quickstart")
    config = {"experiment": "quickstart"}
    with StageSinks(run, OFFLINE, "sft", config) as sinks:
        with Tracker.open(run, OFFLINE, "sft", 1, sinks=sinks) as tracker:
            tracker.log(1, {"sft/loss": 1.0})
        assert wandb.runs[0].exit_code is None
        sinks.record(write_stage(run, "sft", ["model"], {}), {})
    (only,) = wandb.runs
    assert (only.exit_code, only.summary["sft/accuracy.low"]) == (0, 0.5)
    sinks = StageSinks(run, OFFLINE, "ppo", config)
    with Tracker.open(run, OFFLINE, "ppo", 1, sinks=sinks):
        pass
    sinks.close(ZeroDivisionError())  # the model was published, but its result could not be written
    assert wandb.runs[1].exit_code == 1


def record(run: RunFolder, result: StageResult, inputs: dict[str, str], **tracking: Any) -> None:
    config = TrackingConfig(wandb="offline", **tracking)
    experiment = manifest.read_manifest(run)["config"]["experiment"]
    record_result(run, config, result, run_config={"experiment": experiment}, inputs=inputs)


def test_lineage_across_stages_and_run_folders(tmp_path: Path, wandb: FakeWandb) -> None:
    first = begin_run(tmp_path / "seed1-ab", "quickstart")
    sft = write_stage(first, "sft", ["model"], {})
    record(first, sft, {})
    (dataset,) = wandb.runs[-1].used
    assert (dataset.name, dataset.type, dataset.content) == ("data-embedded", "dataset", ["sha256:" + "d" * 64])
    ((model, aliases),) = wandb.runs[-1].made
    assert (model.name, model.type, aliases) == ("quickstart-sft-model", "model", ["latest", "seed1-ab"])
    assert model.content == ["sha256:" + sft.outputs["model"]]
    assert model.metadata["fingerprint"] == "fingerprint-sft"
    assert model.metadata["metrics"]["sft/accuracy"] == 0.75
    assert model.metadata["path"] == str(first.stage("sft").model)
    # Another experiment goes on from it, with comparisons of its own, a base of the hub and a folder of the user.
    second = begin_run(tmp_path / "other" / "x", "my exp/2", {"type": "files", "path": "/data/reviews.jsonl"})
    data = [{"type": "files"}, "d" * 64]
    collect = write_stage(second, "collect", ["comparisons", "ratings"], {"policy": "p"}, data)
    record(second, collect, {"policy": str(first.stage("sft").model)})
    assert [(one.name, one.content) for one in wandb.runs[-1].used] == [
        ("quickstart-sft-model", model.content),
        ("data-files-reviews", ["sha256:" + "d" * 64]),
    ]
    assert [(one.name, one.type) for one, _ in wandb.runs[-1].made] == [
        ("my-exp-2-collect-comparisons", "comparisons"),
        ("my-exp-2-collect-ratings", "comparisons"),
    ]
    own = tmp_path / "my_base"
    own.mkdir()
    inputs = {
        "comparisons": str(second.stage("collect").path / "comparisons"),
        "base": "openai/gpt2",
        "value_model": str(own),
        "reference": str(own),
    }
    contents = {"base": "hub:openai/gpt2@main", "value_model": "e" * 64, "reference": "e" * 64}
    record(second, write_stage(second, "reward_model", ["model"], contents, data), inputs)
    assert [(one.name, one.type, one.content[0]) for one in wandb.runs[-1].used] == [
        ("my-exp-2-collect-comparisons", "comparisons", "sha256:" + collect.outputs["comparisons"]),
        ("hub-openai-gpt2", "model", "sha256:hub:openai/gpt2@main"),
        ("model-my_base", "model", "sha256:" + "e" * 64),
        ("data-files-reviews", "dataset", "sha256:" + "d" * 64),
    ]
    ((reward_model, _),) = wandb.runs[-1].made
    assert reward_model.metadata["inputs"]["base"] == "hub-openai-gpt2@hub:openai/g"
    assert reward_model.metadata["inputs"]["comparisons"].startswith("my-exp-2-collect-comparisons@")


def test_artifacts_by_choice_are_files_or_nothing(tmp_path: Path, wandb: FakeWandb) -> None:
    run = begin_run(tmp_path / "run", "x")
    result = write_stage(run, "sft", ["model"], {})
    record(run, result, {}, artifacts="files")
    ((model, _),) = wandb.runs[-1].made
    assert model.content == [str(run.stage("sft").model)]
    assert wandb.runs[-1].used[0].content == ["sha256:" + "d" * 64]  # where the data lies is its source's affair
    record(run, result, {}, artifacts="none")
    assert (wandb.runs[-1].made, wandb.runs[-1].used) == ([], [])
    assert wandb.runs[-1].summary["sft/accuracy"] == 0.75


def test_a_failing_artifact_ends_only_wandb(
    tmp_path: Path, wandb: FakeWandb, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise ValueError("bad name")

    monkeypatch.setattr(FakeWandb, "Artifact", refuse, raising=False)
    wandb.Artifact = refuse  # type: ignore[assignment]
    run = begin_run(tmp_path / "run", "x")
    record(run, write_stage(run, "sft", ["model"], {}), {})
    assert capsys.readouterr().out.count("W&B could not log artifacts: bad name") == 1


def test_at_the_end_of_a_run_its_report_and_all_results_are_there(
    tmp_path: Path, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begin_run(tmp_path / "seed1", "x")
    write_stage(run, "sft", ["model"], {})  # taken from elsewhere: no rank has recorded it
    wandb_logger.record_run(run, OFFLINE, {"experiment": "x"}, ["sft", "ppo"])
    assert wandb.runs[0].summary["sft/accuracy.high"] == 1.0
    assert wandb.runs[0].made == []
    run.report.write_text("<html>")
    wandb_logger.record_run(run, OFFLINE, {"experiment": "x"}, ["sft"])
    ((report, aliases),) = wandb.runs[1].made
    assert (report.name, report.type, report.content) == ("x-report", "report", [str(run.report)])
    assert (aliases, wandb.runs[1].exit_code) == (["latest", "seed1"], 0)
    wandb_logger.record_run(run, TrackingConfig(wandb="disabled"), {}, ["sft"])
    assert len(wandb.runs) == 2


def test_the_arms_of_a_study_in_a_sweep_are_in_none(
    tmp_path: Path, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, arm = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run" / "arms" / "one")
    for name, value in {"SWEEP_ID": "s", "RUN_ID": "trial", "SWEEP_PARAM_PATH": "p", "NAME": "sweep-1"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    with wandb_logger.outside_the_sweep(), Tracker.open(arm, OFFLINE, "sft", 1):
        pass
    assert wandb.runs[0].arguments["id"] == arm.wandb_id.read_text().strip() != "trial"
    assert wandb.runs[0].arguments["name"] == "one"
    with Tracker.open(run, OFFLINE, "sft", 1):
        pass
    assert (wandb.runs[1].arguments["id"], wandb.runs[1].arguments["name"]) == ("trial", None)


def test_the_command_that_uploads_offline_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = RunFolder(Path("runs/x/seed1"))
    assert wandb_offline.sync_command(run) is None
    for name in ("wandb/offline-run-1-a", "wandb/offline-run-2-a", "wandb/run-3-a"):
        (run.path / name).mkdir(parents=True)
    assert wandb_offline.sync_command(run) == "wandb sync runs/x/seed1/wandb/offline-run-*"
    for name in ("arms/one", "arms/two", "arms/ppo/beta"):
        (run.path / name / "wandb/offline-run-4-b").mkdir(parents=True)
    (run.path / "wandb/offline-run-1-a/run-a.wandb.synced").touch()
    (run.path / "wandb/offline-run-2-a/run-a.wandb.synced").touch()
    assert wandb_offline.sync_command(run) == (
        "wandb sync runs/x/seed1/arms/*/wandb/offline-run-* runs/x/seed1/arms/*/*/wandb/offline-run-*"
    )


def test_a_real_offline_run_is_whole_silent_and_continued(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from rlhf.config.tracking import TrackingConfig
from rlhf.runs import manifest
from rlhf.runs.folder import RunFolder, StageResult
from rlhf.runs.tracking import StageSinks, Tracker
run = RunFolder(Path(sys.argv[1]))
with Tracker.open(run, TrackingConfig(wandb="disabled"), "collect", 1) as tracker:
    tracker.log(1, {"collect/pairs": 3})
assert "wandb" not in sys.modules
config = {"experiment": "x", "seed": 1, "ppo": {"kl_coefficient": 0.25, "batch_size": 8}}
manifest.start_manifest(run, command=[], config=config, config_hash="", seed=1, stages=[])
run.stage("ppo").begin("f", {"inputs": {}, "data": [{"type": "embedded"}, "d" * 64]})
for resume_step, first, last in ((0, 1, 3), (2, 3, 4)):
    with StageSinks(run, TrackingConfig(wandb="offline"), "ppo", config) as sinks:
        with Tracker.open(run, sinks.config, "ppo", 4, resume_step, config, sinks=sinks) as tracker:
            for step in range(first, last + 1):
                tracker.log(step, {"ppo/loss": 1 / step, "perf/x": 2.0})
                tracker.log_samples(step, [{"prompt": "a", "score": 1.0}])
        if last == 4:
            model = run.stage("ppo").model
            model.mkdir()
            (model / "weights").write_text("w")
            result = StageResult("ppo", "f", 1.0, run.stage("ppo").hash_outputs(["model"]), {"ppo/loss": 0.25})
            sinks.record(result, {"policy": "openai/gpt2"})
"""
    parameters = tmp_path / "parameters.yaml"
    parameters.write_text("wandb_version: 1\nseed:\n  value: 1\nppo:\n  value:\n    kl_coefficient: 0.5\n")
    env = {"WANDB_SWEEP_ID": "s", "WANDB_RUN_ID": "trial", "WANDB_SWEEP_PARAM_PATH": str(parameters)}
    run = tmp_path / "run"
    answer = subprocess.run(
        [sys.executable, "-c", code, str(run)], capture_output=True, text=True, check=False, env=_environment(env)
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stderr == ""
    assert "wandb" not in answer.stdout.lower()
    folders = sorted(run.glob("wandb/offline-run-*"))
    # Not by the folders' names: of two in the same second W&B numbers the second.
    assert [path.name for folder in folders for path in folder.glob("*.wandb")] == ["run-trial.wandb"] * 2
    rows = [row for folder in folders for row in wandb_file.history(folder)]
    # Each line once, though the second start wrote step 3 again; W&B's own step grows.
    assert [(row["_step"], row["ppo/step"], row["ppo/loss"]) for row in rows] == [
        (1, 1, 1.0),
        (2, 2, 0.5),
        (3, 3, 1 / 3),
        (4, 4, 0.25),
    ]
    assert all(row["perf/x"] == 2.0 and row["ppo/samples.nrows"] == 1 for row in rows)
    shown = wandb_file.config(folders[0])
    # What the sweep sets is locked, and nothing of the section is lost.
    assert (shown["seed"], shown["ppo"]) == (1, {"kl_coefficient": 0.5, "batch_size": 8})
    assert wandb_file.summary(folders[1])["ppo/loss"] == 0.25
    made = {one.name: one for one in wandb_file.artifacts(folders[1]) if one.type == "model"}
    assert [
        (one.name, one.use_after_commit) for one in wandb_file.artifacts(folders[1]) if one.type != "run_table"
    ] == [
        ("hub-openai-gpt2", True),
        ("data-embedded", True),
        ("x-ppo-model", False),
    ]
    assert sorted(made["x-ppo-model"].aliases) == ["latest", "run"]
    assert json.loads(made["x-ppo-model"].metadata)["inputs"]["policy"].startswith("hub-openai-gpt2@")
    # Nothing but names and hashes would be uploaded.
    assert [entry.ref[:7] for entry in made["x-ppo-model"].manifest.contents] == ["sha256:"]


def _environment(extra: dict[str, str]) -> dict[str, str]:
    from tests.command import environment

    found = environment(extra)
    found.pop("WANDB_MODE", None)
    return found
