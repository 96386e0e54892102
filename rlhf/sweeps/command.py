"""From `command` and a trial's values to the words of the process, by the rules of W&B's agent.

An element that is a macro as a whole is replaced; `${envvar:X}` is replaced inside words, and an unset X becomes its
own name, as with W&B. Values are Python's `str`.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.errors import ConfigError

ENVIRONMENT_VARIABLE = re.compile(r"\$\{envvar:([A-Z0-9_]*)\}")
MACRO = re.compile(r"\$\{[a-z_]+\}")
MACROS = (
    "env",
    "interpreter",
    "program",
    "args",
    "args_no_hyphens",
    "args_no_equals",
    "args_no_boolean_flags",
    "args_json",
    "args_json_file",
    "args_append_hydra",
    "args_override_hydra",
)
# Where a program that is not ours finds its folder: it writes metrics.jsonl there, and it is the same in every attempt.
FOLDER_VARIABLE = "RLHF_TRIAL_FOLDER"
# Verbs of `rlhf` that make a run folder.
RUNS = ("run", "sft", "collect", "reward-model", "reward-report", "ppo", "dpo", "best-of-n", "evaluate")
# Macros with which `rlhf` would not get the values: one leaves out what is false, the other is no `key=value`.
NOT_FOR_US = ("args_no_boolean_flags", "args_json")
# Variables of a W&B agent around us: its server knows nothing of our trials. And those by which srun or torchrun tell
# their tasks apart: each of several agents that they started runs trials of its own, which are no ranks of one group.
FOREIGN = (
    *("WANDB_SWEEP_ID", "WANDB_SWEEP_PARAM_PATH", "WANDB_RUN_ID"),
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_PROCID"),
)


def unknown_macros(words: Sequence[str]) -> list[str]:
    """Words that look like macros and are none of W&B's."""
    return [word for word in words if MACRO.fullmatch(word) and word[2:-1] not in MACROS]


def expand(
    words: Sequence[str],
    program: str | None,
    arguments: Mapping[str, Any],
    environment: Mapping[str, str],
    folder: Path,
) -> list[str]:
    """The words of the process; `folder` is where `${args_json_file}` is written."""
    plain = [f"{name}={value}" for name, value in arguments.items()]
    replaced: dict[str, Sequence[str]] = {
        "env": ["/usr/bin/env"],
        "interpreter": ["python"],
        "program": [program or ""],
        "args": [f"--{one}" for one in plain],
        "args_no_hyphens": plain,
        "args_no_equals": [word for name, value in arguments.items() for word in (f"--{name}", str(value))],
        "args_no_boolean_flags": [
            f"--{name}" if value is True else f"--{name}={value}"
            for name, value in arguments.items()
            if value is not False
        ],
        "args_json": [json.dumps(dict(arguments))],
        "args_append_hydra": [f"+{one}" for one in plain],
        "args_override_hydra": [f"++{one}" for one in plain],
    }
    found: list[str] = []
    for word in words:
        name = word[2:-1] if MACRO.fullmatch(word) else ""
        if name == "args_json_file":
            file = folder / "arguments.json"
            file.write_text(json.dumps(dict(arguments)), encoding="utf-8")
            found.append(str(file))
        elif name in replaced:
            found += replaced[name]
        else:
            found.append(ENVIRONMENT_VARIABLE.sub(lambda match: environment.get(match[1], match[1]), word))
    return found


def own_verb(words: Sequence[str]) -> int | None:
    """The position of the verb where `words` start `rlhf`, as a command or as a module; None for another program."""
    for index, word in enumerate(words[:-1]):
        if Path(word).name == "rlhf" and words[index + 1] in RUNS:
            return index + 1
    return None


def with_verb(words: tuple[str, ...], program: str | None) -> tuple[str, ...]:
    """The command of a file whose `program` is our own script: there the verb is `run` unless the command has one."""
    if program is None or Path(program).name != "rlhf" or "${program}" not in words:
        return words
    at = words.index("${program}")
    rest = words[at + 1 :] if words[at + 1 : at + 2] and words[at + 1] in RUNS else ("run", *words[at + 1 :])
    # W&B's own way to start a Python script is ours to start this very package.
    return ("rlhf", *rest) if words[:at] == ("${env}", "${interpreter}") else (*words[:at], program, *rest)


def fixed_arguments(words: Sequence[str], environment: Mapping[str, str]) -> list[str] | None:
    """What `command` itself says to `rlhf`, besides the parameters; None where it starts another program."""
    verb = own_verb(words)
    if verb is None:
        return None
    fixed = [word for word in words[verb + 1 :] if not MACRO.fullmatch(word) and word != "--debug"]
    fixed = [ENVIRONMENT_VARIABLE.sub(lambda match: environment.get(match[1], match[1]), word) for word in fixed]
    return fixed if words[verb] == "run" else [*fixed, f"stages=[{words[verb].replace('-', '_')}]"]


def trial_command(
    words: Sequence[str],
    program: str | None,
    arguments: Mapping[str, Any],
    environment: Mapping[str, str],
    folder: Path,
    own: Sequence[str],
) -> list[str]:
    """The words of a trial's process; `own` are arguments that only `rlhf` gets, such as its run folder."""
    found = expand(words, program, arguments, environment, folder)
    verb = own_verb(found)
    if verb is None:
        return found
    found = [*found, *own]
    # `rlhf` is this very package, whatever else of that name lies on the path.
    if found[verb - 1] == "rlhf" and (verb == 1 or found[verb - 2] != "-m"):
        found[verb - 1 : verb] = [sys.executable, "-m", "rlhf"]
    return found


def trial_environment(folder: Path, sweep: str, trial: int) -> dict[str, str]:
    """The variables of a trial's process: ours without those of an agent or a launcher around us."""
    environment = {name: value for name, value in os.environ.items() if name not in FOREIGN}
    environment.setdefault("WANDB_RUN_GROUP", sweep)
    environment.setdefault("WANDB_NAME", f"{sweep}-{trial}")
    return environment | {FOLDER_VARIABLE: str(folder)}


def check_command(words: Sequence[str], program: str | None, where: str) -> None:
    """Raises `ConfigError` for a command that could not be started as it is meant."""
    wrong = unknown_macros(words)
    if wrong:
        known = " ".join(f"${{{name}}}" for name in MACROS)
        raise ConfigError(f"{where}: command has {wrong[0]}, which is none of {known}")
    if not any(word[2:-1].startswith("args") for word in words if MACRO.fullmatch(word)):
        raise ConfigError(f"{where}: command hands no parameter to the program; add '${{args_no_hyphens}}' to the list")
    refused = [word for word in words if MACRO.fullmatch(word) and word[2:-1] in NOT_FOR_US]
    if refused and own_verb(words) is not None:
        raise ConfigError(f"{where}: `rlhf` cannot read {refused[0]}: write '${{args_no_hyphens}}' instead")
    if program is not None and {"${program}", program} & {*words} and not Path(program).is_file():
        raise ConfigError(f"{where}: there is no program {program}")
