"""The process group: what ranks say to each other, who may start them, what the user is told when it cannot be."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import rlhf
from rlhf.config.distributed import DistributedConfig
from rlhf.config.zero import ZeroConfig
from rlhf.distributed.launch import launch
from rlhf.distributed.peers import LaunchResult
from rlhf.distributed.runtime import Runtime, _choose_device
from rlhf.errors import ConfigError

pytestmark = pytest.mark.distributed

WORKER = "tests.distributed.runtime_worker"


@pytest.fixture(autouse=True)
def clean_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No rank variables on entering; threads and determinism as they were on leaving."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that leaving restores what was there
        monkeypatch.delenv(name)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    root = str(Path(rlhf.__file__).parent.parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")])))
    threads, mode = torch.get_num_threads(), torch.get_deterministic_debug_mode()
    yield
    torch.set_num_threads(threads)
    torch.set_deterministic_debug_mode(mode)


def answers(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def check_talk(found: list[dict[str, Any]]) -> None:
    for rank, answer in enumerate(found):
        # A group that outlives its end aborts the interpreter's, at times.
        assert (bool(answer["threads"]), answer["left"]) == (True, [])
        for said in (answer["first"], answer["second"]):
            assert (said["rank"], said["world_size"], said["is_main"]) == (rank, 2, rank == 0)
            assert said["gathered"] == [{"rank": 0}, {"rank": 1}]
            assert said["broadcast"] == ["from", 0]
            assert said["sum"] == [2.0, 1.0]
            assert said["dtype"] == "torch.float64"
            assert said["unchanged"] == [1.0, rank]
            assert said["grouped"] is True
            assert said["draws"] == found[0]["first"]["draws"]


def test_two_groups_at_the_same_time_talk_among_themselves(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    commands = []
    for stage, folder in zip((0, 2), folders, strict=True):
        folder.mkdir()
        commands.append([sys.executable, "-m", WORKER, "talk", str(folder), str(stage)])
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda command: launch(command, 2, num_threads=1), commands))
    assert results == [LaunchResult(0)] * 2
    for folder in folders:
        check_talk(answers(folder))


def test_torchrun_starts_the_ranks_just_as_well(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    done = subprocess.run(
        [*command, "--nproc-per-node=2", "-m", WORKER, "talk", str(tmp_path), "0"],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    check_talk(answers(tmp_path))


def test_srun_starts_the_ranks_just_as_well(tmp_path: Path) -> None:
    slurm = {"SLURM_NTASKS": "2", "SLURM_JOB_ID": str(os.getpid() % 9973), "SLURM_NNODES": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", WORKER, "talk", str(tmp_path), "0"],
            env={**os.environ, **slurm, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=600) for process in processes] == [0, 0]
    check_talk(answers(tmp_path))


def test_a_launcher_that_starts_one_process_silently_is_caught(tmp_path: Path) -> None:
    # `accelerate launch --cpu --num_processes 2` does.
    done = subprocess.run(
        [sys.executable, "-m", WORKER, "talk", str(tmp_path), "0"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "distributed.num_processes is 2, but this host runs 1 process (world size 1)" in done.stdout


def test_one_dead_rank_ends_the_others_although_they_wait_for_it(tmp_path: Path) -> None:
    before = set(psutil.Process().children(recursive=True))  # the server of `run_worker`
    result = launch([sys.executable, "-m", WORKER, "die", str(tmp_path), "0"], 2, num_threads=1)
    ended = time.time()
    assert (result.exit_code, result.rank) == (137, 1)
    # The operation that rank 0 waits in gives up after 60 s.
    assert ended - (tmp_path / "ready1").stat().st_mtime < 40
    assert set(psutil.Process().children(recursive=True)) <= before


def test_one_process_has_no_group_and_repeats_its_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # left behind by a trainer or by `accelerate launch`
    config = DistributedConfig(device="cpu", num_threads=1)
    runtime = Runtime.start(config, ZeroConfig(), seed=3)
    draw = torch.rand(3)
    assert not torch.distributed.is_initialized()
    assert "RANK" not in os.environ
    assert "ACCELERATE_MIXED_PRECISION" not in os.environ
    assert (runtime.rank, runtime.world_size, runtime.precision, runtime.dtype) == (0, 1, "fp32", torch.float32)
    assert runtime.gather_objects(4) == [4]
    assert runtime.broadcast_object("x") == "x"
    tensor = torch.ones(2)
    assert runtime.sum_over_ranks(tensor).add_(1).tolist() == [2, 2]
    assert tensor.tolist() == [1, 1]
    runtime.barrier()
    again = Runtime.start(config, ZeroConfig(), seed=3)
    assert torch.equal(torch.rand(3), draw)
    again.stop()


def test_bf16_is_taken_on_cpu_when_asked_for() -> None:
    runtime = Runtime.start(DistributedConfig(device="cpu", precision="bf16"), ZeroConfig(), seed=0)
    assert runtime.dtype == torch.bfloat16


def test_cuda_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"torch finds no CUDA device.*distributed\.device=cpu"):
        Runtime.start(DistributedConfig(device="cuda"), ZeroConfig(), seed=0)


def pretend_cuda(monkeypatch: pytest.MonkeyPatch, devices: int, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")


def test_more_processes_than_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_cuda(monkeypatch, devices=1, capability=(9, 0))
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"num_processes is 2, but this host has 1 visible CUDA device"):
        Runtime.start(DistributedConfig(num_processes=2), ZeroConfig(), seed=0)


def test_a_gpu_for_each_task_of_srun_is_number_0_to_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_cuda(monkeypatch, devices=1, capability=(9, 0))
    for name, value in (("SLURM_PROCID", "3"), ("SLURM_LOCALID", "1"), ("SLURM_STEP_NUM_TASKS", "4")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert _choose_device(DistributedConfig(num_processes=4), local_rank=1) == torch.device("cuda", 0)
    # One task a node, whose supervisor started two ranks each.
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(ConfigError, match="this host has 1 visible CUDA device"):
        _choose_device(DistributedConfig(num_nodes=4, num_processes=2), local_rank=1)


def test_bf16_on_a_device_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_cuda(monkeypatch, devices=1, capability=(7, 5))
    with pytest.raises(ConfigError, match="Old GPU has no bfloat16 units"):
        Runtime.start(DistributedConfig(precision="bf16"), ZeroConfig(), seed=0)


@pytest.mark.parametrize("kind", ["absent", "broken"])
def test_zero_without_deepspeed(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    if kind == "absent":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    else:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: "found")
        monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ConfigError, match=r"needs DeepSpeed.*pip install deepspeed"):
        Runtime.start(DistributedConfig(device="cpu"), ZeroConfig(stage=2), seed=0)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
