"""The settings that a sweep can try: which parameters there are, which of them exist under which choice, and the seeds.

A *setting* is a value for each parameter that exists; a *trial* is one run of a setting with one seed. A parameter
below a choice (`peft.rank` below `peft`) exists where the chosen variant has its key. `seed` is never searched: every
setting is run with each of its values.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf.errors import ConfigError
from rlhf.sweeps.file import Parameter, SweepFile

SEED = "seed"
# Beyond this nobody waits for a grid's end, and its list would not fit into memory.
LARGEST_GRID = 1_000_000
Setting = dict[str, Any]


@dataclass(frozen=True)
class Condition:
    """A parameter exists where the choice `on` has one of `values`."""

    on: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Space:
    """Parameters with each choice before what depends on it, the seeds, and the conditions by parameter name."""

    parameters: tuple[Parameter, ...]
    seeds: tuple[Any, ...] = ()
    conditions: Mapping[str, Condition] = field(default_factory=dict)

    @property
    def is_conditional(self) -> bool:
        """Whether some parameter exists only sometimes."""
        return bool(self.conditions)

    @property
    def searched(self) -> tuple[Parameter, ...]:
        """The parameters that vary."""
        return tuple(one for one in self.parameters if one.distribution.kind != "constant")

    def exists(self, parameter: Parameter, setting: Mapping[str, Any]) -> bool:
        """Whether `parameter` exists under what `setting` has chosen."""
        condition = self.conditions.get(parameter.name)
        return condition is None or (condition.on in setting and setting[condition.on] in condition.values)

    def grid(self) -> list[Setting]:
        """Every combination once, the last parameter varying fastest."""
        settings = list(itertools.islice(self._combinations(0, {}), LARGEST_GRID + 1))
        if len(settings) > LARGEST_GRID:
            raise ConfigError(
                f"the grid has more than {LARGEST_GRID:,} settings; take method random or bayes with a run_cap"
            )
        return settings

    def drawn(self, sweep_seed: int, index: int) -> Setting:
        """The random setting of number `index`, the same whoever asks and however many agents there are."""
        setting: Setting = {}
        for parameter in self.parameters:
            if self.exists(parameter, setting):
                share = random.Random(f"{sweep_seed}/{index}/{parameter.name}").random()
                setting[parameter.name] = parameter.distribution.quantile(share)
        return setting

    def _combinations(self, position: int, before: Setting) -> Iterator[Setting]:
        if position == len(self.parameters):
            yield before
            return
        parameter = self.parameters[position]
        if not self.exists(parameter, before):
            yield from self._combinations(position + 1, before)
            return
        for value in parameter.distribution.in_grid or ():
            yield from self._combinations(position + 1, {**before, parameter.name: value})


def choice_above(parameter: Parameter, parameters: Sequence[Parameter]) -> Parameter | None:
    """The choice that may decide whether the parameter exists: the nearest listed one above its key."""
    parts = parameter.name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        above = ".".join(parts[:length])
        for other in parameters:
            if other.name in (above, f"{above}.type") and other is not parameter and other.distribution.is_listed:
                return other
    return None


def space_of(file: SweepFile, conditions: Mapping[str, Condition] | None = None) -> Space:
    """The space of a file; `conditions` are those that `rlhf.sweeps.check` found."""
    seeds = next((one for one in file.parameters if one.name == SEED and one.distribution.in_grid), None)
    rest = [one for one in file.parameters if one is not seeds]
    known = conditions or {}
    ordered = sorted(rest, key=lambda one: _depth(one.name, known))
    return Space(tuple(ordered), tuple(seeds.distribution.in_grid or ()) if seeds else (), known)


def _depth(name: str, conditions: Mapping[str, Condition]) -> int:
    """How many choices decide over the parameter; sorting by it keeps the file's order otherwise."""
    depth = 0
    while name in conditions:
        name, depth = conditions[name].on, depth + 1
    return depth


def program_arguments(parameters: Sequence[Parameter], values: Mapping[str, Any]) -> dict[str, Any]:
    """The values by the file's top-level keys, nested ones as mappings: what W&B's agent hands to the program."""
    arguments: dict[str, Any] = {}
    paths = {parameter.name: parameter.path for parameter in parameters} | {SEED: (SEED,)}
    for name, value in values.items():
        *above, last = paths[name]
        place = arguments
        for key in above:
            place = place.setdefault(key, {})
        place[last] = value
    return arguments


def label(value: Any) -> str:
    """A value as tables and charts show it."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key}={label(item)}" for key, item in value.items())
    return str(value)
