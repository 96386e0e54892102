"""Methods against one another: results over seeds, tests on the same prompts, win rates, lengths."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from rlhf import statistics
from rlhf.runs.comparison.methods import Method
from rlhf.runs.comparison.notes import answering, notes_on
from rlhf.runs.comparison.records import MEASURES, Answered, Response, Run
from rlhf.runs.report_sections import SHARES
from rlhf.runs.results import Estimate
from rlhf.statistics import Difference, Interval, LengthControlled

# With more methods each is compared with the first one alone.
MOST_COMPARED = 6
# So many prompts in common make a pair; fewer are no sample.
FEWEST_PROMPTS = 2
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Result:
    """A result of a method: the mean over the seeds that have it with Student's interval, or the only seed's own."""

    estimate: Estimate
    seeds: tuple[float, ...]

    @property
    def over_seeds(self) -> bool:
        """Whether the interval is one over seeds."""
        return len(self.seeds) > 1


@dataclass(frozen=True)
class Test:
    """One measure of one method less that of another, with its tests.

    The difference's p-value is of seeds and prompts together, `p_prompts` of sign flips over prompts (of these very
    models), `p_seeds` of sign flips, or permutations, over seeds (of the methods); None where there is nothing to test.
    `adjusted`, `adjusted_prompts` and `adjusted_seeds` are Holm's over all pairs of the measure.
    """

    first: str
    second: str
    measure: str
    difference: Difference
    num_prompts: int
    num_seeds: tuple[int, int]
    paired_seeds: bool
    p_prompts: float | None
    p_seeds: float | None
    adjusted: float = math.nan
    adjusted_prompts: float | None = None
    adjusted_seeds: float | None = None


@dataclass(frozen=True)
class WinRate:
    """How often the first method's response scores higher than the second's on the same prompt, ties half."""

    first: str
    second: str
    rate: Interval
    controlled: LengthControlled
    num_prompts: int


@dataclass(frozen=True)
class Comparison:
    """All that is found between the methods."""

    methods: tuple[Method, ...]
    results: Mapping[str, Mapping[str, Result]]
    tests: tuple[Test, ...] = ()
    win_rates: tuple[WinRate, ...] = ()
    against_baseline: Mapping[str, WinRate] = field(default_factory=dict)
    ratings: Mapping[str, Interval] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def compare(methods: Sequence[Method], *, confidence: float = 0.95, seed: int = 0) -> Comparison:
    """Compares the methods by all that their runs left."""
    notes = notes_on(methods)
    pairs = _pairs(methods)
    tests = [
        test
        for measure in MEASURES
        for first, second in pairs
        if (test := _test(first, second, measure, confidence, seed)) is not None
    ]
    if not any(test.measure == "score" for test in tests) and len(methods) > 1:
        notes.append(
            "no two methods have scored responses to the same prompts: there is no test on prompts, and no win rate"
        )
    rates = [rate for pair in pairs if (rate := _win_rate(*pair, confidence, seed)) is not None]
    baselines = {one.name: rate for one in methods if (rate := _baseline_rate(one, confidence, seed)) is not None}
    return Comparison(
        tuple(methods),
        results_of(methods, confidence),
        tuple(_adjusted(tests)),
        tuple(rates),
        baselines,
        _ratings(methods, confidence, seed),
        tuple(notes),
    )


def results_of(methods: Sequence[Method], confidence: float) -> dict[str, dict[str, Result]]:
    """Of each result (`stage/name`) the methods that have it, with their estimate over the runs that have it."""
    found: dict[str, dict[str, Result]] = {}
    for method in methods:
        for name in dict.fromkeys(name for run in method.runs for name in run.results):
            ones = [one for run in method.runs if (one := run.results.get(name)) is not None]
            values = tuple(one.value for one in ones)
            estimate = ones[0]
            if len(values) > 1:
                interval = statistics.t_interval(values, confidence=confidence)
                estimate = Estimate(*_within(name, values, interval))
            found.setdefault(name, {})[method.name] = Result(estimate, values)
    return found


def _within(name: str, values: Sequence[float], interval: Interval) -> tuple[float, float, float]:
    """The interval; that of shares ends where shares do."""
    if name.rpartition("_")[2] in SHARES and all(0 <= value <= 1 for value in values):
        return interval.value, max(0.0, interval.low), min(1.0, interval.high)
    return interval.value, interval.low, interval.high


def _pairs(methods: Sequence[Method]) -> list[tuple[Method, Method]]:
    if len(methods) <= MOST_COMPARED:
        return list(itertools.combinations(methods, 2))
    return [(methods[0], other) for other in methods[1:]]


def _shared(first: Method, second: Method, measure: str) -> tuple[list[Run], list[Run], bool]:
    """The runs that have the measure, and whether they are paired by seed: two common seeds at least, or the only one.

    Of paired methods the runs of seeds that one side alone has are left out. Empty where a side has no such run.
    """
    both = answering(first, measure), answering(second, measure)
    if not all(both):
        return [], [], False
    ours, theirs = ({run.seed: run for run in side if run.seed is not None} for side in both)
    common = [seed for seed in ours if seed in theirs]
    if common and (len(common) > 1 or len(ours) == len(theirs) == 1):
        return [ours[seed] for seed in common], [theirs[seed] for seed in common], True
    return *both, False


def _prompts(runs: Iterable[Run], measure: str) -> list[str]:
    """The prompts that all runs answered, with the measure of each response."""
    common: dict[str, None] | None = None
    for run in runs:
        have = {name: None for name, one in run.answers.items() if measure in one.own.numbers}
        common = have if common is None else {name: None for name in common if name in have}
    return list(common or ())


def _matrix(runs: Sequence[Run], prompts: Sequence[str], measure: str) -> Array:
    return np.array([[run.answers[prompt].own.numbers[measure] for prompt in prompts] for run in runs])


def _test(first: Method, second: Method, measure: str, confidence: float, seed: int) -> Test | None:
    ours, theirs, paired = _shared(first, second, measure)
    prompts = _prompts([*ours, *theirs], measure)
    if len(prompts) < FEWEST_PROMPTS:
        return None
    mine, other = _matrix(ours, prompts, measure), _matrix(theirs, prompts, measure)
    difference = statistics.hierarchical_difference(
        mine, other, paired_seeds=paired, paired_prompts=True, confidence=confidence, seed=seed
    )
    over_prompts = statistics.sign_flip_p_value(mine.mean(axis=0) - other.mean(axis=0), seed=seed)
    over_seeds = None
    if min(len(ours), len(theirs)) > 1:
        if paired:
            over_seeds = statistics.sign_flip_p_value((mine - other).mean(axis=1), seed=seed)
        else:
            over_seeds = statistics.permutation_p_value(mine.mean(axis=1), other.mean(axis=1), seed=seed)
    counts = len(ours), len(theirs)
    return Test(first.name, second.name, measure, difference, len(prompts), counts, paired, over_prompts, over_seeds)


def _adjusted(tests: Sequence[Test]) -> list[Test]:
    """Holm's correction within each measure: its pairs are the family."""
    found = []
    for measure in dict.fromkeys(test.measure for test in tests):
        family = [test for test in tests if test.measure == measure]
        together = statistics.holm([test.difference.p_value for test in family])
        prompts = statistics.holm([1.0 if test.p_prompts is None else test.p_prompts for test in family])
        seeds = statistics.holm([1.0 if test.p_seeds is None else test.p_seeds for test in family])
        for index, test in enumerate(family):
            found.append(
                Test(
                    **{
                        **vars(test),
                        "adjusted": together[index],
                        "adjusted_prompts": None if test.p_prompts is None else prompts[index],
                        "adjusted_seeds": None if test.p_seeds is None else seeds[index],
                    }
                )
            )
    return found


def _wins(mine: Array, other: Array) -> Array:
    return np.where(mine == other, 0.5, (mine > other).astype(np.float64))


def _win_rate(first: Method, second: Method, confidence: float, seed: int) -> WinRate | None:
    ours, theirs, paired = _shared(first, second, "score")
    prompts = _prompts([*ours, *theirs], "score")
    if len(prompts) < FEWEST_PROMPTS:
        return None
    together = list(zip(ours, theirs, strict=True)) if paired else list(itertools.product(ours, theirs))
    sides = [[(one.answers[name].own, two.answers[name].own) for name in prompts] for one, two in together]
    return _rate(first.name, second.name, sides, 1 if paired else len(theirs), confidence, seed)


def _baseline_rate(method: Method, confidence: float, seed: int) -> WinRate | None:
    """The method's runs against their own baselines."""
    runs = answering(method, "score")
    prompts = [
        name
        for name in _prompts(runs, "score")
        if all((base := run.answers[name].baseline) is not None and "score" in base.numbers for run in runs)
    ]
    if len(prompts) < FEWEST_PROMPTS:
        return None
    sides = [[_sides(run.answers[name]) for name in prompts] for run in runs]
    return _rate(method.name, "baseline", sides, 1, confidence, seed)


def _sides(answered: Answered) -> tuple[Response, Response]:
    assert answered.baseline is not None
    return answered.own, answered.baseline


def _rate(
    first: str,
    second: str,
    rows: Sequence[Sequence[tuple[Response, Response]]],
    num_opponents: int,
    confidence: float,
    seed: int,
) -> WinRate:
    """The win rate over rows (one a pair of runs) of pairs of responses (one a prompt).

    With several opponents the rows go through them for each own run, and both sides' seeds vary on their own.
    """
    scores = np.array([[[side.numbers["score"] for side in pair] for pair in row] for row in rows])
    lengths = np.array([[[float(len(side.text)) for side in pair] for pair in row] for row in rows])
    wins = _wins(scores[:, :, 0], scores[:, :, 1])
    table = wins.reshape(-1, num_opponents, wins.shape[1])
    own = table.mean(axis=1)
    # What an opponent loses beyond the mean on that prompt: its mean over opponents is 0, so the rate is own's.
    other = table.mean(axis=(0, 1)) - table.mean(axis=0)
    if num_opponents == 1:
        other = np.zeros_like(own)
    found = statistics.hierarchical_difference(
        own, other, paired_seeds=num_opponents == 1, confidence=confidence, seed=seed
    )
    rate = Interval(found.value, max(0.0, found.low), min(1.0, found.high))
    if found.standard_error == 0.0:
        # Nothing varies where one side always wins, and yet it may lose on another prompt.
        rate = statistics.wilson(found.value * wins.shape[1], wins.shape[1], confidence=confidence)
    controlled = statistics.length_controlled_win_rate(
        wins.ravel(),
        (lengths[:, :, 0] - lengths[:, :, 1]).ravel(),
        confidence=confidence,
        seed=seed,
        groups=np.tile(np.arange(wins.shape[1]), len(rows)),
    )
    return WinRate(first, second, rate, controlled, wins.shape[1])


def _ratings(methods: Sequence[Method], confidence: float, seed: int) -> dict[str, Interval]:
    """Bradley-Terry ratings of three methods or more that answered the same prompts; the others have none."""
    methods = [method for method in methods if answering(method, "score")]
    prompts = _prompts([run for method in methods for run in answering(method, "score")], "score")
    if len(methods) < 3 or len(prompts) < FEWEST_PROMPTS:
        return {}
    outcomes = np.zeros((len(prompts), len(methods), len(methods)))
    for (row, first), (column, second) in itertools.combinations(enumerate(methods), 2):
        ours, theirs, paired = _shared(first, second, "score")
        together = list(zip(ours, theirs, strict=True)) if paired else list(itertools.product(ours, theirs))
        mine = _matrix([one for one, _ in together], prompts, "score")
        other = _matrix([two for _, two in together], prompts, "score")
        outcomes[:, row, column] = _wins(mine, other).mean(axis=0)
        outcomes[:, column, row] = 1.0 - outcomes[:, row, column]
    found = statistics.rating_intervals(outcomes, confidence=confidence, seed=seed)
    return {method.name: interval for method, interval in zip(methods, found, strict=True)}
