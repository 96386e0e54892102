"""The trainer's rewards: a model, Python functions, and what `args.rewards` describes, as one `RewardSet`."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.config.ppo import PPOConfig
from rlhf.config.rewards import DEFAULT_REWARD_NAME, ModelReward, RewardConfig
from rlhf.errors import ConfigError
from rlhf.rewards.build import LoadedModel, LoadModel, build_rewards
from rlhf.rewards.composition import RewardSet, WeightedReward
from rlhf.rewards.functions import FunctionScorer

RewardFunction = Callable[..., Any]
RewardFunctions = RewardFunction | Sequence[RewardFunction] | Mapping[str, RewardFunction]


@dataclass(frozen=True)
class NamedFunction:
    """A reward function under the name that its metric gets."""

    name: str
    function: RewardFunction


def named_functions(functions: RewardFunctions | None) -> list[NamedFunction]:
    """The functions by name: of a mapping its keys, else the functions' own names, numbered where they repeat.

    Raises `ConfigError` for anything that cannot be called.
    """
    if functions is None:
        return []
    if isinstance(functions, Mapping):
        pairs = list(functions.items())
    else:
        several: object = [functions] if callable(functions) else functions
        if isinstance(several, str) or not isinstance(several, Sequence):
            raise ConfigError(
                f"reward_funcs must be a function, or several in a list or dictionary, not {type(functions).__name__}"
            )
        pairs = [(_own_name(function), function) for function in several]
    named: list[NamedFunction] = []
    for name, function in pairs:
        if not callable(function):
            raise ConfigError(
                f"reward_funcs holds {function!r} ({type(function).__name__}); expected functions "
                "f(prompts, completions, **columns) -> list of numbers. A reward model belongs into reward_model"
            )
        taken = {other.name for other in named}
        number = next(n for n in range(1, len(named) + 2) if _numbered(name, n) not in taken)
        named.append(NamedFunction(_numbered(name, number), function))
    return named


def _numbered(name: str, number: int) -> str:
    return name if number == 1 else f"{name}_{number}"


def _own_name(function: object) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    name = str(getattr(function, "__name__", type(function).__name__))
    return re.sub(r"\W+", "_", name).strip("_") or "function"


def weights_of(
    weights: Sequence[float] | float | None, functions: Sequence[NamedFunction], has_model: bool
) -> list[float]:
    """One weight a reward: the reward model's first, if there is one, then the functions'. Raises `ConfigError`."""
    expected = len(functions) + has_model
    if weights is None:
        return [1.0] * expected
    given = [weights] if isinstance(weights, int | float) else list(weights)
    if len(given) != expected:
        order = [*(["the reward model"] if has_model else []), *(function.name for function in functions)]
        raise ConfigError(
            f"reward_weights has {len(given)} numbers for {expected} rewards; expected one each, in the order "
            f"{', '.join(order) or '(none)'}"
        )
    return [float(weight) for weight in given]


def make_rewards(
    args: PPOConfig,
    configured: Mapping[str, RewardConfig],
    model: LoadedModel | None,
    load_model: LoadModel,
    functions: Sequence[NamedFunction],
    weights: Sequence[float],
) -> RewardSet:
    """All rewards as one. `weights` are those of `weights_of`, `load_model` serves paths in `configured`.

    Raises `ConfigError` without a reward, and for a name that comes twice.
    """
    use_statistics = args.score_normalization == "reward_model"
    entries: list[WeightedReward] = []
    if configured:
        entries += build_rewards(configured, load_model=load_model, use_statistics=use_statistics).rewards
    named_by_args = any(isinstance(reward, ModelReward) and reward.path is None for reward in configured.values())
    rest = list(weights)
    if model is not None:
        weight = rest.pop(0)
        if not named_by_args:
            statistics = model.statistics if use_statistics else None
            entries.insert(0, WeightedReward(DEFAULT_REWARD_NAME, model.reward, weight, statistics))
    for item, weight in zip(functions, rest, strict=True):
        entries.append(WeightedReward(item.name, FunctionScorer(item.function, item.name), weight))
    if not entries:
        raise ConfigError(
            "there is no reward: pass reward_model (a sequence classifier with one label), reward_funcs (Python "
            "functions), or both"
        )
    return RewardSet(tuple(entries))
