"""Trainers on tiny models, for tests of `PPOTrainer`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from rlhf import DistributedConfig, PPOConfig, PPOTrainer
from tests.ppo_example import ppo_config

CPU = DistributedConfig(device="cpu")
PROMPTS = ["the good film was", "the bad book was", "the fine film and", "the great book"]


@contextmanager
def process_state() -> Iterator[None]:
    """A trainer sets its whole process up, and the tests share one: puts back what it changes."""
    environment, threads, mode = dict(os.environ), torch.get_num_threads(), torch.get_deterministic_debug_mode()
    yield
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(threads)
    torch.set_deterministic_debug_mode(mode)


def words(completions: Sequence[str], **columns: Any) -> list[float]:
    """Any number that differs between responses."""
    return [len(text) / 10 for text in completions]


def arguments(**changes: Any) -> PPOConfig:
    """Two updates of eight responses of at most eight tokens, as `ppo_config` has them."""
    return ppo_config(**changes).ppo


def make(model: Any, **changes: Any) -> PPOTrainer:
    """A silent trainer on the CPU; without a reward among the `changes` it is `words`."""
    defaults: dict[str, Any] = {"train_dataset": PROMPTS, "args": arguments(), "distributed": CPU, "verbose": False}
    if not {"reward_model", "reward_funcs"} & set(changes):
        defaults["reward_funcs"] = words
    return PPOTrainer(model, **{**defaults, **changes})


def language_model(path: str) -> PreTrainedModel:
    """As a script loads it."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path)
    return model


def reward_model(path: str) -> PreTrainedModel:
    """As a script loads it."""
    model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(path)
    return model


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the weights."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def equal(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> bool:
    """Whether all weights are equal bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
