"""Slurm: what srun's variables mean, and the batch script that `launcher=slurm` writes."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from rlhf import cli, sbatch, supervisor
from rlhf.config import RLHFConfig, load_config
from rlhf.config.launcher import LauncherConfig
from rlhf.distributed.slurm import adopt_slurm, under_launcher
from rlhf.errors import ConfigError, UserError

ARGUMENTS = (
    "experiment=smoke",
    "launcher=slurm",
    "launcher.partition=a b",
    "--launcher.submit=false",
    "stages=[sft,report]",
    '--model.path=it\'s "here" $HOME `x` \\ !',
    "ppo.kl_coefficient=1e-3",
)


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, False),
        ({"RANK": "0"}, False),
        ({"RANK": "0", "WORLD_SIZE": "1"}, True),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, False),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, True),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "ENVIRONMENT": "BATCH"}, False),  # the batch script itself
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "ENVIRONMENT": "BATCH", "SLURM_STEP_NUM_TASKS": "2"}, True),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"}, False),  # an interactive shell
    ],
)
def test_a_launcher_is_recognised(env: Mapping[str, str], expected: bool) -> None:
    assert under_launcher(env) is expected


def test_srun_on_several_nodes_is_translated() -> None:
    env = {
        "SLURM_PROCID": "5",
        "SLURM_LOCALID": "1",
        "SLURM_NODEID": "1",
        "SLURM_STEP_NUM_TASKS": "6",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_STEP_TASKS_PER_NODE": "4,2",
        "SLURM_STEP_NODELIST": "gpu[03-04]",
        "SLURM_JOB_ID": "1000",
        "SLURM_STEP_ID": "2",
        "MASTER_PORT": "29500",
    }
    adopt_slurm(env)
    assert env["RANK"] == "5"
    assert env["WORLD_SIZE"] == "6"
    assert env["LOCAL_RANK"] == "1"
    assert env["LOCAL_WORLD_SIZE"] == "2"
    assert env["MASTER_ADDR"] == "gpu03"
    assert env["MASTER_PORT"] == "29500"  # what is set stays


def test_srun_on_one_node_meets_on_the_loopback_and_other_launchers_are_left_alone() -> None:
    env = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_JOB_ID": "7"}
    adopt_slurm(env)
    assert (env["RANK"], env["LOCAL_RANK"], env["LOCAL_WORLD_SIZE"]) == ("1", "1", "2")
    assert env["MASTER_ADDR"] == "127.0.0.1"
    assert 15000 <= int(env["MASTER_PORT"]) < 30000
    untouched = {"RANK": "0", "WORLD_SIZE": "1", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"}
    adopt_slurm(untouched)
    assert len(untouched) == 4


def script_of(folder: Path, *arguments: str) -> str:
    config = load_config(["experiment=smoke", "launcher=slurm", *arguments]).config
    return sbatch.job_script(config, folder, ["rlhf", "run", *ARGUMENTS], folder)


def directives(script: str) -> list[str]:
    """The options as sbatch reads them: quotes group and a backslash escapes, which here is what shlex does too."""
    lines = [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]
    return [option for line in lines for option in shlex.split(line)]


def test_the_script_asks_for_what_the_config_says(tmp_path: Path) -> None:
    script = script_of(
        tmp_path,
        "distributed.num_nodes=2",
        "distributed.num_processes=4",
        "ppo.batch_size=16",
        "launcher.partition=gpu",
        "launcher.account=lab",
        "launcher.qos=high",
        "launcher.time_limit=1-00:00:00",
        "launcher.memory=64G",
        "launcher.cpus_per_task=16",
        "launcher.signal_seconds=300",
        "launcher.extra=['--constraint=a100&nvlink','--exclusive']",
    )
    assert directives(script) == [
        "--job-name=rlhf-smoke",
        "--nodes=2",
        "--ntasks-per-node=1",
        "--gpus-per-node=4",
        "--cpus-per-task=16",
        "--mem=64G",
        "--partition=gpu",
        "--account=lab",
        "--qos=high",
        "--time=1-00:00:00",
        "--signal=TERM@300",
        "--requeue",
        "--open-mode=append",
        "--export=ALL",
        f"--output={tmp_path}/slurm-%j.out",
        "--constraint=a100&nvlink",
        "--exclusive",
    ]
    assert (
        "srun --nodes=2 --ntasks=2 --ntasks-per-node=1 --cpus-per-task=16 --kill-on-bad-exit=1 --export=ALL" in script
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["distributed.device=cpu", "distributed.num_processes=2"], None),
        (["launcher.gpus_per_node=0"], None),
        ([], "--gpus-per-node=1"),
        (["launcher.gpus_per_node=8", "distributed.device=cpu"], "--gpus-per-node=8"),
    ],
)
def test_gpus_follow_the_processes_unless_told(tmp_path: Path, arguments: list[str], expected: str | None) -> None:
    found = [option for option in directives(script_of(tmp_path, *arguments)) if option.startswith("--gpus")]
    assert found == ([] if expected is None else [expected])


def test_a_folder_with_odd_characters_is_quoted(tmp_path: Path) -> None:
    folder = tmp_path / "a \"b\" 100% 'c' \\d"
    script = script_of(folder, "launcher.requeue=false")
    output = str(folder).replace("%", "%%") + "/slurm-%j.out"
    assert f"--output={output}" in directives(script)
    assert "--no-requeue" in directives(script)
    assert "--requeue" not in directives(script)
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


def test_the_job_runs_the_same_arguments_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script itself is run by bash, with an srun that writes down its arguments and where it is."""
    folder = tmp_path / "work here"
    folder.mkdir()
    (tmp_path / "srun").write_text(
        f"#!{sys.executable}\n"
        "import json, os, sys\nprint(json.dumps([os.getcwd(), os.environ['TOLD'], sys.argv[1:]]))\n"
    )
    (tmp_path / "srun").chmod(0o755)
    script = script_of(folder, "launcher.setup=['export TOLD=\"a  b\"','true']", "launcher.python=/opt/my python")
    (tmp_path / "job.sbatch").write_text(script)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    result = subprocess.run(["bash", str(tmp_path / "job.sbatch")], capture_output=True, text=True, check=True, cwd="/")
    where, told, arguments = json.loads(result.stdout)
    assert where == str(folder)
    assert told == "a  b"
    start = arguments.index("/opt/my python")
    kept = [ARGUMENTS[0], *ARGUMENTS[4:]]
    added = ["launcher.type=local", "launcher.submit=false", "distributed.stop_seconds=100"]
    assert arguments[start + 1 :] == ["-m", "rlhf", "run", *kept, *added]


@pytest.mark.parametrize("written", ["launcher{}={}", "--launcher{}={}", "+launcher{}={}", "++launcher{}={}", "spaced"])
def test_the_job_runs_and_does_not_write_another_job(tmp_path: Path, written: str) -> None:
    """However the launcher is spelled, and whatever the experiment's file says of it."""
    experiment = tmp_path / "mine.yaml"
    experiment.write_text("# @package _global_\nlauncher:\n  type: slurm\n  submit: true\n")
    arguments = [f"experiment={experiment}", "--seed", "3"]
    for name, value in (("", "slurm"), (".submit", "true"), (".partition", "gpu")):
        arguments += [f"--launcher{name}", value] if written == "spaced" else [written.format(name, value)]
    config = load_config(arguments).config
    assert (config.launcher.type, config.launcher.submit, config.seed) == ("slurm", True, 3)
    step = shlex.split(
        sbatch.job_script(config, tmp_path, ["rlhf", "run", *arguments, "--debug"], tmp_path).splitlines()[-1]
    )
    inside = step[step.index("run") + 1 :]
    assert "--debug" in inside  # which the command takes out before it reads the rest
    job = load_config([argument for argument in inside if argument != "--debug"]).config
    assert job.launcher == LauncherConfig()
    assert job.seed == 3


def test_submitting_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"launcher\.submit=true .* launcher\.type is local.*write launcher=slurm"):
        load_config(["launcher.submit=true"])


def test_the_command_of_a_job_keeps_debug(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def supervise(config: RLHFConfig, command: list[str], debug: bool) -> int:
        commands.append(command)
        return 0

    monkeypatch.setattr(supervisor, "supervise", supervise)
    with pytest.raises(SystemExit) as ended:
        cli.main(["sft", "--debug", "experiment=smoke"])
    assert ended.value.code == 0
    assert commands == [["rlhf", "sft", "experiment=smoke", "stages=[sft]", "--debug"]]


def test_the_job_may_use_the_time_between_slurm_s_warning_and_the_limit(tmp_path: Path) -> None:
    assert script_of(tmp_path, "launcher.signal_seconds=300").endswith(" distributed.stop_seconds=280\n")
    for arguments in (["launcher.signal_seconds=40"], ["distributed.stop_seconds=200"]):
        assert "stop_seconds" not in script_of(tmp_path, *arguments)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["distributed.num_processes=2"], "--cpus-per-task=8"),
        (["distributed.num_processes=2", "distributed.num_threads=3"], "--cpus-per-task=6"),
        (["distributed.num_processes=2", "launcher.cpus_per_task=5"], "--cpus-per-task=5"),
        (["launcher.extra=['--cpus-per-gpu=7']"], None),
        (["launcher.extra=['-c 7']"], None),
    ],
)
def test_a_task_gets_cores_for_all_its_processes(tmp_path: Path, arguments: list[str], expected: str | None) -> None:
    script = script_of(tmp_path, *arguments)
    step = shlex.split(script.splitlines()[-1])
    for options in (directives(script), step[: step.index("-m")]):
        assert [option for option in options if option.startswith("--cpus-per-task")] == (
            [expected] if expected else []
        )


@pytest.mark.parametrize("character", ["\n", "\r", "\x1b", "\x85"])
def test_a_control_character_in_a_path_does_not_become_a_line_of_the_script(tmp_path: Path, character: str) -> None:
    with pytest.raises(ConfigError, match=r"cannot write --output=.*run\.dir, run\.root and experiment"):
        script_of(tmp_path / f"a{character}touch here")


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("gpu[03-05,9],login", "gpu03"),
        ("rack[0-1]node[02-3]", "rack0node02"),
        ("gpu[01-02]-ib", "gpu01-ib"),
        ("r[7,9]n[1,3-4]-ib,other[1-2]", "r7n1-ib"),
        ("n1-ib,n2-ib", "n1-ib"),
        ("a", "a"),
        ("", ""),
    ],
)
def test_the_first_host_of_a_list(hosts: str, first: str) -> None:
    env = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": hosts}
    adopt_slurm(env)
    assert env["MASTER_ADDR"] == (first or "127.0.0.1")


def test_a_line_break_in_a_line_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"launcher\.partition"):
        load_config(["launcher.partition='gpu\n#SBATCH --exclusive'"])


def fake_sbatch(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    (folder / "sbatch").write_text(f"#!/bin/bash\n{body}\n")
    (folder / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def slurm_config(*arguments: str) -> RLHFConfig:
    return load_config(["experiment=smoke", "launcher=slurm", *arguments]).config


def test_submitting_prints_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_sbatch(tmp_path, monkeypatch, 'echo "$@" > "$(dirname "$0")/asked"; echo "4711;cluster"')
    assert sbatch.write_job(slurm_config("launcher.submit=true"), tmp_path, ["rlhf", "run", *ARGUMENTS]) == 0
    assert "submitted as job 4711\n" in capsys.readouterr().out
    assert (tmp_path / "asked").read_text() == f"--parsable {tmp_path}/job.sbatch\n"


def test_without_submitting_the_command_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "my runs"
    folder.mkdir()
    assert sbatch.write_job(slurm_config(), folder, ["rlhf", "run", *ARGUMENTS]) == 0
    assert f"submit it with: sbatch '{folder}/job.sbatch'" in capsys.readouterr().out
    assert (folder / "job.sbatch").is_file()


def test_a_refused_or_missing_sbatch_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = slurm_config("launcher.submit=true")
    fake_sbatch(tmp_path, monkeypatch, "echo 'invalid partition' >&2; exit 3")
    with pytest.raises(UserError, match=r"refused .*job\.sbatch \(exit code 3\): invalid partition") as refused:
        sbatch.write_job(config, tmp_path, ["rlhf", "run"])
    assert refused.value.exit_code == 1
    (tmp_path / "sbatch").unlink()
    with pytest.raises(ConfigError, match="needs Slurm's command sbatch") as missing:
        sbatch.write_job(config, tmp_path, ["rlhf", "run"])
    assert missing.value.exit_code == 2
