"""Which model a stage will hold in which role, before or after the stages that make them have run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rlhf.config import RLHFConfig
from rlhf.config.peft import uses_lora
from rlhf.config.rewards import ModelReward, effective_rewards
from rlhf.models.paths import is_adapter, is_ensemble, member_folders, single_model
from rlhf.planning.architecture import Architecture, read_architecture, scratch_architecture


@dataclass(frozen=True)
class Source:
    """A model on disk, or one that this run is going to make: its architecture, and whether it is an adapter."""

    architecture: Architecture
    adapter: bool = False


@dataclass(frozen=True)
class Sources:
    """The models of all stages. `rewards` are the reward models that PPO loads, each once; `critic` is None on a trunk.

    An ensemble of whole models is as many of `rewards` as it has members. `same_reference`: the reference is where the
    policy starts.
    """

    base: Source
    reward_base: Source
    policy: Source
    reference: Source
    same_reference: bool
    critic: Source | None
    rewards: tuple[Source, ...]


# Architectures that were read, by path; None is the model from scratch.
Known = dict[str | None, Architecture]


def find_sources(config: RLHFConfig, inputs: Mapping[str, str] | None = None, known: Known | None = None) -> Sources:
    """What `config` names, else what its earlier stages will make; `inputs` are a running stage's own folders.

    A policy that neither the config nor an earlier stage provides is taken to be of the shape of `model`. What is in
    `known` is not read again, and what is read is added to it. Raises `ConfigError` for folders that cannot be planned.
    """
    reader = _Reader(config, {} if known is None else known)
    given = dict(inputs or {})
    base = reader.at(given.get("base") or config.sft.base or config.model.path, "model.path")
    warm = Source(base.architecture, uses_lora(config, "sft"))
    reward_base = reader.at(given.get("base") or config.reward_model.base, "reward_model.base", otherwise=warm)
    scorer = Source(reward_base.architecture, uses_lora(config, "reward_model"))
    section = config.ppo
    policy = reader.at(given.get("policy") or section.policy, "ppo.policy", otherwise=warm)
    reference = reader.at(given.get("reference") or section.reference, "ppo.reference", otherwise=policy)
    own_reward = reader.at(given.get("reward_model") or section.reward_model, "ppo.reward_model", otherwise=scorer)
    critic: Source | None = None
    if section.value_network == "separate":
        start = own_reward if section.value_init == "reward_model" else policy
        critic = reader.at(given.get("value_model") or section.value_model, "ppo.value_model", otherwise=start)
    own_path = given.get("reward_model") or section.reward_model
    rewards: dict[str | None, Source] = {}
    for name, reward in effective_rewards(dict(section.rewards)).items():
        if isinstance(reward, ModelReward):
            rewards[reward.path] = reader.at(reward.path, f"ppo.rewards.{name}.path", otherwise=own_reward)
    named = (given.get("policy") or section.policy, given.get("reference") or section.reference)
    same = named[1] is None or named[0] == named[1]
    scorers = tuple(
        source for path, source in rewards.items() for _ in range(_num_whole(path or own_path, source, config))
    )
    return Sources(base, reward_base, policy, reference, same, critic, scorers)


def _num_whole(path: str | None, source: Source, config: RLHFConfig) -> int:
    """How many whole models a reward is; an ensemble of adapters has one base. No `path`: what this run will train."""
    if source.adapter:
        return 1
    if path is None or not Path(path).expanduser().exists():
        return config.reward_model.num_members if path is None else 1
    return len(member_folders(path)) if is_ensemble(path) else 1


class _Reader:
    """Reads each config.json once."""

    def __init__(self, config: RLHFConfig, known: Known) -> None:
        self._config = config
        self._known = known

    def at(self, path: str | None, key: str, *, otherwise: Source | None = None) -> Source:
        if path is None and otherwise is not None:
            return otherwise
        if path not in self._known:
            model = self._config.model
            known = scratch_architecture(model) if path is None else read_architecture(path, model, key)
            self._known[path] = known
        return Source(self._known[path], path is not None and is_adapter(single_model(path)))
