"""Stage closed_form: how far from the exact optimum PPO, RLOO, GRPO and DPO end on a problem that can be enumerated.

Every algorithm starts from the same model, at the same beta, with the same budget of sampled responses to the same
prompts, and gets the same rewards. A policy is measured without sampling: all its responses are enumerated and summed
in float64. The numbers are in `curves/`, one file for each algorithm and beta, which a restart does not train again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.config import RLHFConfig
from rlhf.config.closed_form import Algorithm
from rlhf.config.peft import NoPEFT
from rlhf.errors import ConfigError
from rlhf.models.loading import quiet
from rlhf.runs.files import discard, disk_errors
from rlhf.runs.tracking import Tracker
from rlhf.stages.context import StageContext, StageOutput
from rlhf.studies import closed_form_ppo, closed_form_trl
from rlhf.studies.closed_form_curve import Curve, Point, Recorder, flat, num_points
from rlhf.studies.closed_form_problem import Problem, make_problem

CURVES = "curves"


@dataclass(frozen=True)
class _Training:
    algorithm: Algorithm
    beta: float

    @property
    def name(self) -> str:
        return f"{self.algorithm}_beta_{self.beta:g}"


def run(context: StageContext) -> StageOutput:
    """Trains every algorithm at every beta, and records where each one ends.

    Raises `ConfigError` for several processes, for adapters, and for settings of PPO that the problem cannot have.
    """
    config, section = context.config, context.config.closed_form
    _check(context)
    problem = make_problem(section, config.seed)
    trainings = [_Training(algorithm, beta) for algorithm in section.algorithms for beta in section.betas]
    total = sum(num_points(section.num_measurements, num_steps(config, one.algorithm)) for one in trainings)
    folder = context.stage.path / CURVES
    curves: list[Curve] = []
    # The lines of finished trainings are written again from their files, so a restarted study's lines are whole.
    with context.open_tracker(total) as tracker:
        step = 0
        for training in trainings:
            path = folder / f"{training.name}.json"
            curve = Curve.read(path)
            if curve is None:
                curve = _train(context, problem, training, _logger(tracker, training, step))
                curve.write(path)
            else:
                log = _logger(tracker, training, step)
                for point in curve.points:
                    log(point)
            step += len(curve.points)
            curves.append(curve)
            tracker.message(f"{training.name}: gap {curve.last.gap:.4f} ({curve.seconds:.0f} s)")
    return StageOutput(summary=summary(curves), outputs=[CURVES])


def num_steps(config: RLHFConfig, algorithm: Algorithm) -> int:
    """Updates (PPO) or optimiser steps of one training."""
    section = config.closed_form
    if algorithm == "ppo":
        return closed_form_ppo.num_updates(config.ppo, section)
    if algorithm == "dpo":
        return closed_form_trl.dpo_steps(section.dpo, section.num_responses)
    return closed_form_trl.online_steps(section.rloo if algorithm == "rloo" else section.grpo, section.num_responses)


def summary(curves: list[Curve]) -> dict[str, Any]:
    """The largest gap of each algorithm over the betas, and the whole table as `table`, one row a training."""
    largest: dict[str, float] = {}
    for curve in curves:
        name = f"largest_gap_{curve.algorithm}"
        largest[name] = max(curve.last.gap, largest.get(name, curve.last.gap))
    return {**largest, "table": [flat(curve) for curve in curves]}


def _check(context: StageContext) -> None:
    config = context.config
    if context.runtime.world_size > 1:
        raise ConfigError(
            f"closed_form runs on one process, not on {context.runtime.world_size}: its model is tiny. Leave "
            "distributed.num_processes out."
        )
    if config.zero.stage > 0 or not isinstance(config.peft, NoPEFT):
        raise ConfigError("closed_form trains whole models without sharding: leave zero and peft out.")
    if context.runtime.device.type != "cpu":
        raise ConfigError(f"closed_form runs on the CPU, not on {context.runtime.device}: set distributed.device=cpu.")
    closed_form_ppo.check_section(config.ppo)


def _train(context: StageContext, problem: Problem, training: _Training, log: Callable[[Point], None]) -> Curve:
    recorder = Recorder(
        problem,
        training.algorithm,
        training.beta,
        num_steps=num_steps(context.config, training.algorithm),
        on_point=log,
    )
    if training.algorithm == "ppo":
        closed_form_ppo.train_ppo(problem, context.config.ppo, recorder, context.runtime)
        return recorder.finish()
    scratch = context.stage.path / "scratch"
    _write_model(problem, scratch)
    train = {
        "rloo": closed_form_trl.train_rloo,
        "grpo": closed_form_trl.train_grpo,
        "dpo": closed_form_trl.train_dpo,
    }[training.algorithm]
    train(problem, recorder, scratch)
    discard(scratch)
    return recorder.finish()


def _write_model(problem: Problem, folder: Path) -> None:
    """The problem's model as a folder: the trainers load their reference from where the policy came from."""
    discard(folder)
    with disk_errors(folder), quiet():
        problem.new_model().save_pretrained(folder)


def _logger(tracker: Tracker, training: _Training, step: int) -> Callable[[Point], None]:
    """Writes a training's points as lines of metrics, numbered on from `step` through all trainings."""
    counter = iter(range(step + 1, step + 1_000_000))

    def log(point: Point) -> None:
        here = point.standing
        tracker.log(
            next(counter),
            {
                "closed_form/responses": point.responses,
                "closed_form/gap": here.gap,
                f"closed_form/gap/{training.algorithm}/{training.beta:g}": here.gap,
                "closed_form/objective": here.objective,
                "closed_form/expected_reward": here.expected_reward,
                "closed_form/kl_to_reference": here.kl,
            },
        )

    return log
