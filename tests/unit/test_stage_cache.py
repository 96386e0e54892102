"""Finished stages that runs share: what is taken, what is not, who computes it, and what damage or death does."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf import cached_stages
from rlhf.cached_stages import CachedStage, cached_stage, check_cache, computed_with, entry_of, is_shared, plan_or_take
from rlhf.config import RLHFConfig, config_from_values, load_config
from rlhf.errors import ConfigError, Stopped
from rlhf.pipeline import StagePlan, begin_stage
from rlhf.runs import files, lease, manifest, stage_cache, tracking
from rlhf.runs.folder import RunFolder, StageResult
from rlhf.runs.lease import Lease, Waiting, read_holder
from tests.command import environment

FINGERPRINT = "f" * 64


@pytest.fixture(scope="module")
def smoke() -> dict[str, Any]:
    """The smoke experiment as plain values."""
    values: dict[str, Any] = load_config(["experiment=smoke", "distributed.device=cpu"]).config.model_dump(mode="json")
    return values


@pytest.fixture
def config(smoke: dict[str, Any], tmp_path: Path) -> RLHFConfig:
    return _changed(smoke, run={**smoke["run"], "cache": str(tmp_path / "cache")})


@pytest.fixture(autouse=True)
def _no_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking git costs more than all the rest."""
    monkeypatch.setattr("rlhf.runs.machine.code_state", dict)


def _changed(values: Mapping[str, Any], **sections: Any) -> RLHFConfig:
    return config_from_values({**values, **sections}, "a test")


def _plan(stage: str = "sft", fingerprint: str = FINGERPRINT) -> StagePlan:
    return StagePlan(stage, {}, fingerprint, {"stage": stage, "of": fingerprint}, False)  # type: ignore[arg-type]


def _run(folder: Path) -> RunFolder:
    """A run that is going on and has lines of another stage."""
    run = RunFolder(folder)
    run.create()
    manifest.start_manifest(run, command=["rlhf"], config={}, config_hash="c", seed=1, stages=["sft", "ppo"])
    run.metrics.write_text('{"stage": "collect", "step": 1, "collect/x": 1}\n')
    return run


def _compute(run: RunFolder, plan: StagePlan, content: bytes = b"weights") -> None:
    """Does what a stage does."""
    begin_stage(run, plan)
    stage = run.stage(plan.name)
    for name, body in {"model/model.safetensors": content, "notes/a.json": b"{}", "preferences.sqlite": b"db"}.items():
        (stage.path / name).parent.mkdir(exist_ok=True)
        (stage.path / name).write_bytes(body)
    (stage.checkpoints / "checkpoint-3").mkdir(parents=True)
    (stage.path / "model.partial").mkdir()
    with run.metrics.open("a") as file:
        file.write(f'{{"stage": "{plan.name}", "step": 1, "{plan.name}/loss": 0.5}}\n')
        file.write(f'{{"stage": "{plan.name}", "step": 2, "{plan.name}/loss": null}}\n')
    with run.samples.open("a") as file:
        file.write(f'{{"stage": "{plan.name}", "step": 1, "text": "caf\u00e9 \\u2028"}}\n')
    stage.write_result(StageResult(plan.name, plan.fingerprint, 1.5, stage.hash_outputs(["model"]), {"loss": 0.5}))


def _publish(config: RLHFConfig, folder: Path, plan: StagePlan | None = None) -> tuple[RunFolder, Path]:
    """A run that has computed a stage, and where the cache has it."""
    run, plan = _run(folder), plan or _plan()
    cached = plan_or_take(config, run, plan, 1)
    assert not cached.taken
    _compute(run, plan)
    cached.publish()
    assert cached.entry is not None
    return run, cached.entry.path


def _content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_what_one_run_has_computed_another_takes(
    config: RLHFConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, entry = _publish(config, tmp_path / "first")
    second = _run(tmp_path / "second")
    second.metrics.write_text(
        '{"stage": "collect", "step": 1, "collect/x": 2}\n{"stage": "sft", "step": 1, "sft/loss": 9}\n{"stage": "sf'
    )
    assert plan_or_take(config, second, _plan(), 1).taken
    assert "── sft (1/6) · taken from the cache ──" in capsys.readouterr().out
    theirs, own = first.stage("sft"), second.stage("sft")
    assert _content(own.path) == _content(theirs.path)
    assert not own.checkpoints.exists()
    result = own.read_result()
    assert result is not None
    assert (result.fingerprint, result.summary, own.altered_outputs(result)) == (FINGERPRINT, {"loss": 0.5}, [])
    assert json.loads(own.decided_by.read_text()) == {"stage": "sft", "of": FINGERPRINT}
    lines = first.metrics.read_bytes().split(b"\n")
    assert second.metrics.read_bytes().split(b"\n") == [b'{"stage": "collect", "step": 1, "collect/x": 2}', *lines[1:]]
    assert second.samples.read_bytes() == first.samples.read_bytes()
    noted = manifest.read_manifest(second)["stages"]["sft"]
    assert (noted["cached_from"], noted["fingerprint"]) == (str(entry), FINGERPRINT)
    # The weights lie on the disk once; a database may be written to, so each run has its own.
    weights = own.path / "model/model.safetensors"
    assert weights.stat().st_ino == (theirs.path / "model/model.safetensors").stat().st_ino
    assert weights.stat().st_nlink == 3
    assert (own.path / "preferences.sqlite").stat().st_nlink == 1
    assert list(tmp_path.rglob("*.partial")) == [theirs.path / "model.partial"]


def test_without_hard_links_files_are_copied(
    config: RLHFConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: Any, **__: Any) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", no_links)
    first, _ = _publish(config, tmp_path / "first")
    second = _run(tmp_path / "second")
    assert plan_or_take(config, second, _plan(), 1).taken
    weights = second.stage("sft").path / "model/model.safetensors"
    assert weights.stat().st_nlink == 1
    assert _content(second.stage("sft").path) == _content(first.stage("sft").path)


def test_another_fingerprint_is_another_stage(config: RLHFConfig, tmp_path: Path) -> None:
    _publish(config, tmp_path / "first")
    run = _run(tmp_path / "second")
    assert not plan_or_take(config, run, _plan(fingerprint="e" * 64), 1).taken
    assert not plan_or_take(config, run, _plan("reward_model"), 1).taken


def _rewrite(path: Path, content: bytes) -> None:
    """As a new file: a hard link's other names keep theirs."""
    path.unlink()
    path.write_bytes(content)


def _claim_outside(entry: Path) -> None:
    body = json.loads((entry / "entry.json").read_text())
    body["files"]["stage/../../../x"] = "0"
    _rewrite(entry / "entry.json", json.dumps(body).encode())


def _other_result(entry: Path) -> None:
    path = entry / "stage/result.json"
    _rewrite(path, path.read_bytes().replace(FINGERPRINT.encode(), b"0" * 64))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights": (lambda entry: _rewrite(entry / "stage/model/model.safetensors", b"weightz"), "model.safetensors has"),
    "gone": (lambda entry: (entry / "stage/notes/a.json").unlink(), "a.json is missing"),
    "metrics": (lambda entry: _rewrite(entry / "metrics.jsonl", b"{}\n"), "metrics.jsonl has another content"),
    "samples": (lambda entry: (entry / "samples.jsonl").unlink(), "samples.jsonl has another content"),
    "torn": (lambda entry: _rewrite(entry / "entry.json", b'{"schema'), "entry.json does not say what the entry has"),
    "outside": (_claim_outside, "names files outside the entry"),
    "other": (_other_result, "is not the result of this stage"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_set_aside_and_computed_again(
    damage: str, config: RLHFConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, entry = _publish(config, tmp_path / "first")
    harm, said = DAMAGES[damage]
    harm(entry)
    run = _run(tmp_path / "second")
    before = run.metrics.read_bytes()
    cached = plan_or_take(config, run, _plan(), 1)
    assert not cached.taken
    message = capsys.readouterr().err
    assert said in message
    (aside,) = entry.parent.glob("*.damaged-*")
    assert f"It is computed again; what is left of it is kept in {aside}" in message
    # The run is as it was.
    assert run.metrics.read_bytes() == before
    assert not any(run.stages.iterdir())
    _compute(run, _plan())
    cached.publish()
    third = _run(tmp_path / "third")
    assert plan_or_take(config, third, _plan(), 1).taken
    assert (third.stage("sft").path / "model/model.safetensors").read_bytes() == b"weights"
    assert capsys.readouterr().err == ""


def test_work_of_another_config_is_kept_aside(
    config: RLHFConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _publish(config, tmp_path / "first")
    run = _run(tmp_path / "second")
    _compute(run, _plan(fingerprint="e" * 64), b"older")
    assert plan_or_take(config, run, _plan(), 1).taken
    assert "sft starts over: of" in capsys.readouterr().out
    assert (run.previous / "sft/model/model.safetensors").read_bytes() == b"older"
    assert (run.stage("sft").path / "model/model.safetensors").read_bytes() == b"weights"
    assert run.metrics.read_text().count('"stage": "sft"') == 2


def test_what_decides_rounding_and_lines_tells_entries_apart(
    smoke: dict[str, Any], config: RLHFConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = _run(tmp_path / "run")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def entry(stage: str = "ppo", **sections: dict[str, Any]) -> Path:
        merged = {name: {**smoke[name], **values} for name, values in sections.items()}
        found = entry_of(_changed({**smoke, "run": config.run.model_dump()}, **merged), run, _plan(stage))
        assert found is not None
        return found.path

    same = entry()
    assert same == tmp_path / "cache/ppo" / FINGERPRINT / same.name
    assert entry(ppo={"save_every": 7, "keep_checkpoints": 5, "policy": "/x"}) == same
    assert entry(sft={"micro_batch_size": 2}) == same
    others = [
        entry(ppo={"exact_kl_rows": 3}),
        entry(ppo={"samples_every": 2}),
        entry(ppo={"micro_batch_size": 2}),
        entry(distributed={"num_processes": 2}),
        entry(distributed={"num_threads": 3}),
        entry(distributed={"device": "auto"}),
        entry(zero={"stage": 2}),
        entry("sft"),
    ]
    assert len({same, *others}) == len(others) + 1
    monkeypatch.setattr("rlhf.runs.machine.package_versions", lambda: {"torch": "another", "wandb": "1"})
    other_torch = entry()
    assert other_torch != same
    monkeypatch.setattr("rlhf.runs.machine.package_versions", lambda: {"torch": "another", "wandb": "2"})
    assert entry() == other_torch
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert entry() != other_torch


def test_a_gpu_counts_by_its_name(smoke: dict[str, Any], tmp_path: Path) -> None:
    run = _run(tmp_path / "run")
    config = _changed(smoke, distributed={**smoke["distributed"], "device": "auto"})
    manifest.update_manifest(run, hardware={"gpus": [{"name": "H100", "driver": "1"}, {"name": "H100"}]})
    found = computed_with(config, run, "sft")
    assert (found["gpus"], found["threads"]) == (["H100"], None)


def test_what_people_and_other_runs_write_to_is_not_shared(smoke: dict[str, Any]) -> None:
    shared = [stage for stage in smoke["stages"] if is_shared(_changed(smoke), stage)]
    assert shared == ["sft", "collect", "reward_model", "ppo", "evaluate"]
    own = smoke["preferences"]
    assert not is_shared(_changed(smoke, preferences={**own, "store": "/labels.sqlite"}), "collect")
    assert not is_shared(_changed(smoke, preferences={**own, "annotator": {"type": "human"}}), "collect")
    assert not is_shared(_changed(smoke), "closed_form")
    assert not is_shared(_changed(smoke), "noisy_labels")


def test_without_the_key_nothing_is_shared(smoke: dict[str, Any], tmp_path: Path) -> None:
    config = _changed(smoke)
    check_cache(config)
    assert entry_of(config, _run(tmp_path / "run"), _plan()) is None
    _publish_nothing = plan_or_take(config, RunFolder(tmp_path / "run"), _plan(), 1)
    assert not _publish_nothing.taken
    _publish_nothing.publish()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_file_in_the_place_of_the_cache(smoke: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "cache").touch()
    config = _changed(smoke, run={**smoke["run"], "cache": str(tmp_path / "cache/below")})
    with pytest.raises(ConfigError, match=r"run\.cache=.*: expected a folder, but .*/cache is a file"):
        check_cache(config)


def test_a_cache_that_cannot_be_written_fails_nothing(
    config: RLHFConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(stage_cache, "_link", full)
        _, entry = _publish(config, tmp_path / "first")
    assert "stage sft could not be put into the cache" in capsys.readouterr().err
    assert not entry.exists()
    assert not list(entry.parent.glob(".*"))
    # No lease either: the stage is computed without.
    with monkeypatch.context() as patched:
        patched.setattr(Lease, "acquire", full)
        run = _run(tmp_path / "second")
        with cached_stage(config, run, _plan(), 1, before_waiting=lambda: None) as cached:
            assert not cached.taken
    assert "nothing can be put into the cache" in capsys.readouterr().err


def test_the_adapters_of_another_run_find_their_base_in_this_one(config: RLHFConfig, tmp_path: Path) -> None:
    plan = _plan("reward_model")
    for name in ("first", "second"):
        run = _run(tmp_path / name)
        (run.stage("sft").model).mkdir(parents=True)
        cached = plan_or_take(config, run, plan, 3)
        if not cached.taken:
            stage = run.stage("reward_model")
            begin_stage(run, plan)
            for adapter, base in {"model": run.stage("sft").model.absolute(), "other": "/elsewhere/base"}.items():
                (stage.path / adapter).mkdir()
                body = {"base_model_name_or_path": str(base), "r": 8}
                (stage.path / adapter / "adapter_config.json").write_text(json.dumps(body, indent=2))
            hashes = stage.hash_outputs(["model", "other"])
            stage.write_result(StageResult("reward_model", FINGERPRINT, 1.0, hashes))
            cached.publish()
    assert cached.taken
    own = run.stage("reward_model")
    body = json.loads((own.model / "adapter_config.json").read_text())
    assert body == {"base_model_name_or_path": str(run.stage("sft").model), "r": 8}
    assert "/elsewhere/base" in (own.path / "other/adapter_config.json").read_text()
    result = own.read_result()
    assert result is not None
    assert own.altered_outputs(result) == []
    # The one that made it is as it was.
    first = RunFolder(tmp_path / "first").stage("reward_model")
    made = first.read_result()
    assert made is not None
    assert first.altered_outputs(made) == []


def test_other_code_is_named(config: RLHFConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = _run(tmp_path / "first")
    manifest.update_manifest(first, code={"commit": "0123456789abcdef", "diff_hash": "x"})
    cached = plan_or_take(config, first, _plan(), 1)
    _compute(first, _plan())
    manifest.update_stage(first, "sft", compute={"device": "cpu"})
    cached.publish()
    second = _run(tmp_path / "second")
    plan_or_take(config, second, _plan(), 1)
    assert "taken from the cache, computed by commit 01234567 with changes ──" in capsys.readouterr().out
    assert manifest.read_manifest(second)["stages"]["sft"]["compute"] == {"device": "cpu"}


def test_computed_here_after_it_was_taken(config: RLHFConfig, tmp_path: Path) -> None:
    _publish(config, tmp_path / "first")
    run = _run(tmp_path / "second")
    assert plan_or_take(config, run, _plan(), 1).taken
    with cached_stage(config, run, _plan(fingerprint="e" * 64), 1, before_waiting=lambda: None) as cached:
        assert not cached.taken
    assert manifest.read_manifest(run)["stages"]["sft"]["cached_from"] is None


def test_trackers_get_the_numbers_of_a_taken_stage(
    config: RLHFConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[Any] = []

    class Sink:
        def log(self, line: int, step: int, metrics: Mapping[str, float | None]) -> None:
            heard.append((line, step, dict(metrics)))

        def log_samples(self, line: int, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
            heard.append((line, step, [*rows]))

        def record(self, result: StageResult, inputs: Mapping[str, str]) -> None:
            heard.append(result.summary)

        def close(self, ending: Any) -> None:
            heard.append(ending.exit_code)

    _publish(config, tmp_path / "first")
    starts: list[Any] = []

    def open_sink(start: Any) -> Sink:
        starts.append(start)
        return Sink()

    monkeypatch.setattr(tracking, "SINKS", {"own": open_sink})
    plan_or_take(config, _run(tmp_path / "second"), _plan(), 1)
    assert [(start.stage, start.lines_before, start.lines, start.resume_step) for start in starts] == [("sft", 1, 1, 0)]
    assert heard == [
        (1, 1, {"sft/loss": 0.5}),
        (1, 1, [{"text": "caf\u00e9 \u2028"}]),
        (2, 2, {"sft/loss": None}),
        {"loss": 0.5},
        0,
    ]


def _until(what: Callable[[], bool]) -> None:
    """Returns when it is so, or when that has taken too long: what the test looks at then says what was missing."""
    deadline = time.monotonic() + 60
    while not what() and time.monotonic() < deadline:
        time.sleep(0.01)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cached_stages, "POLL_SECONDS", 0.01)


@pytest.mark.usefixtures("quick")
def test_one_computes_and_the_others_wait(
    config: RLHFConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ready, computed, freed = threading.Barrier(3), [], []

    def work(name: str) -> None:
        run = _run(tmp_path / name)
        ready.wait()
        with cached_stage(config, run, _plan(), 1, before_waiting=lambda: freed.append(name)) as cached:
            if not cached.taken:
                computed.append(name)
                _until(lambda: len(freed) == 2)
                _compute(run, _plan())
                cached.publish()

    threads = [threading.Thread(target=work, args=(name,)) for name in ("a", "b", "c")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(computed) == 1
    assert sorted(freed) == sorted({"a", "b", "c"} - {*computed})
    out = capsys.readouterr().out
    message = f"stage sft is being computed by {tmp_path / computed[0]} (process {os.getpid()} on "
    assert out.count(message) == 2
    assert out.count("taken from the cache") == 2
    contents = [_content(tmp_path / name / "stages/sft/model") for name in ("a", "b", "c")]
    assert contents[0] == contents[1] == contents[2]
    assert not list((tmp_path / "cache").rglob("*.lease"))


def test_a_stop_while_waiting_leaves_the_other_one_alone(
    config: RLHFConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(_: float) -> None:
        raise Stopped(signal.SIGTERM)

    run = _run(tmp_path / "a")
    with cached_stage(config, run, _plan(), 1, before_waiting=lambda: None) as cached:
        monkeypatch.setattr(time, "sleep", stop)
        with (
            pytest.raises(Stopped),
            cached_stage(config, _run(tmp_path / "b"), _plan(), 1, before_waiting=lambda: None),
        ):
            pytest.fail("it is being computed")
        monkeypatch.undo()
        _compute(run, _plan())
        cached.publish()
    assert plan_or_take(config, _run(tmp_path / "b"), _plan(), 1).taken


@pytest.mark.usefixtures("quick")
def test_when_it_fails_the_next_one_computes(config: RLHFConfig, tmp_path: Path) -> None:
    begun, waited = threading.Event(), threading.Event()

    def fail() -> None:
        with (
            suppress(RuntimeError),
            cached_stage(config, _run(tmp_path / "a"), _plan(), 1, before_waiting=lambda: None),
        ):
            begun.set()
            waited.wait(60)
            raise RuntimeError

    thread = threading.Thread(target=fail)
    thread.start()
    begun.wait()
    with cached_stage(config, _run(tmp_path / "b"), _plan(), 1, before_waiting=waited.set) as cached:
        assert not cached.taken
    thread.join()
    assert waited.is_set()


# A process that takes a lease and keeps it until it is killed, or leaves something half-written in the cache.
HOLD = """
import sys, time
from pathlib import Path
from rlhf.runs.lease import Lease
assert Lease.acquire(Path(sys.argv[1]), {"run": "theirs"}) is not None
print("held", flush=True)
time.sleep(600)
"""


@pytest.mark.usefixtures("quick")
def test_a_holder_that_was_killed_blocks_nobody(config: RLHFConfig, tmp_path: Path) -> None:
    run = _run(tmp_path / "run")
    entry = entry_of(config, run, _plan())
    assert entry is not None
    path = entry.path.with_name(f".{entry.path.name}.lease")
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    left = files.partial_path(entry.path)
    left.mkdir()
    waited = threading.Event()

    def kill() -> None:
        waited.wait(60)
        process.send_signal(signal.SIGKILL)
        process.wait()

    thread = threading.Thread(target=kill)
    thread.start()
    began = time.monotonic()
    with cached_stage(config, run, _plan(), 1, before_waiting=waited.set) as cached:
        assert not cached.taken
        assert time.monotonic() - began < 120  # and not only when its lease has run out
        assert not left.exists()
        holder = read_holder(path)
        assert holder is not None
        assert holder.process == os.getpid()
    thread.join()
    process.stdout.close()
    assert waited.is_set(), "the holder was waited for while it lived"
    assert not path.exists()


def _elsewhere(path: Path) -> dict[str, Any]:
    """Writes a lease of another host's process, whose number is nobody's here."""
    body = {"token": "t", "host": "far", "place": "far away", "process": 2**22 + 1, "started": 1, "about": {}}
    path.write_text(json.dumps(body))
    return body


def _clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What time it is for those who look at a lease: `now`."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(lease, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_a_silent_holder_elsewhere_is_dead_after_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = _clock(monkeypatch)
    path = tmp_path / "x.lease"
    _elsewhere(path)
    waiting = Waiting(path)
    for beat in range(1, 5):
        clock.now += 0.4 * lease.DEAD_SECONDS
        os.utime(path, (beat, beat))  # by its own clock, which is far behind
        assert str(waiting.holder()) == "process 4194305 on far"
    assert Lease.acquire(path, {}) is None
    clock.now += 0.9 * lease.DEAD_SECONDS
    assert waiting.holder() is not None
    clock.now += 0.2 * lease.DEAD_SECONDS
    assert waiting.holder() is None
    own = Lease.acquire(path, {})
    assert own is not None
    own.release()
    # One that died before it had written its name.
    path.touch()
    waiting = Waiting(path)
    assert waiting.holder() is not None
    clock.now += 1.1 * lease.DEAD_SECONDS
    assert waiting.holder() is None
    assert not path.exists()


def test_a_living_holder_keeps_its_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = _clock(monkeypatch)
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.05)
    path = tmp_path / "folder/x.lease"
    with Lease.acquire(path, {"run": "r"}) as own:  # type: ignore[union-attr]
        waiting = Waiting(path)
        for _ in range(4):
            clock.now += 0.9 * lease.DEAD_SECONDS
            last = path.stat().st_mtime_ns
            _until(lambda last=last: path.stat().st_mtime_ns > last)  # type: ignore[misc]
            holder = waiting.holder()
            assert holder is not None
            assert holder.about == {"run": "r"}
        # Somebody has taken it over after all: it is theirs.
        path.unlink()
        body = _elsewhere(path)
        own.release()
        assert json.loads(path.read_text()) == body
    # What is taken away is the dead one's, and nobody else's.
    lease._take_away(path, "another token")
    assert json.loads(path.read_text()) == body
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_leases_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: Any, **__: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    path = tmp_path / "x.lease"
    with Lease.acquire(path, {"run": "r"}):  # type: ignore[union-attr]
        monkeypatch.setattr(Path, "exists", lambda _: False)  # another one takes it at the same instant
        assert Lease.acquire(path, {}) is None
        monkeypatch.undo()
        assert Waiting(path).holder() is not None
    assert list(tmp_path.iterdir()) == []


def test_a_number_that_was_given_again_is_another_process(tmp_path: Path) -> None:
    path = tmp_path / "x.lease"
    own = Lease.acquire(path, {})
    assert own is not None
    body = json.loads(path.read_text())
    own.release()
    path.write_text(json.dumps({**body, "started": body["started"] - 1}))
    assert Waiting(path).holder() is None


def test_publishing_twice_keeps_the_first(config: RLHFConfig, tmp_path: Path) -> None:
    run, plan = _run(tmp_path / "run"), _plan()
    _compute(run, plan)
    entry = entry_of(config, run, plan)
    assert entry is not None
    assert entry.publish(run, run.stage("sft"), {"number": 1})
    assert not entry.publish(run, run.stage("sft"), {"number": 2})
    # Two that were whole at the same instant.
    other = files.partial_path(entry.path)
    (other / "x").mkdir(parents=True)
    assert not stage_cache._rename(other, entry.path)
    assert json.loads((entry.path / "entry.json").read_text())["about"] == {"number": 1}
    assert isinstance(CachedStage(config, run, plan, 1, entry), CachedStage)
