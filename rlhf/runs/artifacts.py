"""What goes into a stage and comes out of it, as W&B names it: artifacts with their lineage.

An artifact is named as its folder on disk, `<experiment>-<stage>-<output>`, so that whoever uses it, in this run folder
or another one, names the same one; its version is told by the SHA-256 of its content.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rlhf.runs.files import hash_path
from rlhf.runs.folder import RunFolder, StageFolder, StageResult
from rlhf.runs.jsonable import read_json
from rlhf.runs.manifest import read_manifest
from rlhf.runs.sinks import result_metrics

ArtifactType = Literal["dataset", "model", "comparisons", "report"]
# Inputs and outputs of the stages that hold records. Of the outputs only these and models are artifacts, the tables
# and pictures are not; every other input is a model.
_RECORDS = ("comparisons", "ratings", "benchmark")
_MODELS = ("model", "value_model")
_NOT_IN_A_NAME = re.compile(r"[^\w.-]+")


@dataclass(frozen=True)
class Artifact:
    """One artifact: `content` is the hash, or what stands for it, and `path` where it lies here (None: on a hub)."""

    name: str
    type: ArtifactType
    content: str
    path: Path | None = None
    aliases: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def version(self) -> str:
        """`name@` and the beginning of the hash."""
        return f"{self.name}@{self.content[:12]}"


def used_artifacts(folder: RunFolder, stage: str, inputs: Mapping[str, str]) -> dict[str, Artifact]:
    """What the stage has read, by the name of the input; `dataset` is the data. Hashes nothing: all of it is known."""
    decided = read_json(folder.stage(stage).decided_by)
    decided = decided if isinstance(decided, dict) else {}
    contents = decided.get("inputs", {})
    found = {name: _used(name, path, str(contents.get(name, path))) for name, path in inputs.items()}
    data = decided.get("data")
    if isinstance(data, list) and len(data) == 2 and isinstance(data[0], dict):
        kind, content = str(data[0].get("type")), str(data[1])
        config = read_manifest(folder).get("config", {}).get("data", {})
        place = str(config.get("path") or "")
        name = "-".join(part for part in ("data", kind, _last_name(place)) if part)
        found["dataset"] = Artifact(
            slug(name), "dataset", content, None, (), {"source": place or kind, "sha256": content}
        )
    return found


def made_artifacts(
    folder: RunFolder, result: StageResult, experiment: str, used: Mapping[str, Artifact]
) -> list[Artifact]:
    """What the stage has made: one artifact for each folder of a model or of records."""
    stage = folder.stage(result.stage)
    metadata = {
        "experiment": experiment,
        "run": folder.path.resolve().name,
        "stage": result.stage,
        "fingerprint": result.fingerprint,
        "inputs": {name: artifact.version for name, artifact in used.items()},
        "metrics": result_metrics(result.stage, result.summary),
    }
    alias = (slug(folder.path.resolve().name),)
    return [
        Artifact(
            name=slug(f"{experiment}-{result.stage}-{name}"),
            type="comparisons" if name in _RECORDS else "model",
            content=content,
            path=stage.path / name,
            aliases=alias,
            metadata={**metadata, "sha256": content, "path": str((stage.path / name).resolve())},
        )
        for name, content in result.outputs.items()
        if name in (*_MODELS, *_RECORDS)
    ]


def report_artifact(folder: RunFolder, experiment: str) -> Artifact:
    """The run's `report.html`."""
    content = hash_path(folder.report)
    metadata = {"experiment": experiment, "run": folder.path.resolve().name, "sha256": content}
    alias = (slug(folder.path.resolve().name),)
    return Artifact(slug(f"{experiment}-report"), "report", content, folder.report, alias, metadata)


def slug(text: str) -> str:
    """`text` as W&B takes it for a name: letters, digits, dashes, underscores and dots, at most 128 of them."""
    return _NOT_IN_A_NAME.sub("-", text).strip("-")[:128] or "unnamed"


def _used(name: str, path: str, content: str) -> Artifact:
    kind: ArtifactType = "comparisons" if name in _RECORDS else "model"
    place = Path(path).expanduser()
    if not place.exists():  # a hub id; its content is named by the revision
        return Artifact(slug(f"hub-{path}"), kind, content, None, (), {"source": path})
    place = place.resolve()
    made = _made_by(place)
    metadata = {"path": str(place)}
    if made is not None:
        experiment, stage, known = made
        return Artifact(
            slug(f"{experiment}-{stage}-{place.name}"), kind, known, place, (), {**metadata, "sha256": known}
        )
    return Artifact(slug(f"{kind}-{place.name}"), kind, content, place, (), {**metadata, "sha256": content})


def _made_by(place: Path) -> tuple[str, str, str] | None:
    """Experiment, stage and recorded hash of an output of some run folder; None for what no stage has recorded."""
    stage = StageFolder(place.parent)
    result = stage.read_result()
    if stage.path.parent.name != "stages" or result is None or place.name not in result.outputs:
        return None
    run = RunFolder(stage.path.parent.parent)
    experiment = read_manifest(run).get("config", {}).get("experiment") or run.path.parent.name
    return str(experiment), stage.name, result.outputs[place.name]


def _last_name(place: str) -> str:
    """The last part of a path or hub id, without its suffix; empty for none."""
    return Path(place.rstrip("/")).stem if place else ""
