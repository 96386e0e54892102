"""From the config of annotators to annotators. What is heavy is imported where it is needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlhf.config.annotators import (
    AnyAnnotatorConfig,
    FunctionAnnotator,
    HumanAnnotators,
    JudgeAnnotator,
    MixtureAnnotators,
    RuleAnnotator,
    SimulatedAnnotators,
)
from rlhf.config.rewards import GoldReward
from rlhf.data.embedded import GOLD_REWARDS
from rlhf.errors import ConfigError
from rlhf.preferences.annotators.mixture import WHOLE, Annotators, Pool, pool_weights
from rlhf.preferences.annotators.pool import PoolAnnotator, TaskScorer
from rlhf.preferences.annotators.protocol import People, ShownTask, TaskAnnotator

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from rlhf.rewards.build import LoadModel

ANNOTATOR_KEY = "preferences.annotator"


@dataclass(frozen=True)
class AnnotatorResources:
    """What annotators are made with besides their config.

    `key` is the config key of the annotator, for errors. Rewards that look at tokens need the policy's `tokenizer`,
    reward models `load_model`; a local judge runs on `device` in `dtype` (CPU and float32 when not given).
    """

    seed: int
    key: str = ANNOTATOR_KEY
    tokenizer: PreTrainedTokenizerBase | None = None
    load_model: LoadModel | None = None
    device: torch.device | None = None
    dtype: torch.dtype | None = None


def make_annotators(config: AnyAnnotatorConfig, resources: AnnotatorResources) -> Annotators:
    """All annotators of a config, ready to be asked.

    Raises `ConfigError` for a file, model or key that is not there, and where two parts of a mixture would have
    annotators of one name.
    """
    if isinstance(config, MixtureAnnotators):
        parts = {
            name: _pool(part.annotator, resources, f"{resources.key}.parts.{name}.annotator", name)
            for name, part in config.parts.items()
        }
    else:
        parts = {WHOLE: _pool(config, resources, resources.key, None)}
    found = Annotators(config, resources.seed, parts)
    names = [member.name for member in found.members]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"{resources.key}: two annotators are called {twice}; give the parts other names")
    return found


def _pool(config: AnyAnnotatorConfig, resources: AnnotatorResources, key: str, part: str | None) -> Pool:
    """The annotators of one part; named after it, or after their type, unless the config names them."""
    return Pool(tuple(_members(config, resources, key, part)), pool_weights(config))


def _members(
    config: AnyAnnotatorConfig, resources: AnnotatorResources, key: str, part: str | None
) -> Sequence[TaskAnnotator]:
    if isinstance(config, HumanAnnotators):
        return [People()]
    assert not isinstance(config, MixtureAnnotators), "a mixture has no mixtures in it"
    name = config.name or part or config.type
    if isinstance(config, SimulatedAnnotators):
        score, settings = _scorer(config, resources, key)
        return [
            PoolAnnotator(f"{name}-{number + 1}", config, score, resources.seed, settings)
            for number in range(config.num_annotators)
        ]
    if isinstance(config, RuleAnnotator):
        from rlhf.preferences.annotators.rule import RuleBased

        return [RuleBased(name, config, *_scorer(config, resources, key))]
    if isinstance(config, FunctionAnnotator):
        from rlhf.preferences.annotators.function import load_annotator_function

        return [load_annotator_function(config, name, resources.seed, key)]
    assert isinstance(config, JudgeAnnotator)
    from rlhf.preferences.annotators.judge import make_judge

    return [make_judge(config, name, resources.seed, key, device=resources.device, dtype=resources.dtype)]


def _scorer(
    config: SimulatedAnnotators | RuleAnnotator, resources: AnnotatorResources, key: str
) -> tuple[TaskScorer, dict[str, Any]]:
    """What scores the responses, and its settings."""
    reward = config.reward
    if isinstance(reward, GoldReward):
        weight, wanted = reward.weight, GOLD_REWARDS[reward.wants]

        def gold(tasks: Sequence[ShownTask]) -> list[list[float]]:
            return [[weight * wanted(task.prompt.prompt, one.text) for one in task.responses] for task in tasks]

        return gold, reward.model_dump(mode="json")
    from rlhf.preferences.annotators.scoring import reward_scorer

    return reward_scorer(reward, f"{key}.reward", resources.tokenizer, resources.load_model)
