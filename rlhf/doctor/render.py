"""How the findings look: a symbol and a word for each level, so that they read without colours too."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence
from typing import Any, TextIO

from rlhf.doctor.finding import Finding, Level

_SYMBOLS: dict[Level, tuple[str, str]] = {"green": ("✓", "ok"), "yellow": ("!", "warning"), "red": ("✗", "problem")}
_NAME_WIDTH = 16
_INDENT = " " * (12 + _NAME_WIDTH)


def text_lines(finding: Finding) -> list[str]:
    """The finding as plain text: level, name, what was found, and the remedy on a line of its own."""
    symbol, word = _SYMBOLS[finding.level]
    lines = [f"{symbol} {word:<9} {finding.name:<{_NAME_WIDTH}}{finding.found}"]
    if finding.remedy:
        lines.append(f"{_INDENT}→ {finding.remedy}")
    return lines


class Printer:
    """Prints findings one by one, in colours on a terminal."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._console: Any = None
        if self._stream.isatty():
            from rich.console import Console

            self._console = Console(file=self._stream, highlight=False)

    def show(self, finding: Finding) -> None:
        """Prints one finding."""
        self._print(text_lines(finding), finding.level)

    def close(self, verdict: str, level: Level) -> None:
        """Prints the verdict."""
        self._print(["", f"{_SYMBOLS[level][0]} {verdict}"], level)

    def _print(self, lines: list[str], level: Level) -> None:
        if self._console is None:
            print("\n".join(lines), file=self._stream, flush=True)
            return
        from rich.text import Text

        width = max(60, self._console.width)
        for line in lines:
            style = "" if line.startswith(_INDENT) else level
            for part in textwrap.wrap(line, width, subsequent_indent=_INDENT) or [""]:
                self._console.print(Text(part, style=style), soft_wrap=True)


def verdict(findings: Sequence[Finding], device: str) -> tuple[str, Level]:
    """The last line, and its level: `ready (CPU)`, with a count of what is not green."""
    problems = sum(finding.level == "red" for finding in findings)
    warnings = sum(finding.level == "yellow" for finding in findings)
    counted = _count(warnings, "warning")
    if problems:
        return f"not ready: {_count(problems, 'problem')}{f' and {counted}' if warnings else ''}", "red"
    return f"ready ({device}){f', with {counted}' if warnings else ''}", "green"


def as_json(findings: Sequence[Finding], device: str) -> dict[str, Any]:
    """The report for machines."""
    text, level = verdict(findings, device)
    return {
        "ready": level == "green",
        "verdict": text,
        "findings": [
            {"name": entry.name, "level": entry.level, "found": entry.found, "remedy": entry.remedy}
            for entry in findings
        ],
    }


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
