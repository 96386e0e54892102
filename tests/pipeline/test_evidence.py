"""`rlhf replay` and `rlhf verify` on a run that trains: identical again, PASS, and FAIL for each cause by its name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from rlhf.evidence.expected import read_expected
from rlhf.evidence.record import read_record
from rlhf.evidence.recording import record_baseline
from tests.command import ROOT, rlhf_command
from tests.unit.evidence_example import check, write_expected_file

# SFT on a file, then PPO by a function, both in two steps.
EXPERIMENT = """# @package _global_
defaults:
  - override /data: files

experiment: evidence
stages: [sft, ppo]
data: {path: data.jsonl, max_prompt_tokens: 40, max_response_tokens: 40}
model: {scratch: {hidden_size: 32, num_heads: 2, vocab_size: 300, max_positions: 128}}
tracking: {wandb: disabled}
sft: {max_steps: 2, batch_size: 8, log_every: 1}
ppo:
  num_updates: 2
  batch_size: 8
  rollout_batch_size: 8
  max_response_tokens: 8
  value_init: policy
  learning_rate: 3e-4
  rewards:
    mine: {type: function, file: reward.py}
"""
REWARD = """def reward(prompts, completions, **columns):
    return [SIGN * float(sum(letter in "aeiou" for letter in text)) for text in completions]
"""
COMMAND = ("experiment=evidence", "distributed.device=cpu")


def write_inputs(folder: Path, *, response: str = "good", sign: str = "1") -> None:
    rows = [{"prompt": f"The film number {number} was", "response": f" {response}."} for number in range(60)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "reward.py").write_text(REWARD.replace("SIGN", sign))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project folder with a finished run `run` and its recorded baseline."""
    path = tmp_path_factory.mktemp("evidence")
    (path / "configs/experiment").mkdir(parents=True)
    (path / "configs/experiment/evidence.yaml").write_text(EXPERIMENT)
    write_inputs(path)
    result = rlhf_command("run", *COMMAND, "run.dir=run", cwd=path)
    assert result.returncode == 0, result.stderr
    entries = [
        check(name="last score", metric="ppo/raw_score_mean"),
        check(name="SFT's loss", stage="sft", metric="sft/loss"),
    ]
    stub = read_expected(write_expected_file(path, entries, experiment="evidence"))
    # Three seeds of one value each: the narrowest band that there is.
    record_baseline(stub, dict.fromkeys((1, 2, 3), read_record(path / "run")))
    return path


def verified(folder: Path, *arguments: str, name: str) -> tuple[int, str]:
    """Runs verify in a copy of the finished run, so that only what changed is made again: exit code and output."""
    shutil.copytree(folder / "run", folder / name)
    result = rlhf_command("verify", *COMMAND, f"run.dir={name}", *arguments, cwd=folder)
    assert "Traceback" not in result.stderr, result.stderr
    return result.returncode, result.stdout


def test_a_manifest_says_what_decides_bits(folder: Path) -> None:
    body = json.loads((folder / "run/manifest.json").read_text())
    assert set(body["data"]) == {"hash", "content"}
    ppo = body["stages"]["ppo"]
    assert (ppo["compute"]["device"], ppo["compute"]["num_threads"], ppo["compute"]["precision"]) == ("cpu", 1, "fp32")
    assert ppo["compute"]["cpu_capability"]
    assert ppo["input_hashes"]["policy"] == body["stages"]["sft"]["outputs"]["model"]


def test_a_replay_is_identical_whatever_the_environment_says(folder: Path) -> None:
    result = rlhf_command("replay", "run", cwd=folder, extra={"OMP_NUM_THREADS": "2"})
    assert result.returncode == 0, result.stdout + result.stderr
    # Whoever is at work on the code while this runs has another diff; nothing else may differ.
    assert not any(f"  {name}:" in result.stdout for name in ("config", "data", "files", "packages")), result.stdout
    assert "the run did not write down" not in result.stdout
    assert "identical: 2 stages, " in result.stdout
    assert not (folder / "run-replay").exists()


def test_pass_of_a_finished_run_trains_nothing(folder: Path) -> None:
    code, said = verified(folder, "--json", name="again")
    body = json.loads(said)  # and nothing else, whatever the run prints
    assert (code, body["passed"]) == (0, True)
    assert [line["passed"] for line in body["runs"][0]["checks"]] == [True, True]
    before, after = (json.loads((folder / name / "manifest.json").read_text())["stages"] for name in ("run", "again"))
    assert before == after


def test_fail_of_a_learning_rate_times_ten(folder: Path) -> None:
    code, said = verified(folder, "ppo.learning_rate=3e-3", name="rate")
    assert code == 1
    assert "note: the verdict will be FAIL, the run is of another experiment: ppo.learning_rate 0.003" in said
    assert "likely cause: another experiment: ppo.learning_rate 0.003, recorded 0.0003" in said
    assert "first diverging step: ppo step" in said


def test_fail_of_a_changed_reward_and_of_changed_data(folder: Path) -> None:
    """The keys are the same: what the files hold differs."""
    try:
        write_inputs(folder, sign="-1")
        code, said = verified(folder, name="reward")
        assert code == 1
        assert "likely cause: other files or input models: what ppo.rewards does" in said
        assert "FAIL  last score: -" in said
        assert "first diverging step: ppo step 1: ppo/" in said
        write_inputs(folder, response="bad")
        code, said = verified(folder, "stages=[sft]", name="data")
        assert code == 1
        assert "likely cause: other data: the data's content" in said
        assert "first diverging step: sft step 1: sft/" in said
    finally:
        write_inputs(folder)


def test_the_quickstart_has_a_baseline() -> None:
    assert read_expected(ROOT / "experiments/quickstart/expected.json").expected.experiment == "quickstart"
