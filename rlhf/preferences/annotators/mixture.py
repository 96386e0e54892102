"""Which annotators a task belongs to: the parts of a mixture, and the order in which a pool is asked. Pure Python."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from rlhf.config.annotators import AnyAnnotatorConfig, MixtureAnnotators, SimulatedAnnotators
from rlhf.preferences.annotators.protocol import TaskAnnotator
from rlhf.preferences.annotators.simulated import keyed_uniform
from rlhf.preferences.store import AnnotatorKind
from rlhf.records import PromptContent

# The name of the only part of a config that is no mixture.
WHOLE = ""
_KINDS: dict[str, AnnotatorKind] = {
    "simulated": "simulated",
    "human": "human",
    "judge": "judge",
    "rule": "rule",
    "function": "rule",
}


def part_of(config: AnyAnnotatorConfig, seed: int, prompt: PromptContent) -> str:
    """The part of a mixture that labels the tasks of a prompt: decided by a hash of seed and prompt alone.

    `WHOLE` for a config that is no mixture.
    """
    if not isinstance(config, MixtureAnnotators):
        return WHOLE
    uniform = keyed_uniform(seed, "mixture", "part", prompt, "")
    total = 0.0
    for name, part in config.parts.items():
        total += part.share
        if uniform < total:
            return name
    return name


def audience_of(config: AnyAnnotatorConfig, seed: int, prompt: PromptContent) -> AnnotatorKind:
    """The kind of annotators that label the tasks of a prompt: the `audience` of their plan in the store."""
    if isinstance(config, MixtureAnnotators):
        return _KINDS[config.parts[part_of(config, seed, prompt)].annotator.type]
    return _KINDS[config.type]


def needs_people(config: AnyAnnotatorConfig) -> bool:
    """Whether people label all of the tasks or a part of them."""
    if isinstance(config, MixtureAnnotators):
        return any(part.annotator.type == "human" for part in config.parts.values())
    return config.type == "human"


@dataclass(frozen=True)
class Pool:
    """The annotators of one part; `weights` says how many tasks each gets, relative to the others, if not equally."""

    members: tuple[TaskAnnotator, ...]
    weights: tuple[float, ...] = ()

    def in_turn(self, seed: int, prompt: PromptContent, key: str, number: int | None) -> list[TaskAnnotator]:
        """All members, in the order in which they are asked about a task: later ones where earlier ones abstain.

        Without weights task number n begins with member n mod size. With weights, or without a number, the order is
        drawn without replacement (Efraimidis and Spirakis 2006: by log(u) / weight), keyed by the task.
        """
        size = len(self.members)
        if number is not None and not self.weights:
            return [self.members[(number + turn) % size] for turn in range(size)]
        weights = self.weights or (1.0,) * size

        def draw(index: int) -> float:
            uniform = keyed_uniform(seed, self.members[index].name, "turn", prompt, key)
            return math.log(uniform or 2**-54) / weights[index]

        return [self.members[index] for index in sorted(range(size), key=draw, reverse=True)]


@dataclass(frozen=True)
class Annotators:
    """Everybody whom a config names, by part. `seed` decides parts and turns."""

    config: AnyAnnotatorConfig
    seed: int
    parts: Mapping[str, Pool]

    def pool_for(self, prompt: PromptContent) -> Pool:
        """Who labels the tasks of a prompt."""
        return self.parts[part_of(self.config, self.seed, prompt)]

    @property
    def members(self) -> list[TaskAnnotator]:
        """All annotators that are programs."""
        return [member for pool in self.parts.values() for member in pool.members if member.kind != "human"]


def pool_weights(config: AnyAnnotatorConfig) -> tuple[float, ...]:
    """The weights of a pool's members; none where they take turns."""
    return config.weights if isinstance(config, SimulatedAnnotators) else ()
