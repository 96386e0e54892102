"""What differs between a run that was killed and an undisturbed one; what time and memory decide is left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlhf.preferences.store import PreferenceStore
from tests.distributed.crash_watch import leftovers

# Compared by their content, not by their bytes: they hold seconds and megabytes.
_BY_CONTENT = ("result.json",)


def differences(expected: Path, found: Path) -> list[str]:
    """One line for each difference between the run folders, naming the file and the first key that differs.

    Compared byte for byte are all files of the stages but checkpoints (weights, configs, tokenizers, comparisons,
    fingerprints) and the samples; value for value the metrics, line by line, and the results, both without `perf/`, and
    the tasks and labels of preference stores.
    The found run must call itself finished and must have nothing half-written in it.
    """
    lines = [*_stages(expected, found), *_metrics(expected, found)]
    if (expected / "samples.jsonl").read_bytes() != (found / "samples.jsonl").read_bytes():
        lines.append(_first_line(expected / "samples.jsonl", found / "samples.jsonl"))
    lines += [f"{name}: left half-written" for name in leftovers(found)]
    lines += _manifest(expected, found)
    if (expected / "report.html").exists() and not (found / "report.html").exists():
        lines.append("report.html: missing")
    return lines


def _stages(expected: Path, found: Path) -> list[str]:
    ours, theirs = _stage_files(expected), _stage_files(found)
    lines = [f"{name}: missing" for name in sorted(ours - theirs)]
    lines += [f"{name}: should not be there" for name in sorted(theirs - ours)]
    for name in sorted(ours & theirs):
        if Path(name).name in _BY_CONTENT:
            key = _first_key(_result(expected / name), _result(found / name))
            if key is not None:
                lines.append(f"{name}: {key}")
        elif name.endswith(".sqlite"):
            if _labels(expected / name) != _labels(found / name):
                lines.append(f"{name}: its tasks or labels")
        elif (expected / name).read_bytes() != (found / name).read_bytes():
            tensor = _first_tensor(expected / name, found / name) if name.endswith(".safetensors") else "its bytes"
            lines.append(f"{name}: {tensor}")
    return lines


def _stage_files(run: Path) -> set[str]:
    files = (path.relative_to(run) for path in run.glob("stages/**/*") if path.is_file())
    return {path.as_posix() for path in files if "checkpoints" not in path.parts}


def _labels(path: Path) -> list[tuple[Any, ...]]:
    """Every version of every label of a preference store, without when it was made, and every task."""
    with PreferenceStore.open(path) as store:
        labels = [label for task in store.tasks() for label in store.history(task)]
        made = [(one.task, one.annotator, one.shown, one.version, one.kind, repr(one.answer)) for one in labels]
        return sorted([*made, *((task,) for task in store.tasks())])


def _result(path: Path) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(path.read_text())
    del body["seconds"]
    body["summary"] = _without_perf(body["summary"])
    return body


def _metrics(expected: Path, found: Path) -> list[str]:
    ours, theirs = _lines(expected / "metrics.jsonl"), _lines(found / "metrics.jsonl")
    for number, (one, other) in enumerate(zip(ours, theirs, strict=False), start=1):
        key = _first_key(_without_perf(one), _without_perf(other))
        if key is not None:
            return [f"metrics.jsonl: line {number} ({one['stage']}, step {one['step']}): {key}"]
    if len(ours) != len(theirs):
        return [f"metrics.jsonl: {len(theirs)} lines instead of {len(ours)}"]
    return []


def _manifest(expected: Path, found: Path) -> list[str]:
    ours, theirs = (json.loads((run / "manifest.json").read_text()) for run in (expected, found))
    lines = []
    if (theirs["status"], theirs["exit_status"]) != ("finished", 0):
        lines.append(f"manifest.json: status {theirs['status']}, exit status {theirs['exit_status']}")
    for stage, entry in ours["stages"].items():
        for key in ("status", "fingerprint", "outputs"):
            if theirs["stages"].get(stage, {}).get(key) != entry.get(key):
                lines.append(f"manifest.json: stages.{stage}.{key}")
    outcomes = [attempt["outcome"] for attempt in theirs["attempts"]]
    if outcomes[-1] != "finished" or not set(outcomes[:-1]) <= {"killed", "failed", "finished"}:
        lines.append(f"manifest.json: attempts {outcomes}")
    return lines


def _first_line(expected: Path, found: Path) -> str:
    ours, theirs = expected.read_bytes().splitlines(keepends=True), found.read_bytes().splitlines(keepends=True)
    number = next((n for n, pair in enumerate(zip(ours, theirs, strict=False), 1) if pair[0] != pair[1]), None)
    place = f"line {number}" if number is not None else f"{len(theirs)} lines instead of {len(ours)}"
    return f"{expected.name}: {place}"


def _first_key(expected: Any, found: Any, name: str = "") -> str | None:
    """The dotted name of the first value that differs, with both values; None when all are equal."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in sorted(expected.keys() | found.keys()):
            inner = _first_key(expected.get(key), found.get(key), f"{name}.{key}" if name else key)
            if inner is not None:
                return inner
        return None
    return None if expected == found else f"{name}: {found!r} instead of {expected!r}"


def _first_tensor(expected: Path, found: Path) -> str:
    """The first tensor that differs. A file is: 8 bytes of header length, a JSON header with offsets, the data."""
    ours, theirs = _tensors(expected), _tensors(found)
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            return name
    return "the header"


def _tensors(path: Path) -> dict[str, tuple[Any, bytes]]:
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        tensors[name] = ((entry["dtype"], entry["shape"]), content[start + begin : start + end])
    return tensors


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def _without_perf(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if not name.startswith("perf/")}
