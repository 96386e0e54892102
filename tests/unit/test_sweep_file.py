"""Sweep files: what W&B takes is taken, what it refuses is refused, and every mistake is named with its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf.config.compose import packaged_config_folder
from rlhf.errors import ConfigError
from rlhf.sweeps.check import check_sweep
from rlhf.sweeps.file import FOR_WANDB, USED, read_sweep_file, with_point
from tests.sweep_example import published

SHIPPED = sorted((packaged_config_folder() / "sweep").glob("*.yaml"))


@pytest.mark.parametrize("case", published()["files"], ids=lambda case: json.dumps(case["file"])[-60:])
def test_accepts_and_refuses_as_wandb_does(tmp_path: Path, case: dict[str, Any]) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(case["file"]))
    if case["accepted"]:
        read_sweep_file(path)
        return
    with pytest.raises(ConfigError):
        read_sweep_file(path)


GOOD = """\
method: bayes
metric:
  name: score
  goal: maximize
parameters:
  x:
    min: 0.0
    max: 1.0
command: [rlhf, run, "${args}"]
"""


@pytest.mark.parametrize(
    ("old", "new", "line", "said"),
    [
        ("method: bayes", "method: bayesian", 1, "did you mean bayes?"),
        ("method: bayes", "method: custom", 1, "expected grid, random, bayes"),
        ("metric:\n  name: score\n  goal: maximize\n", "", 1, "method bayes needs a metric"),
        ("goal: maximize", "goal: maximise", 4, "did you mean maximize?"),
        ("goal: maximize", "gaol: maximize", 4, "did you mean goal?"),
        ("min: 0.0", "min: 2.0", 6, "x: min 2.0 is not less than max 1.0"),
        ("min: 0.0", "min: 1e-5", 7, "YAML reads 1e-5 as text, and so does W&B: write 1.0e-5"),
        ("min: 0.0", "minimum: 0.0", 6, "expected value, values, or min and max"),
        ("    min: 0.0", "    distribution: log_uniform_values\n    min: 0.0", 6, "min must be above 0"),
        ("    min: 0.0", "    distribution: log_uniform\n    min: 0.0", 6, "log_uniform_values takes values"),
        ("    min: 0.0", "    distribution: log_uniformvalues\n    min: 0.0", 6, "did you mean log_uniform_values"),
        ("    min: 0.0", "    distribution: normal\n    min: 0.0", 8, "normal has no min"),
        ("method: bayes", "method: grid", 6, "uniform has none to list"),
        ("command:", "comand:", 9, "did you mean command?"),
        ('command: [rlhf, run, "${args}"]', "description: nothing to start", 1, "nothing says what to start"),
        ('command: [rlhf, run, "${args}"]', 'command: [python, "${program}"]', 9, "the file names no program"),
        ('command: [rlhf, run, "${args}"]', "program: [a]", 9, "expected the path of a script, found ['a']"),
        ('command: [rlhf, run, "${args}"]', "command: [a]\nrun_cap: 0", 10, "at least 1, found 0"),
        ('command: [rlhf, run, "${args}"]', "command: [a]\nscheduler: {engine: optuna}", 10, "needs W&B's server"),
        (
            'command: [rlhf, run, "${args}"]',
            "command: [a]\nearly_terminate: {type: hyperband, miniter: 3}",
            10,
            "did you mean min_iter",
        ),
    ],
)
def test_a_mistake_is_named_with_its_line(tmp_path: Path, old: str, new: str, line: int, said: str) -> None:
    path = tmp_path / "sweep.yaml"
    assert old in GOOD
    path.write_text(GOOD.replace(old, new))
    with pytest.raises(ConfigError) as caught:
        read_sweep_file(path)
    assert said in str(caught.value)
    assert f"{path}:{line}: " in str(caught.value)


def test_all_mistakes_at_once(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text("method: grit\nparameters: {a: {values: []}, b: 3}\nprogramm: x\n")
    with pytest.raises(ConfigError) as caught:
        read_sweep_file(path)
    for part in ("5 mistakes", "'grit'", "a: values must be a list", "b: expected a mapping", "unknown key programm"):
        assert part in str(caught.value)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no sweep file"):
        read_sweep_file(tmp_path / "missing.yaml")
    path = tmp_path / "list.yaml"
    path.write_text("- 1\n")
    with pytest.raises(ConfigError, match="holds no mapping"):
        read_sweep_file(path)
    path.write_text("a: [\n")
    with pytest.raises(ConfigError, match="is not YAML"):
        read_sweep_file(path)


def test_the_nested_and_the_dotted_name_of_a_key_may_not_both_be_there(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(
        "method: random\nprogram: p\nparameters:\n  ppo.lam: {value: 1}\n  ppo: {parameters: {lam: {value: 1}}}\n"
    )
    with pytest.raises(ConfigError, match=r"ppo\.lam is there twice"):
        read_sweep_file(path)


@pytest.mark.parametrize(("text", "meant"), [("1e-5", "1.0e-5"), ("3E6", "3.0e+6"), ("2.5e-3", "2.5e-3")])
def test_the_spelling_that_yaml_reads(text: str, meant: str) -> None:
    assert with_point(text) == meant
    assert yaml.safe_load(with_point(text)) == float(text)


def test_listed_exponents_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text("method: grid\nprogram: p\nparameters: {a: {values: [1e-5, 2.0e-5, x, {b: 3e-4}]}}\n")
    assert read_sweep_file(path).parameters[0].distribution.values == (1e-5, 2e-5, "x", {"b": 3e-4})


def test_there_are_shipped_sweeps() -> None:
    assert {path.stem for path in SHIPPED} >= {"ppo_kl_lr", "reward_model_lr", "sft_lr_lora"}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_sweeps_resolve_and_are_wandbs(path: Path) -> None:
    file = read_sweep_file(path)
    space = check_sweep(file)
    assert file.metric is not None
    assert space.searched
    # W&B's schema takes no other top-level key, and reads numbers as YAML does.
    body = yaml.safe_load(path.read_text())
    assert set(body) <= {*USED, *FOR_WANDB}
    for spec in body["parameters"].values():
        assert all(isinstance(spec[name], int | float) for name in ("min", "max") if name in spec)
        assert not any(isinstance(value, str) and value[:1].isdigit() for value in spec.get("values", ()))
