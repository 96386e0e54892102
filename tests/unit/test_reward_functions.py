"""Reward functions with TRL's signature, and what is checked of rewards before anything runs."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlhf.config.data import EmbeddedData, FileData
from rlhf.config.rewards import (
    ExactAnswerReward,
    FunctionReward,
    GoldReward,
    LengthReward,
    ModelReward,
    RewardConfig,
)
from rlhf.errors import ConfigError
from rlhf.records import Message
from rlhf.rewards import checks
from rlhf.rewards.functions import FunctionScorer, load_function
from rlhf.rewards.protocol import RewardBatch, RewardError
from tests.reward_example import SOURCE, make_batch, write_rewards

# --- functions --------------------------------------------------------------------------------------------------------


def scored(function: Callable[..., Any], batch: RewardBatch, **arguments: Any) -> list[float]:
    values: list[float] = FunctionScorer(function, "mine", arguments).score(batch).tolist()
    return values


def test_a_function_gets_what_its_signature_takes() -> None:
    seen: dict[str, Any] = {}

    def all_of_it(prompts: list[str], completions: list[str], **rest: Any) -> list[float]:
        seen.update(rest, prompts=prompts, completions=completions)
        return [float(len(text)) for text in completions]

    batch = make_batch(["ab", "c"], ["p", "q"], {"answer": [4, None], "prompts": ["no", "no"]}, [[5, 6], [7]])
    assert scored(all_of_it, batch, bonus=1) == [2.0, 1.0]
    assert seen == {
        "prompts": ["p", "q"],
        "completions": ["ab", "c"],
        "completion_ids": [[5, 6], [7]],
        "answer": [4, None],
        "bonus": 1,
    }
    assert scored(lambda completions: [len(text) for text in completions], batch) == [2.0, 1.0]
    assert scored(lambda answer, bonus=0: [bonus, len(answer)], batch, bonus=3) == [3.0, 2.0]
    with pytest.raises(
        RewardError, match=r"asks for level, which is neither an input .* of the data \(answer, prompts\)"
    ):
        scored(lambda completions, level: [0, 0], batch)
    with pytest.raises(RewardError, match="answer is both an argument of the function and a column"):
        scored(all_of_it, batch, answer=1)


def test_conversations_are_messages_as_trl_passes_them() -> None:
    prompt = (Message("system", "s"), Message("user", "u"))

    def check(prompts: list[Any], completions: list[Any]) -> list[float]:
        assert prompts == [[{"role": "system", "content": "s"}, {"role": "user", "content": "u"}], "plain"]
        assert completions == [[{"role": "assistant", "content": " yes"}], " no"]
        return [1.0, 2.0]

    assert scored(check, make_batch([" yes", " no"], [prompt, "plain"])) == [1.0, 2.0]


def test_none_is_nan_and_numbers_of_any_kind_are_numbers() -> None:
    values = [None, True, 2, torch.tensor(3.5), 0]
    result = scored(lambda completions: values, make_batch(["a"] * 5))
    assert math.isnan(result[0])
    assert result[1:] == [1.0, 2.0, 3.5, 0.0]
    assert scored(lambda completions: torch.tensor([1.0, 2.0]), make_batch(["a", "b"])) == [1.0, 2.0]

    async def later(completions: list[str]) -> list[float]:
        return [5.0]

    assert scored(later, make_batch(["a"])) == [5.0]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([1.0], "returned 1 numbers for 2 completions"),
        (3.0, r"must return a list of 2 numbers.*it returned 3.0 \(float\)"),
        (None, "it returned None"),
        ([1.0, "x"], r"returned 'x' \(str\) for the response 'second'"),
        ([1.0, math.nan], "returned nan for the response 'second'; expected a finite number, or None"),
        ([math.inf, 1.0], "returned inf for the response 'first'"),
    ],
)
def test_what_a_function_returns_is_checked(result: Any, message: str) -> None:
    with pytest.raises(RewardError, match=f"(?s)reward mine: .*{message}"):
        scored(lambda completions: result, make_batch(["first", "second"]))


def test_a_function_of_a_file(tmp_path: Path) -> None:
    file = write_rewards(tmp_path)
    scorer = load_function(FunctionReward(file=file, arguments={"scale": 4.0}), "mine")
    columns = {"answer": [1, 2]}
    assert scorer.score(make_batch(["ab", "c"], columns=columns)).tolist() == [2.0, 4.0]
    with pytest.raises(
        RewardError, match=r"rewards.py, line 9, in inner: ZeroDivisionError: division by zero"
    ) as caught:
        scorer.score(make_batch(["ab", ""], columns=columns))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    with pytest.raises(ConfigError, match=r"ppo.rewards.mine.function=other: .*defines no function of that name"):
        load_function(FunctionReward(file=file, function="other"), "mine")
    write_rewards(tmp_path, "x = 1\nimport nothing_of_this_name\n")
    with pytest.raises(ConfigError, match=r"rewards.py, line 2: ModuleNotFoundError"):
        load_function(FunctionReward(file=file), "mine")


# --- before torch -----------------------------------------------------------------------------------------------------


FILES = FileData(path="x")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (FunctionReward(file="nothing.py"), "there is no such file"),
        (FunctionReward(file="FILE", function="rewrad"), "does not define it; it defines inner, reward"),
        (
            FunctionReward(file="FILE", function="inner", arguments={"scal": 1}),
            "takes no argument of that name; it takes",
        ),
        (GoldReward(), "needs data=embedded"),
    ],
)
def test_preflight_names_the_mistake(tmp_path: Path, config: RewardConfig, message: str) -> None:
    file = write_rewards(tmp_path)
    if isinstance(config, FunctionReward) and config.file == "FILE":
        config = config.model_copy(update={"file": file})
    with pytest.raises(ConfigError, match=f"(?s)ppo.rewards.mine.*{message}"):
        checks.preflight({"mine": config}, FILES)


def test_preflight_of_data_without_columns(tmp_path: Path) -> None:
    own = FunctionReward(file=write_rewards(tmp_path))
    checks.preflight({"mine": own}, FILES)
    with pytest.raises(ConfigError, match="asks for answer; it gets prompts, completions, completion_ids"):
        checks.preflight({"mine": own}, EmbeddedData())
    checks.preflight({"mine": own.model_copy(update={"arguments": {"answer": 1}})}, EmbeddedData())
    with pytest.raises(ConfigError, match="has no columns"):
        checks.preflight({"right": ExactAnswerReward()}, EmbeddedData())
    write_rewards(tmp_path, "def reward(:\n")
    with pytest.raises(ConfigError, match="line 1: is not valid Python"):
        checks.preflight({"mine": own}, FILES)
    write_rewards(tmp_path, "def reward(x, /): ...\n")
    with pytest.raises(ConfigError, match="positional-only"):
        checks.preflight({"mine": own}, FILES)
    for source in (
        "from other import *",
        "if True:\n    def reward(): ...",
        "reward = print",
        "from other import reward",
    ):
        write_rewards(tmp_path, source)
        checks.preflight({"mine": own}, FILES)


def test_columns_that_rewards_ask_for(tmp_path: Path) -> None:
    rewards: dict[str, RewardConfig] = {
        "mine": FunctionReward(file=write_rewards(tmp_path)),
        "right": ExactAnswerReward(column="b"),
    }
    checks.check_columns(rewards, ["answer", "b"])
    with pytest.raises(ConfigError, match=r"mine.function=reward needs the column answer.*columns are: b"):
        checks.check_columns(rewards, ["b"])
    with pytest.raises(ConfigError, match=r"right\.column=b needs the column b"):
        checks.check_columns(rewards, ["answer"])


def test_the_hash_follows_the_content_of_files_and_not_their_place(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    first.mkdir()
    second.mkdir()
    one: dict[str, RewardConfig] = {"mine": FunctionReward(file=write_rewards(first))}
    other: dict[str, RewardConfig] = {"mine": FunctionReward(file=write_rewards(second))}
    assert checks.content_hash(one) == checks.content_hash(other)
    before = checks.content_hash(one)
    write_rewards(first, SOURCE + "\n# changed")
    assert checks.content_hash(one) != before
    assert checks.content_hash({}) == checks.content_hash({"reward_model": ModelReward()})
    assert checks.content_hash({"a": LengthReward()}) != checks.content_hash({"a": LengthReward(weight=2.0)})
    assert checks.reward_files({**one, "again": FunctionReward(file=str(first / "rewards.py"))}) == [
        first / "rewards.py"
    ]


def test_which_models_the_rewards_need() -> None:
    own, other = ModelReward(), ModelReward(path="~/x")
    assert checks.needs_reward_model({})
    assert checks.needs_reward_model({"a": own, "b": other})
    assert not checks.needs_reward_model({"b": other, "c": LengthReward()})
    assert checks.reward_model_paths({"a": own, "b": other}) == {"b": str(Path.home() / "x")}


def test_an_async_function_works_inside_a_running_loop() -> None:
    """As in a notebook, whose cells run in one."""

    async def slow(completions: list[str], **columns: object) -> list[float]:
        await asyncio.sleep(0)
        return [float(len(text)) for text in completions]

    batch = make_batch(["xyz"])

    async def cell() -> list[float]:
        return FunctionScorer(slow, "slow").score(batch).tolist()

    assert asyncio.run(cell()) == [3.0]


def test_numbers_of_numpy_count_and_too_large_ones_are_named() -> None:
    batch = make_batch(["x", "y"])
    assert FunctionScorer(lambda **_: [np.bool_(True), np.float32(0.5)], "r").score(batch).tolist() == [1.0, 0.5]
    with pytest.raises(RewardError, match="expected a finite number"):
        FunctionScorer(lambda **_: [10**400, 1], "r").score(batch)


def test_a_file_that_a_config_of_the_package_names_is_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = "experiments/imdb_sentiment/sentiment.py"
    reward = FunctionReward(file=name, function="positive_probability", arguments={"model": "a/b"})
    checkout = Path(__file__).parents[2]
    assert checks.reward_files({"mine": reward}) == [checkout / name]
    checks.preflight({"mine": reward}, EmbeddedData())
    assert callable(load_function(reward, "mine").function)
    # What is here comes first, and what is nowhere is looked for here.
    (tmp_path / "experiments/imdb_sentiment").mkdir(parents=True)
    (tmp_path / name).write_text("def positive_probability(completions, model): return [0.0]\n")
    assert checks.reward_files({"mine": reward}) == [tmp_path / name]
    with pytest.raises(ConfigError, match=f"no such file .looked for {tmp_path}/nowhere.py"):
        checks.preflight({"mine": reward.model_copy(update={"file": "nowhere.py"})}, EmbeddedData())
