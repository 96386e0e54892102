"""What a sweep agent of W&B says to the command it starts: the run's id, in the environment. Standard library only."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rlhf.errors import ConfigError

if TYPE_CHECKING:
    from rlhf.config import RLHFConfig

SWEEP_ID = "WANDB_SWEEP_ID"
RUN_ID = "WANDB_RUN_ID"
# W&B's ids are letters and digits; one that a user chose may have more, but it names a folder here.
_FOLDER_NAME = re.compile(r"[\w-][\w.-]*")


def sweep_run_id(env: Mapping[str, str]) -> str | None:
    """The id under which the agent knows this run, the same in every attempt of a trial; None outside a sweep.

    Raises `ConfigError` for an id that cannot name a folder.
    """
    given = env.get(RUN_ID, "").strip()
    if not env.get(SWEEP_ID) or not given:
        return None
    if not _FOLDER_NAME.fullmatch(given):
        raise ConfigError(
            f"{RUN_ID}={given!r} cannot name the run's folder, as the run's id does in a sweep ({SWEEP_ID} is set): "
            "expected letters, digits, _, . and -. Set run.dir=FOLDER, or choose another id."
        )
    return given


def check_sweep(config: RLHFConfig, env: Mapping[str, str]) -> None:
    """Raises `ConfigError` for what cannot be done under an agent, which takes the command's end for the trial's."""
    if env.get(SWEEP_ID) and config.launcher.type == "slurm":
        raise ConfigError(
            "launcher=slurm only writes or submits a batch script, and a sweep agent would take the command's end for "
            f"the trial's ({SWEEP_ID} is set). Start the agent itself in the batch job, and leave launcher out."
        )


def with_verb(arguments: Sequence[str], env: Mapping[str, str]) -> list[str]:
    """The command's arguments with the verb `run` where an agent gave none.

    A sweep file without `command:` starts `python PROGRAM --k=v ...`, which has no place for a verb.
    """
    from_agent = bool(env.get(SWEEP_ID)) and bool(arguments) and arguments[0].startswith("--") and "=" in arguments[0]
    return ["run", *arguments] if from_agent else list(arguments)
