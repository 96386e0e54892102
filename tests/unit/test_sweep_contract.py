"""What a sweep agent hands to the command, and what the command makes of it. The fake agent is proved against W&B's."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf.bookkeeping import default_run_folder
from rlhf.cli import _main
from rlhf.config import load_config
from rlhf.config.serialize import plain_values
from rlhf.distributed.launch import launch
from rlhf.errors import ConfigError
from rlhf.runs import wandb_logger
from rlhf.runs.folder import RunFolder
from rlhf.runs.sinks import Ending, Start
from rlhf.runs.sweep_agent import check_sweep, sweep_run_id, with_verb
from rlhf.runs.wandb_logger import WandbLogger
from tests.command import command, environment
from tests.fake_agent import DEFAULT_COMMAND, FakeAgent, Trial

VALUES: dict[str, Any] = {
    "ppo.learning_rate": 3e-06,
    "ppo.kl_coefficient": 0.05,
    "ppo.whiten_advantages": False,
    "ppo.value_clip": None,
    "ppo.num_updates": 64.0,
    "tracking.tags": ["a", "b"],
    "sft": {"learning_rate": "1e-4", "max_steps": 7, "lora": None},
    "model": "tiny",
    "model.scratch.hidden_size": 32,
    "zero": "stage2",
    "_wandb": {"value": 1},
}
del VALUES["sft"]["lora"]
TRIAL = Trial("abc123", VALUES)
COMMANDS = {
    "default": DEFAULT_COMMAND,
    "args": ("rlhf", "run", "experiment=smoke", "${args}"),
    "args_no_hyphens": ("rlhf", "run", "experiment=smoke", "${args_no_hyphens}"),
    "args_no_equals": ("rlhf", "run", "experiment=smoke", "${args_no_equals}"),
    "args_append_hydra": ("rlhf", "run", "experiment=smoke", "${args_append_hydra}"),
    "args_override_hydra": ("rlhf", "run", "experiment=smoke", "${args_override_hydra}"),
    "args_json_file": ("rlhf", "run", "experiment=smoke", "${args_json_file}"),
    "envvar": ("${env}", "rlhf", "run", "run.root=${envvar:ROOT_FOLDER}/x", "seed=${envvar:UNSET_HERE}", "${unknown}"),
    "inside": ("x${args}", "a ${envvar:ROOT_FOLDER} b ${envvar:ROOT_FOLDER}", "7"),
}
# A program that tells how it was started.
TELL = """
import json, os, sys
try:
    read = sys.stdin.read()
except (OSError, ValueError) as error:
    read = type(error).__name__
names = [name for name in os.environ if name.startswith("WANDB_")]
json.dump({"stdin": read, "leads_group": os.getpgid(0) == os.getpid(), "session": os.getsid(0),
           "variables": {name: os.environ[name] for name in sorted(names)}, "arguments": sys.argv[1:]},
          open(sys.argv[1], "w"))
"""


@pytest.fixture
def agents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, FakeAgent]:
    """W&B's own agent, without its server, and ours; both work in `tmp_path`."""
    from wandb.wandb_agent import Agent

    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_DIR", "WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH", "UNSET_HERE"):
        monkeypatch.setenv(name, "")  # whatever W&B sets is taken back afterwards
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")
    monkeypatch.setenv("WANDB_SERVICE", "somewhere")
    monkeypatch.setenv("ROOT_FOLDER", "/data/runs")
    fake = FakeAgent(tmp_path, environment={**os.environ})
    return Agent(api=None, queue=None, sweep_id="sweep1"), fake


def _asked(trial: Trial, program: str) -> dict[str, Any]:
    """What W&B's server sends."""
    arguments = {name: {"value": value} for name, value in trial.values.items()}
    return {"type": "run", "run_id": trial.run_id, "args": arguments, "program": program}


def _of_wandb(variables: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in variables.items() if not name.startswith("PYTEST_")}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_fake_agents_calls_are_those_of_wandb(
    name: str, agents: tuple[Any, FakeAgent], monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, ours = agents
    called: dict[str, Any] = {}

    class Process:
        def __init__(self, **arguments: Any) -> None:
            called.update(arguments)

    monkeypatch.setattr("wandb.wandb_agent.AgentProcess", Process)
    theirs._sweep_command = list(COMMANDS[name])
    theirs._command_run(_asked(TRIAL, "train.py"))
    files = {path: path.read_text() for path in Path("wandb").rglob("*.*")}
    ours.command = COMMANDS[name]
    assert ours.command_line(TRIAL) == called["command"]
    del called["env"]["WANDB_SERVICE"]  # W&B's process does it
    assert _of_wandb(ours.variables(TRIAL)) == _of_wandb(called["env"])
    ours.write_parameters(TRIAL)
    assert {path: path.read_text() for path in Path("wandb").rglob("*.*")} == files


def test_the_fake_agent_starts_a_process_as_wandb_does(agents: tuple[Any, FakeAgent], tmp_path: Path) -> None:
    theirs, ours = agents
    program = tmp_path / "tell.py"
    program.write_text(TELL)
    trial = Trial("abc123", {"a.b": 1})
    theirs._sweep_command = ours.command = [sys.executable, "${program}", str(tmp_path / "told"), "${args}"]
    ours.program = str(program)
    theirs._command_run(_asked(trial, str(program)))
    assert theirs._run_processes["abc123"].wait() == 0
    told = json.loads((tmp_path / "told").read_text())
    assert ours.start(trial).wait()[0] == 0
    assert json.loads((tmp_path / "told").read_text()) == told
    assert told["leads_group"]
    assert told["session"] == os.getsid(0)
    assert told["stdin"] == ""
    assert told["variables"]["WANDB_RUN_ID"] == "abc123"
    assert told["arguments"][1:] == ["--a.b=1"]


def test_only_a_positive_exit_code_is_a_failure() -> None:
    agent = FakeAgent(Path())
    assert [agent.judge(code) for code in (0, -9, 137, 2)] == ["finished", "killed", "failed", "failed"]
    assert agent.judge(143, marked_preempting=True) == "preempted"
    assert agent.judge(0, marked_preempting=True) == "finished"
    assert agent.gives_up
    assert not FakeAgent(Path(), num_failed=2, num_finished=3).gives_up


def _arguments(name: str, folder: Path, values: dict[str, Any] = VALUES) -> list[str]:
    """What follows `rlhf run` on the command line that the agent makes."""
    agent = FakeAgent(folder, command=COMMANDS[name], environment={})
    trial = Trial("abc123", values)
    line = agent.command_line(trial)
    if name == "args_json_file":
        path = Path(line[-1])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    return line[2:]


@pytest.mark.parametrize("name", [name for name in COMMANDS if name.startswith("args")])
def test_every_macro_means_the_same_config(name: str, tmp_path: Path) -> None:
    values = {**VALUES, "_wandb": "x"} if name == "args_no_equals" else VALUES
    loaded = load_config([*_arguments(name, tmp_path, values), "--local_rank=1"]).config
    ppo = loaded.ppo
    assert (ppo.learning_rate, ppo.kl_coefficient, ppo.num_updates) == (3e-6, 0.05, 64)
    assert ppo.whiten_advantages is False
    assert ppo.value_clip is None
    assert loaded.tracking.tags == ("a", "b")
    assert (loaded.sft.learning_rate, loaded.sft.max_steps, loaded.sft.batch_size) == (1e-4, 7, 8)
    assert (loaded.model.scratch.hidden_size, loaded.zero.stage) == (32, 2)


def test_the_order_of_arguments_does_not_matter() -> None:
    arguments = [
        "experiment=smoke",
        "--model=tiny",
        "--model.scratch.hidden_size=64",
        "--model={'scratch': {'num_layers': 3}}",
        "--preferences.annotator.temperature=0.7",
        "--preferences.annotator=simulated",
    ]
    wanted = plain_values(load_config(arguments).config)
    assert wanted["model"]["scratch"]["hidden_size"] == 64
    assert wanted["model"]["scratch"]["num_layers"] == 3
    assert wanted["preferences"]["annotator"]["temperature"] == 0.7
    for order in itertools.islice(itertools.permutations(arguments), 0, None, 179):
        assert plain_values(load_config(list(order)).config) == wanted, order


def test_a_removal_means_something_at_its_place() -> None:
    before = ["preferences.annotator.temperature=0.5", "~preferences.annotator", "preferences.annotator=human"]
    assert load_config(before).config.preferences.annotator.type == "human"
    after = ["preferences.annotator=human", "~preferences.annotator"]
    assert load_config(after).config.preferences.annotator.type == "simulated"


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("ppo={'learning_rate': '3e-06'}", 3e-6),
        ("ppo={'learning_rate': '3e-06', 'value_clip': 'None'}", 3e-6),
        ('ppo={"learning_rate": "3E-6", "num_updates": "1e1"}', 3e-6),
    ],
)
def test_a_nested_parameter_may_have_its_numbers_as_text(argument: str, expected: float) -> None:
    """PyYAML reads `3e-06` of the sweep's file as text, and W&B hands it on inside a dictionary."""
    assert load_config([argument]).config.ppo.learning_rate == expected


def test_text_in_a_nested_parameter_stays_text() -> None:
    loaded = load_config(["model={'path': '123'}", "zero=stage1", "zero.extra={'timers': {'a': '3', 'b': 'None'}}"])
    assert loaded.config.model.path == "123"
    assert loaded.config.zero.extra == {"timers": {"a": "3", "b": "None"}}


def test_negative_numbers_may_follow_their_key() -> None:
    arguments = ["--ppo.rewards.short.type", "length", "--ppo.rewards.short.weight", "-1.5"]
    assert load_config(arguments).config.ppo.rewards["short"].weight == -1.5
    with pytest.raises(ConfigError, match="argument"):
        load_config(["--ppo.learning_rate", "-x"])


def test_a_file_of_overrides(tmp_path: Path) -> None:
    folder = tmp_path / "a=b"
    folder.mkdir()
    file = folder / "config-x.json"
    file.write_text(json.dumps({"ppo.learning_rate": "3e-6", "model": "tiny", "tracking.tags": ["x"], "_wandb": {}}))
    loaded = load_config(["experiment=smoke", str(file), "tracking.tags=[y]"])
    assert loaded.config.ppo.learning_rate == 3e-6
    assert loaded.config.tracking.tags == ("y",)
    assert loaded.sources["ppo.learning_rate"] == f"{file}: ppo.learning_rate"
    # A value that names such a file is no file of overrides.
    assert load_config(["data=files", "data.path=x.json"]).config.data.path == "x.json"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "there is no such file; expected a JSON object of overrides"),
        ("{", "cannot be read"),
        ("[1]", "found a list"),
        ('{"ppo.lerning_rate": 1}', "did you mean ppo.learning_rate?"),
        ('{"ppo..x": 1}', "names joined by single dots"),
        ('{"model": "tinny"}', "did you mean tiny?"),
    ],
)
def test_a_wrong_file_of_overrides_is_named(content: str | None, said: str, tmp_path: Path) -> None:
    file = tmp_path / "o.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError) as caught:
        load_config([str(file)])
    assert said in str(caught.value)
    assert str(file) in str(caught.value)


def test_the_folder_is_named_after_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(["experiment=smoke", "run.root=/data"]).config
    monkeypatch.delenv("WANDB_SWEEP_ID", raising=False)
    monkeypatch.setenv("WANDB_RUN_ID", "abc123")
    assert str(default_run_folder(config, "0123456789")) == "/data/smoke/seed1-01234567"
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")
    assert str(default_run_folder(config, "0123456789")) == "/data/smoke/abc123"
    chosen = load_config(["experiment=smoke", "run.dir=/mine"]).config
    assert str(default_run_folder(chosen, "0123456789")) == "/mine"
    monkeypatch.delenv("WANDB_RUN_ID")
    assert str(default_run_folder(config, "0123456789")) == "/data/smoke/seed1-01234567"


@pytest.mark.parametrize("given", ["a/b", "..", ".x", "a b", "x\n"])
def test_an_id_that_cannot_name_a_folder(given: str) -> None:
    if given == "x\n":
        assert sweep_run_id({"WANDB_SWEEP_ID": "s", "WANDB_RUN_ID": given}) == "x"
        return
    with pytest.raises(ConfigError, match="cannot name the run's folder"):
        sweep_run_id({"WANDB_SWEEP_ID": "s", "WANDB_RUN_ID": given})


def test_a_batch_script_is_no_trial() -> None:
    config = load_config(["experiment=smoke", "launcher=slurm"]).config
    check_sweep(config, {})
    with pytest.raises(ConfigError, match="Start the agent itself in the batch job"):
        check_sweep(config, {"WANDB_SWEEP_ID": "s"})


def test_without_a_command_in_the_sweep_the_verb_is_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert with_verb(["--seed=1"], {"WANDB_SWEEP_ID": "s"}) == ["run", "--seed=1"]
    assert with_verb(["config", "--seed=1"], {"WANDB_SWEEP_ID": "s"}) == ["config", "--seed=1"]
    assert with_verb(["--seed=1"], {}) == ["--seed=1"]
    monkeypatch.setenv("WANDB_SWEEP_ID", "s")
    assert _main(["--experiment=smok"]) == 2
    assert "did you mean smoke?" in capsys.readouterr().err


def test_a_wrong_key_ends_the_program_before_torch_is_imported(tmp_path: Path) -> None:
    """Exit code 2, and the key's name, of a program that the agent starts; a torch that may not be imported."""
    (tmp_path / "torch").mkdir()
    torch = f"open({str(tmp_path / 'imported')!r}, 'w')\nraise ImportError('torch')\n"
    (tmp_path / "torch/__init__.py").write_text(torch)
    path = environment()["PYTHONPATH"]
    variables = environment({"PYTHONPATH": f"{tmp_path}{os.pathsep}{path}"})
    agent = FakeAgent(tmp_path, command=[*command("run"), "experiment=smoke", "${args}"], environment=variables)
    code, _, said = agent.start(Trial("abc123", {"ppo.learning_rat": 3e-06})).wait(60)
    assert agent.judge(code) == "failed"
    assert code == 2
    assert "ppo.learning_rat" in said
    assert "did you mean ppo.learning_rate?" in said
    assert not (tmp_path / "imported").exists()
    assert not (tmp_path / "runs").exists()
    # The fake torch is the one that would be found.
    found = subprocess.run([sys.executable, "-c", "import torch"], env=variables, capture_output=True, check=False)
    assert found.returncode == 1
    assert (tmp_path / "imported").exists()


def test_ranks_have_a_wandb_service_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that of the supervisor, which talks to W&B about stages that it has taken from the cache; as W&B's agent."""
    monkeypatch.setenv("WANDB_SERVICE", "3-1-unix-x")
    monkeypatch.setenv("WANDB_RUN_ID", "abc123")
    tell = "import json, os, sys; json.dump({**os.environ}, open(sys.argv[1], 'w'))"
    assert launch([sys.executable, "-c", tell, str(tmp_path / "told")], 1, log_folder=tmp_path).exit_code == 0
    told = json.loads((tmp_path / "told").read_text())
    assert told["WANDB_RUN_ID"] == "abc123"
    assert "WANDB_SERVICE" not in told


def test_the_keys_that_wandb_has_locked_are_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B itself, without its server: the values of the trial win over those of the config, which is logged whole."""
    trial = Trial("abc123", {"ppo": {"kl_coefficient": 0.2}, "seed": 7, "sft.max_steps": 3})
    agent = FakeAgent(tmp_path, environment={})
    agent.write_parameters(trial)
    for name, value in {**agent.variables(trial), "WANDB_MODE": "offline"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(wandb_logger, "INIT_SECONDS", 100.0)  # for slow machines
    config = load_config(["experiment=smoke", "tracking.wandb=offline", "ppo.num_updates=9"]).config
    warned: list[str] = []
    run = RunFolder(tmp_path / "run")
    run.create()
    values = config.model_dump(mode="json")
    logger = WandbLogger.open(Start(run, config.tracking, "sft", values, warned.append))
    assert logger is not None
    try:
        assert warned == []
        assert logger._run.id == "abc123"
        assert logger._run.sweep_id == "sweep1"
        logged = logger._run.config
        assert (logged["seed"], logged["sft.max_steps"]) == (7, 3)
        assert logged["ppo"]["kl_coefficient"] == 0.2
        assert logged["ppo"]["num_updates"] == 9
        logger.log(0, 1, {"sft/loss": 0.5})
    finally:
        logger.close(Ending())
    assert warned == []
