"""A sweep agent without a server: starts, stops and judges a program exactly as `wandb agent` (0.31) does.

`tests/unit/test_sweep_contract.py` compares it with W&B's own code. What a sweep's server would decide (which values a
trial gets, whether it is stopped, whether a preempted one is handed out again) is for the test to say.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

Outcome = Literal["finished", "failed", "preempted", "killed"]
# What the agent starts where the sweep file has no `command:`.
DEFAULT_COMMAND = ("${env}", "${interpreter}", "${program}", "${args}")
# Between the request to end and the end by force.
KILL_SECONDS = 30.0
# The agent gives up when so many programs have failed in so short a time since it was started.
FLAPPING_FAILURES, FLAPPING_SECONDS = 3, 60.0
_ENVIRONMENT_MACRO = re.compile(r"\$\{envvar:([A-Z0-9_]*)\}")


@dataclass(frozen=True)
class Trial:
    """What the server hands out: the run's id and the values of its parameters."""

    run_id: str
    values: Mapping[str, Any]


@dataclass
class Started:
    """A program that the agent has started. The agent knows this one process and no other."""

    trial: Trial
    process: subprocess.Popen[str]

    def stop(self, kill_seconds: float = KILL_SECONDS) -> tuple[int, str, float]:
        """Stop in the web page: SIGTERM to the one process, SIGKILL later. Exit code, standard error, seconds."""
        began = time.monotonic()
        self.process.terminate()
        try:
            _, said = self.process.communicate(timeout=kill_seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            _, said = self.process.communicate()
        return self.process.returncode, said, time.monotonic() - began

    def wait(self, seconds: float = 300) -> tuple[int, str, str]:
        """Exit code, standard output and standard error."""
        out, said = self.process.communicate(timeout=seconds)
        return self.process.returncode, out, said

    def end_group(self) -> None:
        """For the end of a test: SIGKILL to the process group, whatever is left in it."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()


@dataclass
class FakeAgent:
    """An agent that works in `folder`, where the programs it starts work too.

    `command` is the sweep file's, `program` what its macro stands for; `environment` is the agent's own.
    """

    folder: Path
    command: Sequence[str] = DEFAULT_COMMAND
    program: str = "train.py"
    sweep_id: str = "sweep1"
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    started_at: float = field(default_factory=time.monotonic)
    num_finished: int = 0
    num_failed: int = 0

    def _sweep_folder(self) -> Path:
        return Path(self.environment.get("WANDB_DIR", self.folder.absolute())) / "wandb" / f"sweep-{self.sweep_id}"

    def variables(self, trial: Trial) -> dict[str, str]:
        """The program's environment."""
        own = {
            "WANDB_DIR": str(self.environment.get("WANDB_DIR", self.folder.absolute())),
            "WANDB_SWEEP_ID": self.sweep_id,
            "WANDB_RUN_ID": trial.run_id,
            "WANDB_SWEEP_PARAM_PATH": str(self._sweep_folder() / f"config-{trial.run_id}.yaml"),
        }
        return {name: value for name, value in {**self.environment, **own}.items() if name != "WANDB_SERVICE"}

    def command_line(self, trial: Trial) -> list[str]:
        """The program's arguments: every element that is nothing but a macro is replaced by what it stands for."""
        pairs = [f"{name}={value}" for name, value in trial.values.items()]
        spaced = [part for name, value in trial.values.items() for part in (f"--{name}", str(value))]
        macros = {
            "env": ["/usr/bin/env"],
            "interpreter": ["python"],
            "program": [self.program],
            "args": [f"--{pair}" for pair in pairs],
            "args_no_hyphens": pairs,
            "args_no_equals": spaced,
            "args_append_hydra": [f"+{pair}" for pair in pairs],
            "args_override_hydra": [f"++{pair}" for pair in pairs],
            "args_json_file": [str(self._sweep_folder() / f"config-{trial.run_id}.json")],
        }
        line: list[str] = []
        for element in self.command:
            known = _ENVIRONMENT_MACRO.sub(lambda found: self.environment.get(found[1], found[1]), element)
            if known.startswith("${") and known.endswith("}"):
                line += macros.get(known[2:-1], [])
            else:
                line.append(known)
        return line

    def write_parameters(self, trial: Trial) -> None:
        """Writes the files that the program is told of."""
        parameters = Path(self.variables(trial)["WANDB_SWEEP_PARAM_PATH"])
        parameters.parent.mkdir(parents=True, exist_ok=True)
        body = yaml.safe_dump({name: {"value": value} for name, value in trial.values.items()}, sort_keys=False)
        parameters.write_text(f"wandb_version: 1\n\n{body}" if trial.values else "wandb_version: 1")
        if "${args_json_file}" in self.command:
            parameters.with_suffix(".json").write_text(json.dumps(dict(trial.values)))

    def start(self, trial: Trial) -> Started:
        """Starts the program for a trial, or starts it again for one that was preempted."""
        self.write_parameters(trial)
        process = subprocess.Popen(
            self.command_line(trial),
            cwd=self.folder,
            env=self.variables(trial),
            process_group=0,
            # W&B's inherits the two; here they are read.
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdin is not None
        process.stdin.close()
        process.stdin = None  # `communicate` would flush it
        return Started(trial, process)

    def judge(self, exit_code: int, *, marked_preempting: bool = False) -> Outcome:
        """What the agent and the server make of the end of a program.

        One that a signal ended (`exit_code` < 0) is no failure to the agent. One that said it was being preempted, and
        then ended otherwise than with 0, is handed out again under the same id.
        """
        self.num_finished += 1
        self.num_failed += exit_code > 0
        if exit_code == 0:
            return "finished"
        if marked_preempting:
            return "preempted"
        return "killed" if exit_code < 0 else "failed"

    @property
    def gives_up(self) -> bool:
        """Whether too many programs have failed too early."""
        early = time.monotonic() < self.started_at + FLAPPING_SECONDS
        return early and self.num_failed >= FLAPPING_FAILURES
