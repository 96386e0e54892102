"""From the config's rewards to a `RewardSet`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf.config.rewards import (
    FunctionReward,
    JudgeReward,
    MathReward,
    ModelReward,
    RemoteReward,
    RewardConfig,
    effective_rewards,
)
from rlhf.rewards.composition import RewardSet, ScoreStatistics, WeightedReward
from rlhf.rewards.ensemble import configured
from rlhf.rewards.functions import load_function
from rlhf.rewards.judge import make_judge_reward
from rlhf.rewards.learned import LearnedReward
from rlhf.rewards.maths import MathRule
from rlhf.rewards.protocol import Reward
from rlhf.rewards.remote import RemoteScorer
from rlhf.rewards.rules import make_rule

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from rlhf.config.model import ModelConfig


@dataclass(frozen=True)
class LoadedModel:
    """A reward model in memory, with the statistics of its scores if they are known."""

    reward: Reward
    statistics: ScoreStatistics | None = None


# Loads the reward model at a path (None: this run's); the second argument is the config key that named it.
LoadModel = Callable[[str | None, str], LoadedModel]


def build_rewards(
    rewards: Mapping[str, RewardConfig],
    *,
    load_model: LoadModel,
    use_statistics: bool = True,
    section: str = "ppo.rewards",
    own_key: str = "ppo.reward_model",
) -> RewardSet:
    """The rewards of a config, loaded; without any, this run's reward model alone.

    A path that several rewards name is loaded once. With `use_statistics=False` no model's scores are normalised,
    whatever its config says (`ppo.score_normalization` is another than `reward_model`). `section` is the config key
    that holds the rewards by name, `own_key` the one that names the run's reward model, both for errors. Raises
    `ConfigError` for a function or a judge that cannot be had, and whatever `load_model` raises.
    """
    models: dict[str | None, LoadedModel] = {}
    entries = []
    for name, config in effective_rewards(dict(rewards)).items():
        statistics = None
        reward: Reward
        if isinstance(config, ModelReward):
            if config.path not in models:
                key = own_key if config.path is None else f"{section}.{name}.path"
                models[config.path] = load_model(config.path, key)
            reward = configured(models[config.path].reward, config, f"{section}.{name}")
            if config.normalize and use_statistics:
                statistics = models[config.path].statistics
        elif isinstance(config, FunctionReward):
            reward = load_function(config, name, section)
        elif isinstance(config, MathReward):
            reward = MathRule(config)
        elif isinstance(config, RemoteReward):
            reward = RemoteScorer.connect(config, f"{section}.{name}", normalized=use_statistics)
            statistics = reward.statistics
        elif isinstance(config, JudgeReward):
            reward = make_judge_reward(config, name, f"{section}.{name}")
        else:
            reward = make_rule(config)
        entries.append(WeightedReward(name, reward, config.weight, statistics))
    return RewardSet(tuple(entries))


def folder_loader(
    run_model: str | None,
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    policy_tokenizer: PreTrainedTokenizerBase | None,
) -> LoadModel:
    """Loads reward models from folders or hub ids; `run_model` is this run's (None when no reward asks for it).

    Without a `policy_tokenizer` the models score texts, never tokens.
    """

    def load(path: str | None, key: str) -> LoadedModel:
        chosen = run_model if path is None else path
        assert chosen is not None, "a reward asks for this run's reward model, which the stage was not given"
        learned = LearnedReward.load(
            chosen, config, dtype=dtype, device=device, policy_tokenizer=policy_tokenizer, key=key
        )
        return LoadedModel(learned, learned.statistics)

    return load
