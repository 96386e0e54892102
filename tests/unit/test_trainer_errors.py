"""What a wrong argument of `PPOTrainer` is answered with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf import DistributedConfig, PPOCallback, PPOConfig, PPOTrainer, UserError, ZeroConfig
from rlhf.errors import ConfigError, DataError
from rlhf.models.loading import load_tokenizer
from rlhf.rewards.protocol import RewardError
from rlhf.trainer.ranks import check_equal, check_sizes, start_runtime
from tests.ppo_example import ppo_config, write_models
from tests.stage_example import one_process
from tests.trainer_example import CPU, process_state

Change = Callable[[dict[str, str]], dict[str, Any]]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(autouse=True)
def _process_state() -> Iterator[None]:
    with process_state():
        yield


def zeros(completions: list[str]) -> list[float]:
    return [0.0] * len(completions)


def two_labels(inputs: dict[str, str]) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(inputs["policy"], num_labels=2)


def without_eos(inputs: dict[str, str]) -> Any:
    tokenizer = load_tokenizer(inputs["policy"])
    tokenizer.eos_token = None
    return tokenizer


def other_tokens(inputs: dict[str, str]) -> Any:
    tokenizer = load_tokenizer(inputs["policy"])
    tokenizer.add_tokens(["<extra>"])
    return tokenizer


def other_eos(inputs: dict[str, str]) -> Any:
    tokenizer = load_tokenizer(inputs["policy"])
    tokenizer.eos_token = tokenizer.bos_token
    return tokenizer


def without_template(inputs: dict[str, str]) -> Any:
    tokenizer = load_tokenizer(inputs["policy"])
    tokenizer.chat_template = None
    return tokenizer


def unplaced(inputs: dict[str, str]) -> dict[str, Any]:
    config = AutoConfig.from_pretrained(inputs["policy"])
    config._name_or_path = ""
    return {"model": AutoModelForCausalLM.from_config(config)}


class TrainerCallback(transformers.TrainerCallback):
    """Of another library."""


CASES: dict[str, tuple[Change, str]] = {
    "no reward": (lambda i: {"reward_funcs": None}, "there is no reward: pass reward_model"),
    "reward is a text": (lambda i: {"reward_funcs": "good"}, "reward_funcs must be a function, or several"),
    "model among functions": (lambda i: {"reward_funcs": [i["reward_model"]]}, "belongs into reward_model"),
    "two labels": (lambda i: {"reward_model": two_labels(i)}, "with 2 labels; a score is one number"),
    "reward has no head": (lambda i: {"reward_model": i["policy"]}, "not a reward model"),
    "function as model": (lambda i: {"reward_model": zeros}, "not function; pass a Python function as reward_funcs"),
    "weights": (lambda i: {"reward_weights": [1.0, 2.0]}, r"2 numbers for 1 rewards.*order zeros"),
    "weights of zero": (lambda i: {"reward_weights": 0.0}, "every reward has weight 0"),
    "model of another kind": (lambda i: {"model": torch.nn.Linear(2, 2)}, "must be a transformers model.*not Linear"),
    "classifier as policy": (lambda i: {"model": two_labels(i)}, "does not write text"),
    "no head": (lambda i: {"model": AutoModel.from_pretrained(i["policy"])}, "does not write text"),
    "reward folder as policy": (lambda i: {"model": i["reward_model"]}, "scores text and cannot write it"),
    "no such folder": (lambda i: {"model": "./nowhere"}, "model"),
    "no tokenizer": (unplaced, "processing_class is missing"),
    "tokenizer of another kind": (lambda i: {"processing_class": 3}, "must be a tokenizer.*not int"),
    "no EOS": (lambda i: {"processing_class": without_eos(i)}, "has no EOS token"),
    "too many tokens": (lambda i: {"processing_class": other_tokens(i)}, "the tokenizer goes up to id"),
    "critic of other tokens": (
        lambda i: {"reward_model": i["reward_model"], "reward_processing_class": other_eos(i)},
        "critic cannot start from reward_model",
    ),
    "no prompt column": (
        lambda i: {"train_dataset": [{"text": "the", "label": 1}]},
        r"row 0: there is no prompt.*found text, label.*rename_column",
    ),
    "token ids": (lambda i: {"train_dataset": [{"input_ids": [1]}]}, "the trainer tokenises them"),
    "no rows": (lambda i: {"train_dataset": []}, "train_dataset has no row"),
    "splits": (lambda i: {"train_dataset": {"train": ["the"]}}, "a dictionary with the keys train.*pass one split"),
    "a file": (lambda i: {"train_dataset": "prompts.jsonl"}, "must be a datasets.Dataset.*load_dataset"),
    "numbers as rows": (lambda i: {"train_dataset": [1, 2]}, "row 0: a row is a dictionary or a text, not int"),
    "an empty prompt": (lambda i: {"train_dataset": ["the", " "]}, "row 1: the prompt is empty"),
    "ends with an answer": (
        lambda i: {"train_dataset": [{"prompt": [{"role": "assistant", "content": "yes"}]}]},
        "row 0: a conversation to answer ends with a user turn",
    ),
    "no chat template": (
        lambda i: {
            "train_dataset": [{"prompt": [{"role": "user", "content": "yes"}]}],
            "processing_class": without_template(i),
        },
        "no chat template",
    ),
    "too long": (lambda i: {"train_dataset": ["the film " * 100]}, "positions"),
    "eval rows": (lambda i: {"eval_dataset": [{"text": "a"}]}, "eval_dataset, row 0: there is no prompt"),
    "eval_every": (lambda i: {"eval_every": 0}, "eval_every must be at least 1"),
    "no demonstrations": (lambda i: {"args": ppo_config(ptx_coefficient=0.1).ppo}, "pass them as ptx_dataset"),
    "wrong demonstrations": (
        lambda i: {"ptx_dataset": [{"prompt": "the film"}]},
        "ptx_dataset, row 0: field 'response' is missing",
    ),
    "args of another library": (
        lambda i: {"args": transformers.GenerationConfig()},
        "args must be a PPOConfig of rlhf.*not a GenerationConfig of transformers",
    ),
    "policy in args": (lambda i: {"args": PPOConfig(policy="x")}, "args.policy is for the rlhf command.*model='x'"),
    "critic on the trunk": (
        lambda i: {"args": PPOConfig(value_network="shared_trunk"), "value_model": i["reward_model"]},
        "leave value_model out",
    ),
    "callback of another library": (lambda i: {"callbacks": [TrainerCallback()]}, "instances of rlhf.PPOCallback"),
    "callback class": (lambda i: {"callbacks": [PPOCallback]}, "expected instances of"),
    "processes": (
        lambda i: {"distributed": DistributedConfig(device="cpu", num_processes=2)},
        "torchrun --nproc-per-node=2",
    ),
    "sharded frozen models": (
        lambda i: {"zero": ZeroConfig(stage=3, shard_frozen=True)},
        "the trainer keeps the reference and the reward model whole",
    ),
    "model reward without a model": (
        lambda i: {"args": ppo_config(rewards={"judge": {"type": "model"}}).ppo},
        "of type model without a path, and there is no reward_model",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_argument_is_named(name: str, inputs: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(variable, raising=False)
    change, message = CASES[name]
    settings: dict[str, Any] = {
        "model": inputs["policy"],
        "train_dataset": ["the film"],
        "reward_funcs": zeros,
        "args": ppo_config().ppo,
        "distributed": CPU,
        "verbose": False,
        **change(inputs),
    }
    with pytest.raises(UserError, match=f"(?s){message}"):
        PPOTrainer(**settings)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda completions: [1.0], "1 numbers for 8 completions"),
        (lambda completions: 1.0, "must return a list of 8 numbers"),
        (lambda completions: ["good"] * len(completions), "expected a number"),
        (lambda completions: [float("nan")] * len(completions), "finite"),
        (lambda completions: [1 / 0 for _ in completions], "ZeroDivisionError"),
        (lambda completions, answer: zeros(completions), "asks for answer"),
        (lambda completions: [None] * len(completions), "has no score"),
    ],
)
def test_a_wrong_reward_is_named(function: Any, message: str, inputs: dict[str, str]) -> None:
    trainer = PPOTrainer(
        inputs["policy"],
        train_dataset=["the film"],
        reward_funcs={"mine": function},
        args=ppo_config().ppo,
        distributed=CPU,
        verbose=False,
    )
    with pytest.raises(RewardError, match=message) as caught:
        trainer.train()
    assert "mine" in str(caught.value)


def test_an_output_folder_that_is_a_file_is_named(inputs: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "out").write_text("taken")
    trainer = PPOTrainer(
        inputs["policy"],
        train_dataset=["the film"],
        reward_funcs=zeros,
        args=ppo_config().ppo,
        distributed=CPU,
        output_dir=tmp_path / "out",
        verbose=False,
    )
    with pytest.raises(ConfigError, match=r"output_dir=.*cannot be made"):
        trainer.train()


class TwoRanks:
    """Stands for a runtime whose other rank holds something else."""

    world_size = 2

    def __init__(self, other: dict[str, str]) -> None:
        self.other = other

    def gather_objects(self, item: dict[str, str]) -> list[dict[str, str]]:
        return [item, {**item, **self.other}]


def test_ranks_must_hold_the_same_and_share_a_minibatch() -> None:
    model = torch.nn.Linear(2, 2)
    same: Any = TwoRanks({})
    check_equal(same, {"model": model}, [])
    other: Any = TwoRanks({"train_dataset": "another order"})
    with pytest.raises(ConfigError, match="train_dataset differ between the processes"):
        check_equal(other, {"model": model}, [])
    check_sizes(PPOConfig(batch_size=8, num_minibatches=4), same)
    with pytest.raises(ConfigError, match=r"num_minibatches \(3\) must be a multiple of the 2 processes"):
        check_sizes(PPOConfig(batch_size=12, num_minibatches=4), same)
    check_sizes(PPOConfig(batch_size=3), one_process())


def test_the_launcher_says_how_many_processes_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    from rlhf.config.zero import ZeroConfig
    from rlhf.distributed.runtime import Runtime

    seen: list[DistributedConfig] = []

    class StartedError(Exception):
        pass

    def start(config: DistributedConfig, zero: ZeroConfig, seed: int) -> None:
        seen.append(config)
        raise StartedError

    monkeypatch.setattr(Runtime, "start", start)
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    for given in (1, 8):
        with pytest.raises(StartedError):
            start_runtime(DistributedConfig(num_processes=given), ZeroConfig(), 1)
    assert [config.num_processes for config in seen] == [4, 8]


def test_messages_are_errors_of_the_package(inputs: dict[str, str]) -> None:
    with pytest.raises(DataError):
        PPOTrainer(inputs["policy"], train_dataset=[], reward_funcs=zeros, distributed=CPU)
