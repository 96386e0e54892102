"""Runs that are killed with SIGKILL and have their checkpoints damaged end as if nothing had happened.

The short form of `crash_harness`: eight kills at moments chosen beforehand, four checkpoints damaged; more where a run
was past its moment before the kill came. The two kills under ZeRO-2 are marked slow: those under ZeRO-3 go the same way
through more that can break.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.distributed import crash_watch
from tests.distributed.crash_compare import differences
from tests.distributed.crash_damage import damage_newest, is_reported
from tests.distributed.crash_harness import ARGUMENTS, DECK, LORA, SETTINGS, Dealer, Outcome, Setting, last_line, table
from tests.distributed.crash_resume import Resumes
from tests.distributed.crash_watch import TRAINED, Attempt, Damage, Hit, Moment, kill

pytestmark = pytest.mark.distributed

ONE_PROCESS = [
    Moment("sft", "saved", "tree", damage="flip"),
    Moment("reward_model", "saved", "rank", damage="truncate"),
    Moment("ppo", "checkpoint", "supervisor"),
    # The undisturbed run, which it is a share of, may have had less of the machine.
    Moment("evaluate", "time", "tree", share=0.1),
]
ZERO = {
    "zero2": [Moment("sft", "checkpoint", "supervisor"), Moment("sft", "saved", "rank", damage="truncate")],
    "zero3": [Moment("ppo", "checkpoint", "tree"), Moment("ppo", "saved", "rank", damage="flip")],
}


def _setting(name: str, folder: Path, *more: str) -> Setting:
    return Setting(name, (*ARGUMENTS, "ppo.num_updates=4", *SETTINGS[name], *more), folder, random.Random(1))


@pytest.fixture(scope="module", autouse=True)
def _patience() -> Iterator[None]:
    """The harness counts what outlives a kill by 15 s as lost; a busy machine may need longer for what is left."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crash_watch, "GONE_SECONDS", 120.0)
        patch.setattr(crash_watch, "ATTEMPT_SECONDS", 1200.0)
        yield


def _came_in_time(hit: Hit) -> bool:
    """Whether the kill met what it was meant to: a half-written checkpoint, or one to damage, or its stage at least."""
    meets_checkpoint = hit.moment.kind != "checkpoint" or "checkpoint" in hit.half_written
    return meets_checkpoint and hit.place == hit.moment.place and hit.damaged == (hit.moment.damage is not None)


def _missed(outcome: Outcome, plan: list[Moment]) -> list[Moment]:
    met = [hit.moment for hit in outcome.hits if _came_in_time(hit)]
    return [moment for moment in plan if moment not in met]


def _kill_again(setting: Setting, plan: list[Moment]) -> None:
    """One run after the other is killed at the moments of `plan` that no run has been killed at yet, a few times.

    A checkpoint is written in milliseconds: on a busy machine the kill may come after them.
    """
    for _ in range(4):
        missed = _missed(setting.outcome, plan)
        if setting.outcome.failed or not missed:
            break
        setting.run_killed(missed)


def _assert_nothing_lost(outcome: Outcome, plan: list[Moment]) -> None:
    report = table([outcome])
    assert not outcome.failed, report
    missed = _missed(outcome, plan)
    assert not missed, f"no kill came in time in {outcome.runs} runs: {missed}\n{report}"
    assert last_line([outcome]) == f"{len(outcome.hits)} kills, 0 lost, 0 different"
    assert outcome.resumed >= outcome.damaged > 0, report


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """The whole pipeline in one process, undisturbed and, at the same time on another core, killed."""
    setting = _setting("one_process", tmp_path_factory.mktemp("crash"))
    with ThreadPoolExecutor(1) as pool:
        reference = pool.submit(setting.run_undisturbed)
        setting.run_killed(ONE_PROCESS, reference.result)
    return setting


def test_one_process_killed_in_every_stage(one_process: Setting) -> None:
    _kill_again(one_process, ONE_PROCESS)
    _assert_nothing_lost(one_process.outcome, ONE_PROCESS)


@pytest.mark.parametrize("zero", [pytest.param("zero2", marks=pytest.mark.slow), "zero3"])
def test_two_ranks_killed_while_they_train(zero: str, one_process: Setting, tmp_path: Path) -> None:
    models = one_process.reference / "run/stages"
    stages = {
        "zero2": ("stages=[sft]", *LORA),
        "zero3": ("stages=[ppo]", f"ppo.policy={models}/sft/model", f"ppo.reward_model={models}/reward_model/model"),
    }
    setting = _setting(zero, tmp_path, *stages[zero])
    setting.run_undisturbed()
    setting.run_killed(ZERO[zero])
    _kill_again(setting, ZERO[zero])
    _assert_nothing_lost(setting.outcome, ZERO[zero])


def _spoil_weights(run: Path) -> str:
    path = run / "stages/ppo/model/model.safetensors"
    weights = load_file(path)
    name = sorted(weights)[3]
    weights[name].view(-1)[0] += 1e-6
    save_file(weights, path, metadata={"format": "pt"})
    return f"stages/ppo/model/model.safetensors: {name}"


def _spoil_metrics(run: Path) -> str:
    path = run / "metrics.jsonl"
    lines = path.read_text().split("\n")
    path.write_text("\n".join([lines[0], *lines]))
    return "metrics.jsonl: line 2 (sft, step 6): "


def _spoil_samples(run: Path) -> str:
    path = run / "samples.jsonl"
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([*lines[:-2], b""]))
    number = len(lines) - 2
    return f"samples.jsonl: {number} lines instead of {number + 1}"


def _spoil_result(run: Path) -> str:
    path = run / "stages/reward_model/result.json"
    body = json.loads(path.read_text())
    body["summary"] |= {"accuracy": -1.0, "perf/peak_memory_bytes": -1}
    path.write_text(json.dumps(body))
    return "stages/reward_model/result.json: summary.accuracy: -1.0 instead of"


def _leave_half_written(run: Path) -> str:
    (run / "stages/sft/checkpoints/checkpoint-9.partial").mkdir()
    return "stages/sft/checkpoints/checkpoint-9.partial: left half-written"


SPOILERS = [_spoil_weights, _spoil_metrics, _spoil_samples, _spoil_result, _leave_half_written]


@pytest.mark.parametrize("spoil", SPOILERS)
def test_the_comparison_sees_what_is_wrong(spoil: Callable[[Path], str], one_process: Setting, tmp_path: Path) -> None:
    expected = one_process.reference / "run"
    assert differences(expected, expected) == []
    shutil.copytree(expected, tmp_path / "run")
    message = spoil(tmp_path / "run")
    found = differences(expected, tmp_path / "run")
    assert len(found) == 1
    assert found[0].startswith(message)


@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_damage_is_done_to_the_newest_checkpoint(damage: Damage, tmp_path: Path) -> None:
    for step in (9, 10):
        folder = tmp_path / f"stages/ppo/checkpoints/checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "state.pt").write_bytes(b"state")
    path = damage_newest(tmp_path, "ppo", damage, random.Random(1))
    assert path == tmp_path / "stages/ppo/checkpoints/checkpoint-10/state.pt"
    content = path.read_bytes()
    if damage == "truncate":
        assert b"state".startswith(content)
        assert len(content) < 5
    else:
        pairs = zip(content, b"state", strict=True)
        assert sum((one ^ other).bit_count() for one, other in pairs) == 1
    log = tmp_path / "log"
    log.write_text(f"rlhf: {tmp_path}/stages/ppo/checkpoints/checkpoint-9: state.pt\n")
    assert not is_reported(log, path)
    log.write_text(f"rlhf: {path.parent} is damaged: state.pt was altered\n")
    assert is_reported(log, path)


@pytest.fixture
def killed(tmp_path: Path) -> tuple[Resumes, Path, Path]:
    """Of a run killed in stage sft when checkpoints 8 and 9 were whole: the check, the folder, the next start's log."""
    for step in (8, 9):
        (tmp_path / f"stages/sft/checkpoints/checkpoint-{step}").mkdir(parents=True)
        (tmp_path / f"stages/sft/checkpoints/checkpoint-{step}/state.pt").touch()
    lines = [json.dumps({"stage": "sft", "step": step, "perf/step_seconds": 0.1}) + "\n" for step in (4, 8)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    resumes = Resumes(tmp_path)
    resumes.expect()
    (tmp_path / "log").touch()
    return resumes, tmp_path, tmp_path / "log"


def test_a_start_has_to_go_on_from_the_newest_checkpoint(killed: tuple[Resumes, Path, Path]) -> None:
    resumes, run, log = killed
    assert not resumes.check(log, killed=True)  # before it could say so
    with pytest.raises(RuntimeError, match="went on from none instead of checkpoint-9"):
        resumes.check(log, killed=False)
    log.write_text("rlhf: the training goes on from checkpoint-8\n")
    with pytest.raises(RuntimeError, match="went on from checkpoint-8 instead of checkpoint-9"):
        resumes.check(log, killed=True)
    log.write_text("rlhf: the training goes on from checkpoint-9\n")
    assert resumes.check(log, killed=True)
    metrics = run / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace("0.1", "0.2"))
    with pytest.raises(RuntimeError, match="went on from checkpoint-9, and rewrote sft's step 4"):
        resumes.check(log, killed=True)


def test_a_start_that_trains_has_to_say_from_where(killed: tuple[Resumes, Path, Path]) -> None:
    resumes, run, log = killed
    (run / "stages/sft/checkpoints/checkpoint-10").mkdir()
    with pytest.raises(RuntimeError, match="went on from none instead of checkpoint-9"):
        resumes.check(log, killed=True)


def test_the_checkpoint_before_a_damaged_one_has_to_be_used(killed: tuple[Resumes, Path, Path]) -> None:
    resumes, run, log = killed
    damaged = run / "stages/sft/checkpoints/checkpoint-9/state.pt"
    resumes.expect(damaged)
    log.write_text("the training goes on from checkpoint-8\n")
    with pytest.raises(RuntimeError, match=r"checkpoint-9/state\.pt was damaged, and no start .* names it"):
        resumes.check(log, killed=True)
    log.write_text(f"{damaged.parent} is not a whole checkpoint: state.pt was altered\n")
    assert not resumes.check(log, killed=True)
    resumes.expect()
    log.write_text("the training goes on from checkpoint-9\n")
    with pytest.raises(RuntimeError, match="went on from checkpoint-9 instead of checkpoint-8"):
        resumes.check(log, killed=False)
    log.write_text("the training goes on from checkpoint-8\n")
    assert resumes.check(log, killed=False)


def test_a_hundred_kills_are_dealt_over_all_moments() -> None:
    dealer = Dealer(random.Random(1))
    moments = [moment for _ in range(8) for moment in dealer.deal(len(DECK) // 8)]
    assert sorted((moment.place, moment.kind) for moment in moments) == sorted(DECK)
    victims = [moment.victim for moment in moments]
    assert min(victims.count(victim) for victim in ("supervisor", "rank", "tree")) >= len(DECK) // 3
    assert all(DECK.count((stage, "checkpoint")) == 2 for stage in TRAINED)


def test_a_process_whose_parent_is_gone_is_still_found(tmp_path: Path) -> None:
    with Attempt(["experiment=nonesuch"], tmp_path, tmp_path / "log") as attempt:
        script = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])"
        subprocess.run([sys.executable, "-c", script], env={**os.environ, **attempt.mark}, check=True)
        attempt.process.wait()
        orphans = attempt.members()
        assert len(orphans) == 1
        kill(orphans)
        end = time.monotonic() + 60
        while attempt.members():
            assert time.monotonic() < end
            time.sleep(0.01)
