"""How an attempt at a trial ended, and the words for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlhf.config.errors import close_names, did_you_mean
from rlhf.runs.machine import code_state
from rlhf.sweeps.hyperband import Verdict


@dataclass
class Outcome:
    """How an attempt ended. `released`: somebody shall go on with it; `lost`: somebody else already does."""

    exit_code: int | None = None
    pruned: Verdict | None = None
    released: str | None = None
    lost: bool = False
    seconds: float = 0.0
    tail: tuple[str, ...] = ()


def describe_exit(code: int | None) -> str:
    """An exit code in words."""
    if code == 137:
        return "exit code 137: killed by SIGKILL, most often for using too much memory"
    if code is not None and code > 128:
        return f"exit code {code}: ended by signal {code - 128}"
    return f"exit code {code}"


def describe_code(code: dict[str, Any]) -> str | None:
    """A commit and what was changed since, as one word; None where the package does not run from a checkout."""
    commit, diff = code.get("commit"), code.get("diff_hash")
    if not commit:
        return None
    return f"{commit[:10]}+{diff[:8]}" if diff else str(commit[:10])


def own_code() -> str | None:
    """The code that this process runs on."""
    return describe_code(code_state())


def no_metric(name: str, names: set[str]) -> str:
    """Why a trial that ended well has no value; `names` are those that it reported."""
    if name in names:
        return f"its {name} was never a finite number"
    near = close_names(name, sorted(names))
    known = "" if near else f", but {', '.join(sorted(names)) or 'nothing at all'}"
    return f"it reported no {name}{known}{did_you_mean(near)}"
