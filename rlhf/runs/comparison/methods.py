"""Which runs are one method: those whose configs differ in nothing that decides the result but the seed."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.config import STAGES
from rlhf.config.ppo import BOOKKEEPING as PPO_BOOKKEEPING
from rlhf.config.provenance import flatten, show
from rlhf.config.training import BOOKKEEPING
from rlhf.errors import ConfigError
from rlhf.runs.comparison.records import Run

# Sections that say where and how a run is run, and keys that say what is written of it.
_PRACTICAL = {"seed", "run", "tracking", "plan", "launcher", "serve", "experiment", "stages", "zero", "distributed"}
_BOOKKEEPING = BOOKKEEPING | PPO_BOOKKEEPING | {"log_every", "confidence", "bootstrap_resamples"}
# Where inputs lie: other seeds have other folders, so they tell methods apart only where nothing else does.
_INPUTS = {
    *("policy", "reference", "reward_model", "value_model", "base", "baseline", "comparisons", "ratings"),
    *("benchmark", "path", "store"),
}
# The inputs that are given, not made by earlier runs.
_GIVEN = ("model.path", "data.path")
# More keys than this make no name.
_MOST_KEYS = 3
_ABSENT = "\N{EN DASH}"
# A key of the config, dotted, with its value in each run.
Values = tuple[Any, ...]


@dataclass(frozen=True)
class Method:
    """Runs of one method, one a seed, in the order of their seeds."""

    name: str
    runs: tuple[Run, ...]

    @property
    def seeds(self) -> tuple[int | None, ...]:
        """The seeds of the runs."""
        return tuple(run.seed for run in self.runs)


@dataclass(frozen=True)
class Grouping:
    """The methods, the keys in which the configs differ with their value in each method, and what is to be said."""

    methods: tuple[Method, ...]
    differing: Mapping[str, tuple[str, ...]]
    notes: tuple[str, ...] = ()


def group_runs(runs: Sequence[Run], group_by: Sequence[str] = ()) -> Grouping:
    """The methods in the order of their first runs, named by labels, by `group_by`, or by the keys that differ.

    Raises `ConfigError` for a key in `group_by` that no run has.
    """
    flat = [_flat(run) for run in runs]
    differing = _differing(runs, flat)
    if group_by:
        columns = {key: _column(flat, key) for key in group_by}
        keys = list(columns)
    else:
        columns = differing
        keys = _deciding(runs, differing)
    groups: dict[Any, list[int]] = {}
    for index, run in enumerate(runs):
        values = tuple(_hashable(columns[key][index]) for key in keys)
        groups.setdefault(("label", run.label) if run.label is not None else ("keys", values), []).append(index)
    names = _names(runs, list(groups.items()), {key: columns[key] for key in keys}, fixed=bool(group_by))
    notes: list[str] = []
    methods = [
        Method(name, _one_a_seed(name, [runs[index] for index in members], notes))
        for name, members in zip(names, groups.values(), strict=True)
    ]
    shown = {
        key: tuple(_shown({_text(values[index]) for index in members}) for members in groups.values())
        for key, values in differing.items()
    }
    return Grouping(
        tuple(methods), {key: values for key, values in shown.items() if len(set(values)) > 1}, tuple(notes)
    )


def _flat(run: Run) -> dict[str, Any]:
    return {".".join(path): value for path, value in flatten(dict(run.config)).items()}


def _differing(runs: Sequence[Run], flat: Sequence[Mapping[str, Any]]) -> dict[str, Values]:
    """The keys that decide something in at least two runs and differ between them, with each run's value."""
    found: dict[str, Values] = {}
    for key in sorted({key for one in flat for key in one}):
        section, _, rest = key.partition(".")
        last = key.rpartition(".")[2]
        if (section in _PRACTICAL and key != "distributed.precision") or last in _BOOKKEEPING or last == "num_seeds":
            continue
        # A section counts in the runs that have its stage.
        counts = [section not in STAGES or section in run.stages for run in runs]
        values = tuple(one.get(key) if used else None for one, used in zip(flat, counts, strict=True))
        used = {_text(value) for value, counted in zip(values, counts, strict=True) if counted}
        if len(used) > 1 and rest:
            found[key] = values
    stages = tuple(run.stages for run in runs)
    common = set.intersection(*map(set, stages)) if stages else set()
    if len(set(stages)) > 1:
        found["stages"] = tuple(", ".join(stage for stage in one if stage not in common) or "no more" for one in stages)
    return found


def _deciding(runs: Sequence[Run], differing: Mapping[str, Values]) -> list[str]:
    """The differing keys that make methods: inputs of other runs only where they tell two runs of one seed apart."""

    def is_input(key: str) -> bool:
        return key.rpartition(".")[2] in _INPUTS and key not in _GIVEN

    keys = [key for key in differing if not is_input(key)]
    for key in filter(is_input, differing):
        without, within = (len(set(_identities(runs, differing, some))) for some in (keys, [*keys, key]))
        if within > without:
            keys.append(key)
    return keys


def _identities(runs: Sequence[Run], differing: Mapping[str, Values], keys: Sequence[str]) -> list[Any]:
    return [
        (run.label, run.seed, *(_hashable(differing[key][index]) for key in keys)) for index, run in enumerate(runs)
    ]


def _column(flat: Sequence[Mapping[str, Any]], key: str) -> Values:
    """A key's value in each run; of a section all that is in it. Raises `ConfigError` when no run has it."""
    if any(key in one for one in flat):
        return tuple(one.get(key) for one in flat)
    within = [{name: value for name, value in one.items() if name.startswith(f"{key}.")} for one in flat]
    if any(within):
        return tuple(_text(sorted(one.items())) for one in within)
    near = difflib.get_close_matches(key, {name for one in flat for name in one}, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ConfigError(f"group_by={key}: no run's config has this key{hint} (`rlhf config` lists all keys)")


def _names(
    runs: Sequence[Run], groups: Sequence[tuple[Any, list[int]]], columns: Mapping[str, Values], *, fixed: bool
) -> list[str]:
    """A name for each group: its label, or as few keys as tell the groups apart, or the experiments' names."""
    unlabelled = [members[0] for kind, members in groups if kind[0] == "keys"]
    keys = list(columns) if fixed else _telling(columns, unlabelled)
    experiments = [str(runs[index].config.get("experiment") or "run") for index in unlabelled]
    by_experiment = len(set(experiments)) == len(unlabelled)
    short = _short_keys(keys)
    names = []
    for (kind, label), members in groups:
        first = members[0]
        if kind == "label":
            names.append(str(label))
        elif fixed or (keys and (len(keys) <= _MOST_KEYS or not by_experiment)):
            names.append(", ".join(f"{short[key]}={_text(columns[key][first])}" for key in keys))
        else:
            names.append(str(runs[first].config.get("experiment") or "run"))
    return _distinct(names)


def _telling(columns: Mapping[str, Values], indices: Sequence[int]) -> list[str]:
    """As few keys as tell the runs apart, found one at a time: the one that splits them most comes next."""
    chosen: list[str] = []

    def parts(keys: Iterable[str]) -> int:
        return len({tuple(_hashable(columns[key][index]) for key in keys) for index in indices})

    wanted = parts(columns)
    while parts(chosen) < wanted:
        rest = [key for key in columns if key not in chosen]
        # Of those that split as much, a number is the better name, and the shorter key.
        chosen.append(max(rest, key=lambda key: (parts([*chosen, key]), _is_plain(columns[key]), -len(key))))
    return chosen


def _is_plain(values: Values) -> bool:
    return all(value is None or isinstance(value, int | float | str) for value in values)


def _short_keys(keys: Sequence[str]) -> dict[str, str]:
    """The ends of the keys that tell them apart."""
    short: dict[str, str] = {}
    for key in keys:
        parts = key.split(".")
        ends = (".".join(parts[-size:]) for size in range(1, len(parts) + 1))
        short[key] = next(end for end in ends if sum(other == end or other.endswith(f".{end}") for other in keys) == 1)
    return short


def _distinct(names: Sequence[str]) -> list[str]:
    counts: dict[str, int] = {}
    found = []
    for name in names:
        counts[name] = counts.get(name, 0) + 1
        found.append(name if counts[name] == 1 else f"{name} ({counts[name]})")
    return found


def _one_a_seed(name: str, runs: Sequence[Run], notes: list[str]) -> tuple[Run, ...]:
    """Of several runs with one seed one: finished before others, then the one that started last."""
    kept: dict[int | None, Run] = {}
    for run in sorted(runs, key=lambda run: (run.status == "finished", str(run.manifest.get("started") or ""))):
        other = kept.get(run.seed)
        if other is not None:
            notes.append(
                f"{name}: {other.folder.path} and {run.folder.path} have the same seed {run.seed} and differ in no "
                f"key that decides the result; {run.folder.path} counts"
            )
        kept[run.seed] = run
    return tuple(sorted(kept.values(), key=lambda run: math.inf if run.seed is None else run.seed))


def _hashable(value: Any) -> str:
    return _text(value)


def _text(value: Any) -> str:
    if value is None:
        return _ABSENT
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else show(value)


def _shown(values: set[str]) -> str:
    return ", ".join(sorted(values)[:4]) + (", …" if len(values) > 4 else "")
