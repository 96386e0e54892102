"""`rlhf replay`: what is run, where, what is said beforehand, and what it concludes. A stand-in does the training."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from rlhf import data
from rlhf.config import RLHFConfig, config_from_file
from rlhf.errors import ArtifactError, ConfigError
from rlhf.evidence import replay
from rlhf.evidence.record import read_record
from rlhf.evidence.replay import default_folder, parse_options, replay_config, run_replay
from rlhf.rewards.checks import content_hash
from rlhf.runs import machine
from tests.unit.evidence_example import config_of, ppo_rows, write_run

# What the example would write down here.
AS_HERE: dict[str, Any] = {
    "data": {"hash": "", "content": data.data_content(config_of().data)},
    "decided_by": {"ppo": {"section": {"rewards": content_hash(config_of().ppo.rewards)}, "inputs": {}}},
}


@pytest.fixture(autouse=True)
def _as_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine and the checkout are those of the example's runs."""
    monkeypatch.setattr(machine, "code_state", lambda: {"commit": "a" * 40, "diff_hash": None})
    monkeypatch.setattr(machine, "package_versions", lambda: {"torch": "2.8.0"})
    monkeypatch.setattr(machine, "hardware", lambda: {"cpu": "A processor", "cores": 2, "gpus": []})
    monkeypatch.delenv("RANK", raising=False)


@pytest.fixture
def original(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", **AS_HERE)


def stand_in(monkeypatch: pytest.MonkeyPatch, code: int = 0, **run: Any) -> list[RLHFConfig]:
    """Replaces the training: the replay's folder is written as the example's run, changed by `run`."""
    started: list[RLHFConfig] = []

    def supervise(config: RLHFConfig, command: list[str], debug: bool) -> int:
        started.append(config)
        assert config.run.dir is not None
        if code == 0:
            write_run(Path(config.run.dir), **{**AS_HERE, **run})
        return code

    monkeypatch.setattr("rlhf.supervisor.supervise", supervise)
    return started


def test_an_identical_replay_is_said_and_removed(
    original: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started = stand_in(monkeypatch)
    folder = original.with_name("run-replay")
    assert run_replay([str(original)], debug=False) == 0
    said = capsys.readouterr().out
    assert "the same as far as it was written down" in said
    assert "identical: 2 stages, 5 lines of metrics, 2 outputs, 0 samples" in said
    assert not folder.exists()
    assert run_replay([str(original), "--keep"], debug=False) == 0
    assert folder.exists()
    # The same command goes on in the same folder.
    assert run_replay([str(original), "--keep"], debug=False) == 0
    chosen = original.with_name("chosen")
    assert run_replay([str(original), f"run.dir={chosen}"], debug=False) == 0
    assert chosen.exists()
    assert [config.run.dir for config in started] == [str(folder)] * 3 + [str(chosen)]


def test_what_is_run(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The config, but elsewhere, with the recorded number of threads, without W&B, on the stages that were begun."""
    config = replay_config(read_record(original), parse_options([str(original)]))
    assert config.stages == ("sft", "ppo")
    assert config.distributed.num_threads == 1
    assert config.tracking.wandb == "disabled"
    assert config.run.cache is None
    changed = {key for key, value in config if value != getattr(config_from_file(original / "config.yaml"), key)}
    assert changed <= {"run", "distributed", "tracking", "launcher"}


def test_a_cache_would_prove_nothing(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", f"run.cache={tmp_path}/cache")
    assert replay_config(read_record(run), parse_options([str(run)])).run.cache is None


def test_a_divergence_is_named_with_its_likely_cause(
    original: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(monkeypatch, rows={"sft": [{"sft/loss": 2.0}, {"sft/loss": 1.0}], "ppo": ppo_rows([0.5, 0.6, 0.9])})
    monkeypatch.setattr(machine, "package_versions", lambda: {"torch": "2.9.0"})
    assert run_replay([str(original)], debug=False) == 1
    said = capsys.readouterr().out
    assert "not the same, or not known to be:\n  packages: torch there 2.8.0, here 2.9.0" in said
    assert "diverging at ppo step 3: ppo/score_mean 0.7 against 0.9" in said
    assert original.with_name("run-replay").exists()
    assert run_replay([str(original), "--json"], debug=False) == 1
    body = json.loads(capsys.readouterr().out)
    assert body["verdict"] == "different"
    # Here the stand-in wrote down the original's packages, so nothing explains it.
    assert "nothing that was written down differs" in body["likely_causes"][0]


def test_what_cannot_be_the_same_is_said_before_it_runs(
    original: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    body = json.loads((original / "manifest.json").read_text())
    body["data"]["content"] = "embedded 0"
    body["stages"]["ppo"]["compute"] = {}
    (original / "manifest.json").write_text(json.dumps(body))
    monkeypatch.setattr(machine, "code_state", lambda: {"commit": "b" * 40, "diff_hash": "c" * 64})
    stand_in(monkeypatch, code=143)
    assert run_replay([str(original)], debug=False) == 143
    said = capsys.readouterr().out
    assert "data: the data's content there embedded 0, here embedded" in said
    assert (
        "code: code commit there aaaaaaaaaaaa, here bbbbbbbbbbbb; code not committed there none, here cccccccccccc"
        in said
    )
    assert "the run did not write down its number of threads" in said


def test_input_models_are_checked_by_their_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for name in ("model.safetensors", "tokenizer.json"):
        (model / name).write_text("1")
    (model / "config.json").write_text(json.dumps({"model_type": "llama"}))
    inputs = {"policy": "0" * 64, "reference": "0" * 64}
    run = write_run(
        tmp_path / "run",
        "stages=[ppo]",
        f"ppo.policy={model}",
        "ppo.rewards={mine: {type: length}}",
        "ppo.value_init=policy",
        rows={"ppo": ppo_rows([0.5])},
        decided_by={"ppo": {"section": {}, "inputs": inputs}},
    )
    stand_in(monkeypatch, code=1)
    assert run_replay([str(run)], debug=False) == 1
    said = capsys.readouterr().out
    assert f"the content of ppo.policy there {'0' * 12}, here" in said


def test_an_interrupted_run_is_compared_as_far_as_it_came(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {"sft": [{"sft/loss": 2.0}, {"sft/loss": 1.0}], "ppo": ppo_rows([0.5])}
    run = write_run(tmp_path / "run", rows=rows, unfinished=["ppo"], **AS_HERE)
    stand_in(monkeypatch)
    assert run_replay([str(run)], debug=False) == 0
    assert "identical as far as both have come: 2 stages, 3 lines" in capsys.readouterr().out


def test_the_folder_of_a_replay(tmp_path: Path) -> None:
    assert default_folder(Path("runs/a/b/")) == Path("runs/a/b-replay")
    # An arm's replay is no arm of the study.
    study = write_run(tmp_path / "study")
    arm = write_run(study / "arms/dpo/beta-1")
    assert default_folder(arm) == tmp_path / "study-replay-dpo-beta-1"


def test_no_folder_is_taken_that_is_something_else(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)
    other = original.with_name("other")
    other.mkdir()
    (other / "mine.txt").write_text("x")
    with pytest.raises(ConfigError, match="is there and is no replay of"):
        run_replay([str(original), f"run.dir={other}"], debug=False)
    assert run_replay([str(original), "--keep"], debug=False) == 0
    again = write_run(original.with_name("again"))
    with pytest.raises(ConfigError, match=r"is the replay of .*run as started"):
        run_replay([str(again), f"run.dir={original}-replay"], debug=False)
    with pytest.raises(ConfigError, match="is the run itself"):
        run_replay([str(original), f"run.dir={original}"], debug=False)


def test_labels_of_people_come_from_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = tmp_path / "labels.sqlite"
    begun: dict[str, list[dict[str, Any]]] = {"sft": [], "collect": []}
    run = write_run(tmp_path / "run", "stages=[sft,collect]", f"preferences.store={store}", rows=begun)
    options = parse_options([str(run)])
    config = replay_config(read_record(run), options)
    assert config.preferences.store == str(tmp_path / "run-replay/preferences-replay.sqlite")
    with pytest.raises(ArtifactError, match="the labels of the run are gone"):
        replay._copy_store(read_record(run), config, options.folder)
    with closing(sqlite3.connect(store)) as connection, connection:
        connection.execute("CREATE TABLE labels (answer TEXT)")
        connection.execute("INSERT INTO labels VALUES ('first')")
    options.folder.mkdir()
    assert "nobody is asked again" in replay._copy_store(read_record(run), config, options.folder)[0]
    with closing(sqlite3.connect(options.folder / "preferences-replay.sqlite")) as copy:
        assert copy.execute("SELECT answer FROM labels").fetchall() == [("first",)]
    # Nor is the folder that the copy goes to asked for before it is made.
    stand_in(monkeypatch, code=143)
    assert run_replay([str(run), f"run.dir={tmp_path}/chosen"], debug=False) == 143
    assert (tmp_path / "chosen/preferences-replay.sqlite").is_file()


def test_mistakes_in_the_arguments(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, message in [
        ([], "name one run folder"),
        ([str(original), "other"], "name one run folder"),
        ([str(original), "ppo.learning_rate=1"], "a replay changes no key of the run but run.dir"),
        ([str(original), "--kep"], "unknown flag --kep"),
    ]:
        with pytest.raises(ConfigError, match=message):
            run_replay(arguments, debug=False)
    body = json.loads((original / "manifest.json").read_text())
    (original / "manifest.json").write_text(json.dumps({**body, "recorded": {"every": 1}}))
    with pytest.raises(ArtifactError, match="is the record of a run; rlhf verify runs its experiment again"):
        run_replay([str(original)], debug=False)


def test_inputs_that_are_gone_are_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative path is read from where one stands, which is the likeliest reason for a file that is not there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reward.py").write_text("def reward(prompts, completions, **columns): return [0.0]\n")
    run = write_run(tmp_path / "run", "ppo.rewards={mine: {type: function, file: reward.py}}", **AS_HERE)
    stand_in(monkeypatch, code=143)
    assert run_replay([str(run)], debug=False) == 143
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=r"reward\.py.*\n  A replay reads .* start it where .*run was started"):
        run_replay([str(run), f"run.dir={tmp_path}/other"], debug=False)
    assert not (tmp_path / "other").exists()
