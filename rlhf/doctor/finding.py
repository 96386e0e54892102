"""What a check found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["green", "yellow", "red"]


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    `level`: green works, yellow is in the way of something that a run may do without, red stops runs. `remedy` is what
    to do about it; only a green one may leave it empty.
    """

    name: str
    level: Level
    found: str
    remedy: str = ""


def green(name: str, found: str) -> Finding:
    """All is well."""
    return Finding(name, "green", found)


def yellow(name: str, found: str, remedy: str) -> Finding:
    """A run works, but not all that it could do."""
    return Finding(name, "yellow", found, remedy)


def red(name: str, found: str, remedy: str) -> Finding:
    """Runs of this config do not work."""
    return Finding(name, "red", found, remedy)
