"""What Slurm says in the environment: srun's tasks as ranks, or as the supervisors of several nodes. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping

from rlhf.config.distributed import DistributedConfig
from rlhf.errors import ConfigError


def under_launcher(env: Mapping[str, str]) -> bool:
    """Whether torchrun, accelerate, deepspeed, srun or `launch` started this process as one rank of a group."""
    return ("RANK" in env and "WORLD_SIZE" in env) or _slurm_tasks(env) > 1


def tasks_are_ranks(env: Mapping[str, str]) -> bool:
    """Whether srun started every rank of the group itself; our supervisors, one a node, start more than it did."""
    return 1 < _slurm_tasks(env) == int(env.get("WORLD_SIZE", "1"))


def adopt_slurm(env: MutableMapping[str, str]) -> None:
    """Fills in what torch expects from srun's variables; what is already set stays. A no-op outside srun.

    Every task derives the same port from the job's and step's numbers.
    """
    tasks = _slurm_tasks(env)
    if tasks <= 1 or ("RANK" in env and "WORLD_SIZE" in env):
        return
    nodes = _slurm_nodes(env)
    first_host = _first_host(_node_list(env))
    values = {
        "RANK": env["SLURM_PROCID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": env.get("SLURM_LOCALID", env["SLURM_PROCID"]),
        "LOCAL_WORLD_SIZE": str(_slurm_local_tasks(env, tasks, nodes)),
        "MASTER_ADDR": first_host if nodes > 1 and first_host else "127.0.0.1",
        "MASTER_PORT": str(_port(env)),
    }
    for name, value in values.items():
        env.setdefault(name, value)


def _slurm_tasks(env: Mapping[str, str]) -> int:
    """Tasks of the srun step this process belongs to; 0 outside of one.

    A batch script sees the job's SLURM_NTASKS too, but it is no task of a step: srun alone sets SLURM_STEP_NUM_TASKS.
    """
    if "SLURM_PROCID" not in env:
        return 0
    step_tasks = env.get("SLURM_STEP_NUM_TASKS")
    if step_tasks is None and env.get("ENVIRONMENT") == "BATCH":
        return 0
    tasks = step_tasks or env.get("SLURM_NTASKS", "0")
    return int(tasks) if tasks.isdigit() else 0


def _slurm_local_tasks(env: Mapping[str, str], tasks: int, nodes: int) -> int:
    """Tasks on this node, from a list like `4(x2),3` indexed by the node's number."""
    counts: list[int] = []
    listing = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE") or ""
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", listing):
        counts.extend([int(count)] * int(times or 1))
    node = int(env.get("SLURM_NODEID", "0"))
    return counts[node] if node < len(counts) else max(1, tasks // nodes)


def _first_host(hosts: str) -> str:
    """The first name of a Slurm host list: `rack[1-2]n[03-05,9]-ib,login` gives `rack1n03-ib`."""
    found = re.match(r"(?:\[[^\]]*\]|[^,\[])*", hosts)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", found.group()) if found else ""


def node_from_slurm(config: DistributedConfig, env: Mapping[str, str]) -> tuple[int, str] | None:
    """This node's rank and the rendezvous `HOST:PORT`, where srun started one task on each of `config.num_nodes` nodes.

    None outside an srun step and where its tasks are ranks, which is what `world_size` tasks on these nodes are, unless
    that is one task a node. The host is the first of the step's nodes. Raises `ConfigError` for any other number of
    tasks: it is neither.
    """
    tasks, nodes = _slurm_tasks(env), _slurm_nodes(env)
    if tasks <= 1:
        return None
    if tasks == nodes == config.num_nodes:
        host = _first_host(_node_list(env))
        return int(env.get("SLURM_NODEID") or env["SLURM_PROCID"]), f"{host}:{_port(env)}"
    if tasks == config.world_size:
        return None
    raise ConfigError(
        f"srun started {tasks} tasks on {nodes} node{'s' if nodes > 1 else ''}, but distributed.num_nodes="
        f"{config.num_nodes} needs one task on each node: srun --nodes={config.num_nodes} --ntasks={config.num_nodes} "
        "--ntasks-per-node=1. Each starts distributed.num_processes processes."
    )


def _slurm_nodes(env: Mapping[str, str]) -> int:
    return int(env.get("SLURM_STEP_NUM_NODES") or env.get("SLURM_NNODES") or 1)


def _node_list(env: Mapping[str, str]) -> str:
    return env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or ""


def _port(env: Mapping[str, str]) -> int:
    """The same for all tasks of a step, another for the next one, and below the range the kernel hands out."""
    job, step = env.get("SLURM_JOB_ID", "0"), env.get("SLURM_STEP_ID", "0")
    number = (int(job) if job.isdigit() else 0) * 31 + (int(step) if step.isdigit() else 0)
    return 15000 + number % 15000
