"""The manifest tells what ran, from what, on what, and how each attempt ended."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from rlhf.runs import machine, manifest
from rlhf.runs.folder import RunFolder


def start(run: RunFolder, **changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "command": ["rlhf", "run"],
        "config": {"a": 1},
        "config_hash": "h",
        "seed": 1,
        "stages": ["sft", "ppo"],
    }
    return manifest.start_manifest(run, **{**arguments, **changes})


def test_attempts_and_stages(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    start(run)
    manifest.update_stage(run, "sft", status="finished", seconds=2.0, outputs={"model": "x"})
    manifest.update_stage(run, "ppo", status="running")
    # The process is killed here: nobody writes an end.
    body = start(run, command=["rlhf", "run", "again"])
    assert [attempt["outcome"] for attempt in body["attempts"]] == ["killed", "running"]
    assert body["stages"]["sft"]["status"] == "finished"
    assert body["stages"]["ppo"]["status"] == "interrupted"
    manifest.update_stage(run, "ppo", status="running")
    body = manifest.finish_manifest(run, 130)
    assert body["status"] == "interrupted"
    assert body["stages"]["ppo"]["status"] == "interrupted"
    start(run)
    manifest.update_stage(run, "ppo", status="running")
    assert manifest.finish_manifest(run, 1)["stages"]["ppo"]["status"] == "failed"
    start(run)
    body = manifest.finish_manifest(run, 0)
    assert (body["status"], body["exit_status"]) == ("finished", 0)
    assert [attempt["exit_status"] for attempt in body["attempts"]] == [None, 130, 1, 0]
    assert manifest.read_manifest(run) == body
    assert manifest.update_manifest(run, note="n")["note"] == "n"


def test_code_and_packages_are_those_that_made_the_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same command again after an upgrade finds everything finished: nothing was made with the other version."""
    run = RunFolder(tmp_path)
    versions = {"torch": "1"}
    monkeypatch.setattr(machine, "package_versions", lambda: dict(versions))
    monkeypatch.setattr(machine, "code_content", lambda: {"rlhf/ops": versions["torch"]})
    start(run)
    for stage in ("sft", "ppo"):
        manifest.update_stage(run, stage, status="running")
        manifest.update_stage(run, stage, status="finished")
    manifest.finish_manifest(run, 0)
    versions["torch"] = "2"
    start(run)
    body = manifest.finish_manifest(run, 0)
    assert (body["packages"], body["code"]["content"], len(body["attempts"])) == ({"torch": "1"}, {"rlhf/ops": "1"}, 2)
    # Killed, and then one that makes a stage: what is noted is what that one has.
    start(run)
    versions["torch"] = "3"
    start(run)
    manifest.update_stage(run, "ppo", status="running")
    body = manifest.finish_manifest(run, 0)
    assert (body["packages"], body["code"]["content"]) == ({"torch": "3"}, {"rlhf/ops": "3"})
    assert "here" not in body


def test_peak_memory_keeps_the_largest_and_status_is_checked(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    start(run)
    manifest.update_stage(run, "sft", peak_memory_bytes=5)
    manifest.update_stage(run, "sft", peak_memory_bytes=3)
    assert manifest.read_manifest(run)["stages"]["sft"]["peak_memory_bytes"] == 5
    with pytest.raises(ValueError, match="done"):
        manifest.update_stage(run, "sft", status="done")
    assert machine.peak_memory_bytes() > 2**20


def test_broken_manifest_is_started_anew(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.create()
    run.manifest.write_text('{"schema": "manif')
    assert manifest.read_manifest(run) == {}
    assert len(start(run)["attempts"]) == 1


def test_it_is_quick_and_names_no_host_or_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A GPU's tool has its own pace.
    monkeypatch.setattr(machine, "gpus", list)
    run = RunFolder(tmp_path)
    times = []
    for _ in range(3):
        before = time.process_time()
        body = start(run)
        times.append(time.process_time() - before)
    assert min(times) < 0.1
    assert body["packages"]["torch"]
    assert body["packages"]["python"].startswith("3.")
    assert body["hardware"]["cores"] >= 1
    assert body["hardware"]["memory_bytes"] > 2**28
    assert os.uname().nodename not in str(body["hardware"])


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


def test_code_state(tmp_path: Path) -> None:
    package = tmp_path / "rlhf"
    package.mkdir()
    (package / "a.py").write_text("1")
    assert machine.code_state(package) == {"commit": None, "diff_hash": None}
    git(tmp_path, "init", "-q")
    assert machine.code_state(package)["commit"] is None
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    clean = machine.code_state(package)
    assert len(clean["commit"] or "") == 40
    assert clean["diff_hash"] is None
    hashes: set[str | None] = {None}
    for change in ("2", "3"):
        (package / "a.py").write_text(change)
        hashes.add(machine.code_state(package)["diff_hash"])
    for content in ("new", "newer"):
        (package / "b.py").write_text(content)
        hashes.add(machine.code_state(package)["diff_hash"])
    assert len(hashes) == 5
    # Outside code and configs nothing counts; an installed package is not the checkout it happens to lie in.
    before = machine.code_state(package)
    (tmp_path / "notes.txt").write_text("x")
    assert machine.code_state(package) == before
    assert machine.code_state(tmp_path / ".venv" / "site-packages" / "rlhf") == {"commit": None, "diff_hash": None}
    # The files by their names, renamed ones by the new name.
    assert before["changed"] == ["rlhf/a.py", "rlhf/b.py"]
    git(tmp_path, "add", ".")
    git(tmp_path, "mv", "rlhf/a.py", "rlhf/with space.py")
    assert {"rlhf/b.py", "rlhf/with space.py"} <= set(machine.code_state(package)["changed"])


def test_the_content_of_the_code_by_folder(tmp_path: Path) -> None:
    """Also where there is no git to ask."""
    package = tmp_path / "rlhf"
    (package / "rewards/rules").mkdir(parents=True)
    for name in ("a.py", "rewards/b.py", "rewards/rules/c.py", "rewards/notes.txt"):
        (package / name).write_text(name)
    before = machine.code_content(package)
    assert list(before) == ["rlhf", "rlhf/rewards", "rlhf/rewards/rules"]
    (package / "rewards/b.py").write_text("changed")
    (package / "rewards/notes.txt").write_text("changed")
    after = machine.code_content(package)
    assert [folder for folder in before if before[folder] != after[folder]] == ["rlhf/rewards"]
    (package / "rewards/b.py").rename(package / "rewards/d.py")
    assert machine.code_content(package)["rlhf/rewards"] != after["rlhf/rewards"]
    assert "rlhf/rewards" in machine.code_content()


def test_gpus_from_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H200, 143771, 570.1'\necho 'Odd GPU, [N/A], 570.1'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert machine.gpus() == [
        {"name": "NVIDIA H200", "memory_bytes": 143771 * 2**20, "driver": "570.1"},
        {"name": "Odd GPU", "memory_bytes": None, "driver": "570.1"},
    ]
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert machine.gpus() == []
