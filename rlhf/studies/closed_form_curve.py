"""A training of the study `closed_form` as a curve of exact measurements, and its file."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlhf.config.closed_form import Algorithm
from rlhf.evaluation.closed_form import Standing
from rlhf.runs.files import write_json
from rlhf.runs.jsonable import read_json
from rlhf.studies.closed_form_problem import Problem


@dataclass(frozen=True)
class Point:
    """Where the policy stands after so many sampled responses."""

    responses: int
    standing: Standing


@dataclass(frozen=True)
class Curve:
    """One training: an algorithm at one beta. `optimum` is what the last point could at best be."""

    algorithm: Algorithm
    beta: float
    points: tuple[Point, ...]
    optimum: Standing
    seconds: float

    @property
    def last(self) -> Standing:
        """Where the trained policy stands."""
        return self.points[-1].standing

    def write(self, path: Path) -> None:
        """Writes the curve as JSON, whole or not at all. Raises `DiskFullError`."""
        write_json(path, self)

    @classmethod
    def read(cls, path: Path) -> Curve | None:
        """The curve of a file; None when there is none."""
        body: Any = read_json(path)
        if not isinstance(body, dict):
            return None
        points = tuple(Point(point["responses"], Standing(**point["standing"])) for point in body["points"])
        rest = {name: body[name] for name in ("algorithm", "beta", "seconds")}
        return cls(points=points, optimum=Standing(**body["optimum"]), **rest)


class Recorder:
    """Measures a policy at the start and at evenly spaced steps of its training, the last one included.

    A step is an optimiser step or an update; `num_responses` are used up by the last one.
    """

    def __init__(
        self,
        problem: Problem,
        algorithm: Algorithm,
        beta: float,
        *,
        num_steps: int,
        on_point: Callable[[Point], None] = lambda point: None,
    ) -> None:
        self.problem = problem
        self.algorithm: Algorithm = algorithm
        self.beta = beta
        self.num_steps = num_steps
        self.points: list[Point] = []
        self._on_point = on_point
        self._started = time.monotonic()

    def observe(self, step: int, policy: nn.Module) -> None:
        """After step `step`, 0 being before the first: measures the policy if it is time."""
        wanted = self.problem.config.num_measurements
        due = step == 0 or step * wanted // self.num_steps > (step - 1) * wanted // self.num_steps
        if due and (not self.points or self._responses(step) > self.points[-1].responses):
            # Trainings draw from the global stream; a look at the model takes nothing from it.
            with torch.random.fork_rng(devices=[]):
                point = Point(self._responses(step), self.problem.standing(policy, self.beta))
            self.points.append(point)
            self._on_point(point)

    def _responses(self, step: int) -> int:
        return self.problem.config.num_responses * step // self.num_steps

    def finish(self) -> Curve:
        """The curve. Raises `RuntimeError` when the training ended early."""
        if not self.points or self.points[-1].responses != self.problem.config.num_responses:
            raise RuntimeError(f"{self.algorithm} at beta {self.beta} ended before its last step")
        optimum = self.problem.optimum(self.beta)
        return Curve(self.algorithm, self.beta, tuple(self.points), optimum, time.monotonic() - self._started)


def num_points(num_measurements: int, num_steps: int) -> int:
    """How many points a recorder makes of a training of `num_steps` steps."""
    return 1 + min(num_measurements, num_steps)


def flat(curve: Curve) -> dict[str, Any]:
    """The end of a training as one row of a table: the policy's numbers and, as `optimal_...`, those of the optimum."""
    row: dict[str, Any] = {"algorithm": curve.algorithm, "beta": curve.beta, **dataclasses.asdict(curve.last)}
    optimum = dataclasses.asdict(curve.optimum)
    row |= {f"optimal_{name}": value for name, value in optimum.items() if name != "gap"}
    return {**row, "responses": curve.points[-1].responses, "seconds": curve.seconds}
