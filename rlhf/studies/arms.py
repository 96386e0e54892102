"""Studies that compare whole runs: their arms, each a run of its own in `arms/<name>`, one after the other.

An arm is an ordinary run: it has its manifest, metrics and report, it is skipped when it is finished and resumed when
it was interrupted. It differs from the study's config by the keys that the study changes. What the study finds is
written by the supervisor from what the arms left on disk; no torch is needed for it.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

from rlhf.config import STUDIES_OF_RUNS, RLHFConfig, StageName, config_from_values
from rlhf.errors import EXIT_SUCCESS, ArtifactError, ConfigError
from rlhf.runs.exhibits import Exhibits
from rlhf.runs.folder import RunFolder, StageResult
from rlhf.stage_inputs import inputs_of
from rlhf.terminal import say

# One line a study: the module with its `arms(config, run, policy)` and `exhibits(config, arms)`.
STUDY_MODULES: dict[str, str] = {
    "iterated": "rlhf.studies.iterated",
    "overoptimisation": "rlhf.studies.overoptimisation",
    "noisy_labels": "rlhf.studies.noisy_labels",
    "frontier": "rlhf.studies.frontier",
    "compare_arms": "rlhf.studies.compare_arms",
}
ARMS_FOLDER = "arms"


@dataclass(frozen=True)
class Arm:
    """One run of a study: its folder's name and the config keys (dotted) in which it differs from the study's."""

    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)


class Study(Protocol):
    """What a study's module defines."""

    def arms(self, config: RLHFConfig, run: RunFolder, policy: str) -> Sequence[Arm]:
        """The arms in the order in which they run; `policy` is the model that all of them start from."""

    def exhibits(self, config: RLHFConfig, arms: Mapping[str, RunFolder]) -> tuple[dict[str, Any], Exhibits]:
        """The key results and what is shown, from the finished arms by name."""


# Runs one arm to its end under a config of its own; returns the exit code.
RunArm = Callable[[RLHFConfig], int]


def check_alone(config: RLHFConfig, *, alone: bool) -> None:
    """A study of runs starts every process itself: raises `ConfigError` where another launcher or node takes part."""
    studies = [stage for stage in config.stages if stage in STUDIES_OF_RUNS]
    if studies and not alone:
        raise ConfigError(
            f"stage {studies[0]} runs whole pipelines one after the other and starts their processes itself, on one "
            "node: run it by `rlhf run` without torchrun, accelerate, deepspeed or srun and without "
            "distributed.num_nodes. distributed.num_processes counts the processes of each."
        )


def check_arms(config: RLHFConfig, run: RunFolder) -> None:
    """Makes the config of every arm of the run's studies: a mistake should show before anything is trained.

    Raises `ConfigError` where the study's settings and the user's do not go together.
    """
    for name in config.stages:
        if name in STUDIES_OF_RUNS:
            for arm in study_of(name).arms(config, run, inputs_of(config, run, name)["policy"]):
                arm_config(config, run, arm)


def study_of(name: StageName) -> Study:
    """The module of a study."""
    return cast("Study", importlib.import_module(STUDY_MODULES[name]))


def arm_folder(run: RunFolder, arm: str) -> RunFolder:
    """Where an arm of the study's run lives."""
    return RunFolder(run.path / ARMS_FOLDER / arm)


def arm_config(config: RLHFConfig, run: RunFolder, arm: Arm) -> RLHFConfig:
    """The arm's config. Raises `ConfigError` where the study's settings and the user's do not go together."""
    values = config.model_dump(mode="json")
    for key, value in {"run.dir": str(arm_folder(run, arm.name).path), **arm.changes}.items():
        *parents, last = key.split(".")
        section = values
        for parent in parents:
            section = section[parent]
        section[last] = value
    return config_from_values(values, f"arm {arm.name}")


def run_study(config: RLHFConfig, run: RunFolder, name: StageName, policy: str, run_arm: RunArm) -> int:
    """Runs what is left of the study's arms, then writes `stages/<study>`. Returns the first arm's failure, or 0."""
    started = time.monotonic()
    study = study_of(name)
    # All configs first: a mistake should not show after an hour.
    prepared = [(arm, arm_config(config, run, arm)) for arm in study.arms(config, run, policy)]
    for number, (arm, own) in enumerate(prepared, start=1):
        # What arms share, such as a preference store, lies beside them.
        arm_folder(run, arm.name).create()
        say(f"── {name}: {arm.name} ({number}/{len(prepared)}) ──")
        code = run_arm(own)
        if code != EXIT_SUCCESS:
            return code
    finish_study(config, run, name, [arm for arm, _ in prepared], time.monotonic() - started)
    return EXIT_SUCCESS


def finish_study(config: RLHFConfig, run: RunFolder, name: StageName, arms: Sequence[Arm], seconds: float) -> None:
    """Writes tables, figures and the result of a study whose arms are finished."""
    summary, exhibits = study_of(name).exhibits(config, {arm.name: arm_folder(run, arm.name) for arm in arms})
    stage = run.stage(name)
    outputs = exhibits.write(stage.path)
    stage.write_result(
        StageResult(
            stage=name,
            fingerprint=stage.read_fingerprint() or "",
            seconds=seconds,
            outputs=stage.hash_outputs(outputs),
            summary=summary,
        )
    )


def summary_of(arm: RunFolder, stage: str) -> Mapping[str, Any]:
    """The key results of a stage of a finished arm. Raises `ArtifactError` when it has none."""
    result = arm.stage(stage).read_result()
    if result is None:
        raise ArtifactError(f"the arm {arm.path} has no finished stage {stage}; run the same command again")
    return result.summary


def model_of(run: RunFolder, arm: str, stage: str) -> str:
    """Where an arm's stage puts its model, whether it is there or not."""
    return str(arm_folder(run, arm).stage(stage).model)


def output_of(run: RunFolder, arm: str, stage: str, name: str) -> Path:
    """Where an arm's stage puts an output, whether it is there or not."""
    return arm_folder(run, arm).stage(stage).path / name
