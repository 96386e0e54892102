"""`ppo.rewards`: sections under names of the user's choice, from files and arguments, and their mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf.config import config_from_file, load_config, schema
from rlhf.config.compose import render_sources
from rlhf.config.rewards import (
    FunctionReward,
    KeywordReward,
    LengthReward,
    ModelReward,
    RegexReward,
    effective_rewards,
)
from rlhf.config.serialize import config_hash, config_to_yaml
from rlhf.errors import EXIT_USAGE, ConfigError


@pytest.fixture(autouse=True)
def _empty_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def rewards(*arguments: str) -> dict[str, Any]:
    return load_config(arguments).config.ppo.rewards


def message(*arguments: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(arguments)
    assert caught.value.exit_code == EXIT_USAGE
    text = str(caught.value)
    assert not [word for word in ("Input should", "pydantic", "union_tag", "Traceback") if word in text], text
    return text


def experiment(text: str) -> str:
    Path("mine.yaml").write_text("# @package _global_\n" + text, encoding="utf-8")
    return "experiment=mine.yaml"


def test_without_an_entry_the_reward_model_is_the_reward() -> None:
    assert rewards() == {}
    assert effective_rewards({}) == {"reward_model": ModelReward()}
    own = rewards("ppo.rewards.a.type=length")
    assert effective_rewards(own) == own


@pytest.mark.parametrize(
    "arguments",
    [
        ["ppo.rewards.own.type=model", "ppo.rewards.short.type=length", "ppo.rewards.short.maximum=8.0"],
        ["ppo.rewards={own: {type: model}, short: {type: length, maximum: 8}}"],
        ["ppo.rewards={'own': {'type': 'model'}}", "ppo={'rewards.short': {'type': 'length', 'maximum': 8}}"],
        ["--ppo.rewards.own.type=model", "--ppo.rewards.short={type: regex}", "--ppo.rewards.short.type=length"]
        + ["++ppo.rewards.short.maximum=8"],
    ],
)
def test_spellings_on_the_command_line(arguments: list[str]) -> None:
    found = rewards(*arguments)
    assert found == {"own": ModelReward(), "short": LengthReward(maximum=8)}
    assert list(found) == ["own", "short"]


def test_values_take_the_type_of_their_field() -> None:
    found = rewards(
        "ppo.rewards.Mixed-Name_2.type=keywords",
        "ppo.rewards.Mixed-Name_2.words=[a, 3]",
        "ppo.rewards.Mixed-Name_2.weight=-1e-1",
        "ppo.rewards.r.type=regex",
        "ppo.rewards.r.pattern=123",
        "ppo.rewards.r.whole=True",
        "ppo.rewards.f.type=function",
        "ppo.rewards.f.file=007",
        "ppo.rewards.f.arguments.scale=3",
        "ppo.rewards.f.arguments={names: [a, 1]}",
        "ppo.rewards.m.type=model",
        "ppo.rewards.m.path=null",
    )
    assert found == {
        "Mixed-Name_2": KeywordReward(words=("a", "3"), weight=-0.1),
        "r": RegexReward(pattern="123", whole=True),
        "f": FunctionReward(file="007", arguments={"scale": 3, "names": ["a", 1]}),
        "m": ModelReward(path=None),
    }


def test_a_file_and_arguments_merge_and_every_value_has_its_source() -> None:
    file = experiment(
        "ppo:\n  rewards:\n    short:\n      type: length\n      tolerance: 1e1\n    gold: {type: gold, weight: 0}\n"
    )
    loaded = load_config([file, "ppo.rewards.short.weight=0.5", "ppo.rewards.words={type: keywords, words: [a]}"])
    assert loaded.config.ppo.rewards["short"] == LengthReward(tolerance=10, weight=0.5)
    assert list(loaded.config.ppo.rewards) == ["short", "gold", "words"]
    assert loaded.sources["ppo.rewards.short.type"] == "mine.yaml:5"
    assert loaded.sources["ppo.rewards.short.tolerance"] == "mine.yaml:6"
    assert loaded.sources["ppo.rewards.short.weight"] == "argument ppo.rewards.short.weight=0.5"
    assert loaded.sources["ppo.rewards.short.maximum"] == "default"
    assert loaded.sources["ppo.rewards.words.words"].startswith("argument ppo.rewards.words=")
    assert list(rewards(file, "~ppo.rewards.gold")) == ["short"]
    assert rewards(file, "~ppo.rewards") == {}
    listing = render_sources(loaded)
    assert yaml.safe_load(listing) == yaml.safe_load(config_to_yaml(loaded.config))
    assert next(line for line in listing.splitlines() if "tolerance:" in line).endswith("# mine.yaml:6")


def test_an_empty_mapping_in_a_file_is_no_source_of_what_arguments_add() -> None:
    loaded = load_config([experiment("ppo:\n  rewards: {}\n"), "ppo.rewards.short.type=length"])
    assert loaded.sources["ppo.rewards.short.weight"] == "default"


def test_round_trip_through_yaml() -> None:
    arguments = ["ppo.rewards={a: {type: keywords, words: [x, '1e3']}, b: {type: regex, pattern: '(?i)^yes'}}"]
    arguments += ["ppo.rewards.c.type=function", "ppo.rewards.c.file=f.py", "ppo.rewards.c.arguments.x='1e3'"]
    config = load_config(arguments).config
    Path("config.yaml").write_text(config_to_yaml(config), encoding="utf-8")
    again = config_from_file("config.yaml")
    assert again == config
    assert config_hash(again) == config_hash(config)
    assert config_hash(config, exclude=("ppo.rewards.a",)) != config_hash(config)


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("ppo.rewards.a.type=lenght", "expected one of model, function, length, regex"),
        ("ppo.rewards.a.type=lenght", "did you mean length?"),
        ("ppo.rewards.a={type: lenght, maximum: 3}", "ppo.rewards.a.type = lenght"),
        ("ppo.rewards.a.weight=0.2", "has no value: add ppo.rewards.a.type=model (or function, length"),
        ("ppo.rewards={a: {}}", "has no value: add ppo.rewards.a.type=model"),
        ("ppo.rewards.A.wieght=1", "did you mean ppo.rewards.A.weight?"),
        ("ppo.rewards.a={type: length, maximun: 3}", "did you mean ppo.rewards.a.maximum?"),
        ("ppo.reward.a.type=length", "did you mean ppo.rewards.a.type?"),
        ("ppo.rewards.a.b.c=1", "unknown key"),
        ("ppo.rewards={a: {type: length, pattern: x}}", "choose ppo.rewards.a.type=regex"),
        ("ppo.rewards={a: {type: length, pattern: x}}", "exists for ppo.rewards.a of types regex, exact_answer"),
        ("ppo.rewards={a: {type: length, weight: x}}", "ppo.rewards.a.weight = x"),
        ("ppo.rewards={a: {type: length, weight: inf}}", "expected a number"),
        ("ppo.rewards={a: {type: length, tolerance: 0}}", "expected a whole number, at least 1"),
        ("ppo.rewards={a: {type: length, unit: words, minimum: 20}}", "minimum (20) must not exceed maximum (16)"),
        ("ppo.rewards={a: {type: length, minimum: 20}}", "ppo.rewards.a.maximum: 16 (default)"),
        ("ppo.rewards.a.type=regex", "add ppo.rewards.a.pattern=VALUE"),
        ("ppo.rewards={a: {type: regex, pattern: '(x'}}", "pattern is not a regular expression: missing )"),
        ("ppo.rewards.a.type=keywords", "add ppo.rewards.a.words=[VALUE]"),
        ("ppo.rewards={a: {type: keywords, words: x}}", "write ppo.rewards.a.words=[x]"),
        ("ppo.rewards={a: {type: keywords, words: []}}", "not empty"),
        ("ppo.rewards={a: {type: keywords, words: ['']}}", "words holds an empty word"),
        ("ppo.rewards.a.type=function", "add ppo.rewards.a.file=VALUE"),
        ("ppo.rewards={a: {type: function, file: f.py, arguments: {prompts: 1}}}", "which every call gets already"),
        ("ppo.rewards={a: {type: gold, weight: 0}}", "every weight is 0, so there is nothing to optimise: a"),
        ("ppo.rewards=3", "set ppo.rewards.NAME.type=model"),
        ("ppo.rewards=null", "holds sections under names of yours"),
        ("ppo.rewards=[length]", "holds sections under names of yours"),
        ("ppo.rewards.a=length", "choose its kind with ppo.rewards.a.type=model (or function, length"),
        ("ppo.rewards={'1a': {'type': 'length'}}", "a name is made of letters, digits, _ and -"),
    ],
)
def test_each_mistake_has_its_message(argument: str, expected: str) -> None:
    assert expected in message(argument)


def test_mistakes_of_a_file_name_its_line_and_are_named_together() -> None:
    text = message(
        experiment(
            "ppo:\n  rewards:\n    a: {type: length, maximum: x}\n    b: {weight: 1}\n    c: 3\n"
            "    d: {type: regex, pattern: 3}\n    e: {type: model, pth: x}\n"
        ),
        "ppo.rewards.f.type=nothing",
        "seed=x",
    )
    for expected in (
        "ppo.rewards.a.maximum = x  (mine.yaml:4)",
        "ppo.rewards.b.type  (mine.yaml:5)",
        "ppo.rewards.c = 3  (mine.yaml:6)",
        "ppo.rewards.d.pattern = 3  (mine.yaml:7)\n      expected text; put it in quotes",
        "ppo.rewards.e.pth = x  (mine.yaml:8)\n      unknown key; did you mean ppo.rewards.e.path?",
        "ppo.rewards.f.type = nothing",
        "seed = x",
    ):
        assert expected in text, text
    assert text.startswith("7 mistakes")
    assert "ppo.rewards = 3  (mine.yaml:3)" in message(experiment("ppo:\n  rewards: 3\n"))


def test_the_table_has_named_sections_once() -> None:
    key = ("ppo", "rewards", schema.ANY_NAME, "maximum")
    assert key in schema.entries()
    found = schema.find(("ppo", "rewards", "mine", "maximum"), "length")
    assert found is not None
    assert (found.key, found.union) == ("ppo.rewards.mine.maximum", ("ppo", "rewards", "mine"))
    assert schema.find(("ppo", "rewards", "mine", "nothing")) is None
    assert schema.inside_mapping(("ppo", "rewards", "mine", "arguments", "x"))
    assert not schema.inside_mapping(("ppo", "rewards", "mine", "x"))
    assert "ppo.rewards.mine.weight" in schema.leaf_keys(("ppo", "rewards", "mine", "x"))
