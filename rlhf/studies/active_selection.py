"""Stage active_selection: how many labels a reward model needs, by how they were chosen.

For each seed a pool of responses is sampled from the first policy. All strategies begin with the same labels, drawn at
random; after each round the reward model is trained anew on all labels so far, measured on test pairs without noise,
and chooses the next ones. The numbers are in `curves/`, a file for each seed and strategy, which a restart keeps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rlhf.config.active_selection import Strategy, check_active_selection
from rlhf.data.embedded import gold_reward
from rlhf.preferences.annotators import AnnotatorResources, make_annotators
from rlhf.preferences.selection import Floats
from rlhf.records import Comparison
from rlhf.runs.files import write_text
from rlhf.runs.tracking import Tracker
from rlhf.stages.context import StageContext, StageOutput
from rlhf.stages.reward_members import member_seed
from rlhf.stages.reward_objectives import is_tie
from rlhf.studies.active_curves import NAMES, Curve, Point, as_csv, exhibits
from rlhf.studies.active_pool import Labeller, Pool, PoolMaker, choose_next
from rlhf.studies.active_training import RewardLearner
from rlhf.studies.seeds import seeds_of

CURVES = "curves"
# The points of all curves in one table.
CURVES_CSV = "curves.csv"
# Those that choose by the scores of the model that is measured.
_BY_SCORES: set[Strategy] = {"best_worst", "near_tie"}
OnPoint = Callable[[Point], None]


def run(context: StageContext) -> StageOutput:
    """Measures every strategy with every seed and writes the exhibits.

    Raises `ConfigError` for what the study cannot do: several processes, adapters, other losses than bradley_terry.
    """
    config, section = context.config, context.config.active_selection
    check_active_selection(config, context.runtime.world_size)
    work = _Work(context)
    curves: list[Curve] = []
    total = section.num_seeds * len(section.strategies) * len(section.num_labels)
    folder = context.stage.path / CURVES
    # The lines of finished curves are written again from their files, so a restarted study's lines are whole.
    with context.open_tracker(total) as tracker:
        work.report = tracker.message
        for seed in seeds_of(config, section.num_seeds):
            for strategy in section.strategies:
                path = folder / f"seed-{seed}-{strategy}.json"
                log = _logger(tracker, strategy, len(curves) * len(section.num_labels))
                curve = Curve.read(path)
                if curve is None:
                    curve = work.measure(seed, strategy, log)
                    curve.write(path)
                else:
                    for point in curve.points:
                        log(point)
                curves.append(curve)
                last = curve.points[-1]
                tracker.message(
                    f"seed {seed}, {NAMES[strategy]}: accuracy {last.accuracy:.3f} with {last.labels} labels "
                    f"({curve.seconds:.0f} s)"
                )
    summary, shown = exhibits(section, curves)
    write_text(context.stage.path / CURVES_CSV, as_csv(curves))
    return StageOutput(summary=summary, outputs=[CURVES, CURVES_CSV, *shown.write(context.stage.path)])


class _Work:
    """What the trainings share: the policy's pools, and one reward model in memory; both made when first needed."""

    def __init__(self, context: StageContext) -> None:
        self._context = context
        self.report: Callable[[str], None] = lambda text: None
        self._maker: PoolMaker | None = None
        self._learner: RewardLearner | None = None
        self._seed: _Seed | None = None

    def measure(self, seed: int, strategy: Strategy, log: OnPoint) -> Curve:
        """Every round of a strategy with a seed."""
        if self._maker is None or self._learner is None:
            self._maker = PoolMaker(self._context, self.report)
            self._learner = RewardLearner(self._context, self._context.inputs["base"])
        if self._seed is None or self._seed.seed != seed:
            self._seed = _Seed(self._context, seed, self._maker.make(seed), self._learner)
        return self._seed.measure(strategy, log)


class _Seed:
    """The rounds of one seed; what all strategies begin with is trained once."""

    def __init__(self, context: StageContext, seed: int, pool: Pool, learner: RewardLearner) -> None:
        config = context.config
        self.seed = seed
        self._section = config.active_selection
        self._pool, self._learner = pool, learner
        annotators = make_annotators(config.preferences.annotator, AnnotatorResources(seed))
        as_ties = config.preferences.resolution.both_bad == "tie"
        self._labeller = Labeller(annotators, pool, ties_of_both_bad=as_ties)
        self._texts = learner.encode(pool.texts)
        self._test = learner.encode([text for side in zip(*pool.test, strict=True) for text in side])
        self._first: tuple[Point, Floats] | None = None

    def measure(self, strategy: Strategy, log: OnPoint) -> Curve:
        """Asks, trains and measures, round by round."""
        started = time.monotonic()
        asked: list[int] = []
        points: list[Point] = []
        scores: Floats | None = None
        for count in self._section.num_labels:
            members = self._members(strategy, asked, scores)
            # The first round has no model to choose by.
            chooser: Strategy = strategy if asked else "random"
            asked = asked + choose_next(chooser, self._pool, asked, count - len(asked), members)
            point, scores = self._round(asked, strategy)
            points.append(point)
            log(point)
        return Curve(self.seed, strategy, tuple(points), time.monotonic() - started)

    def _members(self, strategy: Strategy, asked: Sequence[int], scores: Floats | None) -> Callable[[], Floats]:
        """The scores (M, N) of the pool by what chooses next."""

        def members() -> Floats:
            if strategy != "disagreement":
                assert scores is not None
                return scores[np.newaxis]
            found = []
            comparisons = self._labeller.label(asked)
            for number in range(self._section.num_members):
                own = member_seed(self.seed, number)
                self._learner.train(comparisons, seed=own, bootstrap=self._section.bootstrap)
                found.append(self._learner.scores(self._texts))
            return np.array(found)

        return members

    def _round(self, asked: Sequence[int], strategy: Strategy) -> tuple[Point, Floats]:
        """Trains on the labels of the candidates and measures; with the pool's scores (N,) where somebody needs them.

        Nobody does after the last round.
        """
        is_first = len(asked) == self._section.num_labels[0]
        if is_first and self._first is not None:
            return self._first
        comparisons = self._labeller.label(asked)
        self._learner.train(comparisons, seed=self.seed)
        better, worse = np.split(self._learner.scores(self._test), 2)
        accuracy = float((0.5 + 0.5 * np.sign(better - worse)).mean())
        readers = set(self._section.strategies) if is_first else {strategy}
        is_read = readers & _BY_SCORES and len(asked) < self._section.num_labels[-1]
        scores = self._learner.scores(self._texts if is_read else [])
        found = Point(len(asked), len(comparisons), accuracy, label_accuracy(comparisons)), scores
        if is_first:
            self._first = found
        return found


def label_accuracy(comparisons: Sequence[Comparison]) -> float | None:
    """The share of the comparisons whose chosen response has the higher gold reward; ties are left out on both sides.

    None where nothing is left.
    """
    gaps = [
        gold_reward(row.prompt, row.chosen) - gold_reward(row.prompt, row.rejected)
        for row in comparisons
        if not is_tie(row)
    ]
    decided = [gap > 0 for gap in gaps if gap]
    return sum(decided) / len(decided) if decided else None


def _logger(tracker: Tracker, strategy: Strategy, done: int) -> OnPoint:
    """Writes the points of a curve as lines of metrics, numbered on from `done` through all curves."""
    steps = iter(range(done + 1, done + 1_000_000))

    def log(point: Point) -> None:
        metrics: dict[str, Any] = {
            "active_selection/labels": float(point.labels),
            "active_selection/accuracy": point.accuracy,
            f"active_selection/accuracy/{strategy}": point.accuracy,
        }
        if point.label_accuracy is not None:
            metrics["active_selection/label_accuracy"] = point.label_accuracy
        tracker.log(next(steps), metrics)

    return log
