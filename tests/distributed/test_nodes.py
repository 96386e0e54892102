"""`rlhf run` on two nodes, which are two commands on this host: the result, deaths and signals, Slurm, a network."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from rlhf.distributed.launch import reserved_port
from tests.command import SMOKE, command, environment, rlhf_command, wait_for
from tests.run_example import held
from tests.stage_example import metrics_of, weight_bytes
from tests.unit.test_launch import mark, marked, wait_until_gone

__all__ = ["mark"]  # the fixture

pytestmark = pytest.mark.distributed

# PPO after SFT, under ZeRO 2, with a rule for a reward so that no reward model has to be trained.
PPO = ("stages=[sft,ppo]", "zero=stage2", "ppo.rewards={length:{type:length,maximum:8}}", "ppo.value_init=policy")
# Long enough that something can happen to it; nothing is waited for longer than its start.
LONG = ("stages=[sft]", "sft.max_steps=100000", "sft.save_every=2")
# What ends because another node or rank has ended takes 5 s and what the machine needs, and not the ten minutes of
# `distributed.timeout_seconds`.
SOON = 30
# What a death on one node may take to end the other.
PROMISED = 10


@pytest.fixture
def port() -> Iterator[int]:
    """The rendezvous's, which is given to nobody else while the test runs."""
    with reserved_port() as number:
        yield number


def node(
    folder: Path, rank: int, port: int, *arguments: str, extra: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Starts one node's command; what it prints is in `folder/node<rank>.txt`."""
    place = (
        *(f"distributed.node_rank={rank}", f"distributed.rendezvous=127.0.0.1:{port}", "distributed.num_nodes=2"),
        # A busy machine lets a process wait for seconds; a connection that is closed is noticed at once.
        "distributed.silent_seconds=60",
    )
    with (folder / f"node{rank}.txt").open("wb") as output:
        return subprocess.Popen(
            command("run", *SMOKE, *place, "run.dir=run", *arguments),
            cwd=folder,
            env=environment(extra),
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def both(
    folder: Path, port: int, *arguments: str, extra: Mapping[str, str] | None = None
) -> tuple[subprocess.Popen[bytes], subprocess.Popen[bytes]]:
    return node(folder, 0, port, *arguments, extra=extra), node(folder, 1, port, *arguments, extra=extra)


def codes(*nodes: subprocess.Popen[bytes], seconds: float = 900) -> list[int]:
    return [each.wait(timeout=seconds) for each in nodes]


def printed(folder: Path, rank: int) -> str:
    return (folder / f"node{rank}.txt").read_text()


def rank_processes(mark: str) -> dict[int, int]:
    """The process of every rank by the rank's number."""
    found = {}
    for pid in marked(mark):
        with suppress(psutil.NoSuchProcess):  # a supervisor starts programs that end by themselves
            process = psutil.Process(pid)
            if "rlhf.worker" in process.cmdline():
                found[int(process.environ()["RANK"])] = pid
    return found


def same_numbers(one: Path, other: Path, stage: str) -> None:
    """Metrics but for timings, and weights, are equal to the last bit."""
    assert metrics_of(one, stage) == metrics_of(other, stage)
    assert metrics_of(one, stage)
    assert weight_bytes(one, stage) == weight_bytes(other, stage)


def test_two_nodes_give_what_two_processes_of_one_give(tmp_path: Path, mark: str, port: int) -> None:
    nodes = both(tmp_path, port, *PPO)
    assert codes(*nodes) == [0, 0], printed(tmp_path, 0) + printed(tmp_path, 1)
    one = rlhf_command("run", *SMOKE, *PPO, "distributed.num_processes=2", "run.dir=one", cwd=tmp_path)
    assert one.returncode == 0, one.stderr
    for stage in ("sft", "ppo"):
        same_numbers(tmp_path / "run", tmp_path / "one", stage)
    assert (tmp_path / "run/logs/ppo/rank1.log").exists()
    assert not list((tmp_path / "run").glob(".nodes-*"))
    assert "sft 4/4" not in printed(tmp_path, 1)
    assert wait_until_gone(mark, SOON) == []


Training = tuple[subprocess.Popen[bytes], subprocess.Popen[bytes]]


@pytest.fixture
def training(tmp_path: Path, mark: str, port: int) -> Iterator[Training]:
    """Two nodes in the middle of a training."""
    nodes = both(tmp_path, port, *LONG)
    # Whichever is the newest: those before it are removed.
    wait_for(tmp_path / "run/stages/sft/checkpoints/checkpoint-*[0-9]", nodes[0])
    assert set(rank_processes(mark)) == {0, 1}
    yield nodes
    assert wait_until_gone(mark, SOON) == []


def test_a_killed_rank_of_the_other_node_ends_both(tmp_path: Path, training: Training, mark: str) -> None:
    os.kill(rank_processes(mark)[1], signal.SIGKILL)
    assert codes(*training, seconds=PROMISED) == [137, 137]
    assert "rank 1 on node 1 (" in printed(tmp_path, 0)
    assert "was ended by signal 9 (SIGKILL)" in printed(tmp_path, 0)
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert (manifest["status"], manifest["exit_status"]) == ("failed", 137)


def test_a_node_killed_whole_ends_the_other(tmp_path: Path, training: Training, mark: str) -> None:
    rank = rank_processes(mark)[1]
    training[1].kill()
    with suppress(ProcessLookupError):  # it may have ended with its supervisor
        os.kill(rank, signal.SIGKILL)
    assert training[0].wait(timeout=PROMISED) == 1
    training[1].wait()
    assert "is gone: it closed the connection" in printed(tmp_path, 0)


def test_sigterm_on_the_other_node_saves_and_the_same_command_goes_on(tmp_path: Path, mark: str, port: int) -> None:
    arguments = ("stages=[sft]", "sft.max_steps=20", "sft.save_every=2", "distributed.stop_seconds=100")
    waiting, variables = held(tmp_path, "sft", 4)
    nodes = both(tmp_path, port, *arguments, extra=variables)
    wait_for(waiting, nodes[0])
    nodes[1].terminate()
    assert codes(*nodes, seconds=200) == [143, 143], printed(tmp_path, 0)
    assert wait_until_gone(mark, SOON) == []
    assert "stopped by SIGTERM at step 3" in printed(tmp_path, 0)
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert (manifest["status"], manifest["exit_status"]) == ("interrupted", 143)
    nodes = both(tmp_path, port, *arguments)
    assert codes(*nodes) == [0, 0], printed(tmp_path, 0)
    assert "goes on where it was interrupted" in printed(tmp_path, 0)
    assert wait_until_gone(mark, SOON) == []


def test_a_slurm_job_finds_its_nodes(tmp_path: Path, mark: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An sbatch that runs the script at once, and an srun that starts two tasks as if on two nodes."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "sbatch").write_text(
        '#!/bin/bash\nSLURM_JOB_ID=$$ bash "$2" > "$(dirname "$2")/job.txt" 2>&1\necho 4711\n'
    )
    (tools / "srun").write_text(
        f"""#!{sys.executable}
import os, subprocess, sys
start = next(number for number, word in enumerate(sys.argv) if number and not word.startswith("--"))
step = {{"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2", "SLURM_LOCALID": "0",
         "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}}
tasks = [subprocess.Popen(sys.argv[start:], env={{**os.environ, **step, "SLURM_PROCID": rank, "SLURM_NODEID": rank}})
         for rank in ("1", "0")]
sys.exit(max(task.wait() for task in tasks))
"""
    )
    for tool in tools.iterdir():
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    arguments = ("launcher=slurm", "launcher.submit=true", "distributed.num_nodes=2", "stages=[sft]")
    result = rlhf_command("run", *SMOKE, *arguments, "run.root=my runs", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "2 node(s), 2 process(es) in all" in result.stdout
    assert "submitted as job 4711" in result.stdout
    (run,) = (tmp_path / "my runs/smoke").iterdir()
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["status"] == "finished", (run / "job.txt").read_text()
    assert (run / "logs/sft/rank1.log").exists()
    assert manifest["config"]["launcher"]["type"] == "local"


def _can_make_networks() -> bool:
    """Whether this user may join network namespaces, which takes the superuser and the command ip."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    name = f"rlhfprobe{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode != 0:
        return False
    wire = ["ip", "-n", name, "link", "add", "one", "type", "veth", "peer", "name", "other"]
    wired = subprocess.run(wire, capture_output=True, check=False).returncode == 0
    subprocess.run(["ip", "netns", "del", name], check=False)
    return wired


@pytest.fixture
def network() -> Iterator[tuple[str, str]]:
    """Two network namespaces that reach each other at 10.173.21.1 and .2, and nothing else."""
    names = [f"rlhf{os.getpid()}n{number}" for number in (0, 1)]
    ends = [f"rh{os.getpid() % 100000}e{number}" for number in (0, 1)]
    try:
        for name in names:
            subprocess.run(["ip", "netns", "add", name], check=True)
        pair = ["ip", "link", "add", ends[0], "netns", names[0], "type", "veth", "peer", "name", ends[1], "netns"]
        subprocess.run([*pair, names[1]], check=True)
        for number, name in enumerate(names):
            inside = ["ip", "-n", name]
            subprocess.run([*inside, "addr", "add", f"10.173.21.{number + 1}/24", "dev", ends[number]], check=True)
            subprocess.run([*inside, "link", "set", ends[number], "up"], check=True)
            subprocess.run([*inside, "link", "set", "lo", "up"], check=True)
        yield names[0], names[1]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@pytest.mark.skipif(not _can_make_networks(), reason="network namespaces take the superuser and the command ip")
def test_two_hosts_on_a_network_of_their_own(tmp_path: Path, mark: str, network: tuple[str, str]) -> None:
    """Each node has a loopback of its own, so whatever goes over the wrong interface does not arrive."""
    shared = ("distributed.num_nodes=2", "distributed.rendezvous=10.173.21.1:29400", "stages=[sft]", "run.dir=run")
    nodes = []
    for rank, name in enumerate(network):
        with (tmp_path / f"node{rank}.txt").open("wb") as output:
            arguments = command("run", *SMOKE, *shared, f"distributed.node_rank={rank}")
            within = ["ip", "netns", "exec", name, *arguments]
            nodes.append(
                subprocess.Popen(within, cwd=tmp_path, env=environment(), stdout=output, stderr=subprocess.STDOUT)
            )
    assert codes(*nodes) == [0, 0], printed(tmp_path, 0) + printed(tmp_path, 1)
    one = rlhf_command("run", *SMOKE, "stages=[sft]", "distributed.num_processes=2", "run.dir=one", cwd=tmp_path)
    assert one.returncode == 0, one.stderr
    same_numbers(tmp_path / "run", tmp_path / "one", "sft")
    assert wait_until_gone(mark, SOON) == []
