"""Distributions, grids, conditions and seeds: against W&B's own answers and hand-worked cases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf.errors import ConfigError
from rlhf.sweeps import space
from rlhf.sweeps.check import check_sweep
from rlhf.sweeps.file import EarlyTerminate, Metric, Parameter, SweepFile, read_sweep_file
from rlhf.sweeps.hyperband import brackets, judge
from rlhf.sweeps.space import Condition, program_arguments, space_of
from tests.sweep_example import published


def _file(folder: Path, text: str) -> SweepFile:
    path = folder / "sweep.yaml"
    path.write_text(text)
    return read_sweep_file(path)


def _parameter(folder: Path, spec: dict[str, Any]) -> Parameter:
    return _file(folder, yaml.safe_dump({"method": "random", "program": "p", "parameters": {"a": spec}})).parameters[0]


@pytest.mark.parametrize("case", published()["quantiles"], ids=lambda case: json.dumps(case["spec"]))
def test_quantiles_are_wandbs(tmp_path: Path, case: dict[str, Any]) -> None:
    distribution = _parameter(tmp_path, case["spec"]).distribution
    for share, expected in zip(published()["shares"], case["values"], strict=True):
        drawn = distribution.quantile(share)
        if isinstance(expected, str):
            assert drawn == expected
        else:
            assert drawn == pytest.approx(expected, rel=1e-9)
            assert isinstance(drawn, int) == isinstance(expected, int)


@pytest.mark.parametrize("case", published()["grids"], ids=lambda case: json.dumps(case["parameters"])[:50])
def test_grids_are_wandbs(tmp_path: Path, case: dict[str, Any]) -> None:
    file = _file(tmp_path, yaml.safe_dump({"method": "grid", "program": "p", "parameters": case["parameters"]}))
    settings = [program_arguments(file.parameters, setting) for setting in space_of(file).grid()]
    assert len(settings) == len(case["settings"])
    for setting, expected in zip(settings, case["settings"], strict=True):
        assert setting == expected or setting == pytest.approx(expected)


@pytest.mark.parametrize("case", published()["hyperband"], ids=lambda case: json.dumps(case["rule"]))
def test_hyperband_stops_whom_wandb_stops(case: dict[str, Any]) -> None:
    rule = {name: value for name, value in case["rule"].items() if name != "type"}
    stopped = [
        index
        for index, (history, running) in enumerate(zip(case["histories"], case["running"], strict=True))
        if running
        and judge(
            EarlyTerminate(**rule), Metric("m", case["goal"]), history, [one for one in case["histories"] if one]
        ).stop
    ]
    assert stopped == case["stopped"]


def test_hyperband_by_hand() -> None:
    assert brackets(EarlyTerminate(eta=3, min_iter=2))[:4] == [2, 6, 18, 54]
    assert brackets(EarlyTerminate(eta=3, max_iter=27, s=2)) == [3, 9]
    # Below one iteration there is nothing to compare.
    assert brackets(EarlyTerminate(eta=3, max_iter=5, s=3)) == [1]
    rule, metric = EarlyTerminate(eta=2, min_iter=2), Metric("m", "maximize")
    everyone = [[0, 1.0], [0, 2.0], [0, 3.0], [0, 4.0]]
    # The better half of four is 3 and 4; W&B's threshold is the third best, so 2 stays as well and 1 goes.
    assert [judge(rule, metric, own, everyone).stop for own in everyone] == [True, False, False, False]
    assert not judge(rule, metric, [-100.0], everyone).stop
    # Not strict: its best value so far counts, not the one at the bracket.
    assert not judge(EarlyTerminate(eta=2, min_iter=2, strict=False), metric, [5.0, 1.0], everyone).stop


def test_random_settings_follow_from_seed_and_number(tmp_path: Path) -> None:
    file = _file(
        tmp_path, "method: random\nprogram: p\nparameters: {a: {min: 0.0, max: 1.0}, b: {values: [1, 2, 3]}}\n"
    )
    found = space_of(file)
    assert [found.drawn(1, index) for index in range(5)] == [found.drawn(1, index) for index in range(5)]
    drawn = [found.drawn(1, index) for index in range(400)]
    assert drawn[0] != found.drawn(2, 0)
    assert len({one["a"] for one in drawn}) == 400
    # 400 uniform draws: the mean's standard deviation is 0.0144, that of a third's count 9.4.
    assert abs(sum(one["a"] for one in drawn) / 400 - 0.5) < 0.05
    assert all(abs(sum(one["b"] == value for one in drawn) - 133.3) < 30 for value in (1, 2, 3))


def test_conditions_keep_what_does_not_exist_out(tmp_path: Path) -> None:
    file = _file(
        tmp_path,
        "method: grid\nprogram: p\nparameters:\n"
        "  c.rank: {values: [4, 8]}\n  c: {values: [none, lora]}\n  z: {values: [1, 2]}\n",
    )
    found = space_of(file, {"c.rank": Condition("c", ("lora",))})
    # The choice comes first, so that it is known when what depends on it is drawn.
    assert [one.name for one in found.parameters] == ["c", "z", "c.rank"]
    assert found.grid() == [
        {"c": "none", "z": 1},
        {"c": "none", "z": 2},
        {"c": "lora", "z": 1, "c.rank": 4},
        {"c": "lora", "z": 1, "c.rank": 8},
        {"c": "lora", "z": 2, "c.rank": 4},
        {"c": "lora", "z": 2, "c.rank": 8},
    ]
    assert all(("c.rank" in one) == (one["c"] == "lora") for one in (found.drawn(1, index) for index in range(20)))


def test_seeds_are_repeated_and_not_searched(tmp_path: Path) -> None:
    file = _file(
        tmp_path,
        "method: bayes\nmetric: {name: m}\nprogram: p\nparameters: {seed: {values: [1, 2]}, a: {min: 1, max: 3}}\n",
    )
    found = space_of(file)
    assert found.seeds == (1, 2)
    assert [one.name for one in found.searched] == ["a"]


def test_a_grid_that_nobody_can_finish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(space, "LARGEST_GRID", 999)
    lists = "\n".join(f"  {name}: {{min: 1, max: 10}}" for name in "abc")
    with pytest.raises(ConfigError, match="more than 999 settings"):
        space_of(_file(tmp_path, f"method: grid\nprogram: p\nparameters:\n{lists}\n")).grid()


RUN = 'command: [rlhf, run, experiment=smoke, "stages=[sft]", "${args}"]\nmethod: random\nparameters:\n'


def test_every_parameter_is_tried_on_the_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        check_sweep(_file(tmp_path, f"{RUN}  sft.learning_rte: {{values: [0.1]}}\n"))
    assert f"{tmp_path}/sweep.yaml:4: parameter sft.learning_rte=0.1" in str(caught.value)
    assert "did you mean sft.learning_rate?" in str(caught.value)


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ("  sft.warmup_steps: {min: -3, max: 3}\n", "parameter sft.warmup_steps=-3"),
        ("  sft.batch_size: {values: [8, 0]}\n", "parameter sft.batch_size=0"),
        ("  model: {values: [tiny, tinny]}\n", "parameter model='tinny'"),
        ("  run.dir: {values: [a, b]}\n", "run.dir is set by the agent"),
        ("  seed: {min: 0.0, max: 1.0}\n", "seed is not searched but repeated"),
        (
            "  distributed.num_processes: {values: [2]}\n  sft.batch_size: {values: [9]}\n",
            "these values do not go together",
        ),
    ],
)
def test_values_that_the_config_refuses(tmp_path: Path, parameters: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_sweep(_file(tmp_path, RUN + parameters))
    assert said in str(caught.value)


def test_the_metric_of_a_stage_that_does_not_run(tmp_path: Path) -> None:
    text = f"metric: {{name: ppo/objective}}\n{RUN}  sft.learning_rate: {{values: [0.1]}}\n"
    with pytest.raises(ConfigError, match="is reported by stage ppo, and the command's stages are sft"):
        check_sweep(_file(tmp_path, text))


def test_a_choice_of_several_keys_at_once(tmp_path: Path) -> None:
    """What W&B's agent can send as well: a section as a mapping."""
    file = _file(tmp_path, f"{RUN}  peft: {{values: [{{type: none}}, {{type: lora, rank: 4}}]}}\n")
    assert check_sweep(file).grid() == [{"peft": {"type": "none"}}, {"peft": {"type": "lora", "rank": 4}}]
    file = _file(tmp_path, f"{RUN}  peft: {{values: [{{type: lora, rnk: 4}}]}}\n")
    with pytest.raises(ConfigError, match=r"did you mean peft\.rank"):
        check_sweep(file)


def test_conditions_are_found_in_the_config(tmp_path: Path) -> None:
    """`peft.rank` exists with peft=lora alone; a nested group choice and a mapping of several keys resolve."""
    file = _file(
        tmp_path,
        f"{RUN}  peft.rank: {{values: [2, 4]}}\n  peft: {{values: [none, lora]}}\n"
        "  sft: {parameters: {learning_rate: {min: 0.001, max: 0.01}}}\n",
    )
    found = check_sweep(file)
    assert found.conditions == {"peft.rank": Condition("peft", ("lora",))}
    assert program_arguments(file.parameters, {"peft": "lora", "sft.learning_rate": 0.1}) == {
        "peft": "lora",
        "sft": {"learning_rate": 0.1},
    }
