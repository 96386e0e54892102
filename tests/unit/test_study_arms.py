"""Studies of runs: the arms' configs, their order, what a failure leaves, and what the result is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from rlhf.config import STAGES, STUDIES_OF_RUNS, RLHFConfig
from rlhf.errors import ArtifactError, ConfigError
from rlhf.runs.exhibits import Exhibits, Table
from rlhf.runs.folder import RunFolder, StageResult
from rlhf.studies import arms
from rlhf.studies.arms import Arm, arm_config, arm_folder, run_study, summary_of

CONFIG = RLHFConfig(experiment="loop")


class _Study:
    """Two arms that differ in the learning rate; the result is their final loss."""

    def __init__(self, changes: Sequence[Mapping[str, Any]]) -> None:
        self._changes = changes

    def arms(self, config: RLHFConfig, run: RunFolder, policy: str) -> list[Arm]:
        return [Arm(f"arm-{n}", {"ppo.policy": policy, **change}) for n, change in enumerate(self._changes)]

    def exhibits(self, config: RLHFConfig, arms: Mapping[str, RunFolder]) -> tuple[dict[str, Any], Exhibits]:
        losses = {name: summary_of(folder, "sft")["loss"] for name, folder in arms.items()}
        return losses, Exhibits((Table("losses", ("arm", "loss"), tuple(losses.items())),))


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.create()
    folder.stage("iterated").path.mkdir()
    return folder


def _use(monkeypatch: pytest.MonkeyPatch, *changes: Mapping[str, Any]) -> None:
    monkeypatch.setattr(arms, "study_of", lambda name: _Study(changes))


def _finish(config: RLHFConfig) -> int:
    """Stands for a run: leaves a finished stage."""
    assert config.run.dir is not None
    stage = RunFolder(Path(config.run.dir)).stage("sft")
    stage.path.mkdir(parents=True)
    stage.write_result(StageResult("sft", "", 1.0, {}, {"loss": config.sft.learning_rate}))
    return 0


def test_every_study_of_runs_is_a_stage_with_a_section_and_a_module() -> None:
    assert set(STUDIES_OF_RUNS) == set(arms.STUDY_MODULES) <= set(STAGES)
    for name in STUDIES_OF_RUNS:
        assert hasattr(getattr(CONFIG, name), "policy")
        study = arms.study_of(name)
        assert callable(study.arms)
        assert callable(study.exhibits)


def test_arms_run_in_order_and_the_result_is_made_of_them(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    _use(monkeypatch, {"sft.learning_rate": 0.5}, {"sft.learning_rate": 0.25})
    seen: list[RLHFConfig] = []

    def run_arm(config: RLHFConfig) -> int:
        seen.append(config)
        return _finish(config)

    assert run_study(CONFIG, run, "iterated", "models/sft", run_arm) == 0
    assert [config.run.dir for config in seen] == [str(run.path / "arms" / f"arm-{n}") for n in (0, 1)]
    assert {config.ppo.policy for config in seen} == {"models/sft"}
    result = run.stage("iterated").read_result()
    assert result is not None
    assert result.summary == {"arm-0": 0.5, "arm-1": 0.25}
    assert not run.stage("iterated").altered_outputs(result)
    assert (run.stage("iterated").path / "losses.csv").read_text() == "arm,loss\narm-0,0.5\narm-1,0.25\n"


def test_a_failed_arm_ends_the_study_without_a_result(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    _use(monkeypatch, {}, {}, {})
    codes = iter([0, 143, 0])
    assert run_study(CONFIG, run, "iterated", "m", lambda config: next(codes)) == 143
    assert next(codes) == 0  # the third arm was not begun
    assert run.stage("iterated").read_result() is None


def test_all_configs_are_checked_before_the_first_arm_runs(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    _use(monkeypatch, {}, {"ppo.num_updates": 0})
    with pytest.raises(ConfigError, match=r"ppo.num_updates = 0 +\(arm arm-1\)"):
        run_study(CONFIG, run, "iterated", "m", lambda config: pytest.fail("an arm ran"))


def test_an_arm_keeps_what_it_does_not_change() -> None:
    run = RunFolder(Path("somewhere"))
    config = CONFIG.model_copy(update={"seed": 7})
    own = arm_config(config, run, Arm("a", {"ppo.kl_coefficient": 0.5}))
    assert own.ppo.kl_coefficient == 0.5
    assert own.run.dir == str(arm_folder(run, "a").path)
    assert own.model_copy(update={"run": config.run, "ppo": config.ppo}) == config


def test_an_arm_without_its_stage_says_which(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no finished stage ppo"):
        summary_of(RunFolder(tmp_path), "ppo")
