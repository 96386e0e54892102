"""Real trials, started and stopped by an agent as W&B's does it: what they say to W&B, what is left, what is shared."""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.command import SMOKE, command, environment
from tests.fake_agent import FakeAgent, Started, Trial
from tests.run_example import held, marked_processes
from tests.stage_example import metrics_of, weight_bytes

# What stands for W&B: it writes down who calls it.
WANDB = """
import json, os
def _say(**what):
    with open(os.environ["FAKE_WANDB_CALLS"], "a") as file:
        print(json.dumps({"rank": os.environ.get("RANK"), "pid": os.getpid(), **what}), file=file)
class Settings:
    def __init__(self, **_): pass
class Run:
    summary = {}
    def define_metric(self, *_, **__): pass
    def log(self, values, step=None): _say(call="log", step=step, names=sorted(values))
    def mark_preempting(self): _say(call="mark_preempting")
    def finish(self, exit_code=0): _say(call="finish", exit_code=exit_code)
def init(**arguments):
    named = {name: arguments.get(name) for name in ("id", "resume", "project", "entity", "allow_val_change")}
    _say(call="init", **named)
    return Run()
def teardown(*_, **__): pass
class Table:
    def __init__(self, **_): pass
"""
ARGUMENTS = (*SMOKE, "run.root=runs", "tracking.wandb=offline", "tracking.artifacts=none")


class Sweep:
    """An agent in a folder of its own, and what its programs say to W&B."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.folder = folder
        self.mark = f"RLHF_TEST_MARK_{uuid.uuid4().hex}"
        self._calls = folder / "calls.jsonl"
        self._calls.touch()
        (folder / "modules/wandb").mkdir(parents=True)
        (folder / "modules/wandb/__init__.py").write_text(WANDB)
        self.modules = str(folder / "modules")
        line = [*command("run"), *ARGUMENTS, *arguments, "${args}"]
        self.agent = FakeAgent(folder, command=line, environment=self._environment({}))
        self._started: list[Started] = []

    def _environment(self, extra: dict[str, str]) -> dict[str, str]:
        ours = {self.mark: "1", "FAKE_WANDB_CALLS": str(self._calls), "WANDB_MODE": "offline", **extra}
        path = os.pathsep.join([self.modules, ours.get("PYTHONPATH", environment()["PYTHONPATH"])])
        return environment({**ours, "PYTHONPATH": path})

    def start(self, trial: Trial, extra: dict[str, str] | None = None) -> Started:
        self.agent.environment = self._environment(extra or {})
        self._started.append(self.agent.start(trial))
        return self._started[-1]

    def calls(self, *names: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in self._calls.read_text().splitlines()]
        return [line for line in lines if line["call"] in names]

    def check_nothing_left(self) -> None:
        end = time.monotonic() + 60
        while (left := marked_processes(self.mark)) and time.monotonic() < end:
            time.sleep(0.05)
        assert left == []

    def end(self) -> None:
        for started in self._started:
            started.end_group()
        for number in marked_processes(self.mark):
            os.kill(number, 9)


@pytest.fixture
def new_sweep(tmp_path: Path) -> Iterator[Callable[..., Sweep]]:
    """Makes sweeps, whatever is left of which is killed at the end."""
    made: list[Sweep] = []

    def make(*arguments: str) -> Sweep:
        made.append(Sweep(tmp_path, *arguments))
        return made[-1]

    yield make
    for sweep in made:
        sweep.end()


def _manifest(run: Path) -> dict[str, Any]:
    body: dict[str, Any] = json.loads((run / "manifest.json").read_text())
    return body


def _wait_for(file: Path, started: Started) -> None:
    end = time.monotonic() + 900
    while not file.exists():
        assert started.process.poll() is None, started.wait()
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.distributed
def test_a_preempted_trial_of_two_ranks_goes_on_in_its_folder(new_sweep: Callable[..., Sweep], tmp_path: Path) -> None:
    sweep = new_sweep("stages=[sft]", "distributed.num_processes=2", "sft.save_every=1000", "sft.log_every=4")
    # Config groups and nested parameters, as the agent spells them.
    values = {"sft": {"max_steps": 14, "learning_rate": "1e-3"}, "zero": "none", "model": "tiny", "_wandb": {"a": 1}}
    trial = Trial("abc123", {**values, "model.scratch.hidden_size": 48.0})
    waiting, extra = held(tmp_path, "sft", 11)
    started = sweep.start(trial, extra)
    _wait_for(waiting, started)
    code, said, seconds = started.stop()
    sweep.check_nothing_left()
    assert code == 143, said
    assert seconds < 25
    # Rank 0 alone talks to W&B; it says that the run is preempted before it ends.
    assert {call["rank"] for call in sweep.calls("init", "log", "mark_preempting", "finish")} == {"0"}
    (init,) = sweep.calls("init")
    assert (init["id"], init["resume"], init["allow_val_change"]) == ("abc123", "allow", True)
    assert (init["project"], init["entity"]) == (None, None)
    last = [(call["call"], call.get("exit_code")) for call in sweep.calls("mark_preempting", "finish")]
    assert last == [("mark_preempting", None), ("finish", 143)]
    assert sweep.agent.judge(code, marked_preempting=True) == "preempted"
    run = tmp_path / "runs/smoke/abc123"
    step = _manifest(run)["stages"]["sft"]["stopped"]["step"]
    assert step == 10
    # Handed out again under the same id.
    code, out, said = sweep.start(trial).wait()
    assert code == 0, said
    assert "sft (1/1) · goes on where it was interrupted" in out
    assert sweep.agent.judge(code) == "finished"
    manifest = _manifest(run)
    assert [attempt["outcome"] for attempt in manifest["attempts"]] == ["interrupted", "finished"]
    assert [line["step"] for line in metrics_of(run, "sft") if "sft/loss" in line] == [4, 8, 12, 14]
    assert manifest["config"]["model"]["scratch"]["hidden_size"] == 48
    assert [path.name for path in (tmp_path / "runs/smoke").iterdir()] == ["abc123"]
    assert {call["id"] for call in sweep.calls("init")} == {"abc123"}
    assert sweep.calls("finish")[-1]["exit_code"] == 0
    sweep.check_nothing_left()


def test_two_trials_at_once_share_what_both_need(new_sweep: Callable[..., Sweep], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    sweep = new_sweep("stages=[sft,collect]")
    trials = [
        Trial(f"trial{number}", {"run.cache": str(cache), "collect": {"sampling.temperature": temperature}})
        for number, temperature in enumerate((0.7, 1.0))
    ]
    waiting, extra = held(tmp_path, "sft", 3)
    first = sweep.start(trials[0], extra)
    _wait_for(waiting, first)
    first_folder = tmp_path / "runs/smoke/trial0"
    second = sweep.start(trials[1])
    assert second.process.stdout is not None
    message = next(line for line in second.process.stdout if "being computed" in line)
    assert message.startswith(f"rlhf: stage sft is being computed by {first_folder} (process {first.process.pid} on ")
    waiting.unlink()
    ends = [one.wait() for one in (first, second)]
    assert [code for code, _, _ in ends] == [0, 0], ends
    computed, taken = (tmp_path / "runs/smoke" / trial.run_id for trial in trials)
    assert "taken from the cache" not in ends[0][1]
    assert "sft (1/2) · taken from the cache" in ends[1][1]
    assert not list(cache.rglob("*.lease"))
    entry = Path(_manifest(taken)["stages"]["sft"]["cached_from"])
    assert entry.is_relative_to(cache / "sft")
    assert _manifest(computed)["stages"]["sft"].get("cached_from") is None
    assert sorted(path.parts[-4] for path in cache.rglob("entry.json")) == ["collect", "collect", "sft"]
    # W&B hears of the numbers of a stage that was taken as well, from the supervisor.
    names = {name for call in sweep.calls("log") if call["rank"] is None for name in call["names"]}
    assert "sft/loss" in names
    # Bit for bit what a run without a cache computes.
    alone = Trial("alone", {"collect": {"sampling.temperature": 1.0}})
    code, _, said = sweep.start(alone).wait()
    assert code == 0, said
    reference = tmp_path / "runs/smoke/alone"
    assert weight_bytes(taken, "sft") == weight_bytes(reference, "sft")
    for stage in ("sft", "collect"):
        assert metrics_of(taken, stage) == metrics_of(reference, stage)
    assert _manifest(taken)["stages"]["sft"]["outputs"] == _manifest(reference)["stages"]["sft"]["outputs"]
    for split in ("train", "validation", "test"):  # the card beside them names the run's folder
        name = f"stages/collect/comparisons/{split}.jsonl"
        assert (taken / name).read_bytes() == (reference / name).read_bytes()
    assert (taken / "samples.jsonl").read_bytes() == (reference / "samples.jsonl").read_bytes()
    # Nothing in the stage's folder names the run that has computed it.
    for path in (taken / "stages/sft").rglob("*"):
        assert not path.is_file() or str(computed).encode() not in path.read_bytes(), path
    # Under a launcher that starts the ranks itself rank 0 takes what is there.
    ranks = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    code, out, said = sweep.start(Trial("rank", trials[1].values), ranks).wait()
    assert code == 0, said
    assert out.count("taken from the cache") == 2
    assert weight_bytes(tmp_path / "runs/smoke/rank", "sft") == weight_bytes(reference, "sft")
    assert _manifest(tmp_path / "runs/smoke/rank")["status"] == "finished"
    sweep.check_nothing_left()
