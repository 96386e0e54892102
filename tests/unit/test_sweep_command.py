"""`rlhf sweep` and `rlhf agent`: what they start, what they say, and how mistakes are named."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from rlhf.distributed.slurm import under_launcher
from rlhf.errors import ConfigError, UserError
from rlhf.sweeps import command_line
from rlhf.sweeps.agent import Agent
from rlhf.sweeps.command import expand, fixed_arguments, trial_command, trial_environment
from rlhf.sweeps.command_line import run_agent, run_sweep
from rlhf.sweeps.file import read_sweep_file
from rlhf.sweeps.folder import checked_storage
from rlhf.sweeps.page import write_page
from rlhf.sweeps.status import describe, status_of
from tests.fake_agent import FakeAgent
from tests.fake_agent import Trial as FakeTrial
from tests.sweep_example import make_sweep, write_file

VALUES: dict[str, Any] = {"a.b": 3e-06, "flag": True, "off": False, "none": None, "ppo": {"lam": 0.9}, "list": [1, 2]}


@pytest.mark.parametrize(
    "words",
    [
        ["${env}", "${interpreter}", "${program}", "${args}"],
        ["${args_no_hyphens}", "${args_append_hydra}", "${args_override_hydra}", "${args_no_equals}"],
        ["python", "x=${envvar:SOMETHING}", "${envvar:NOT_SET}", "--note=${args}"],
    ],
)
def test_the_words_are_those_of_wandbs_agent(tmp_path: Path, words: list[str]) -> None:
    """The fake agent of the contract's tests, which is held against W&B's own code."""
    environment = {"SOMETHING": "some thing"}
    fake = FakeAgent(tmp_path, words, "train.py", environment=environment)
    assert expand(words, "train.py", VALUES, environment, tmp_path) == fake.command_line(FakeTrial("r", VALUES))


def test_the_arguments_as_a_file(tmp_path: Path) -> None:
    found = expand(["p", "${args_json_file}"], None, VALUES, {}, tmp_path)
    assert json.loads(Path(found[1]).read_text()) == VALUES


def test_our_own_command_gets_its_folder(tmp_path: Path) -> None:
    words = trial_command(["rlhf", "run", "${args}"], None, {"seed": 1}, {}, tmp_path, ["run.dir=/x"])
    assert words[1:] == ["-m", "rlhf", "run", "--seed=1", "run.dir=/x"]
    other = trial_command(["python", "train.py", "${args}"], None, {"seed": 1}, {}, tmp_path, ["run.dir=/x"])
    assert other == ["python", "train.py", "--seed=1"]
    assert fixed_arguments(["python", "-m", "rlhf", "reward-model", "seed=2", "${args}"], {}) == [
        "seed=2",
        "stages=[reward_model]",
    ]


def test_a_program_that_is_our_script_runs_what_it_runs_under_wandbs_agent(tmp_path: Path) -> None:
    """A file without `command`, or whose command names no verb: it is `run`, see `rlhf.runs.sweep_agent.with_verb`."""
    path = tmp_path / "sweep.yaml"
    found = []
    for command in ("", 'command: ["${env}", "${program}", "${args}"]', 'command: [x, "${program}", sft, "${args}"]'):
        path.write_text(f"method: grid\nprogram: /bin/rlhf\nparameters: {{seed: {{values: [1]}}}}\n{command}\n")
        found.append(read_sweep_file(path).command)
    assert found == [
        ("rlhf", "run", "${args}"),
        ("${env}", "/bin/rlhf", "run", "${args}"),
        ("x", "/bin/rlhf", "sft", "${args}"),
    ]
    assert [fixed_arguments(words, {}) for words in found] == [[], [], ["stages=[sft]"]]


def test_an_agent_around_us_is_not_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")
    monkeypatch.setenv("WANDB_RUN_ID", "def")
    # srun --ntasks=4 rlhf agent: four agents, and no ranks of one run.
    for name, value in {"SLURM_JOB_ID": "5", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4"}.items():
        monkeypatch.setenv(name, value)
    assert under_launcher(os.environ)
    found = trial_environment(tmp_path, "lr", 7)
    assert not under_launcher(found)
    monkeypatch.delenv("SLURM_PROCID")
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert under_launcher(os.environ)
    assert not under_launcher(trial_environment(tmp_path, "lr", 7))
    assert "WANDB_SWEEP_ID" not in found
    assert "WANDB_RUN_ID" not in found
    assert found["WANDB_RUN_GROUP"] == "lr"
    assert found["RLHF_TRIAL_FOLDER"] == str(tmp_path)


def test_create_find_again_and_refuse_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_file(tmp_path, "method: grid\nparameters: {x: {values: [1, 2, 3]}, seed: {values: [1, 2]}}\n")
    arguments = [str(path), f"root={tmp_path}/sweeps", "name=lr"]
    assert run_sweep(arguments) == 0
    said = capsys.readouterr().out
    assert "sweep lr: grid over x: 3 settings x 2 seeds = 6 trials, checked in" in said
    assert f"rlhf agent {tmp_path}/sweeps/lr" in said
    assert run_sweep(arguments) == 0
    assert "6 trials, there already" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="with seed=1, and seed=2 was asked for"):
        run_sweep([*arguments, "seed=2"])
    path.write_text(path.read_text().replace("[1, 2, 3]", "[1, 2, 4]"))
    with pytest.raises(ConfigError, match="made from another sweep file"):
        run_sweep(arguments)
    # The agents go on with what the sweep began with, and say so.
    assert run_agent([f"{tmp_path}/sweeps/lr", "--count", "1"]) == 0
    assert "was changed after the sweep had been created; this sweep keeps" in capsys.readouterr().err
    kept = tmp_path / "sweeps" / "lr" / "sweep.yaml"
    kept.write_text(kept.read_text() + "# a remark\n")
    with pytest.raises(ConfigError, match="was changed after the sweep had been created, and trials of two files"):
        run_agent([f"{tmp_path}/sweeps/lr"])


@pytest.mark.parametrize(
    ("verb", "arguments", "said"),
    [
        ("agent", ["swep"], "there is no sweep swep; did you mean sweep?"),
        ("agent", ["sweep-file.yaml"], "is a sweep file: `rlhf sweep sweep-file.yaml` makes the sweep"),
        ("agent", ["sweep", "--count=0"], "--count=0: expected a whole number of at least 1"),
        ("agent", ["sweep", "--count=x"], "--count=x: expected"),
        ("agent", ["sweep", "--cuont=1"], "did you mean --count?"),
        ("agent", ["sweep", "--count"], "--count needs a value: rlhf agent SWEEP"),
        ("agent", [], "expected one sweep: rlhf agent SWEEP"),
        ("sweep", [], "expected one sweep file, found none: rlhf sweep FILE"),
        ("sweep", ["stauts", "sweep"], "found stauts sweep; did you mean status?"),
        ("sweep", ["sweep-fil.yml"], "there is no sweep file sweep-fil.yml; did you mean sweep-file.yaml?"),
        ("sweep", ["elsewhere/ppo_lr_kl.yaml"], "sweep/ppo_kl_lr.yaml?"),
        ("sweep", ["nothing_like_it.yaml"], "there is no sweep file nothing_like_it.yaml"),
        ("sweep", ["status"], "takes one sweep"),
        ("sweep", ["sweep-file.yaml", "storage=redis://x"], "storage=redis://x: expected journal"),
        ("sweep", ["sweep-file.yaml", "nmae=x"], "did you mean name=...?"),
        ("sweep", ["sweep-file.yaml", "name=../x"], "expected letters, digits"),
        ("sweep", ["sweep-file.yaml", "name=n", "lease_seconds=0"], "expected seconds, at least 1"),
    ],
)
def test_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str, arguments: list[str], said: str) -> None:
    monkeypatch.chdir(tmp_path)
    make_sweep(tmp_path, "method: grid\nparameters: {x: {values: [1]}}\n")
    run = run_agent if verb == "agent" else run_sweep
    whole = [*arguments, f"root={tmp_path}"] if arguments else arguments
    with pytest.raises(ConfigError) as caught:
        run(whole)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ('[python, "${argz}"]', "which is none of"),
        ('[rlhf, run, "${args_json}"]', "cannot read"),
        ('[rlhf, run, "${args_no_boolean_flags}"]', "cannot read"),
        ("[python, train.py]", "hands no parameter to the program"),
        ('[python, "${program}", "${args}"]\nprogram: missing.py', "there is no program missing.py"),
    ],
)
def test_commands_that_cannot_be_meant(tmp_path: Path, command: str, said: str) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(f"method: grid\nparameters: {{x: {{values: [1]}}}}\ncommand: {command}\n")
    with pytest.raises(ConfigError, match=said):
        run_sweep([str(path), f"root={tmp_path}"])


@pytest.mark.parametrize("text", ["junk", "[]", '{"schema": "sweep/1"}', '{"schema": "sweep/9"}'])
def test_a_description_that_is_not_ours(tmp_path: Path, text: str) -> None:
    sweep = make_sweep(tmp_path, "method: grid\nparameters: {x: {values: [1]}}\n")
    sweep.folder.description.write_text(text)
    with pytest.raises(UserError, match=r"sweep\.json is not what `rlhf sweep` wrote"):
        run_agent([str(sweep.folder.path)])


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text('method: grid\nparameters: {x: {values: [1]}}\ncommand: [no-such-program, "${args}"]\n')
    run_sweep([str(path), f"root={tmp_path}"])
    with pytest.raises(UserError, match="cannot be started: No such file or directory: no-such-program"):
        run_agent([str(tmp_path / "sweep")])


def test_a_storage_that_cannot_be_used(tmp_path: Path) -> None:
    assert checked_storage("sqlite:///x.db") == f"sqlite:///{Path('x.db').absolute()}"
    sweep = make_sweep(
        tmp_path,
        "method: bayes\nparameters: {x: {min: 0.0, max: 1.0}}\n",
        storage=f"sqlite:///{tmp_path}/missing/study.db",
    )
    with pytest.raises(UserError, match="cannot be used"):
        Agent(sweep).work()


TWO = "method: grid\nparameters: {x: {values: [1, 2, 3]}, code: {values: [abc, def]}, seed: {values: [1, 2]}}\n"


def test_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = make_sweep(tmp_path, TWO)
    assert describe(status_of(sweep))[1].endswith("none yet; 0 s of work")
    Agent(sweep, count=11).work()
    capsys.readouterr()
    assert run_sweep(["status", str(sweep.folder.path)]) == 0
    said = capsys.readouterr().out
    assert "trials: 12 of 12: 11 finished, 1 waiting" in said
    # Setting 4 is x=3: -1/3 + 0.01 and + 0.02; t(0.975, 1) = 12.7062, so half the interval is 12.7062 * 0.005 = 0.0635.
    assert "4        -0.3183 ± 0.064 (2 seeds)  3  abc" in said
    assert "waiting  trial 11" in said
    assert "share of the variance explained (fANOVA): x " in said
    assert "warning: trials ran on different code" in said
    assert "abc (trials 0-1, 4-5, 8-9)" in said
    assert run_sweep(["status", str(sweep.folder.path), "--json"]) == 0
    body = json.loads(capsys.readouterr().out)
    assert body["counts"] == {"finished": 11, "running": 0, "waiting": 1, "pruned": 0, "failed": 0, "skipped": 0}
    best = body["settings"][0]
    assert best["values"] == {"x": 3, "code": "abc"}
    assert best["mean"] == pytest.approx(-1 / 3 + 0.015)
    assert best["low"] == pytest.approx(-1 / 3 + 0.015 - 12.7062 * 0.005, abs=1e-5)
    assert body["history"][-1][2] == pytest.approx(best["mean"])
    page = Path(body["page"]).read_text()
    assert "<h2>All settings</h2>" in page
    assert "<h2>What matters</h2>" in page
    assert "http" not in page.replace("http://www.w3.org", "")


def test_an_agent_of_other_code_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = make_sweep(tmp_path, "method: grid\nparameters: {x: {values: [1, 2]}}\n")
    monkeypatch.setattr(command_line, "own_code", lambda: "abc")
    for _ in range(2):
        assert run_agent([str(sweep.folder.path), "--count=1"]) == 0
    assert "other code" not in capsys.readouterr().err
    monkeypatch.setattr(command_line, "own_code", lambda: "def")
    assert run_agent([str(sweep.folder.path)]) == 0
    assert "trials of this sweep ran on other code (abc) than this agent's (def)" in capsys.readouterr().err


def test_the_page_of_a_sweep_with_failures_and_choices(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, "method: grid\nparameters: {x: {values: [1, 3]}, fail: {values: [false, true]}}\n")
    Agent(sweep).work()
    status = status_of(sweep)
    assert [one.state for one in status.settings] == ["finished", "finished", "failed", "failed"]
    page = write_page(sweep, status).read_text()
    assert "there is no such thing" in page
    text = "\n".join(describe(status))
    assert "failed   trial 1: exit code 1\n    there is no such thing" in text


def test_retry_hands_failed_trials_out_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = make_sweep(tmp_path, "method: grid\nparameters: {fail: {values: [true]}, seed: {values: [1, 2]}}\n")
    Agent(sweep).work()
    state = sweep.journal.look()
    assert [one.state for one in state.trials.values()] == ["failed", "skipped"]
    capsys.readouterr()
    assert run_sweep(["retry", str(sweep.folder.path)]) == 0
    assert "2 trials will be handed out again" in capsys.readouterr().out
    # What made it fail is mended.
    program = tmp_path / "program.py"
    program.write_text(program.read_text().replace('== "True"', '== "never"'))
    Agent(sweep).work()
    state = sweep.journal.look()
    assert [one.state for one in state.trials.values()] == ["finished"] * 2
    assert state.settings[0].state == "finished"
    assert run_sweep(["retry", str(sweep.folder.path)]) == 0
    assert "no trial has failed" in capsys.readouterr().out


def test_an_unset_variable_is_its_own_name(tmp_path: Path) -> None:
    assert "NOT_THERE_AT_ALL" not in os.environ
    assert expand(["${envvar:NOT_THERE_AT_ALL}"], None, {}, os.environ, tmp_path) == ["NOT_THERE_AT_ALL"]
