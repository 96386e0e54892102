"""Arguments in every spelling that people, sweep agents and launchers use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.config import load_config
from rlhf.config.data import FileData
from rlhf.config.provenance import flatten
from rlhf.config.schema import ValueType
from rlhf.config.serialize import plain_values
from rlhf.config.values import from_text


@pytest.fixture(autouse=True, scope="module")
def _empty_working_folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(tmp_path_factory.mktemp("working"))
        yield


def loaded_value(key: str, *arguments: str) -> Any:
    return flatten(plain_values(load_config(arguments).config))[tuple(key.split("."))]


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("ppo.learning_rate=3e-06", 3e-6),
        ("ppo.learning_rate=5e-7", 5e-7),
        ("ppo.learning_rate=1", 1.0),
        ("ppo.num_updates=64.0", 64),
        ("ppo.num_updates=1e2", 100),
        ("ppo.whiten_advantages=False", False),
        ("ppo.whiten_advantages=false", False),
        ("ppo.gradient_checkpointing=True", True),
        ("ppo.value_clip=None", None),
        ("ppo.value_clip=null", None),
        ("model.path=null", None),
        ("model.path='null'", "null"),
        ('model.path="None"', "None"),
        ("run.root=None", "None"),
        ("run.dir=123", "123"),
        ("run.dir=007", "007"),
        ("run.dir=true", "true"),
        ("run.dir=1e3", "1e3"),
        ("run.dir=", ""),
        ("run.dir='quoted text'", "quoted text"),
        (r"run.dir='it\'s'", "it's"),
        ("run.dir='a' and 'b'", "'a' and 'b'"),
        ("run.dir='open", "'open"),
        ("run.dir=/data/a=b/c,d e/~x/{1}[2]", "/data/a=b/c,d e/~x/{1}[2]"),
        ("run.dir=~/runs", "~/runs"),
        ("run.dir=[1, 2]", "[1, 2]"),
        ("run.dir=a\nb", "a\nb"),
        ("tracking.tags=[1, 2]", ["1", "2"]),
        ("tracking.tags=['a', \"b\"]", ["a", "b"]),
        ("tracking.tags=[a,b c]", ["a", "b c"]),
        ('tracking.tags=["a"]', ["a"]),
        ("tracking.tags=[]", []),
        ("tracking.tags=()", []),
        ("stages=[sft,ppo]", ["sft", "ppo"]),
        ("stages=['sft', 'ppo']", ["sft", "ppo"]),
        ("zero.stage=2", 2),
        ("zero.stage=2.0", 2),
        ("tracking.wandb=disabled", "disabled"),
        ("tracking.wandb='disabled'", "disabled"),
        ("seed=0", 0),
    ],
)
def test_values_take_the_type_of_their_field(argument: str, expected: object) -> None:
    key = argument.partition("=")[0]
    value = loaded_value(key, argument)
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3e-06", 3e-6),
        ("12", 12),
        ("True", True),
        ("false", False),
        ("None", None),
        ("null", None),
        ("'None'", "None"),
        ("text with = and ,", "text with = and ,"),
        ("[1, 2]", [1, 2]),
        ("[1, 'a', None, true]", [1, "a", None, True]),
        ("{'a': 1}", {"a": 1}),
        ('{"a": {"b": null}}', {"a": {"b": None}}),
        ("{a: 1, b: [x, 'y']}", {"a": 1, "b": ["x", "y"]}),
    ],
)
def test_values_without_a_field_type(text: str, expected: object) -> None:
    extra = load_config(["zero.stage=1", f"zero.extra.timers.key={text}"]).config.zero.extra["timers"]
    assert extra == {"key": expected}
    assert type(extra["key"]) is type(expected)


@pytest.mark.parametrize(
    "arguments",
    [
        ["ppo.learning_rate=2e-6"],
        ["--ppo.learning_rate=2e-6"],
        ["+ppo.learning_rate=2e-6"],
        ["++ppo.learning_rate=2e-6"],
        ["--ppo.learning_rate", "2e-6"],
        ["ppo={'learning_rate': 2e-06}"],
        ['--ppo={"learning_rate": 2e-06}'],
        ["ppo={learning_rate: 2e-6}"],
        ["ppo.learning_rate=1", "ppo.learning_rate=2e-6"],
    ],
)
def test_spellings_mean_the_same(arguments: list[str]) -> None:
    loaded = load_config(arguments)
    assert loaded.config == load_config([]).config.model_copy(
        update={"ppo": load_config([]).config.ppo.model_copy(update={"learning_rate": 2e-6})}
    )
    assert loaded.sources["ppo.learning_rate"] == "argument " + "=".join(
        arguments[-2:][-(len(arguments) > 1 and "=" not in arguments[-1]) - 1 :]
    )


def test_group_choices_in_both_spellings() -> None:
    assert load_config(["--model=gpt2"]).config == load_config(["model=gpt2"]).config
    assert load_config(["--model", "gpt2"]).config == load_config(["model=gpt2"]).config
    assert load_config(["model=llama", "model=gpt2"]).config == load_config(["model=gpt2"]).config
    assert load_config(["model.path=x"]).config.model.path == "x"
    assert load_config(["experiment=null"]).config == load_config([]).config


def test_dictionaries_merge_into_sections() -> None:
    arguments = ["experiment=smoke", "ppo={'kl_coefficient': 0.1, 'num_updates': 7}", "ppo.num_updates=9"]
    ppo = load_config(arguments).config.ppo
    assert (ppo.kl_coefficient, ppo.num_updates, ppo.batch_size) == (0.1, 9, 8)
    nested = load_config(["model={'path': 123, 'scratch': {'num_layers': 3.0}}", "collect={'sampling.temperature': 2}"])
    assert (nested.config.model.path, nested.config.model.scratch.num_layers) == ("123", 3)
    assert nested.config.collect.sampling.temperature == 2.0
    judge = load_config(["evaluate.judge={'type': 'classifier', 'ngram_max': 3}"]).config.evaluate.judge
    assert judge.model_dump() == {"type": "classifier", "ngram_max": 3, "inverse_regularization": 4.0}
    extra = load_config(
        ["zero=stage1", "zero.extra={'timers': {'b': 1}}", "zero.extra={'timers': {'c': 2}}", "zero.extra.timers.d=3"]
    ).config.zero.extra
    assert extra == {"timers": {"b": 1, "c": 2, "d": 3}}


def test_removal_gives_back_the_default() -> None:
    assert load_config(["experiment=smoke", "~ppo.num_updates"]).config.ppo.num_updates == 100
    assert load_config(["~ppo.num_updates"]).config == load_config([]).config
    leftover = ["experiment=smoke", "data=files", "data.path=x"]
    sizes = ["num_demonstrations", "num_prompts", "num_test_prompts", "num_validation_prompts"]
    sizes += ["max_prompt_tokens", "max_response_tokens"]
    data = load_config([*leftover, *(f"~data.{name}" for name in sizes)]).config.data
    assert data == FileData(path="x")


def test_keys_of_launchers_and_agents_are_left_out() -> None:
    ignored = [
        "--_wandb={'a': 1}",
        "_wandb.x=1",
        "--local_rank=3",
        "--local-rank=3",
        "local_rank=0",
        "--local_rank",
        "1",
    ]
    assert load_config(ignored) == load_config([])


def test_a_union_is_set_by_its_type_alone() -> None:
    data = load_config(["data.type=files", "data.path=x", "data.splits.test=0.25"]).config.data
    assert isinstance(data, FileData)
    assert data.splits.test == 0.25


@given(st.floats(allow_nan=False))
def test_every_float_survives(number: float) -> None:
    target = ValueType(float, (), nullable=False)
    assert from_text(str(number), target) == number
    assert from_text(f"{number:.17E}", target) == number


@given(st.integers(min_value=-(2**53), max_value=2**53))
def test_every_whole_float_is_a_whole_number(number: int) -> None:
    for text in (str(number), repr(float(number))):
        value = from_text(text, ValueType(int, (), nullable=False))
        assert value == number
        assert type(value) is int


# Quotes around the whole have a meaning of their own.
@given(st.text(min_size=1).filter(lambda text: text[0] not in "'\""))
def test_any_text_is_taken_as_it_stands(text: str) -> None:
    assert from_text(text, ValueType(str, (), nullable=False)) == text
    quoted = "'" + text.replace("'", "\\'") + "'"
    if "\\" not in text:
        assert from_text(quoted, ValueType(str, (), nullable=True)) == text


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner)))
def test_the_python_and_json_spelling_of_lists(value: Any) -> None:
    target = ValueType(Any, (), nullable=True)
    if isinstance(value, list):
        assert from_text(repr(value), target) == value
        assert from_text(json.dumps(value), target) == value


def test_a_folder_named_like_a_choice_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("gpt2").mkdir()
    Path("tiny.yaml").write_text("path: wrong\n")
    assert load_config(["model=gpt2"]).config.model.path == "openai-community/gpt2"
    assert load_config(["model=tiny"]).config.model.path is None
