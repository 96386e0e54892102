"""Whether a run is one of the recorded experiment at all, and on FAIL what differs from the record."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rlhf.evidence.causes import describe_facts, strong_causes, weak_causes
from rlhf.evidence.difference import Difference, StageDifference
from rlhf.evidence.expected import Expected
from rlhf.evidence.judging import TOO_TIGHT, MissingNumberError, Verdict, value_of
from rlhf.evidence.record import RunRecord

LABELS = ("", "recorded")
CAUSE = "likely cause: "


@dataclass(frozen=True)
class Sameness:
    """One line of the verdict: a kind of thing that must be as recorded."""

    name: str
    passed: bool
    text: str


def same_experiment(difference: Difference) -> list[Sameness]:
    """What must be as recorded whatever the numbers are: the keys that decide results, the data, files and inputs.

    The seed is not among them, nor is anything that decides rounding alone.
    """
    facts = difference.facts
    missing = [name for name in difference.only_second if name.startswith("stage ")]
    lines = [
        ("config", facts.results, "the run is of another experiment"),
        ("data", facts.data, "the run is on other data"),
        ("files", facts.content, "the run has other files or input models"),
    ]
    found = [
        Sameness(name, not differing, f"{said}: {describe_facts(differing, LABELS)}" if differing else "as recorded")
        for name, differing, said in lines
    ]
    if missing:
        found.append(Sameness("stages", False, f"the run has no {', '.join(missing)}, as the recorded one has"))
    return found


def explain_failure(
    run: RunRecord, difference: Difference | None, expected: Expected, verdicts: Sequence[Verdict]
) -> list[str]:
    """What a run that failed differs in from the record: likely causes, first diverging step, and what is the same.

    `difference` is that to the recorded run, None where none is recorded. The first line names a cause, or says that
    none is known.
    """
    failed = [verdict for verdict in verdicts if not verdict.passed]
    causes = strong_causes(difference.facts, LABELS) if difference is not None else []
    causes += [*_unfinished(run), *doubts(run, difference), *_of_the_file(difference, failed)]
    tight = [one for one in failed if one.remark.startswith(TOO_TIGHT)]
    causes += [f"the band of {one.check.name!r} is too tight{one.remark.removeprefix(TOO_TIGHT)}" for one in tight]
    other_seed = run.seed is not None and expected.seeds and run.seed not in expected.seeds
    seed = (
        [f"seed {run.seed} is none of the recorded seeds {', '.join(map(str, expected.seeds))}"] if other_seed else []
    )
    notes = [f"note: {one}" for one in seed] if causes else []
    if not causes:
        causes = seed + (weak_causes(difference.facts, LABELS) if difference is not None else [])
    lines = [CAUSE + cause for cause in causes or [_none_known(difference)]] + notes
    return lines if difference is None else [*lines, *_notes(difference), steps_line(difference)]


def _unfinished(run: RunRecord) -> Iterator[str]:
    going = [f"stage {stage.name} is {stage.status}" for stage in run.stages.values() if not stage.finished]
    if going or run.status != "finished":
        yield f"the run is not finished: it is {run.status}{''.join(f', {one}' for one in going)}"


def doubts(run: RunRecord, difference: Difference | None) -> Iterator[str]:
    """What shows that the run's numbers are not, or not all of, what it computed."""
    if run.num_torn:
        yield f"metrics.jsonl of the run is damaged: {run.num_torn} of its lines are no JSON objects"
    if difference is None:
        return
    logs_otherwise = any(fact.name.endswith("log_every") for fact in difference.facts.nothing)
    for name, one in [("", difference), *difference.arms.items()]:
        arm = f"arm {name}, " if name else ""
        for stage in one.stages:
            if not (stage.partial or logs_otherwise) and _lacks_lines(stage):
                more = " ..." if len(stage.steps.unmatched) > 6 else ""
                shown = ", ".join(map(str, stage.steps.unmatched[:6])) + more
                yield f"metrics.jsonl of the run lacks lines of {arm}stage {stage.name}, at step {shown}"
            elif difference.first.seed == difference.second.seed and _contradicts_itself(stage):
                yield (
                    f"{arm}stage {stage.name} has the recorded outputs bit for bit and other numbers: they were "
                    "edited, or other code measures them otherwise"
                )


def _of_the_file(difference: Difference | None, failed: Sequence[Verdict]) -> Iterator[str]:
    """Checks that ask for what no run has."""
    for verdict in failed if difference is not None else ():
        if verdict.seen is None and difference is not None and _is_nowhere(verdict, difference.second):
            yield f"the check {verdict.check.name!r} asks for a number that the recorded run has not either"


def _lacks_lines(stage: StageDifference) -> bool:
    """Whether lines were lost. Another seed, or other numbers, may also make a stage shorter."""
    steps = stage.steps
    return steps.num_first == 0 < steps.num_second or (bool(steps.unmatched) and stage.beyond is None)


def _contradicts_itself(stage: StageDifference) -> bool:
    return bool(stage.outputs) and all(stage.outputs.values()) and stage.beyond is not None


def _is_nowhere(verdict: Verdict, record: RunRecord) -> bool:
    """Whether the record lacks the number too. It may lack single steps, and the rows of large tables."""
    readings = [verdict.check, *([verdict.check.minus] if verdict.check.minus is not None else [])]
    if any(one.row is not None or one.at.partition(":")[0] in ("step", "mean_last") for one in readings):
        return False
    try:
        value_of(verdict.check, record)
    except MissingNumberError:
        return True
    return False


def _none_known(difference: Difference | None) -> str:
    if difference is None:
        return "none is known: no run is recorded that this one could be compared with"
    same = "config, data, files, packages and machine are as recorded, as far as both wrote them down"
    if difference.facts.code_known:
        return f"none is known: {same}, and so is the code"
    found = difference.first_divergence() if difference.first.seed == difference.second.seed else None
    if found is None:
        return f"none is known: {same}; of which code the record is, it does not say"
    arm = f"arm {found[0]}, " if found[0] else ""
    return f"other code, from {arm}stage {found[1].stage} on: {same}; of which code the record is, it does not say"


def _notes(difference: Difference) -> list[str]:
    facts = difference.facts
    groups = [
        ("packages", facts.packages),
        ("computed", (*facts.rounding, *facts.compute)),
        ("hardware", facts.hardware),
    ]
    code = describe_facts(facts.code, LABELS) or ("as recorded" if facts.code_known else "the record does not say")
    notes = [f"{name}: {describe_facts(found, LABELS)}" if found else f"{name}: as recorded" for name, found in groups]
    return [f"code: {code}", *notes]


def steps_line(difference: Difference) -> str:
    """Where the numbers part from the recorded ones."""
    seeds = (difference.first.seed, difference.second.seed)
    if seeds[0] != seeds[1]:
        return f"steps: not compared, the recorded run has seed {seeds[1]} and this one {seeds[0]}"
    compared = [stage for one in (difference, *difference.arms.values()) for stage in one.stages]
    if not any(stage.steps.num_compared for stage in compared):
        return "first diverging step: no step is in both, so none could be compared"
    so_far = " as far as both have come" if difference.partial else ""
    found = difference.first_divergence(beyond_rounding=True)
    if found is None:
        if difference.first_divergence() is None:
            return f"first diverging step: none, all numbers equal the recorded ones bit for bit{so_far}"
        largest = f"largest relative difference {difference.largest:.2g}"
        return f"first diverging step: none but for rounding{so_far} ({largest})"
    arm, part = found
    return f"first diverging step: {f'arm {arm}, ' if arm else ''}{part.describe()}"
