"""A run as the comparisons read it: a run folder, or the `recorded/` folder of a baseline. Never imports torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from rlhf.config import STAGES, config_from_values
from rlhf.config.provenance import flatten
from rlhf.config.serialize import plain_values
from rlhf.errors import ConfigError
from rlhf.runs.folder import RunFolder
from rlhf.runs.jsonable import parse_line, read_json, read_lines
from rlhf.runs.manifest import read_manifest
from rlhf.studies.arms import ARMS_FOLDER

# In the manifest of a `recorded/` folder: what was left out of it.
RECORDED = "recorded"
_GOING_ON = ("running", "waiting")


@dataclass(frozen=True)
class StageRecord:
    """What one stage left. `rows` are its lines of metrics.jsonl, in order; numbers of `perf/` are left out."""

    name: str
    status: str
    rows: tuple[Mapping[str, Any], ...]
    summary: Mapping[str, Any]
    outputs: Mapping[str, str]
    inputs: Mapping[str, str]
    decided_by: Mapping[str, Any]
    compute: Mapping[str, Any]
    seconds: float | None

    @property
    def finished(self) -> bool:
        """Whether the stage came to its end."""
        return self.status in ("finished", "skipped")


@dataclass(frozen=True)
class RunRecord:
    """What one run left; `arms` are the runs of a study, by name. `config` has a value for every dotted key.

    `num_torn` counts lines of metrics.jsonl that are no JSON objects; one that a killed run was writing does not count.
    """

    path: Path
    manifest: Mapping[str, Any]
    config: Mapping[str, Any]
    stages: Mapping[str, StageRecord]
    samples: tuple[Mapping[str, Any], ...]
    arms: Mapping[str, RunRecord] = field(default_factory=dict)
    num_torn: int = 0

    @property
    def status(self) -> str:
        """As the manifest says: finished, running, interrupted, ..."""
        return str(self.manifest.get("status", "unknown"))

    @property
    def going_on(self) -> bool:
        """Whether the run, or whoever writes its manifest, has not ended yet."""
        return self.status in _GOING_ON

    @property
    def is_recorded(self) -> bool:
        """Whether this is the pruned record of a baseline: it has no samples, and may lack some steps."""
        return RECORDED in self.manifest

    @property
    def seed(self) -> int | None:
        """The run's seed."""
        seed = self.manifest.get("seed")
        return seed if isinstance(seed, int) else None

    @property
    def own_hashes(self) -> frozenset[str]:
        """Content hashes of everything that the stages of the run and of its arms have made."""
        own = {value for stage in self.stages.values() for value in stage.outputs.values()}
        return frozenset(own.union(*(arm.own_hashes for arm in self.arms.values())))


def read_record(path: Path) -> RunRecord:
    """The record of a run folder, of a `recorded/` folder, or of the folder of a baseline that has one.

    Raises `ConfigError` when there is no run: what names the folder is an argument.
    """
    path = path.expanduser()
    if not (path / "manifest.json").is_file() and (path / "recorded" / "manifest.json").is_file():
        path = path / "recorded"
    run = RunFolder(path)
    manifest = read_manifest(run)
    if not manifest:
        what = "its manifest.json is damaged" if run.manifest.exists() else "there is no manifest.json in it"
        raise ConfigError(f"{path} is not a run folder: {what}" if path.is_dir() else f"there is no folder {path}")
    metrics: dict[str, list[Mapping[str, Any]]] = {}
    for row in read_lines(run.metrics):
        metrics.setdefault(str(row.get("stage")), []).append(without_perf(row))
    entries = manifest.get("stages")
    entries = entries if isinstance(entries, dict) else {}
    names = [*entries, *(name for name in metrics if name not in entries)]
    names.sort(key=lambda name: STAGES.index(name) if name in STAGES else len(STAGES))
    stages = {name: _stage(run, name, entries.get(name, {}), metrics.get(name, [])) for name in names}
    stages.pop("report", None)
    arms = {name: read_record(folder) for name, folder in sorted(_arm_folders(path / ARMS_FOLDER))}
    config, samples = full_config(manifest.get("config")), tuple(read_lines(run.samples))
    torn = _num_torn(run.metrics) - (0 if manifest.get("status") == "finished" else 1)
    return RunRecord(path, manifest, config, stages, samples, arms, max(torn, 0))


def _num_torn(path: Path) -> int:
    if not path.is_file():
        return 0
    return sum(bool(line.strip()) and parse_line(line) is None for line in path.read_bytes().split(b"\n"))


def without_perf(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values without those of `perf/`, which time and memory decide."""
    return {name: value for name, value in values.items() if not name.startswith("perf/")}


def full_config(config: Any) -> dict[str, Any]:
    """The values by dotted key; a key that the config is older than has the default it has today."""
    return dict(_full_config(json.dumps(config))) if isinstance(config, dict) else {}


@cache
def _full_config(text: str) -> dict[str, Any]:
    config = json.loads(text)
    # Where a key of it is no longer known its own values are compared as they are.
    with suppress(ConfigError):
        config = plain_values(config_from_values(config, "manifest.json"))
    # As JSON, so that a tuple equals the list that a manifest has.
    return {".".join(path): value for path, value in flatten(json.loads(json.dumps(config, default=str))).items()}


def _stage(run: RunFolder, name: str, entry: Mapping[str, Any], rows: list[Mapping[str, Any]]) -> StageRecord:
    folder = run.stage(name)
    result = folder.read_result()
    summary = result.summary if result is not None else entry.get("summary")
    outputs = result.outputs if result is not None else entry.get("outputs")
    decided_by = read_json(folder.decided_by) or entry.get("decided_by") or {}
    seconds = result.seconds if result is not None else entry.get("seconds")
    return StageRecord(
        name=name,
        status="finished" if result is not None else str(entry.get("status", "unknown")),
        rows=tuple(rows),
        summary=without_perf(_mapping(summary)),
        outputs=_mapping(outputs),
        inputs=_mapping(_mapping(decided_by).get("inputs")),
        decided_by=_mapping(decided_by),
        compute=_mapping(entry.get("compute")),
        seconds=float(seconds) if isinstance(seconds, int | float) else None,
    )


def _mapping(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


def _arm_folders(folder: Path) -> Iterator[tuple[str, Path]]:
    """The runs below `folder` by their relative path: an arm's name may have a slash in it."""

    def walk(place: Path) -> Iterator[Path]:
        for path in sorted(place.iterdir()) if place.is_dir() else ():
            if (path / "manifest.json").is_file():
                yield path
            elif path.is_dir():
                yield from walk(path)

    for path in walk(folder):
        yield path.relative_to(folder).as_posix(), path
