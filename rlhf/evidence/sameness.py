"""Whether a run is one of the recorded experiment at all, and on FAIL what differs from the record."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf.evidence.causes import describe_facts, strong_causes, weak_causes
from rlhf.evidence.difference import Difference

LABELS = ("", "recorded")


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


def explain_failure(difference: Difference, seeds: tuple[int, ...], remarks: list[str]) -> list[str]:
    """What differs from the record, for a run that failed: likely causes, first diverging step, and what is the same.

    `seeds` are those the band was made of, `remarks` what the checks said themselves.
    """
    facts = difference.facts
    run, record = difference.first, difference.second
    same_seed = run.seed == record.seed
    causes = strong_causes(facts, LABELS) + [remark for remark in remarks if "too tight" in remark]
    lines = [f"likely cause: {cause}" for cause in causes or weak_causes(facts, LABELS)]
    if run.seed is not None and run.seed not in seeds:
        lines.append(
            f"{'note' if lines else 'likely cause'}: seed {run.seed} is none of the recorded seeds "
            f"{', '.join(map(str, seeds))}"
        )
    if not lines:
        lines.append(
            "likely cause: none is known: config, data, files, code, packages and machine are as recorded, as far as "
            "both wrote them down"
        )
    lines += _notes(difference)
    if same_seed:
        lines.append(_steps(difference))
    else:
        lines.append(f"steps: not compared, the recorded run has seed {record.seed} and this one {run.seed}")
    return lines


def _notes(difference: Difference) -> list[str]:
    facts = difference.facts
    groups = [
        ("code", facts.code),
        ("packages", facts.packages),
        ("computed", (*facts.rounding, *facts.compute)),
        ("hardware", facts.hardware),
    ]
    return [f"{name}: {describe_facts(found, LABELS)}" if found else f"{name}: as recorded" for name, found in groups]


def _steps(difference: Difference) -> str:
    found = difference.first_divergence(beyond_rounding=True)
    if found is None:
        found = difference.first_divergence()
        if found is None:
            return "first diverging step: none, all numbers equal the recorded ones bit for bit"
        return f"first diverging step: none but for rounding (largest relative difference {difference.largest:.2g})"
    arm, part = found
    return f"first diverging step: {f'arm {arm}, ' if arm else ''}{part.describe()}"
