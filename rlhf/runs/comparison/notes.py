"""What the reader of a comparison must know before reading a number."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf.config.provenance import show
from rlhf.runs.comparison.methods import Method
from rlhf.runs.comparison.records import Run

# The seeds of more methods make no sentence.
_MOST_LISTED = 6


def answering(method: Method, measure: str) -> list[Run]:
    """The method's runs with responses that have the measure."""
    return [run for run in method.runs if any(measure in one.own.numbers for one in run.answers.values())]


def notes_on(methods: Sequence[Method]) -> list[str]:
    """Sentences without their full stops: what is missing first."""
    runs = [run for method in methods for run in method.runs]
    notes = [_status(run) for run in runs]
    notes += [_missing(method, run) for method in methods for run in method.runs]
    notes += [_single(methods), _seeds(methods), _data(runs), _judges(runs), _baselines(runs), _partial(runs)]
    return [note for note in notes if note is not None]


def _status(run: Run) -> str | None:
    if run.status == "running":
        return f"{run.folder.path} is still running: its numbers are those of now"
    if run.status in ("finished", "unknown"):
        return None
    return f"{run.folder.path} is not finished: its status is {run.status}"


def _missing(method: Method, run: Run) -> str | None:
    """What the method's other runs have and this one has not."""
    others = [other for other in method.runs if other is not run]
    stages = dict.fromkeys(stage for other in others for stage in other.summaries)
    missing = [f"no result of {stage}" for stage in stages if stage not in run.summaries]
    if not run.answers and any(other.answers for other in others):
        missing.append("no scored responses")
    if not missing:
        return None
    return f"{run.folder.path} has {' and '.join(missing)}: there {method.name} is its other seeds alone"


def _single(methods: Sequence[Method]) -> str | None:
    single = [method.name for method in methods if len(method.runs) < 2]
    if not single:
        return None
    what = "every method" if len(single) == len(methods) else " and ".join(single)
    return (
        f"one seed alone of {what}: seeds were not varied, so intervals and tests are over prompts and speak of these "
        "trained models, not of the methods"
    )


def _seeds(methods: Sequence[Method]) -> str | None:
    """Where methods with answers share some seeds only, or none."""
    seeds = {
        method.name: [run.seed for run in own if run.seed is not None]
        for method in methods
        if (own := answering(method, "score"))
    }
    if len({tuple(one) for one in seeds.values()}) < 2:
        return None
    listed = "; ".join(f"{name}: {', '.join(map(str, one)) or 'unknown'}" for name, one in seeds.items())
    which = f" ({listed})" if len(seeds) <= _MOST_LISTED else ""
    return (
        f"the methods do not have the same seeds{which}: two methods are compared on the seeds that both have, where "
        "these are two or more, and else on all of them without pairs"
    )


def _data(runs: Sequence[Run]) -> str | None:
    """Runs whose configs name the same data, and whose data was not the same."""
    seen: dict[str, tuple[str, Run]] = {}
    for run in runs:
        content = run.data_content
        if content is None:
            continue
        known, other = seen.setdefault(show(run.config.get("data")), (content, run))
        if known != content:
            return (
                f"{other.folder.path} and {run.folder.path} name the same data, and its content was not the same: what "
                "differs between them may be the data's doing"
            )
    return None


def _judges(runs: Sequence[Run]) -> str | None:
    judges = {run.judge for run in runs if run.judge is not None}
    if len(judges) < 2:
        return None
    return f"the runs have different judges ({', '.join(sorted(judges))}): their scores are not comparable"


def _baselines(runs: Sequence[Run]) -> str | None:
    relative = [run for run in runs if (run.judge or "").startswith("language_model")]
    if len({run.baseline for run in relative}) < 2:
        return None
    return (
        "the language model compared each policy with its own run's baseline, and the baselines differ: a score says "
        "how much better than its baseline a response is"
    )


def _partial(runs: Sequence[Run]) -> str | None:
    partial = [run for run in runs if run.answers and not run.has_all_responses]
    if not partial:
        return None
    return (
        f"{len(partial)} of {len(runs)} runs kept the responses of their sample table alone: the tests use these "
        "prompts. `rlhf evaluate` on such a run writes stages/evaluate/responses.jsonl with all of them"
    )
