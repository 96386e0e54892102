"""`launcher=slurm`: the batch script that starts a run's supervisors, one on each node of a Slurm job."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

from rlhf.config import RLHFConfig
from rlhf.config.overrides import join_spaced
from rlhf.errors import EXIT_SUCCESS, ConfigError, UserError
from rlhf.runs.files import write_text

SCRIPT = "job.sbatch"
# Every spelling that the command line takes, a removal too.
_OWN_ARGUMENT = re.compile(r"(--)?(~|\+{0,2})\s*launcher\s*([.=]|$)")
# One core for a rank's own thread and some for what feeds it; many clusters give a task a single one unless asked.
_CORES_PER_PROCESS = 4
_CORES_OPTION = re.compile(r"(-c|--cpus-per-(task|gpu))\b")
# What remains of `launcher.signal_seconds` for the supervisors to notice and to end after the ranks.
_SUPERVISOR_SECONDS = 20


def write_job(config: RLHFConfig, run_folder: Path, command: Sequence[str]) -> int:
    """Writes the script into the run folder, says how to submit it and, with `launcher.submit`, does so.

    `command` is `rlhf VERB ARGUMENTS...`. Returns the exit code. Raises `ConfigError` where there is no sbatch, and
    `UserError` when it refuses the job.
    """
    path = run_folder / SCRIPT
    write_text(path, job_script(config, run_folder.absolute(), command, Path.cwd()))
    processes = config.distributed.world_size
    print(f"rlhf: wrote {path}: {config.distributed.num_nodes} node(s), {processes} process(es) in all")
    if not config.launcher.submit:
        print(f"rlhf: submit it with: sbatch {shlex.quote(str(path))}")
        return EXIT_SUCCESS
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "launcher.submit=true needs Slurm's command sbatch, which is not on this machine's PATH. Submit "
            f"{path} from a login node of the cluster, or leave launcher.submit out."
        )
    result = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise UserError(f"sbatch refused {path} (exit code {result.returncode}): {result.stderr.strip()}")
    print(f"rlhf: submitted as job {result.stdout.strip().partition(';')[0]}")
    return EXIT_SUCCESS


def job_script(config: RLHFConfig, run_folder: Path, command: Sequence[str], working_folder: Path) -> str:
    """The batch script's text. In the job the same command runs with the launcher set to local."""
    launcher, distributed = config.launcher, config.distributed
    arguments = [argument for argument in join_spaced(command[1:]) if not _OWN_ARGUMENT.match(argument)]
    step = ["srun", f"--nodes={distributed.num_nodes}", f"--ntasks={distributed.num_nodes}", "--ntasks-per-node=1"]
    cores = _cores(config)
    if cores is not None:
        step.append(f"--cpus-per-task={cores}")  # srun has not inherited it since Slurm 22.05
    # A supervisor ends its node's ranks and says so before it fails; one that could not even start must not leave the
    # others waiting.
    step += ["--kill-on-bad-exit=1", "--export=ALL", launcher.python or sys.executable, "-m", "rlhf"]
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH {option}" for option in _options(config, run_folder)),
        "",
        f"# Written by {shlex.join(command)}".replace("\n", " "),
        "# The same script, submitted again, goes on where the job ended.",
        f"cd {shlex.quote(str(working_folder))} || exit 2",
        *launcher.setup,
        f"exec {shlex.join([*step, *arguments, *_in_the_job(config)])}",
    ]
    return "\n".join(lines) + "\n"


def _in_the_job(config: RLHFConfig) -> Iterator[str]:
    """What the command is given besides: Slurm's warning comes early enough for a checkpoint, so that may take long."""
    yield "launcher.type=local"
    yield "launcher.submit=false"  # an experiment file may say otherwise
    stop_seconds = config.launcher.signal_seconds - _SUPERVISOR_SECONDS
    if stop_seconds > config.distributed.stop_seconds:
        yield f"distributed.stop_seconds={stop_seconds}"


def _cores(config: RLHFConfig) -> int | None:
    """CPU cores of a node to ask for; None when `launcher.extra` asks for them."""
    launcher, distributed = config.launcher, config.distributed
    if launcher.cpus_per_task is not None:
        return launcher.cpus_per_task
    if any(_CORES_OPTION.match(option) for option in launcher.extra):
        return None
    return distributed.num_processes * (distributed.num_threads or _CORES_PER_PROCESS)


def _options(config: RLHFConfig, run_folder: Path) -> Iterator[str]:
    launcher, distributed = config.launcher, config.distributed
    yield _option("job-name", f"rlhf-{config.experiment}")
    yield _option("nodes", distributed.num_nodes)
    yield _option("ntasks-per-node", 1)
    gpus = launcher.gpus_per_node
    if gpus is None:
        gpus = 0 if distributed.device == "cpu" else distributed.num_processes
    if gpus:
        yield _option("gpus-per-node", gpus)
    named = {
        "cpus-per-task": _cores(config),
        "mem": launcher.memory,
        "partition": launcher.partition,
        "account": launcher.account,
        "qos": launcher.qos,
        "time": launcher.time_limit,
    }
    yield from (_option(name, value) for name, value in named.items() if value is not None)
    # Without a B: it goes to the tasks of srun, which are the supervisors, and not to the shell that waits for them.
    yield _option("signal", f"TERM@{launcher.signal_seconds}")
    yield "--requeue" if launcher.requeue else "--no-requeue"
    yield "--open-mode=append"
    yield "--export=ALL"
    yield _option("output", f"{run_folder}".replace("%", "%%") + "/slurm-%j.out")
    yield from launcher.extra


def _option(name: str, value: object) -> str:
    """`--name=value` as sbatch reads it from a script: a backslash escapes within quotes and without.

    Raises `ConfigError` for control characters: after a line break in it the rest would be a line of the script.
    """
    text = str(value)
    if any(unicodedata.category(character) == "Cc" for character in text):
        raise ConfigError(
            f"launcher=slurm cannot write --{name}={text!r} into a batch script: it has a line break or another "
            "control character. Choose run.dir, run.root and experiment without."
        )
    if re.fullmatch(r"[\w.,:/@%+=-]+", text, re.ASCII):
        return f"--{name}={text}"
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'--{name}="{escaped}"'
