"""Mistakes a user makes: each ends with a short message that says what to do, and the right exit code."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.command import SMOKE, rlhf_command
from tests.ppo_example import write_models


def _refused(result: subprocess.CompletedProcess[str], code: int, *parts: str) -> None:
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr, result.stderr
    for part in parts:
        assert part in result.stderr


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["run", *SMOKE, "ppo.lerning_rate=1e-3"], ["ppo.lerning_rate", "ppo.learning_rate"]),
        (["run", *SMOKE, "model=tinny"], ["tinny", "tiny"]),
        (["run", "experiment=quikstart"], ["quikstart", "quickstart"]),
        (["run", *SMOKE, "ppo.num_updates=many"], ["ppo.num_updates", "many"]),
        (["rnu", *SMOKE], ["rnu", "did you mean run"]),
        (["sft", "data=files", "data.path=missing.jsonl"], ["data.path", "missing.jsonl"]),
        (["run", *SMOKE, "model.path=./no/such/folder"], ["model.path", "no/such/folder"]),
        (["run", *SMOKE, "stages=[ppo]"], ["ppo.policy", "sft"]),
        (["run", *SMOKE, "stages=[ppo,sft]"], ["stages"]),
        (["run", *SMOKE, "distributed.num_processes=3"], ["batch_size", "distributed.num_processes"]),
        (["sft", *SMOKE, "sft.base=./nowhere"], ["sft.base", "nowhere"]),
        (["run", *SMOKE, "zero=stage9"], ["stage9", "stage3"]),
        (["report", *SMOKE], ["no finished stage to report", "run.dir"]),
        (["run", *SMOKE, "stages=[sft,reward_model]"], ["needs comparisons", "collect"]),
        (["run", *SMOKE, "evaluate.judge={'type': 'classifier'}"], ["data=labelled_text"]),
    ],
)
def test_a_wrong_command_ends_with_2(arguments: list[str], parts: list[str], tmp_path: Path) -> None:
    _refused(rlhf_command(*arguments, cwd=tmp_path), 2, *parts)
    assert list(tmp_path.iterdir()) == []


def test_a_broken_row_names_file_and_line_and_can_be_skipped(tmp_path: Path) -> None:
    rows = [json.dumps({"prompt": f"the film {i}", "response": " was good"}) for i in range(40)]
    rows[6] = '{"prompt": "the film", "response"'
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    arguments = ["sft", *SMOKE, "data=files", "data.path=rows.jsonl", "run.dir=run"]
    # The experiment sets keys of the embedded corpus, which data=files does not have.
    arguments[1:2] = ["experiment=null", "sft.max_steps=2", "sft.batch_size=4", "tracking.wandb=disabled"]
    _refused(rlhf_command(*arguments, cwd=tmp_path), 1, "rows.jsonl", "line 7", "data.on_bad_row=skip")
    assert not (tmp_path / "run/stages/sft/model").exists()
    result = rlhf_command(*arguments, "data.on_bad_row=skip", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "left out 1 of 40 rows" in result.stdout


def test_stages_that_the_data_cannot_feed_are_named_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "chosen": " b", "rejected": " c"}\n')
    data = ["data=files", "data.path=rows.jsonl", "run.dir=run"]
    _refused(rlhf_command("run", *data, cwd=tmp_path), 2, "stage collect", "stages=[sft,reward_model")
    stages = "stages=[sft,reward_model,ppo,evaluate]"
    _refused(rlhf_command("run", *data, stages, cwd=tmp_path), 2, "evaluate.judge.type=reward_model")
    assert not (tmp_path / "run").exists()


def test_conversations_without_a_template_name_one_that_then_works(tmp_path: Path) -> None:
    turns = [
        [{"role": "user", "content": f"how was film {i}?"}, {"role": "assistant", "content": "it was good"}]
        for i in range(60)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))
    arguments = ["sft", "data=files", "data.path=rows.jsonl", "run.dir=run", "tracking.wandb=disabled"]
    arguments += ["sft.max_steps=2", "sft.batch_size=4", "distributed.device=cpu", "model.chat_template=chatml"]
    result = rlhf_command(*arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr


def test_a_model_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    inputs = write_models(tmp_path / "models")
    for path in Path(inputs["policy"]).glob("*token*"):
        path.unlink()
    result = rlhf_command("sft", *SMOKE, f"model.path={inputs['policy']}", cwd=tmp_path)
    _refused(result, 2, "model.path", "tokenizer", "save_pretrained")


def test_damaged_weights_are_not_taken_for_a_model(tmp_path: Path) -> None:
    inputs = write_models(tmp_path / "models")
    weights = Path(inputs["policy"]) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    result = rlhf_command("sft", *SMOKE, f"model.path={inputs['policy']}", cwd=tmp_path)
    _refused(result, 1, inputs["policy"])


def test_a_reward_model_where_the_policy_belongs(tmp_path: Path) -> None:
    inputs = write_models(tmp_path / "models")
    result = rlhf_command(
        "ppo", *SMOKE, f"ppo.policy={inputs['reward_model']}", f"ppo.reward_model={inputs['policy']}", cwd=tmp_path
    )
    _refused(result, 1, "ppo.policy", "which scores text and cannot write it")


def test_help_and_version(tmp_path: Path) -> None:
    assert "rlhf run experiment=quickstart" in rlhf_command("--help", cwd=tmp_path).stdout
    assert rlhf_command("--version", cwd=tmp_path).stdout.startswith("rlhf ")
    assert rlhf_command(cwd=tmp_path).returncode == 2
