"""`compare_arms`: named arms, each a run that changes some keys of this config, and what is compared about them."""

from __future__ import annotations

import difflib
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from rlhf.config.base import PositiveInt, Section

# What becomes of a metric's values along a stage; `rlhf.studies.measures` says how each is computed.
REDUCTIONS = ("first", "last", "max", "min", "rise", "fall", "peak_step", "linear_slope", "linear_r_squared")
_METRIC = re.compile(r"[a-z_]+(/[\w-]+)+")


def _is_metric(name: str) -> str:
    if not _METRIC.fullmatch(name):
        raise ValueError(f"{name!r} is no metric: write STAGE/NAME, such as ppo/score_mean")
    return name


def _is_result(text: str) -> str:
    metric, at, reduction = text.partition("@")
    _is_metric(metric)
    if at and reduction not in REDUCTIONS:
        near = difflib.get_close_matches(reduction, REDUCTIONS, n=1)
        raise ValueError(
            f"{text!r} ends with none of {', '.join('@' + name for name in REDUCTIONS)}"
            + (f"; did you mean {metric}@{near[0]}?" if near else "")
        )
    return text


Metric = Annotated[str, AfterValidator(_is_metric)]
Result = Annotated[str, AfterValidator(_is_result)]


class CompareArmsConfig(Section):
    """Arms under names of the user's choice, run one after the other from one policy, and a table of their results.

    An arm is a mapping of config keys as they stand in an experiment's file; it has the stages ppo, evaluate and report
    unless it says otherwise. What an arm does not make or name is this run's: policy, comparisons, reward model.
    """

    policy: str | None = Field(None, description="policy that all arms start from; null is this run's SFT model")
    num_seeds: PositiveInt = Field(1, description="repetitions of all arms with the seeds seed, seed + 1, ...")
    arms: dict[str, Any] = Field({}, description="config keys that each arm changes, by the arm's name")
    differences: tuple[str, ...] = Field(
        (), description="FIRST/SECOND: the results of the first arm less those of the second, paired by seed"
    )
    results: tuple[Result, ...] = Field(
        (), description="STAGE/NAME of a stage's key results, or STAGE/METRIC@REDUCTION of a metric along it"
    )
    curves: tuple[Metric, ...] = Field((), description="metrics that are drawn, a panel each")
    x: Literal["step", "sqrt_kl"] = Field(
        "step", description="horizontal axis: steps of the stage, or the square root of ppo/kl_to_reference in nats"
    )
    window: PositiveInt = Field(3, description="steps that are averaged before a reduction")

    @model_validator(mode="after")
    def _arms_are_named(self) -> CompareArmsConfig:
        for name, changes in self.arms.items():
            if not re.fullmatch(r"[A-Za-z_][\w-]*", name):
                raise ValueError(f"arms: {name!r} is no name: letters, digits, _ and -, beginning with a letter or _")
            if not isinstance(changes, dict):
                raise ValueError(
                    f"arms.{name} holds config keys and their values, such as {{ppo: {{kl_coefficient: 0.0}}}}; "
                    f"got {changes!r}"
                )
        for difference in self.differences:
            first, _, second = difference.partition("/")
            if first not in self.arms or second not in self.arms or first == second:
                names = ", ".join(self.arms) or "(none)"
                raise ValueError(f"differences: {difference!r} is not FIRST/SECOND, two of the arms {names}")
        for field in ("differences", "results", "curves"):
            values = getattr(self, field)
            if len(set(values)) != len(values):
                raise ValueError(f"{field} lists an entry twice: {', '.join(values)}")
        return self
