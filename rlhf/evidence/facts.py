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
_CHANGED_SHOWN = 4
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
    """What differs, by kind. `content` is what files and input models hold; `code_known` whether both runs wrote down
    of which code they are, so that no difference means that there is none."""

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
    code_known: bool = True


def compare_facts(first: RunRecord, second: RunRecord) -> Facts:
    """Everything that both runs wrote down about themselves and that differs."""
    kinds: dict[Kind, list[Fact]] = {"results": [], "rounding": [], "seed": [], "nothing": []}
    stages = first.stages.keys() & second.stages.keys()
    # The record of an arm has no config of its own: the study's decides it.
    for fact in _keys(first.config, second.config) if first.config and second.config else ():
        idle = fact.name in _MEASURED and _both_measured(first, second)
        kinds["nothing" if idle else kind_of(fact.name, stages)].append(fact)
    own = first.own_hashes | second.own_hashes
    return Facts(
        results=tuple(kinds["results"]),
        seed=tuple(kinds["seed"]),
        rounding=tuple(kinds["rounding"]),
        nothing=tuple(kinds["nothing"]),
        data=_data(first, second),
        content=tuple(_content(first, second, own, {fact.name for fact in kinds["results"]})),
        code=tuple(_code(_mapping(first, "code"), _mapping(second, "code"))),
        packages=tuple(_differing(_mapping(first, "packages"), _mapping(second, "packages"))),
        hardware=tuple(_differing(_mapping(first, "hardware"), _mapping(second, "hardware"))),
        compute=tuple(_compute(first, second)),
        code_known=any(all(_mapping(run, "code").get(key) for run in (first, second)) for key in ("commit", "content")),
    )


def _keys(first: Mapping[str, Any], second: Mapping[str, Any]) -> Iterator[Fact]:
    """Config keys that differ. A section that is empty on one side is one key: `ppo.rewards {...}, recorded {}`."""
    sections = sorted({key for one, other in ((first, second), (second, first)) for key in one if key not in other})
    sections = [key for key in sections if {} in (first.get(key), second.get(key))]
    inside = tuple(f"{section}." for section in sections)
    for key in sorted(first.keys() | second.keys()):
        if key.startswith(inside):
            continue
        if key in sections:
            yield Fact(key, *(_section(config, key) for config in (first, second)))
        elif first.get(key) != second.get(key):
            yield Fact(key, first.get(key), second.get(key))


def _section(config: Mapping[str, Any], section: str) -> Any:
    """The values below a section, without those that are nothing."""
    found = {key.removeprefix(f"{section}."): value for key, value in config.items() if key.startswith(f"{section}.")}
    return {key: value for key, value in found.items() if value is not None} or config.get(section)


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


def _code(first: Mapping[str, Any], second: Mapping[str, Any]) -> Iterator[Fact]:
    """Folders of the package that differ, commits, and what was not committed. What one alone wrote down is unknown of
    the other, which is no difference; where all folders are equal the commits do not matter."""
    contents = [code["content"] for code in (first, second) if isinstance(code.get("content"), Mapping)]
    if len(contents) == 2:
        differing = list(_differing(*contents))
        if not differing:
            return
        yield from differing
    if first.get("commit") and second.get("commit") and first["commit"] != second["commit"]:
        yield Fact("code commit", first["commit"], second["commit"])
    if len(contents) == 2 and first.get("diff_hash") and second.get("diff_hash"):
        return  # the folders say where; the files that both have changed would say less
    if first.get("diff_hash") != second.get("diff_hash") and (first.get("commit") or second.get("commit")):
        yield Fact("code not committed", _not_committed(first), _not_committed(second))


def _not_committed(code: Mapping[str, Any]) -> str | None:
    """The files where they were written down, else the hash; None where all was committed."""
    if not code.get("commit"):
        return "unknown"
    changed = code.get("changed")
    if not isinstance(changed, list) or not changed:
        return code.get("diff_hash")
    more = f" and {len(changed) - _CHANGED_SHOWN} more" if len(changed) > _CHANGED_SHOWN else ""
    return f"{', '.join(map(str, changed[:_CHANGED_SHOWN]))}{more} ({str(code.get('diff_hash'))[:8]})"


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
        yield from _inputs(ours, theirs, own, bool(keys))


def _inputs(first: StageRecord, second: StageRecord, own: frozenset[str], other_keys: bool) -> Iterator[Fact]:
    """Inputs that no stage of the runs has made: what those make differs as a consequence.

    One that a run alone has is explained where config keys differ: they say which inputs a stage reads.
    """
    for key in sorted(first.inputs.keys() | second.inputs.keys()):
        ours, theirs = first.inputs.get(key), second.inputs.get(key)
        if other_keys and None in (ours, theirs):
            continue
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
