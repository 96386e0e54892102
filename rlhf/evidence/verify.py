"""`rlhf verify`: runs an experiment, or takes a finished run, and says PASS or FAIL by its expected.json."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rlhf.config import RLHFConfig
from rlhf.config.compose import load_config
from rlhf.config.errors import close_names, did_you_mean
from rlhf.errors import EXIT_FAILURE, EXIT_SUCCESS, ConfigError
from rlhf.evidence import expected as files
from rlhf.evidence.difference import Difference, compare
from rlhf.evidence.expected import Baseline
from rlhf.evidence.facts import compare_facts
from rlhf.evidence.judging import Verdict, judge, show_band, show_number
from rlhf.evidence.output import refuse_launchers, standard_output_to_error
from rlhf.evidence.record import RunRecord, full_config, read_record
from rlhf.evidence.recording import check_seeds, record_baseline
from rlhf.evidence.sameness import CAUSE, Sameness, doubts, explain_failure, same_experiment, steps_line
from rlhf.runs.machine import code_content
from rlhf.terminal import say

USAGE = """usage: rlhf verify                                        lists the baselines, what each asks and costs
       rlhf verify experiment=NAME [key=value ...]        runs it, or takes the finished run, and judges it
       rlhf verify experiment=NAME seeds=[1,2,3]          several seeds, each judged
       rlhf verify experiment=NAME record=true [seeds=..] runs the seeds, writes bands and recorded/
       rlhf verify run=FOLDER                             judges a run that is there
expected=FILE takes another expected.json; --json prints for machines."""
_OWN = ("run", "expected", "record", "seeds")
_DEFAULT_SEEDS = (1, 2, 3)


@dataclass(frozen=True)
class Options:
    """The arguments of the verb; `overrides` are the config's."""

    overrides: tuple[str, ...] = ()
    run: Path | None = None
    expected: Path | None = None
    record: bool = False
    seeds: tuple[int, ...] | None = None
    as_json: bool = False


@dataclass(frozen=True)
class Judgement:
    """One run, judged. `difference` is that to the recorded run, None where none is recorded."""

    record: RunRecord
    verdicts: tuple[Verdict, ...]
    sameness: tuple[Sameness, ...]
    difference: Difference | None
    explanation: tuple[str, ...] = field(default=())

    @property
    def passed(self) -> bool:
        """Whether every line says PASS."""
        return all(verdict.passed for verdict in self.verdicts) and all(line.passed for line in self.sameness)

    @property
    def cause(self) -> str:
        """The likeliest cause of a FAIL; empty on PASS."""
        return next((line.removeprefix(CAUSE) for line in self.explanation if line.startswith(CAUSE)), "")


def run_verify(arguments: Sequence[str], debug: bool) -> int:
    """The verb: 0 on PASS, 1 on FAIL. Raises `ConfigError` for what cannot be judged."""
    if not arguments:
        return _list()
    options = parse_options(arguments)
    if options.run is not None:
        return _verify_run(options)
    experiment = _experiment(options.overrides)
    baseline = (
        files.read_expected(options.expected)
        if options.expected is not None
        else files.find_baseline(experiment, files.folders())
    )
    _check_bands(baseline, options)
    runs = _run_seeds(baseline, options, debug)
    if isinstance(runs, int):
        return runs
    if options.record:
        baseline = record_baseline(baseline, runs)
        _tell(options, f"recorded {len(runs)} seeds in {baseline.path} and {baseline.recorded}")
    return _report(options, baseline, [judge_run(run, baseline) for run in runs.values()])


def parse_options(arguments: Sequence[str]) -> Options:
    """Tells the verb's own arguments from the config's. Raises `ConfigError` for a value that is not one."""
    values: dict[str, str] = {}
    overrides = []
    for argument in arguments:
        key, equals, value = argument.removeprefix("--").partition("=")
        if key in _OWN and equals:
            values[key] = value
        elif argument != "--json":
            overrides.append(argument)
    if "run" in values and overrides:
        near = did_you_mean(close_names(overrides[0].partition("=")[0], _OWN))
        raise ConfigError(f"run=FOLDER judges the run as it is; {overrides[0]} cannot change it{near}\n{USAGE}")
    if "run" in values and ("record" in values or "seeds" in values):
        raise ConfigError(f"record and seeds run an experiment; run=FOLDER judges one that is there\n{USAGE}")
    record = values.get("record", "false").lower()
    if record not in ("true", "false"):
        raise ConfigError(f"record={values['record']}: expected true or false")
    seeds = _seeds(values["seeds"]) if "seeds" in values else None
    if record == "true":
        seeds = _DEFAULT_SEEDS if seeds is None else seeds
        check_seeds(seeds)
    if seeds is not None and any(item.removeprefix("--").startswith(("seed=", "run.dir=")) for item in overrides):
        raise ConfigError(
            "seeds=[...] sets the seed of several runs: leave seed and run.dir out (run.root=FOLDER works)"
        )
    return Options(
        overrides=tuple(overrides),
        run=Path(values["run"]).expanduser() if "run" in values else None,
        expected=Path(values["expected"]).expanduser() if "expected" in values else None,
        record=record == "true",
        seeds=seeds,
        as_json="--json" in arguments,
    )


def _seeds(text: str) -> tuple[int, ...]:
    items = [item.strip() for item in text.strip().removeprefix("[").removesuffix("]").split(",")]
    if not items or not all(re.fullmatch(r"\d+", item) for item in items):
        raise ConfigError(f"seeds={text}: expected whole numbers such as seeds=[1,2,3]")
    if len(set(items)) != len(items):
        raise ConfigError(f"seeds={text} names a seed twice")
    return tuple(int(item) for item in items)


def _experiment(overrides: Sequence[str]) -> str:
    chosen = [
        item.removeprefix("--").partition("=")[2] for item in overrides if item.lstrip("-").startswith("experiment=")
    ]
    if not chosen:
        raise ConfigError(f"name the experiment, experiment=NAME, or the run, run=FOLDER\n{USAGE}")
    return chosen[-1].removesuffix(".yaml")


def _check_bands(baseline: Baseline, options: Options) -> None:
    """Before anything runs: is there a band to judge by?"""
    missing = [check.name for check in baseline.expected.checks if not check.recorded]
    if missing and not options.record:
        raise ConfigError(
            f"{baseline.path} has no band yet for {', '.join(missing)}. Record it: "
            f"rlhf verify experiment={baseline.expected.experiment} record=true"
        )


def _run_seeds(baseline: Baseline, options: Options, debug: bool) -> dict[int, RunRecord] | int:
    """The finished runs by seed, or the exit code of the first that did not finish."""
    from rlhf.bookkeeping import run_folder_of
    from rlhf.supervisor import supervise

    refuse_launchers("verify")
    # Every config first: a mistake should not show after the first seed.
    wanted = [[*options.overrides, f"seed={seed}"] for seed in options.seeds or ()] or [list(options.overrides)]
    configs = [load_config(arguments).config for arguments in wanted]
    runs = {}
    for arguments, config in zip(wanted, configs, strict=True):
        folder = run_folder_of(config).path
        if not options.record:
            _warn_beforehand(config, baseline, options)
        _tell(options, f"── seed {config.seed}: {folder} ──")
        with standard_output_to_error(options.as_json):
            code = supervise(config, command=["rlhf", "run", *arguments], debug=debug)
        if code != EXIT_SUCCESS:
            return code
        runs[config.seed] = read_record(folder)
        _warn_of_other_code(runs[config.seed], options)
    return runs


def _warn_of_other_code(record: RunRecord, options: Options) -> None:
    """Finished stages are taken as they are: an edit of the code since then is in none of their numbers."""
    code = record.manifest.get("code")
    made_by = code.get("content") if isinstance(code, Mapping) else None
    here = code_content()
    if isinstance(made_by, Mapping) and made_by != here:
        folders = sorted(key for key in made_by.keys() | here.keys() if made_by.get(key) != here.get(key))
        named = ", ".join(folders[:6]) + (f" and {len(folders) - 6} more" if len(folders) > 6 else "")
        _tell(
            options,
            f"note: {record.path} was made by other code than is here ({named}): nothing of that is in its numbers. "
            "run.dir=FOLDER makes the run anew",
        )


def _warn_beforehand(config: RLHFConfig, baseline: Baseline, options: Options) -> None:
    """A run that is going to be of another experiment is said before it takes its time."""
    record = _recorded(baseline)
    if record is None:
        return
    wanted = RunRecord(Path(), {}, full_config(config.model_dump(mode="json")), record.stages, ())
    facts = compare_facts(wanted, record).results
    if facts:
        named = "; ".join(fact.describe(second="recorded ") for fact in facts[:6])
        _tell(options, f"note: the verdict will be FAIL, the run is of another experiment: {named}")


def _verify_run(options: Options) -> int:
    assert options.run is not None
    record = read_record(options.run)
    baseline = files.read_expected(options.expected) if options.expected is not None else _baseline_of(record)
    _check_bands(baseline, options)
    if record.status != "finished":
        _tell(options, f"note: the run is {record.status}; what it has so far is judged")
    return _report(options, baseline, [judge_run(record, baseline)])


def _baseline_of(record: RunRecord) -> Baseline:
    """By the experiment's choice in the run's command, else by the name that its config gives the run."""
    command = record.manifest.get("command")
    chosen = [str(item) for item in command] if isinstance(command, list) else []
    names = [item.lstrip("-").removeprefix("experiment=") for item in chosen if "experiment=" in item]
    named = str(record.config.get("experiment"))
    places = files.folders()
    known = files.names_of(places)
    for name in [*names[::-1], named, *(name for name in known if name.replace("/", "_") == named)]:
        if name in known:
            return files.read_expected(known[name])
    return files.find_baseline(names[-1] if names else named, places)


def judge_run(record: RunRecord, baseline: Baseline) -> Judgement:
    """Judges one run by the bands, and whether it is of the recorded experiment at all."""
    verdicts = tuple(judge(check, record) for check in baseline.expected.checks)
    recorded = _recorded(baseline)
    difference = compare(record, recorded) if recorded is not None else None
    sameness = tuple(same_experiment(difference)) if difference is not None else ()
    judged = Judgement(record, verdicts, sameness, difference)
    if judged.passed:
        return judged
    return replace(judged, explanation=tuple(explain_failure(record, difference, baseline.expected, verdicts)))


def _recorded(baseline: Baseline) -> RunRecord | None:
    """The recorded run, None where none is recorded. Raises `ConfigError` for a folder that is not one."""
    if not baseline.recorded.is_dir():
        return None
    try:
        return read_record(baseline.recorded)
    except ConfigError as error:
        raise ConfigError(
            f"the baseline's record is damaged: {error}. Get it again (git checkout -- {baseline.recorded}), or remove "
            "the folder to judge by the bands alone"
        ) from error


def _report(options: Options, baseline: Baseline, judged: Sequence[Judgement]) -> int:
    passed = all(one.passed for one in judged)
    if options.as_json:
        print(json.dumps(to_json(baseline, judged), indent=2))
    else:
        for line in render(baseline, judged):
            say(line)
    return EXIT_SUCCESS if passed else EXIT_FAILURE


def render(baseline: Baseline, judged: Sequence[Judgement]) -> Iterator[str]:
    """The verdict as lines of text."""
    expected = baseline.expected
    yield f"{expected.experiment}: {expected.question}"
    yield f"expected: {baseline.path}; {expected.source}"
    for one in judged:
        yield ""
        seconds = one.record.manifest.get("seconds")
        took = f", {seconds:.0f} s" if isinstance(seconds, int | float) else ""
        recorded = ", ".join(f"{value:.0f}" for value in expected.seconds.values())
        yield f"seed {one.record.seed}: {one.record.path}{took}{f' (recorded {recorded} s)' if recorded else ''}"
        for verdict in one.verdicts:
            yield from _verdict_lines(verdict, expected.source)
        for line in one.sameness:
            yield f"  {_word(line.passed)}  {line.name}: {line.text}"
        if one.difference is None:
            yield f"  note: {baseline.recorded} is not there: whether config and data are the same is not known"
        elif one.passed:
            yield from (f"  note: {doubt}" for doubt in doubts(one.record, one.difference))
            yield f"  note: {steps_line(one.difference)}"
        if one.explanation:
            yield f"  against the recorded run, {baseline.recorded}:" if one.difference is not None else "  why:"
            yield from (f"    {line}" for line in one.explanation)
    yield ""
    lines = [verdict.passed for one in judged for verdict in one.verdicts]
    lines += [line.passed for one in judged for line in one.sameness]
    num_failed = lines.count(False)
    runs = f" of {len(judged)} seeds" if len(judged) > 1 else ""
    if not num_failed:
        yield f"PASS: {len(lines)} checks{runs}"
        return
    first = next(one for one in judged if not one.passed)
    seed = f" (seed {first.record.seed})" if len(judged) > 1 else ""
    yield f"FAIL: {num_failed} of {len(lines)} checks{runs}; {CAUSE}{first.cause}{seed}"


def _verdict_lines(verdict: Verdict, source: str) -> Iterator[str]:
    check = verdict.check
    yield (
        f"  {_word(verdict.passed)}  {check.name}: {show_number(verdict.seen)}, expected {show_band(check)}"
        f"  [{check.describe()}{f' less {check.minus.describe()}' if check.minus else ''}; {check.source or source}]"
    )
    if not verdict.passed:
        yield f"        {check.why}"
        if verdict.remark:
            yield f"        {verdict.remark}"


def _word(passed: bool) -> str:
    return "PASS" if passed else "FAIL"


def to_json(baseline: Baseline, judged: Sequence[Judgement]) -> dict[str, Any]:
    """The verdict for machines."""
    return {
        "experiment": baseline.expected.experiment,
        "expected": str(baseline.path),
        "passed": all(one.passed for one in judged),
        "runs": [
            {
                "run": str(one.record.path),
                "seed": one.record.seed,
                "passed": one.passed,
                "seconds": one.record.manifest.get("seconds"),
                "checks": [
                    {
                        "name": verdict.check.name,
                        "passed": verdict.passed,
                        "seen": verdict.seen,
                        "low": verdict.check.low,
                        "high": verdict.check.high,
                        "reading": verdict.check.describe(),
                        "source": verdict.check.source or baseline.expected.source,
                        "remark": verdict.remark,
                    }
                    for verdict in one.verdicts
                ],
                "sameness": [vars(line) for line in one.sameness],
                "likely_cause": one.cause or None,
                "explanation": list(one.explanation),
            }
            for one in judged
        ],
    }


def _list() -> int:
    """Every baseline: what it asks, and what it costs."""
    places = files.folders()
    names = files.names_of(places)
    if not names:
        say(f"no baselines: looked for experiments/*/expected.json in {', '.join(map(str, places)) or '.'}\n\n{USAGE}")
        return EXIT_SUCCESS
    for name, path in names.items():
        try:
            expected = files.read_expected(path).expected
        except ConfigError as error:
            say(f"{name}\n    {error}")
            continue
        seconds = sorted(expected.seconds.values())
        cost = f"{seconds[len(seconds) // 2]:.0f} s a seed on {expected.hardware}" if seconds else "not recorded yet"
        num_bands = sum(check.recorded for check in expected.checks)
        say(f"{name}\n    {expected.question}\n    {num_bands} of {len(expected.checks)} checks have a band; {cost}")
        say(f"    {expected.command}    ({path})")
    say(f"\n{USAGE}")
    return EXIT_SUCCESS


def _tell(options: Options, text: str) -> None:
    say(text, sys.stderr if options.as_json else None)
