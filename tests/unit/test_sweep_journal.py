"""The journal and the leases: what a kill leaves, who may write, and who is taken for dead."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from rlhf.errors import UserError
from rlhf.runs.processes import group_lives, started
from rlhf.sweeps.journal import Journal
from rlhf.sweeps.leases import Leases
from rlhf.sweeps.metric import History, final_value
from rlhf.sweeps.search import Search, external, internal
from rlhf.sweeps.space import Setting
from tests.sweep_example import make_sweep


def _journal(folder: Path) -> Journal:
    (folder / "events.jsonl").touch()
    journal = Journal(folder / "events.jsonl")
    with journal.locked():
        journal.append("setting", setting=0, values={"x": 1}, trials=[[0, 1], [1, 2]])
    return journal


def test_a_torn_line_is_removed_by_the_next_writer(tmp_path: Path) -> None:
    journal = _journal(tmp_path)
    with journal.path.open("ab") as file:
        file.write(b'{"event": "start", "tri')
    other = Journal(journal.path)
    assert len(other.look().trials) == 2
    with other.locked():
        other.append("start", trial=0, attempt=1, agent="a")
    assert journal.look().trials[0].state == "running"
    assert [event["event"] for event in journal.events()] == ["setting", "start"]


def test_an_older_attempt_has_no_say(tmp_path: Path) -> None:
    journal = _journal(tmp_path)
    with journal.locked() as state:
        journal.append("start", trial=0, attempt=1, agent="a")
        journal.append("release", trial=0, attempt=1, note="its agent died")
        journal.append("start", trial=0, attempt=2, agent="b")
        assert not state.holds(0, 1)
        journal.append("end", trial=0, attempt=1, state="finished", value=7.0)
        assert state.trials[0].state == "running"
        journal.append("end", trial=0, attempt=2, state="finished", value=8.0, seconds=2.5)
    trial = Journal(journal.path).look().trials[0]
    assert (trial.state, trial.value, trial.seconds) == ("finished", 8.0, 2.5)


def test_only_one_writer_at_a_time(tmp_path: Path) -> None:
    """Fifty trials that four processes share out: each is taken once."""
    (tmp_path / "events.jsonl").touch()
    journal = Journal(tmp_path / "events.jsonl")
    with journal.locked():
        journal.append("setting", setting=0, values={}, trials=[[number, None] for number in range(50)])
    children = []
    for index in range(4):
        child = os.fork()
        if child == 0:
            own = Journal(journal.path)
            while True:
                with own.locked() as state:
                    waiting = state.by_state("waiting")
                    if not waiting:
                        os._exit(0)
                    own.append("start", trial=waiting[0].number, attempt=1, agent=str(index))
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    started = [event["trial"] for event in journal.events() if event["event"] == "start"]
    assert started == list(range(50))


def test_signals_wait_until_the_decision_is_written(tmp_path: Path) -> None:
    journal = _journal(tmp_path)
    seen: list[str] = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append("told"))
    try:
        with journal.locked():
            os.kill(os.getpid(), signal.SIGTERM)
            journal.append("start", trial=0, attempt=1, agent="a")
            assert seen == []
        assert seen == ["told"]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_deleted_sweep(tmp_path: Path) -> None:
    journal = _journal(tmp_path)
    journal.path.unlink()
    with pytest.raises(UserError, match="the sweep was deleted"), journal.locked():
        pass
    with pytest.raises(UserError, match="the sweep was deleted"):
        journal.look()


def test_who_is_taken_for_dead(tmp_path: Path) -> None:
    leases = Leases(tmp_path, seconds=60)
    assert leases.is_lost(0, 1) == "its agent died before it began"
    leases.take(0, 1, "us")
    assert leases.is_lost(0, 1) is None
    # The journal is ahead of the lease: an attempt that began just now.
    assert leases.is_lost(0, 2) is None
    text = leases.path(0).read_text()
    leases.path(0).write_text(text.replace(f'"process": {os.getpid()}', '"process": 4194000'))
    assert leases.is_lost(0, 1) == "its agent died"
    # Another process by the same number is not our agent.
    assert f'"process_start": {started(os.getpid())}' in text
    leases.path(0).write_text(text.replace('"process_start": ', '"process_start": 1'))
    assert leases.is_lost(0, 1) == "its agent died"
    # Of another host nothing is known but how long ago it was heard of.
    leases.path(0).write_text(text.replace('"host": "', '"host": "far-'))
    assert leases.is_lost(0, 1) is None
    os.utime(leases.path(0), (time.time() - 61, time.time() - 61))
    assert leases.is_lost(0, 1) == "its agent on another host was not heard of for 60 s"
    # What it has cost until then.
    assert leases.seconds_since(0, leases.path(0).stat().st_mtime - 7) == pytest.approx(7, abs=1e-3)
    assert leases.seconds_since(1, 0.0) == 0.0
    leases.touch(0)
    assert leases.is_lost(0, 1) is None


def test_a_dead_agents_program_must_be_gone_first(tmp_path: Path) -> None:
    leases = Leases(tmp_path, seconds=60)
    child = subprocess.Popen(["sleep", "60"], process_group=0)
    try:
        leases.take(0, 1, "us", group=child.pid)
        text = leases.path(0).read_text()
        leases.path(0).write_text(text.replace(f'"process": {os.getpid()}', '"process": 4194000'))
        assert leases.is_lost(0, 1) is None, "it may be writing its checkpoint"
        os.utime(leases.path(0), (time.time() - 61, time.time() - 61))
        assert leases.is_lost(0, 1) == "its agent died"
        assert child.wait(timeout=10) == -signal.SIGKILL
        assert not group_lives(child.pid)
    finally:
        child.kill()
        child.wait()


def test_a_group_that_is_somebody_elses_by_now_is_left_alone(tmp_path: Path) -> None:
    """The number of a group that has ended was given out again before anybody looked at the lease."""
    leases = Leases(tmp_path, seconds=60)
    child = subprocess.Popen(["sleep", "60"], process_group=0)
    try:
        leases.take(0, 1, "us", group=child.pid)
        text = leases.path(0).read_text().replace(f'"process": {os.getpid()}', '"process": 4194000')
        leases.path(0).write_text(text.replace('"group_start": ', '"group_start": 1'))
        assert leases.is_lost(0, 1) == "its agent died"
        os.utime(leases.path(0), (time.time() - 61, time.time() - 61))
        assert leases.is_lost(0, 1) == "its agent died"
        assert child.poll() is None
    finally:
        child.kill()
        child.wait()


def test_a_metric_is_followed_and_taken_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    history = History(tmp_path, "m")
    assert history.update() == []
    path.write_text('{"stage": "s", "step": 1, "m": 1.0}\n{"step": 2, "other": 3}\n{"step": 2, "m": NaN}\n{"m": 2')
    assert history.update() == [1.0]
    with path.open("a") as file:
        file.write('.5}\n{"m": true}\n{"m": {"value": 4, "low": 1, "high": 5}}\n')
    assert history.update() == [1.0, 2.5, 4.0]
    # A resumed training takes lines back by replacing the file.
    other = tmp_path / "new"
    other.write_text('{"m": 7.0}\n')
    other.replace(path)
    assert history.update() == [7.0]


def test_the_value_at_the_end(tmp_path: Path) -> None:
    """The last line counts; a stage's result where no line has the name."""
    (tmp_path / "metrics.jsonl").write_text('{"evaluate/x": 1}\n{"evaluate/x": 2}\n')
    result = tmp_path / "stages" / "evaluate" / "result.json"
    result.parent.mkdir(parents=True)
    result.write_text(
        '{"summary": {"evaluate/x": 9, "evaluate/win_rate": {"value": 0.75, "low": 0, "high": 1}, "loss": 4}}'
    )
    assert final_value(tmp_path, "evaluate/x")[0] == 2
    assert final_value(tmp_path, "evaluate/win_rate")[0] == 0.75
    assert final_value(tmp_path, "evaluate/loss")[0] == 4
    value, names = final_value(tmp_path, "nothing")
    assert value is None
    assert names == {"evaluate/x", "evaluate/win_rate", "evaluate/loss"}


SPACE = """method: bayes
parameters:
  a: {min: 0.5, max: 2.0}
  b: {distribution: log_uniform_values, min: 0.001, max: 10.0}
  c: {min: 2, max: 9}
  d: {values: [0.1, 0.2, 0.5]}
  e: {values: [x, {k: 1}, null]}
  f: {distribution: normal, mu: 3.0, sigma: 2.0}
  g: {distribution: q_uniform, min: 0.0, max: 2.0, q: 0.25}
  h: {values: [x, y, z, never], probabilities: [0.25, 0.5, 0.25, 0]}
"""


def test_what_optuna_draws_and_what_the_config_gets(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, SPACE)
    setting: Setting = sweep.space.drawn(3, 0)
    for parameter in sweep.space.parameters:
        value = setting[parameter.name]
        assert external(parameter, internal(parameter, value)) == pytest.approx(value)
    found = Search(sweep).next_setting(sweep.journal.look())
    assert found is not None
    assert set(found) == set("abcdefgh")
    # Of the shares that mean the same the middle: 0.5 are those from 0.375 to 0.625 of 2; y those from 0.25 to 0.75.
    steps, choice = sweep.space.parameters[-2:]
    assert internal(steps, 0.5) == pytest.approx(0.25)
    assert internal(steps, 0.0) == pytest.approx(0.125 / 4)
    assert internal(choice, "y") == pytest.approx(0.5)


def test_a_torn_line_of_optunas_journal(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, "method: bayes\nparameters: {x: {min: 0.0, max: 1.0}}\n")
    Search(sweep).study.ask({})
    path = sweep.folder.path / "optuna.log"
    with path.open("ab") as file:
        file.write(b'{"op_code": 4, "wor')
    Search(sweep).study.ask({})
    assert [trial.number for trial in Search(sweep).study.trials] == [0, 1]
