"""Two runs compared: what they were made of, where their numbers part, and what that amounts to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from rlhf.evidence.facts import Facts, compare_facts
from rlhf.evidence.record import RunRecord, StageRecord
from rlhf.evidence.steps import (
    Divergence,
    StageSteps,
    Verdict,
    compare_results,
    compare_steps,
    is_rounding,
)

_ORDER: dict[Verdict, int] = {"identical": 0, "rounding": 1, "different": 2}


@dataclass(frozen=True)
class StageDifference:
    """One stage of both runs. `results` and `outputs` are compared where both finished the stage."""

    name: str
    statuses: tuple[str, str]
    steps: StageSteps
    results: tuple[Divergence, ...]
    outputs: Mapping[str, bool]
    partial: bool

    @property
    def verdict(self) -> Verdict:
        """By the numbers alone; `outputs` says whether the files are equal too."""
        parts = [part for part in (self.steps.first, self.steps.beyond) if part is not None] + list(self.results)
        if self.steps.unmatched or any(not is_rounding(part) for part in parts):
            return "different"
        return "rounding" if parts else "identical"

    @property
    def first(self) -> Divergence | None:
        """The first number that differs: of a step, else of the result."""
        return self.steps.first or (self.results[0] if self.results else None)

    @property
    def beyond(self) -> Divergence | None:
        """The first number that differs by more than rounding."""
        return self.steps.beyond or next((part for part in self.results if not is_rounding(part)), None)

    @property
    def largest(self) -> float:
        """The largest relative difference."""
        return max([self.steps.largest, *(part.relative for part in self.results)])


@dataclass(frozen=True)
class Difference:
    """Two runs. `only_first` and `only_second` are stages, and arms, that one of them alone has."""

    first: RunRecord
    second: RunRecord
    facts: Facts
    stages: tuple[StageDifference, ...]
    samples: tuple[int, str] | None
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    arms: Mapping[str, Difference] = field(default_factory=dict)

    @property
    def partial(self) -> bool:
        """Whether a part of one of the runs is not there yet, so that only the rest could be compared."""
        unfinished = any(run.status != "finished" and not run.is_recorded for run in (self.first, self.second))
        return (
            unfinished or any(stage.partial for stage in self.stages) or any(arm.partial for arm in self.arms.values())
        )

    @property
    def verdict(self) -> Verdict:
        """The worst of all parts. What one run alone has is a difference, unless the other one ended early.

        Outputs and samples that differ beside numbers that differ by rounding differ as these do; beside equal numbers
        nothing makes their difference small.
        """
        parts = [stage.verdict for stage in self.stages] + [arm.verdict for arm in self.arms.values()]
        files_differ = self.samples is not None or not all(all(stage.outputs.values()) for stage in self.stages)
        if files_differ and all(part == "identical" for part in parts):
            parts.append("different")
        if (self.only_first and not _ended_early(self.second)) or (self.only_second and not _ended_early(self.first)):
            parts.append("different")
        return max(parts, key=_ORDER.__getitem__, default="identical")

    @property
    def identical(self) -> bool:
        """Whether something could be compared, and all of it is equal."""
        return self.verdict == "identical" and not self.empty

    @property
    def empty(self) -> bool:
        """Whether the runs have no line of metrics and no finished stage in common."""
        compared = any(stage.steps.num_compared or not stage.partial for stage in self.stages)
        return not compared and all(arm.empty for arm in self.arms.values())

    @property
    def largest(self) -> float:
        """The largest relative difference of any number."""
        own = [stage.largest for stage in self.stages]
        return max([0.0, *own, *(arm.largest for arm in self.arms.values())])

    def first_divergence(self, *, beyond_rounding: bool = False) -> tuple[str, Divergence] | None:
        """The first number that differs and the arm it is of ("" for the run's own stages), in the order of work."""
        for stage in self.stages:
            part = stage.beyond if beyond_rounding else stage.first
            if part is not None:
                return "", part
        for name, arm in self.arms.items():
            found = arm.first_divergence(beyond_rounding=beyond_rounding)
            if found is not None:
                return f"{name}/{found[0]}".rstrip("/"), found[1]
        return None


def compare(first: RunRecord, second: RunRecord) -> Difference:
    """Compares two runs, or a run with a record, and their arms by name."""
    recorded = (first.is_recorded, second.is_recorded)
    shared = [name for name in first.stages if name in second.stages]
    arms = [name for name in first.arms if name in second.arms]
    return Difference(
        first=first,
        second=second,
        facts=compare_facts(first, second),
        stages=tuple(_compare_stage(first.stages[name], second.stages[name], recorded) for name in shared),
        samples=None if any(recorded) else _first_sample(first, second),
        only_first=_only(first, second),
        only_second=_only(second, first),
        arms={name: compare(first.arms[name], second.arms[name]) for name in arms},
    )


def _compare_stage(first: StageRecord, second: StageRecord, recorded: tuple[bool, bool]) -> StageDifference:
    both = first.finished and second.finished
    names = first.outputs.keys() | second.outputs.keys() if both else ()
    return StageDifference(
        name=first.name,
        statuses=(first.status, second.status),
        steps=compare_steps(first.name, first.rows, second.rows, finished=both, thinned=recorded),
        results=tuple(compare_results(first.name, first.summary, second.summary)) if both else (),
        outputs={name: first.outputs.get(name) == second.outputs.get(name) for name in sorted(names)},
        partial=not both,
    )


def _only(run: RunRecord, other: RunRecord) -> tuple[str, ...]:
    stages = [f"stage {name}" for name in run.stages if name not in other.stages]
    return (*stages, *(f"arm {name}" for name in run.arms if name not in other.arms))


def _ended_early(run: RunRecord) -> bool:
    return run.status != "finished" and not run.is_recorded


def _first_sample(first: RunRecord, second: RunRecord) -> tuple[int, str] | None:
    """The number of the first line of samples.jsonl that differs, and its stage and step; None when all are equal."""
    for number, (ours, theirs) in enumerate(zip(first.samples, second.samples, strict=False), start=1):
        if ours != theirs:
            return number, f"{ours.get('stage')} step {ours.get('step')}"
    ended_early = _ended_early(first) or _ended_early(second)
    if len(first.samples) != len(second.samples) and not ended_early:
        return min(len(first.samples), len(second.samples)) + 1, "the end of one of them"
    return None
