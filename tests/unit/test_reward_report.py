"""Stage reward_report, and the report that stage reward_model writes by itself, on an ensemble of two tiny models."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from rlhf.config import RLHFConfig
from rlhf.config.model import ScratchConfig
from rlhf.config.reward_report import RewardReportConfig
from rlhf.config.root import PIPELINE
from rlhf.data.tokenization import encode_pair
from rlhf.distributed.runtime import Runtime
from rlhf.errors import ConfigError, DataError
from rlhf.models import ScalarModel, build_from_scratch, load_tokenizer, response_scores
from rlhf.models.paths import member_folders
from rlhf.models.scalar import pad_pairs
from rlhf.pipeline import plan_stage, preflight
from rlhf.records import Comparison, Message, dump_line
from rlhf.runs.folder import RunFolder
from rlhf.stages import reward_model, reward_report
from rlhf.stages.context import StageOutput
from tests.stage_example import make_context, one_process, tiny_config, write_comparisons

STEPS = {"batch_size": 8, "max_steps": 2, "num_members": 2, "log_every": 2, "save_every": 2}
QUICK = {"bootstrap_resamples": 20}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Comparisons, and a run of stage reward_model with two members. Not to be changed."""
    folder = tmp_path_factory.mktemp("report")
    write_comparisons(folder / "comparisons")
    config = ScratchConfig.model_validate({"num_layers": 2, "hidden_size": 32, "num_heads": 2, "vocab_size": 300})
    policy, tokenizer = build_from_scratch(config, ["the film was good and bad"] * 9, seed=3)
    policy.save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    inputs = {"base": str(folder / "policy"), "comparisons": str(folder / "comparisons")}
    context = make_context(tiny_config(folder, reward_model=STEPS), folder / "run", "reward_model", inputs)
    output = reward_model.run(context)
    (folder / "summary.json").write_text(json.dumps(output.summary))
    return folder


def model_of(files: Path) -> Path:
    return files / "run/stages/reward_model/model"


def report_with(
    files: Path, run: Path, inputs: dict[str, str], runtime: Runtime | None = None, **section: Any
) -> tuple[StageOutput, dict[str, Any]]:
    """Runs the stage on the ensemble; returns its output and the report."""
    config = tiny_config(files, reward_report={**QUICK, **section})
    whole = {"reward_model": str(model_of(files)), **inputs}
    context = make_context(config, run, "reward_report", whole, runtime)
    output = reward_report.run(context)
    return output, json.loads((context.stage.path / "reward_report.json").read_text())


def on(files: Path) -> dict[str, str]:
    return {"comparisons": str(files / "comparisons")}


def test_stage_reward_model_reports_on_what_it_held_out(files: Path) -> None:
    folder = files / "run/stages/reward_model"
    report, summary = (
        json.loads((folder / "reward_report.json").read_text()),
        json.loads((files / "summary.json").read_text()),
    )
    assert report["measured_on"]["splits"] == ["test"]
    assert report["num_comparisons"] == 7
    assert report["accuracy"]["value"] == summary["accuracy"]["value"]
    assert report["margin"]["value"] == pytest.approx(summary["margin"])
    members = [summary[f"member_{number}_accuracy"]["value"] for number in range(2)]
    assert [one["value"] for one in report["ensemble"]["member_accuracy"]] == members
    assert {"exhibits.json", "reward_report.svg", "mistakes.jsonl", "held_out_scores.jsonl"} <= {
        file.name for file in folder.iterdir()
    }


def test_the_stage_finds_the_same_on_the_same_comparisons(files: Path, tmp_path: Path) -> None:
    output, report = report_with(files, tmp_path, on(files))
    own = json.loads((files / "run/stages/reward_model/reward_report.json").read_text())
    assert report["accuracy"] == own["accuracy"]
    assert report["margin"]["value"] == pytest.approx(own["margin"]["value"], abs=1e-6)
    assert report["length"]["longer_wins"] == own["length"]["longer_wins"]
    assert report["slices"]["length_gap"][0]["group"] == own["slices"]["length_gap"][0]["group"]
    assert output.summary["num_comparisons"] == 7
    assert output.summary["accuracy"] == report["accuracy"]
    assert {"reward_report.json", "held_out_scores.jsonl", "mistakes.jsonl"} == set(output.outputs)


def test_every_key_changes_the_report(files: Path, tmp_path: Path) -> None:
    _, report = report_with(
        files,
        tmp_path,
        on(files),
        splits=("validation", "train"),
        max_comparisons=43,
        num_bins=2,
        num_mistakes=1,
        confidence=0.5,
        bootstrap_resamples=7,
    )
    assert report["num_comparisons"] == 43
    assert report["measured_on"]["splits"] == ["train", "validation"]
    assert len(report["calibration"]["curve"]) == 2
    assert report["confidence"] == 0.5
    lines = (tmp_path / "stages/reward_report/mistakes.jsonl").read_text().splitlines()
    wrong = sum(1 for one in _scores(tmp_path) if sum(one["chosen_scores"]) < sum(one["rejected_scores"]))
    assert len(lines) == min(1, wrong)
    assert {one["split"] for one in _scores(tmp_path)} == {"train", "validation"}
    _, other = report_with(files, tmp_path, on(files), splits=("validation", "train"), max_comparisons=43)
    assert len(other["calibration"]["curve"]) == 2
    assert other["calibration"]["brier"]["low"] < report["calibration"]["brier"]["low"]
    _, one = report_with(files, tmp_path, on(files), splits=("train",), num_bins=1)
    assert len(one["calibration"]["curve"]) == 1


def _scores(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "stages/reward_report/held_out_scores.jsonl").read_text().splitlines()]


def _alone(files: Path, prompt: Any, response: str) -> float:
    """The members' mean score of one response, computed one text at a time."""
    total = 0.0
    for folder in member_folders(model_of(files)):
        scalar, tokenizer = ScalarModel.load(folder), load_tokenizer(folder)
        encoded = encode_pair(tokenizer, prompt, response)
        total += response_scores(scalar, *pad_pairs(scalar, [encoded], pad_id=0)).item()
    return total / 2


def test_a_benchmark_by_itself_or_as_a_chat(files: Path, tmp_path: Path) -> None:
    rows = [
        {
            "prompt": "the film",
            "chosen": " was good",
            "rejected": " was bad and poor",
            "subset": "donotanswer",
            "id": 4,
        },
        {"prompt": "a film", "chosen": " was fine", "rejected": " was bad " * 400, "subset": "mine"},
    ]
    path = tmp_path / "bench.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    config = RLHFConfig.model_validate({**tiny_config(files).model_dump(), "data": {"type": "embedded"}})
    for as_chat in (False, True):
        section = RewardReportConfig.model_validate({**QUICK, "benchmark_as_chat": as_chat})
        inputs = {"reward_model": str(model_of(files)), "benchmark": str(path)}
        own = config.model_copy(update={"reward_report": section})
        context = make_context(own, tmp_path / str(as_chat), "reward_report", inputs)
        output = reward_report.run(context)
        report = json.loads((context.stage.path / "reward_report.json").read_text())
        assert "accuracy" not in report
        assert report["benchmark"]["num_too_long"] == 1
        assert report["benchmark"]["subsets"]["donotanswer"]["num"] == 1
        assert "total" not in output.summary
        lines = [json.loads(one) for one in (context.stage.path / "benchmark_scores.jsonl").read_text().splitlines()]
        assert lines[1]["scores"] is None
        prompt: Any = (Message("user", "the film"),) if as_chat else "the film"
        expected = [[_alone(files, prompt, " was good")], [_alone(files, prompt, " was bad and poor")]]
        assert lines[0]["id"] == 4
        assert lines[0]["scores"][0] == pytest.approx(expected[0], abs=1e-5)
        assert lines[0]["scores"][1] == pytest.approx(expected[1], abs=1e-5)


def test_comparisons_that_are_too_long_are_counted(files: Path, tmp_path: Path) -> None:
    records = [Comparison("the film", " was good", " was bad"), Comparison("the film " * 300, " was good", " was bad")]
    folder = tmp_path / "comparisons"
    folder.mkdir()
    (folder / "test.jsonl").write_text("".join(dump_line(one) + "\n" for one in records))
    output, report = report_with(files, tmp_path / "run", {"comparisons": str(folder)})
    assert report["measured_on"]["num_too_long"] == output.summary["num_too_long"] == 1
    assert report["num_comparisons"] == 1
    (folder / "test.jsonl").write_text(dump_line(records[1]) + "\n")
    with pytest.raises(DataError, match="too long for the positions"):
        report_with(files, tmp_path / "run", {"comparisons": str(folder)})
    with pytest.raises(DataError, match=r"splits=\[validation\].*Choose other splits"):
        report_with(files, tmp_path / "run", {"comparisons": str(folder)}, splits=("validation",))


@dataclass(frozen=True)
class Rank(Runtime):
    """One of two ranks in threads that hand each other objects."""

    place: threading.Barrier = field(default_factory=lambda: threading.Barrier(2))
    shares: dict[int, Any] = field(default_factory=dict)

    def gather_objects(self, value: Any) -> list[Any]:
        self.shares[self.rank] = value
        self.place.wait(60)
        found = [self.shares[rank] for rank in range(2)]
        self.place.wait(60)
        return found

    def barrier(self) -> None:
        self.place.wait(60)


def test_two_ranks_score_their_shares(files: Path, tmp_path: Path) -> None:
    place, shares = threading.Barrier(2), dict[int, Any]()
    outputs: dict[int, StageOutput] = {}

    def work(rank: int) -> None:
        runtime = Rank(rank, 2, rank, torch.device("cpu"), "fp32", place=place, shares=shares)
        config = tiny_config(files, reward_report=QUICK)
        inputs = {"reward_model": str(model_of(files)), **on(files)}
        outputs[rank] = reward_report.run(make_context(config, tmp_path / "two", "reward_report", inputs, runtime))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    alone, _ = report_with(files, tmp_path / "one", on(files), one_process())
    assert outputs[0].summary["accuracy"] == alone.summary["accuracy"]
    for first, second in zip(_scores(tmp_path / "two"), _scores(tmp_path / "one"), strict=True):
        assert first["comparison"] == second["comparison"]
        assert first["chosen_scores"] == pytest.approx(second["chosen_scores"], abs=1e-5)


def checked(files: Path, tmp_path: Path, **values: Any) -> RLHFConfig:
    body = {**tiny_config(files).model_dump(), "stages": ("reward_report",), "data": {"type": "embedded"}}
    config = RLHFConfig.model_validate({**body, **values})
    preflight(config, RunFolder(tmp_path / "none"))
    return config


def test_what_is_wrong_is_said_before_anything_runs(files: Path, tmp_path: Path) -> None:
    model = str(model_of(files))
    with pytest.raises(ConfigError, match=r"set reward_report\.reward_model=FOLDER_OR_HUB_ID"):
        checked(files, tmp_path)
    with pytest.raises(ConfigError, match="nothing to score"):
        checked(files, tmp_path, reward_report={"reward_model": model})
    with pytest.raises(ConfigError, match=r"reward_report\.benchmark=.*no such file"):
        checked(files, tmp_path, reward_report={"reward_model": model, "benchmark": str(tmp_path / "b.jsonl")})
    (tmp_path / "empty").mkdir()
    section = {"reward_model": model, "comparisons": str(tmp_path / "empty"), "splits": ("validation",)}
    with pytest.raises(ConfigError, match=r"with validation\.jsonl .*data=files"):
        checked(files, tmp_path, reward_report=section)
    with pytest.raises(ConfigError, match=r"reward_report\.reward_model"):
        checked(files, tmp_path, reward_report={"reward_model": str(tmp_path), **on(files)})
    for wrong in ({"confidence": 1.0}, {"splits": ("test", "test")}, {"splits": ()}, {"num_bins": 0}):
        with pytest.raises(ValidationError):
            RewardReportConfig.model_validate(wrong)
    assert "reward_report" not in PIPELINE


def test_content_decides_whether_a_report_is_made_again(files: Path, tmp_path: Path) -> None:
    bench = tmp_path / "bench.jsonl"
    bench.write_text("{}\n")
    section = {"reward_model": str(model_of(files)), "benchmark": str(bench)}
    run = RunFolder(tmp_path / "none")

    def fingerprint(**more: Any) -> str:
        config = checked(files, tmp_path, reward_report={**section, **more})
        return plan_stage(config, run, "reward_report", "data").fingerprint

    first = fingerprint()
    moved = tmp_path / "moved.jsonl"
    moved.write_text("{}\n")
    assert fingerprint(benchmark=str(moved)) == first
    assert fingerprint(num_mistakes=3) != first
    bench.write_text("{} \n")
    assert fingerprint() != first
