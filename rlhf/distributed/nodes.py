"""Several nodes: each runs the same command, node 0 leads, the others follow. Needs no torch.

Node 0's supervisor decides what is to be done, holds the run folder's lock and writes its files. The supervisors of the
other nodes connect to it at `distributed.rendezvous`; told to, they start their ranks of a stage, report how they end,
and end with node 0's exit code. Both sides send a heart-beat: a node that is gone ends the run everywhere.

Who connects has to prove that it can read a file in the run folder that only its owner may read. That makes sure that
all nodes see one folder, since stages meet on disk; it keeps strangers out; and the file hands node 0's variables for
W&B, Hugging Face and the communication libraries to the other nodes, so that no token travels over the network.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import stat
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import rlhf
from rlhf.config.distributed import DistributedConfig, split_address
from rlhf.distributed.slurm import node_from_slurm, under_launcher
from rlhf.errors import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_SUCCESS, ConfigError, UserError
from rlhf.terminal import warn

# Variables of node 0 that its ranks on other nodes get too, unless they are set there.
FORWARDED = ("WANDB_", "HF_", "NCCL_", "TORCH_NCCL_", "GLOO_")
# Those of them that hold no secrets.
_HARMLESS = ("NCCL_", "TORCH_NCCL_", "GLOO_")
# What may differ between the commands of a run's nodes.
OWN_KEYS = ("distributed.node_rank",)
_SECRETS = ".nodes-*.json"
# Packages with which ranks that have different versions would compute, or say to each other, different things.
_SAME_PACKAGES = ("torch", "deepspeed", "transformers")
_SHOWN_DIFFERENCES = 10


@dataclass(frozen=True)
class NodePlace:
    """This node among those of its run, and where node 0 is met."""

    rank: int
    num_nodes: int
    host: str
    port: int
    num_processes: int
    timeout_seconds: int
    silent_seconds: float

    @property
    def address(self) -> str:
        """HOST:PORT as a user writes it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def place_of(config: DistributedConfig, env: Mapping[str, str]) -> NodePlace | None:
    """This node's place; None for a single node, and for a process that another launcher started as one rank.

    What the config leaves open Slurm's variables fill in. Raises `ConfigError` when something is still missing.
    """
    if config.num_nodes == 1 or ("RANK" in env and "WORLD_SIZE" in env):
        return None
    from_slurm = node_from_slurm(config, env)
    if from_slurm is None and under_launcher(env):
        return None
    rank, rendezvous = config.node_rank, config.rendezvous
    if from_slurm is not None:
        rank = from_slurm[0] if rank is None else rank
        rendezvous = rendezvous or from_slurm[1]
    if rank is None or rendezvous is None:
        raise _missing(config, rank, rendezvous, env)
    host, port = split_address(rendezvous)
    return NodePlace(
        rank, config.num_nodes, host, port, config.num_processes, config.timeout_seconds, config.silent_seconds
    )


def _missing(
    config: DistributedConfig, rank: int | None, rendezvous: str | None, env: Mapping[str, str]
) -> ConfigError:
    keys = [key for key, value in (("node_rank", rank), ("rendezvous", rendezvous)) if value is None]
    names = " and ".join(f"distributed.{key}" for key in keys)
    slurm = ""
    if "SLURM_JOB_ID" in env:
        slurm = (
            f" Inside this Slurm job, start it with srun --nodes={config.num_nodes} --ntasks={config.num_nodes} "
            "--ntasks-per-node=1 instead, and leave both out."
        )
    return ConfigError(
        f"distributed.num_nodes is {config.num_nodes}, but {names} {'are' if len(keys) > 1 else 'is'} not set. Give "
        "the same command on each node, with distributed.rendezvous=HOST:PORT, an address of node 0 and a free port "
        f"there, and with distributed.node_rank=0 on that node, 1 on the next and so on.{slurm}"
    )


@dataclass(frozen=True)
class Secret:
    """What node 0 leaves in the run folder for the others: the means of a proof, and its variables."""

    token: str
    value: str
    environment: Mapping[str, str]

    @staticmethod
    def path(run_folder: Path, token: str) -> Path:
        """A name that no node has looked for before: a network file system may remember for a while what is absent."""
        return run_folder / f".nodes-{token}.json"

    @classmethod
    def write(cls, run_folder: Path, env: Mapping[str, str]) -> Secret:
        """Makes a new one, readable by its owner alone; what killed runs left goes.

        On a file system that ignores modes it says so, and keeps the variables that may be secret to node 0.
        """
        remove_left_secrets(run_folder)
        token, value = secrets.token_hex(16), secrets.token_hex(32)
        path = cls.path(run_folder, token)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            private = _is_private(file.fileno())
            if not private:
                notice(
                    f"{run_folder} is on a file system that ignores file modes: what is written there others may read. "
                    "WANDB_* and HF_* of node 0 are not handed to the other nodes; set them there, and see that only "
                    "users whom you trust can read this folder"
                )
            environment = {
                name: value for name, value in env.items() if name.startswith(FORWARDED if private else _HARMLESS)
            }
            secret = cls(token, value, environment)
            json.dump({"secret": secret.value, "environment": environment}, file)
            file.flush()
            os.fsync(file.fileno())
        return secret

    @classmethod
    def read(cls, run_folder: Path, token: str) -> Secret | None:
        """The one with this token; None when it cannot be read."""
        try:
            body = json.loads(cls.path(run_folder, token).read_text())
        except (OSError, ValueError):
            return None
        return cls(token, body["secret"], body["environment"])

    def remove(self, run_folder: Path) -> None:
        """Removes the file."""
        with suppress(OSError):
            self.path(run_folder, self.token).unlink()


def remove_left_secrets(run_folder: Path) -> None:
    """Removes what a node 0 that was killed left in the run folder; call it while holding the folder's lock."""
    for left in run_folder.glob(_SECRETS):
        with suppress(FileNotFoundError):
            left.unlink()


def _is_private(descriptor: int) -> bool:
    """Whether only the owner can read the file, as far as its mode tells."""
    return stat.S_IMODE(os.fstat(descriptor).st_mode) == 0o600


def exit_of(error: BaseException) -> tuple[int, str]:
    """The exit code and message that an error ends the command with, for the other nodes."""
    if isinstance(error, UserError):
        return error.exit_code, str(error)
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else EXIT_SUCCESS if error.code is None else EXIT_FAILURE, ""
    if isinstance(error, KeyboardInterrupt):
        return getattr(error, "exit_code", EXIT_INTERRUPTED), str(error)
    return EXIT_FAILURE, f"{type(error).__name__}: {error}"


@cache
def installed() -> dict[str, str]:
    """What has to be the same on all nodes: versions, and a hash of this package's code, which changes between them."""
    versions = {"rlhf": rlhf.__version__, "code of rlhf": _code_hash(Path(rlhf.__file__).parent)}
    for name in _SAME_PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def _code_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        name, content = path.relative_to(folder).as_posix(), hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{name} {content}\n".encode())
    return digest.hexdigest()[:12]


def mistake_in(hello: Mapping[str, Any], values: Mapping[str, Any]) -> str | None:
    """What makes the node that says `hello` unfit for a run with these config values; None for one that fits."""
    who = f"node {hello['node_rank']} ({hello.get('host')})"
    theirs = hello.get("installed")
    different = differences(installed(), theirs if isinstance(theirs, dict) else {})
    if different:
        return f"{who} has not installed what node 0 has: {', '.join(different)}. Install the same on all nodes."
    different = differences(values, hello["config"])
    if not different:
        return None
    more = "" if len(different) <= _SHOWN_DIFFERENCES else f" and {len(different) - _SHOWN_DIFFERENCES} more"
    return (
        f"the config of {who} is not that of node 0: {', '.join(different[:_SHOWN_DIFFERENCES])}{more}. Give all nodes "
        "the same command but for distributed.node_rank."
    )


def differences(leader: Mapping[str, Any], follower: Mapping[str, Any]) -> list[str]:
    """`key (A on node 0, B here)` for every dotted key in which two configs differ, but for `OWN_KEYS`."""
    one, other = _flat(leader), _flat(follower)
    keys = [key for key in dict.fromkeys((*one, *other)) if key not in OWN_KEYS and one.get(key) != other.get(key)]
    return [f"{key} ({_shown(one, key)} on node 0, {_shown(other, key)} there)" for key in keys]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _shown(flat: Mapping[str, Any], key: str) -> str:
    text = json.dumps(flat[key]) if key in flat else "absent"
    return text if len(text) <= 80 else f"{text[:77]}..."


def notice(text: str) -> None:
    """One line for the user; what came from another node may hold anything, so nothing unprintable passes."""
    printable = "".join(character if character.isprintable() else "?" for character in text)
    warn(f"rlhf: {printable}")
