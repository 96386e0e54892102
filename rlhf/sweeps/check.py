"""What can be known wrong about a sweep before its first trial: every parameter is tried on the config of its command.

Every listed value, and both ends and the middle of every distribution, is composed as `rlhf run` would. That also shows
which parameters exist under which choice.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.config import STAGES, RLHFConfig
from rlhf.config.compose import load_config
from rlhf.config.provenance import flatten
from rlhf.config.serialize import plain_values
from rlhf.errors import ConfigError
from rlhf.sweeps.command import check_command, fixed_arguments
from rlhf.sweeps.file import Parameter, SweepFile
from rlhf.sweeps.space import SEED, Condition, Setting, Space, choice_above, program_arguments, space_of

# The agent gives every trial a folder of its own.
TAKEN = ("run.dir", "run.root", "run.cache")


def check_sweep(file: SweepFile) -> Space:
    """The file's space with its conditions. Raises `ConfigError` naming parameter, line and what is wrong."""
    check_command(file.command, file.program, str(file.path))
    for parameter in file.parameters:
        if parameter.name in TAKEN:
            raise ConfigError(
                f"{file.where(parameter.line)}: {parameter.name} is set by the agent, for each trial anew"
            )
        if parameter.name == SEED and parameter.distribution.in_grid is None:
            raise ConfigError(
                f"{file.where(parameter.line)}: seed is not searched but repeated: write seed: {{values: [1, 2, 3]}}"
            )
    fixed = fixed_arguments(file.command, os.environ)
    if fixed is None:
        # Another program's parameters are its own affair.
        return space_of(file)
    config = _base(file, fixed)
    _check_metric(file, config)
    trying = _Trying(file, fixed)
    space = space_of(file, _conditions(file, trying))
    for setting, seed in _rows(space):
        trying.check(space, setting, seed)
    return space


def _base(file: SweepFile, fixed: Sequence[str]) -> RLHFConfig:
    try:
        return load_config(fixed).config
    except ConfigError as error:
        raise ConfigError(f"the command of {file.path} does not resolve without its parameters: {error}") from error


def _check_metric(file: SweepFile, config: RLHFConfig) -> None:
    group = "" if file.metric is None else file.metric.name.partition("/")[0]
    if group in STAGES and group not in config.stages and not any(one.name == "stages" for one in file.parameters):
        assert file.metric is not None
        raise ConfigError(
            f"{file.path}: the metric {file.metric.name} is reported by stage {group}, and the command's stages are "
            f"{', '.join(config.stages)}"
        )


class _Trying:
    """Composes configs with some of the parameters, none of them twice."""

    def __init__(self, file: SweepFile, fixed: Sequence[str]) -> None:
        self.file, self.fixed = file, fixed
        self._seen: dict[str, ConfigError | frozenset[str]] = {}

    def keys(self, values: Mapping[str, Any]) -> ConfigError | frozenset[str]:
        """The dotted keys that the config then has, or what is wrong with it."""
        arguments = [f"{key}={value}" for key, value in program_arguments(self.file.parameters, values).items()]
        name = "\0".join(arguments)
        if name not in self._seen:
            try:
                config = load_config([*self.fixed, *arguments]).config
                self._seen[name] = frozenset(".".join(path) for path in flatten(plain_values(config)))
            except ConfigError as error:
                self._seen[name] = error
        return self._seen[name]

    def check(self, space: Space, setting: Setting, seed: Any) -> None:
        """Raises for a setting that does not resolve, blaming the parameter where one alone is to blame."""
        whole = setting if seed is None else {**setting, SEED: seed}
        error = self.keys(whole)
        if not isinstance(error, ConfigError):
            return
        by_name = {parameter.name: parameter for parameter in self.file.parameters}
        for name, value in whole.items():
            alone = {above: setting[above] for above in _above(space, name)} | {name: value}
            own = self.keys(alone)
            if isinstance(own, ConfigError):
                raise ConfigError(f"{self.file.where(by_name[name].line)}: parameter {name}={value!r}: {own}")
        shown = ", ".join(f"{name}={value!r}" for name, value in whole.items())
        raise ConfigError(f"{self.file.path}: these values do not go together: {shown}: {error}")


def _above(space: Space, name: str) -> list[str]:
    found: list[str] = []
    while name in space.conditions:
        name = space.conditions[name].on
        found.insert(0, name)
    return found


def _conditions(file: SweepFile, trying: _Trying) -> dict[str, Condition]:
    """For each parameter below a choice, under which of its values the parameter's key is there."""
    found: dict[str, Condition] = {}
    for parameter in file.parameters:
        choice = choice_above(parameter, file.parameters)
        if choice is None:
            continue
        there = [value for value in choice.distribution.values if _has(trying, choice, value, parameter.name)]
        if there and len(there) < len(choice.distribution.values):
            found[parameter.name] = Condition(choice.name, tuple(there))
    return found


def _has(trying: _Trying, choice: Parameter, value: Any, name: str) -> bool:
    keys = trying.keys({choice.name: value})
    # A choice that does not resolve is reported by itself.
    return isinstance(keys, ConfigError) or any(key == name or key.startswith(f"{name}.") for key in keys)


def _rows(space: Space) -> list[tuple[Setting, Any]]:
    """Settings in which every value to be tried occurs once: as few as there are values of the longest parameter."""
    if not space.parameters:
        return [({}, seed) for seed in space.seeds]
    tried = {parameter.name: parameter.distribution.tried for parameter in space.parameters}
    choices = [one for one in space.parameters if any(one.name == two.on for two in space.conditions.values())]
    starts: list[Setting] = [{}]
    for choice in choices:
        starts = [{**start, choice.name: value} for start in starts for value in tried[choice.name]]
    length = max(len(values) for values in (*tried.values(), space.seeds))
    rows: list[tuple[Setting, Any]] = []
    for start in starts[:LARGEST_NUMBER_OF_CHOICES]:
        for index in range(length):
            setting: Setting = {}
            for parameter in space.parameters:
                if parameter.name in start:
                    setting[parameter.name] = start[parameter.name]
                elif space.exists(parameter, setting):
                    values = tried[parameter.name]
                    setting[parameter.name] = values[index % len(values)]
            seed = space.seeds[index % len(space.seeds)] if space.seeds else None
            if (setting, seed) not in rows:
                rows.append((setting, seed))
    return rows


# Combinations of choices that are tried; each costs a tenth of a second for every value of the longest parameter.
LARGEST_NUMBER_OF_CHOICES = 32
