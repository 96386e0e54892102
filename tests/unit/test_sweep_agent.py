"""Agents: nothing is lost and nothing is run twice to the end, whoever is killed when."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from rlhf.sweeps.agent import Agent
from rlhf.sweeps.command_line import run_sweep
from rlhf.sweeps.folder import Sweep
from rlhf.sweeps.outcome import no_metric
from rlhf.sweeps.process import TrialProcess
from rlhf.sweeps.space import Condition, space_of
from rlhf.sweeps.status import describe, status_of
from tests.command import command, environment
from tests.sweep_example import lines_of, make_sweep, values_of

GRID = "method: grid\nparameters: {x: {values: [1, 2, 3, 4]}, y: {values: [a, b]}}\n"


def _ends(sweep: Sweep) -> list[int]:
    """How often each trial came to its end."""
    trials = sorted((sweep.folder.path / "trials").iterdir(), key=lambda path: int(path.name))
    return [len(lines_of(trial / "ends")) for trial in trials]


def _wait(what: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def _start(sweep: Sweep, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command("agent", str(sweep.folder.path), *arguments),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_grid_is_gone_through_once_in_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = make_sweep(tmp_path, GRID)
    assert Agent(sweep, count=3).work() == 0
    # A second agent goes on where the first ended.
    assert Agent(sweep).work() == 0
    assert values_of(sweep) == [{"x": x, "y": y} for x in (1, 2, 3, 4) for y in "ab"]
    assert _ends(sweep) == [1] * 8
    state = sweep.journal.look()
    # The last line of the metric: -(x-3)^2 - 1/3.
    assert state.settings[5].value == pytest.approx(-1 / 3)
    assert state.settings[0].value == pytest.approx(-4 - 1 / 3)
    said = capsys.readouterr().out
    assert "trial 5: x=3 y=b" in said
    assert "done: 5 finished" in said
    assert Agent(sweep).work() == 0
    assert "done: no trial" in capsys.readouterr().out


def test_three_agents_one_killed(tmp_path: Path) -> None:
    """SIGKILL to an agent in a trial: the trial goes to another agent and on from its checkpoint."""
    # All wait after their first step until the kill has happened.
    hold = tmp_path / "hold"
    hold.touch()
    sweep = make_sweep(
        tmp_path, f"method: grid\nparameters: {{x: {{values: [1, 2, 3, 4, 5, 6, 7]}}, wait_while: {{value: {hold}}}}}\n"
    )
    agents = [_start(sweep) for _ in range(3)]
    victim, trial = agents[0], -1

    def in_the_middle() -> bool:
        nonlocal trial
        for one in sweep.journal.look().by_state("running"):
            if f"-{victim.pid}-" in (one.agent or "") and lines_of(sweep.folder.trial(one.number) / "step"):
                trial = one.number
                return True
        return False

    _wait(in_the_middle)
    victim.kill()
    victim.wait()  # with it the kernel has told its program to end
    hold.unlink()
    said = [agent.communicate(timeout=120)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [-signal.SIGKILL, 0, 0]
    state = sweep.journal.look()
    assert [one.state for one in state.trials.values()] == ["finished"] * 7
    assert _ends(sweep) == [1] * 7
    # Handed out again, and begun anew behind a step that was on disk.
    assert state.trials[trial].attempt == 2
    attempts = [int(line) for line in lines_of(sweep.folder.trial(trial) / "attempts")]
    assert len(attempts) == 2
    assert attempts[0] == 0 < attempts[1]
    assert f"trial {trial} is handed out again: its agent died" in said[1] + said[2]
    # Nobody else was started twice, and no two agents began the same trial.
    others = [one for number, one in state.trials.items() if number != trial]
    assert all(one.attempt == 1 for one in others)
    starts = [(event["trial"], event["attempt"]) for event in sweep.journal.events() if event["event"] == "start"]
    assert len(starts) == len(set(starts)) == 8


def test_an_agent_that_is_told_to_end_leaves_its_trial_to_others(tmp_path: Path) -> None:
    hold = tmp_path / "hold"  # the trial waits after its first step
    hold.touch()
    sweep = make_sweep(tmp_path, f"method: grid\nparameters: {{wait_while: {{value: {hold}}}}}\n")
    agent = _start(sweep)
    _wait(lambda: bool(lines_of(sweep.folder.trial(0) / "step")))
    agent.send_signal(signal.SIGTERM)
    said, _ = agent.communicate(timeout=120)
    hold.unlink()
    assert agent.returncode == 143
    assert "trial 0 released" in said
    trial = sweep.journal.look().trials[0]
    assert (trial.state, trial.attempt) == ("waiting", 1)
    assert not (sweep.folder.path / "leases" / "0.json").exists()
    assert Agent(sweep).work() == 0
    attempts = [int(line) for line in lines_of(sweep.folder.trial(0) / "attempts")]
    assert len(attempts) == 2
    assert attempts[1] > 0
    assert _ends(sweep) == [1]


def test_a_trial_whose_agent_was_not_heard_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lease of another host runs out; the agent that comes back finds the trial taken, and stops its own process."""
    sweep = make_sweep(tmp_path, "method: grid\nparameters: {pause: {value: 300}}\n", lease_seconds=60)
    slow = Agent(sweep)
    trial, _ = slow._take()
    assert trial is not None
    process = slow._start(trial, {"pause": 300})
    stop = process.stop
    monkeypatch.setattr(process, "stop", lambda seconds: stop(60 * seconds))
    try:
        lease = sweep.folder.path / "leases" / "0.json"
        lease.write_text(lease.read_text().replace('"host": "', '"host": "elsewhere-'))
        other = Agent(sweep)
        # It still has time.
        assert other._take() == (None, "1 trial of others")
        begun = sweep.journal.events()[-1]["time"]
        os.utime(lease, (begun - 100, begun - 100))
        sweep.journal.path.write_text(sweep.journal.path.read_text().replace(str(begun), str(round(begun - 120, 3))))
        other = Agent(sweep)
        taken, _ = other._take()
        assert taken is not None
        assert (taken.number, taken.attempt) == (0, 2)
        # It worked until it was last heard of.
        assert sweep.journal.look().trials[0].seconds == pytest.approx(20, abs=0.1)
        # The first one looks at the journal when it next touches its lease.
        slow.sweep = make_sweep(tmp_path, "method: grid\nparameters: {pause: {value: 300}}\n", lease_seconds=60)
        object.__setattr__(slow.sweep, "lease_seconds", 0.3)
        outcome = slow._follow(trial, process)
        assert outcome.lost
        assert process.poll() == 143
        slow._settle(trial, outcome)
        assert sweep.journal.look().holds(0, 2)
    finally:
        process.kill()


def test_seeds_run_for_every_setting(tmp_path: Path) -> None:
    sweep = make_sweep(
        tmp_path, "method: random\nrun_cap: 7\nparameters: {x: {min: 0.0, max: 6.0}, seed: {values: [1, 2, 3]}}\n"
    )
    assert Agent(sweep).work() == 0
    state = sweep.journal.look()
    # Two whole settings fit under the cap; a third would have one seed of three.
    assert [(one.setting, one.seed) for one in state.trials.values()] == [
        (0, 1),
        (0, 2),
        (0, 3),
        (1, 1),
        (1, 2),
        (1, 3),
    ]
    for record in state.settings.values():
        # The stand-in adds 0.01 a seed: the mean over 1, 2 and 3 adds 0.02.
        assert record.value == pytest.approx(-((record.values["x"] - 3) ** 2) + 0.02 - 1 / 3)


def _pretend(sweep: Sweep, count: int) -> list[float]:
    """What an agent asks and writes down, without a process: the score is -(x - 3)^2. Returns the x that were tried."""
    agent, drawn = Agent(sweep), []
    for _ in range(count):
        trial, _ = agent._take()
        assert trial is not None
        drawn.append(sweep.journal.look().settings[trial.setting].values["x"])
        with agent.journal.locked() as state:
            value = -((drawn[-1] - 3) ** 2)
            agent.journal.append("end", trial=trial.number, attempt=1, state="finished", value=value)
            agent._close_settings(state)
    return drawn


@pytest.mark.parametrize("method", ["random", "bayes"])
def test_the_same_settings_again(tmp_path: Path, method: str) -> None:
    """One agent and the same seed: the same sequence; with another seed another one."""
    found = []
    for index, seed in enumerate((1, 1, 2)):
        folder = tmp_path / str(index)
        folder.mkdir()
        text = f"method: {method}\nparameters: {{x: {{min: 0.0, max: 6.0}}}}\n"
        found.append(_pretend(make_sweep(folder, text, seed=seed), 7))
    assert found[0] == found[1] != found[2]


def test_bayes_finds_the_optimum(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, "method: bayes\nparameters: {x: {min: 0.0, max: 100.0}}\n")
    values = _pretend(sweep, 14)
    # Random draws come within 1 of 3 with probability 1 - 0.98^14 = 0.25.
    assert min(abs(value - 3) for value in values) < 1.0
    study = Agent(sweep).search.study
    assert len(study.trials) == 14
    assert study.best_value == pytest.approx(max(one.value or -1e9 for one in sweep.journal.look().settings.values()))


def test_bayes_where_parameters_exist_only_sometimes(tmp_path: Path) -> None:
    text = (
        "method: bayes\nparameters: {x: {min: 0.0, max: 6.0}, c: {values: [none, lora]}, c.rank: {values: [1, 2, 4]}}\n"
    )
    sweep = make_sweep(tmp_path, text)
    sweep = replace(sweep, space=space_of(sweep.file, {"c.rank": Condition("c", ("lora",))}))
    _pretend(sweep, 12)
    settings = values_of(sweep)
    assert {one["c"] for one in settings} == {"none", "lora"}
    assert all(("c.rank" in one) == (one["c"] == "lora") for one in settings)
    # Beyond the 7 random ones the search has learned where x belongs.
    assert min(abs(one["x"] - 3) for one in settings[7:]) < 1.0
    assert status_of(sweep).settings[0].values in settings


def test_a_sweep_without_a_metric(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, "method: grid\nparameters: {x: {values: [1, 2]}}\n", metric=False)
    assert Agent(sweep).work() == 0
    assert [one.state for one in sweep.journal.look().settings.values()] == ["finished"] * 2
    assert describe(status_of(sweep))[0] == "sweep sweep: grid"


def _fail(agent: Agent) -> None:
    trial, _ = agent._take()
    assert trial is not None
    with agent.journal.locked() as state:
        agent.journal.append("end", trial=trial.number, attempt=trial.attempt, state="failed")
        agent._close_settings(state)


@pytest.mark.parametrize(("impute", "value"), [("worst", -4.0), ("best", 0.0), ("latest", -1.0)])
def test_a_failed_setting_counts_as_the_file_says(tmp_path: Path, impute: str, value: float) -> None:
    sweep = make_sweep(
        tmp_path,
        f"metric: {{name: score, goal: maximize, impute: {impute}}}\nmethod: grid\n"
        "parameters: {x: {values: [2.5, 1, 3, 4, 5]}}\n",
        metric=False,
    )
    # Before anything has ended well there is nothing that it could count as.
    agent = Agent(sweep)
    _fail(agent)
    assert agent.search.known(agent.journal.look()).trials == []
    _pretend(sweep, 3)
    _fail(agent)
    assert [one.value for one in agent.search.known(agent.journal.look()).trials] == [value, -4.0, 0.0, -1.0, value]
    assert [one.value for one in agent.search.study.trials] == [None, -4.0, 0.0, -1.0, None]


def test_a_setting_that_was_handed_out_again_counts_once_and_as_it_ended_last(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, "method: bayes\nparameters: {x: {min: 0.0, max: 6.0}}\n")
    _pretend(sweep, 2)
    agent = Agent(sweep)
    _fail(agent)
    assert run_sweep(["retry", str(sweep.folder.path)]) == 0
    trial, _ = agent._take()
    assert trial is not None
    assert (trial.number, trial.attempt) == (2, 2)
    assert [one.state.name for one in agent.search.known(agent.journal.look()).trials[2:]] == ["RUNNING"]
    with agent.journal.locked() as state:
        agent.journal.append("end", trial=2, attempt=2, state="finished", value=7.0)
        agent._close_settings(state)
    assert [one.value for one in agent.search.known(agent.journal.look()).trials[2:]] == [7.0]
    assert agent.search.study.best_value == 7.0


def test_bayes_draws_nothing_that_has_no_probability(tmp_path: Path) -> None:
    text = "method: bayes\nparameters: {x: {min: 0.0, max: 6.0}, c: {values: [a, b], probabilities: [0, 1]}}\n"
    sweep = make_sweep(tmp_path, text)
    _pretend(sweep, 9)
    assert {one["c"] for one in values_of(sweep)} == {"b"}


def test_hyperband_stops_what_is_behind(tmp_path: Path) -> None:
    sweep = make_sweep(
        tmp_path,
        "method: grid\nearly_terminate: {type: hyperband, min_iter: 2, eta: 2}\n"
        "parameters: {x: {values: [3, 2.5, 9]}, steps: {value: 8}, stuck_above: {value: 8}, seed: {values: [1, 2]}}\n",
    )
    Agent(sweep).work()
    state = sweep.journal.look()
    bad = [one for one in state.trials.values() if state.settings[one.setting].values["x"] == 9]
    # Its second seed is not worth beginning.
    assert [one.state for one in bad] == ["pruned", "skipped"]
    assert "at iteration" in bad[0].note
    assert not (sweep.folder.trial(bad[0].number) / "ends").exists()
    assert state.settings[2].state == "pruned"
    assert state.trials[0].state == "finished"


def test_failures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are written down with what was printed, and three at once end the agent."""
    sweep = make_sweep(tmp_path, "method: grid\nparameters: {x: {values: [1, 2, 3, 4]}, fail: {value: true}}\n")
    assert Agent(sweep).work() == 1
    state = sweep.journal.look()
    assert [one.state for one in state.trials.values()] == ["failed"] * 3
    assert state.trials[0].exit_code == 1
    assert state.trials[0].tail == ("there is no such thing",)
    said = capsys.readouterr()
    assert "    there is no such thing" in said.out
    assert "gives up: 3 trials failed in its first 60 s" in said.err


def test_a_metric_that_nobody_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first trial shows it, and the others are not begun."""
    sweep = make_sweep(
        tmp_path,
        "metric: {name: scores, goal: maximize}\nmethod: grid\nparameters: {x: {values: [1, 2]}}\n",
        metric=False,
    )
    assert Agent(sweep).work() == 1
    said = capsys.readouterr().err
    assert "gives up, as no trial has reported the metric" in said
    assert "but it reported no scores; did you mean score? A sweep keeps its file" in said
    assert list(sweep.journal.look().trials) == [0]
    trial = sweep.journal.look().trials[0]
    assert trial.state == "failed"
    assert trial.note == "it reported no scores; did you mean score?"
    assert no_metric("loss", {"b", "a"}) == "it reported no loss, but a, b"
    assert no_metric("loss", {"loss", "a"}) == "its loss was never a finite number"


def test_the_target_ends_the_sweep(tmp_path: Path) -> None:
    sweep = make_sweep(
        tmp_path,
        "metric: {name: score, goal: maximize, target: -0.5}\nmethod: grid\n"
        "parameters: {x: {values: [1, 2, 3, 4, 5]}}\n",
        metric=False,
    )
    Agent(sweep).work()
    assert [one["x"] for one in values_of(sweep)] == [1, 2, 3]


def test_a_run_that_is_told_to_end_by_others_is_handed_out_again(tmp_path: Path) -> None:
    hold = tmp_path / "hold"  # the trial waits after its first step
    hold.touch()
    sweep = make_sweep(tmp_path, f"method: grid\nparameters: {{wait_while: {{value: {hold}}}}}\n")
    agent = Agent(sweep, count=1)
    trial, _ = agent._take()
    assert trial is not None
    process = agent._start(trial, {"wait_while": str(hold)})
    _wait(lambda: bool(lines_of(sweep.folder.trial(0) / "step")))
    os.kill(process.group, signal.SIGTERM)
    outcome = agent._follow(trial, process)
    hold.unlink()
    agent._settle(trial, outcome)
    assert sweep.journal.look().trials[0].state == "waiting"
    Agent(sweep).work()
    assert _ends(sweep) == [1]


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    """What the program started and left running ends with it."""
    marker = tmp_path / "pid"
    script = f"sleep 600 & echo $! > {marker}; exit 0"
    process = TrialProcess(["/bin/sh", "-c", script], dict(os.environ), tmp_path / "log")
    _wait(lambda: process.poll() is not None)
    process.clean()
    left = int(marker.read_text())
    stat = Path(f"/proc/{left}/stat")
    _wait(lambda: not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] in "ZX")


def test_sqlite_holds_the_study_as_well(tmp_path: Path) -> None:
    sweep = make_sweep(
        tmp_path,
        "method: bayes\nparameters: {x: {min: 0.0, max: 6.0}, y: {values: [a, b]}}\n",
        storage=f"sqlite:///{tmp_path}/study.db",
    )
    _pretend(sweep, 4)
    _pretend(sweep, 4)
    study = Agent(sweep).search.study
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 8
    assert {trial.user_attrs["setting"] for trial in study.trials} == set(range(8))


def test_an_agent_with_nothing_to_wait_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = make_sweep(tmp_path, "method: grid\nparameters: {x: {values: [1]}}\n")
    other = Agent(sweep)
    assert other._take()[0] is not None
    assert Agent(sweep, wait=False).work() == 0
    assert "done: no trial" in capsys.readouterr().out
