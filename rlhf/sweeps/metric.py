"""The metric of a trial, as it grows in `metrics.jsonl`, or as a stage's result says at the end."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rlhf.runs.folder import RunFolder
from rlhf.runs.jsonable import parse_line, read_json


class History:
    """The finite values of a metric in a run folder, in the order of their lines; reads only what is new.

    A resumed training takes lines back by replacing the file: then it is read anew.
    """

    def __init__(self, folder: Path, metric: str) -> None:
        self.values: list[float] = []
        self.names: set[str] = set()
        self._path, self._metric = folder / "metrics.jsonl", metric
        self._file: tuple[int, int] | None = None
        self._read_to = 0

    def update(self) -> list[float]:
        """Reads what was added and returns all values."""
        try:
            with self._path.open("rb") as file:
                status = self._path.stat()
                identity = (status.st_dev, status.st_ino)
                if identity != self._file or status.st_size < self._read_to:
                    self.values, self._file, self._read_to = [], identity, 0
                file.seek(self._read_to)
                whole, newline, _ = file.read().rpartition(b"\n")
        except FileNotFoundError:
            return self.values
        self._read_to += len(whole) + len(newline)
        for line in whole.split(b"\n"):
            entry = parse_line(line)
            if entry is not None:
                self.names.update(name for name in entry if name not in ("stage", "step"))
                value = number(entry.get(self._metric))
                if value is not None:
                    self.values.append(value)
        return self.values


def number(value: Any) -> float | None:
    """A finite number, also as the `value` of an estimate; None for anything else."""
    if isinstance(value, dict):
        value = value.get("value")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def results(folder: Path) -> dict[str, float]:
    """The numbers in the results of a run's stages, as `stage/name` unless they have a group; later stages win."""
    found: dict[str, float] = {}
    files = sorted(RunFolder(folder).stages.glob("*/result.json"), key=lambda path: path.stat().st_mtime)
    for path in files:
        body = read_json(path)
        summary = body.get("summary") if isinstance(body, dict) else None
        for name, value in (summary if isinstance(summary, dict) else {}).items():
            known = number(value)
            if known is not None:
                found[name if "/" in name else f"{path.parent.name}/{name}"] = known
    return found


def final_value(folder: Path, metric: str) -> tuple[float | None, set[str]]:
    """The metric's last value in `metrics.jsonl`, else in a stage's result; and all names that there are.

    A stage's result counts where the metrics have no such name: a win rate, an accuracy on held-out data.
    """
    history = History(folder, metric)
    values = history.update()
    if values:
        return values[-1], history.names
    found = results(folder)
    return found.get(metric), history.names | set(found)
