"""What two runs were made of, and where that differs: config, data, files, code, packages, machine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any, Literal

from rlhf.config import STUDIES
from rlhf.config.ppo import BOOKKEEPING as PPO_BOOKKEEPING
from rlhf.config.preferences import BOOKKEEPING as PREFERENCES_BOOKKEEPING
from rlhf.config.provenance import flatten
from rlhf.config.training import BOOKKEEPING as TRAINING_BOOKKEEPING
from rlhf.evidence.record import RunRecord, StageRecord

# `results`: decides what comes out. `rounding`: decides in which order numbers are added. `seed`: another sample of the
# same experiment. `nothing`: where a run lives, what is kept of it, and sections of stages that did not run.
Kind = Literal["results", "rounding", "seed", "nothing"]

_ROUNDING_SECTIONS = ("zero",)
_ROUNDING_DISTRIBUTED = ("num_processes", "num_nodes", "device", "num_threads", "determinism")
# What the keys that leave it to the machine amounted to is written down with each stage, and compared there.
_MEASURED = ("distributed.num_threads", "distributed.device", "distributed.num_processes", "distributed.num_nodes")
_ROUNDING_NAMES = ("micro_batch_size", "gradient_checkpointing", "rollout_batch_size", "logprob_chunk_tokens")
_IDLE_SECTIONS = ("run", "tracking", "plan", "launcher", "serve", "experiment", "stages")
# Keys that say where something lies; the content of what lies there is compared by its hash.
_PLACES = {
    *("path", "file", "files", "store", "template", "ranking_template", "rating_template", "chat_template"),
    *("policy", "reference", "value_model", "base", "baseline", "comparisons", "ratings", "benchmark"),
}
_OF_STAGES = ("sft", "collect", "reward_model", "reward_report", "ppo", "dpo", "best_of_n", "evaluate")
# Parts of what decides a stage that are hashes of files, by what they are called.
_FILE_HASHES = {
    ("ppo", "section", "rewards"): "ppo.rewards",
    ("best_of_n", "section", "rewards"): "best_of_n.rewards",
    ("collect", "section", "rewards"): "preferences.annotator",
    ("active_selection", "section", "rewards"): "preferences.annotator",
    ("evaluate", "section", "judge"): "evaluate.judge",
}


@dataclass(frozen=True)
class Fact:
    """One thing that differs: what it is, and both values."""

    name: str
    first: Any
    second: Any

    def describe(self, first: str = "", second: str = "") -> str:
        """`ppo.learning_rate 0.003, recorded 0.0003` with `second="recorded "`."""
        return f"{self.name} {first}{show(self.first)}, {second}{show(self.second)}"


@dataclass(frozen=True)
class Facts:
    """What differs, by kind. `content` is what files and input models hold; `unknown` what a run did not write down."""

    results: tuple[Fact, ...] = ()
    seed: tuple[Fact, ...] = ()
    rounding: tuple[Fact, ...] = ()
    nothing: tuple[Fact, ...] = ()
    data: tuple[Fact, ...] = ()
    content: tuple[Fact, ...] = ()
    code: tuple[Fact, ...] = ()
    packages: tuple[Fact, ...] = ()
    hardware: tuple[Fact, ...] = ()
    compute: tuple[Fact, ...] = ()


def compare_facts(first: RunRecord, second: RunRecord) -> Facts:
    """Everything that both runs wrote down about themselves and that differs."""
    kinds: dict[Kind, list[Fact]] = {"results": [], "rounding": [], "seed": [], "nothing": []}
    stages = first.stages.keys() & second.stages.keys()
    # The record of an arm has no config of its own: the study's decides it.
    for key in sorted(first.config.keys() | second.config.keys()) if first.config and second.config else ():
        ours, theirs = first.config.get(key), second.config.get(key)
        if ours != theirs:
            kind: Kind = "nothing" if key in _MEASURED and _both_measured(first, second) else kind_of(key, stages)
            kinds[kind].append(Fact(key, ours, theirs))
    own = first.own_hashes | second.own_hashes
    return Facts(
        results=tuple(kinds["results"]),
        seed=tuple(kinds["seed"]),
        rounding=tuple(kinds["rounding"]),
        nothing=tuple(kinds["nothing"]),
        data=_data(first, second),
        content=tuple(_content(first, second, own, {fact.name for fact in kinds["results"]})),
        code=tuple(_differing(_mapping(first, "code"), _mapping(second, "code"), "code")),
        packages=tuple(_differing(_mapping(first, "packages"), _mapping(second, "packages"))),
        hardware=tuple(_differing(_mapping(first, "hardware"), _mapping(second, "hardware"))),
        compute=tuple(_compute(first, second)),
    )


def _both_measured(first: RunRecord, second: RunRecord) -> bool:
    shared = [(first.stages[name], second.stages[name]) for name in first.stages if name in second.stages]
    return bool(shared) and all(ours.compute and theirs.compute for ours, theirs in shared)


def kind_of(key: str, stages: Set[str]) -> Kind:
    """What a config key decides where these stages are compared."""
    section, _, rest = key.partition(".")
    name = key.rpartition(".")[2]
    if key == "seed":
        return "seed"
    if section in _IDLE_SECTIONS or _is_idle(section, rest, name, stages):
        return "nothing"
    if section in _ROUNDING_SECTIONS or name in _ROUNDING_NAMES:
        return "rounding"
    if section == "distributed" and rest != "precision":
        return "rounding" if rest in _ROUNDING_DISTRIBUTED else "nothing"
    return "results"


def _is_idle(section: str, rest: str, name: str, stages: Set[str]) -> bool:
    """Whether it is only read by stages that did not run, says where something lies, or how much of a run is kept."""
    studies = stages & set(STUDIES)
    if section in STUDIES and section not in stages:
        return True
    if section in _OF_STAGES and section not in stages and not studies:
        return True
    if section == "preferences":
        return ("collect" not in stages and not studies) or any(
            rest == key or rest.startswith(f"{key}.") for key in PREFERENCES_BOOKKEEPING
        )
    if name in _PLACES or (section in _OF_STAGES and name == "reward_model"):
        return True
    if name in _ROUNDING_NAMES:
        return False
    return (section == "ppo" and name in PPO_BOOKKEEPING) or (
        section in ("sft", "reward_model", "dpo") and name in TRAINING_BOOKKEEPING
    )


def _mapping(run: RunRecord, key: str) -> Mapping[str, Any]:
    value = run.manifest.get(key)
    return value if isinstance(value, Mapping) else {}


def _differing(first: Mapping[str, Any], second: Mapping[str, Any], prefix: str = "") -> Iterator[Fact]:
    """Of what both wrote down. A run that wrote nothing down differs in nothing."""
    for key in first.keys() & second.keys() if not (first and second) else sorted(first.keys() | second.keys()):
        if first.get(key) != second.get(key):
            yield Fact(f"{prefix} {key}".strip(), first.get(key), second.get(key))


def _data(first: RunRecord, second: RunRecord) -> tuple[Fact, ...]:
    ours, theirs = (_mapping(run, "data").get("content") for run in (first, second))
    if ours is None or theirs is None or ours == theirs:
        return ()
    return (Fact("the data's content", ours, theirs),)


def _content(first: RunRecord, second: RunRecord, own: frozenset[str], keys: set[str]) -> Iterator[Fact]:
    """Files and input models whose content differs, where no differing key explains it."""
    for name in first.stages:
        if name not in second.stages:
            continue
        ours, theirs = first.stages[name], second.stages[name]
        if not ours.decided_by or not theirs.decided_by:
            continue
        for path, called in _FILE_HASHES.items():
            values = [_at(stage.decided_by, path[1:]) for stage in (ours, theirs)]
            explained = any(key == called or key.startswith(f"{called}.") for key in keys)
            if path[0] == name and None not in values and values[0] != values[1] and not explained:
                yield Fact(f"what {called} does", *values)
        files = [flatten(_at(stage.decided_by, ("section", "files")) or {}) for stage in (ours, theirs)]
        for key in sorted(files[0].keys() | files[1].keys()):
            if files[0].get(key) != files[1].get(key):
                yield Fact(f"the file preferences.{'.'.join(key)}", files[0].get(key), files[1].get(key))
        for part, called in (("chat_template", "the chat template"), ("version", f"the code of stage {name}, version")):
            values = [stage.decided_by.get(part) for stage in (ours, theirs)]
            if part in ours.decided_by.keys() & theirs.decided_by.keys() and values[0] != values[1]:
                yield Fact(called, *values)
        yield from _inputs(ours, theirs, own)


def _inputs(first: StageRecord, second: StageRecord, own: frozenset[str]) -> Iterator[Fact]:
    """Inputs that no stage of the runs has made: what those make differs as a consequence."""
    for key in sorted(first.inputs.keys() | second.inputs.keys()):
        ours, theirs = first.inputs.get(key), second.inputs.get(key)
        if ours != theirs and not (_made(ours, own) and _made(theirs, own)):
            yield Fact(f"the content of {first.name}.{key}", ours, theirs)


def _made(content: str | None, own: frozenset[str]) -> bool:
    # An adapter is "<hash> on <hash of its base>", an ensemble "ensemble <hash> <hash> ...".
    return content is not None and any(part in own for part in content.split())


def _at(value: Any, path: tuple[str, ...]) -> Any:
    for part in path:
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _compute(first: RunRecord, second: RunRecord) -> Iterator[Fact]:
    """How the stages computed; what differs in several stages alike is said once."""
    seen: dict[tuple[str, str, str], tuple[Fact, list[str]]] = {}
    for name in first.stages:
        if name in second.stages:
            for fact in _differing(first.stages[name].compute, second.stages[name].compute):
                seen.setdefault((fact.name, repr(fact.first), repr(fact.second)), (fact, []))[1].append(name)
    for fact, names in seen.values():
        yield Fact(f"{fact.name} ({', '.join(names)})", fact.first, fact.second)


def show(value: Any) -> str:
    """A value on one line; a hash by its beginning."""
    if value is None:
        return "none"
    if isinstance(value, str):
        return value[:12] if len(value) in (40, 64) and set(value) <= set("0123456789abcdef") else value
    return f"{value:g}" if isinstance(value, float) and f"{value:g}" == str(value) else str(value)
