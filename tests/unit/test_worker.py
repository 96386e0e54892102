"""A rank whose stage calls `sys.exit` has failed, whichever launcher started it."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest

from rlhf import config as configs
from rlhf import rank_pipeline, worker
from rlhf.config import RLHFConfig, load_config
from rlhf.distributed import stopping
from rlhf.distributed.runtime import Runtime
from rlhf.runs import console, manifest
from rlhf.runs.folder import RunFolder

MESSAGE = r"rlhf: error: something in the stage called sys\.exit\(0\) at .*test_worker\.py:\d+; a stage ends by"


class OnlyRank:
    is_main = True

    def barrier(self) -> None:
        pass

    def broadcast_object(self, item: object) -> object:
        return item


class Left(Exception):  # noqa: N818 - what stands in for the end of the process
    pass


def exits(*_: object) -> NoReturn:
    sys.exit(0)


@pytest.fixture(autouse=True)
def nothing_of_this_process_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(code: int) -> NoReturn:
        raise Left(code)

    monkeypatch.setattr(stopping, "install", lambda: None)
    monkeypatch.setattr(worker, "quiet_libraries", lambda: None)
    monkeypatch.setattr(console, "quiet_libraries", lambda: None)
    monkeypatch.setattr(rank_pipeline, "leave", leave)
    monkeypatch.setattr(Runtime, "start", lambda *_: OnlyRank())


def test_a_rank_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(configs, "config_from_file", lambda path: RLHFConfig())
    monkeypatch.setattr(worker, "run_stage", exits)
    assert worker.main([str(tmp_path), "sft"]) == 1
    assert re.match(MESSAGE, capsys.readouterr().err)
    assert worker.main([str(tmp_path), "sft", "--debug"]) == 1
    assert "in exits\n    sys.exit(0)\n" in capsys.readouterr().err
    # Who answers the signal that is to end the rank in this way has done as he was told.
    monkeypatch.setattr(stopping, "requested", lambda: 15)
    assert worker.main([str(tmp_path), "sft"]) == 143


def test_a_rank_of_another_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(["experiment=smoke", "stages=[sft]", f"run.dir={tmp_path}/run"]).config
    begun: list[Any] = []

    def stage(*given: object) -> NoReturn:
        begun.append(manifest.read_manifest(RunFolder(tmp_path / "run"))["stages"]["sft"]["status"])
        exits()

    monkeypatch.setattr(rank_pipeline, "run_stage", stage)
    with pytest.raises(Left) as left:
        rank_pipeline.run_as_rank(config, ["rlhf", "run"], debug=False)
    assert left.value.args == (1,)
    assert begun == ["running"]
    assert re.search(MESSAGE, capsys.readouterr().err)
    assert manifest.read_manifest(RunFolder(tmp_path / "run"))["status"] == "failed"
