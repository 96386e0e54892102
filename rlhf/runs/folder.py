"""Where everything of a run lies, and what says that a stage is finished.

A stage is finished when its `result.json` is there: it is written last and atomically, after everything it names.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.errors import ArtifactError, UserError
from rlhf.runs import files
from rlhf.runs.jsonable import read_json


@dataclass(frozen=True)
class StageResult:
    """What a finished stage leaves: `result.json`.

    `outputs` maps paths relative to the stage folder to their content hash (`files.hash_path`). `summary` holds
    the key results: numbers, texts, or `{"value", "low", "high"}` for an estimate with its interval.
    """

    stage: str
    fingerprint: str
    seconds: float
    outputs: dict[str, str] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StageFolder:
    """The folder of one stage."""

    path: Path

    @property
    def name(self) -> str:
        """The stage's name."""
        return self.path.name

    @property
    def checkpoints(self) -> Path:
        """States to resume from."""
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        """The trained model in Hugging Face format."""
        return self.path / "model"

    @property
    def result(self) -> Path:
        """`StageResult` as JSON; its presence means that the stage is finished."""
        return self.path / "result.json"

    @property
    def fingerprint_file(self) -> Path:
        """Fingerprint of the attempt that the checkpoints belong to."""
        return self.path / "fingerprint"

    @property
    def decided_by(self) -> Path:
        """What the fingerprint is a hash of, as JSON: keys and content hashes."""
        return self.path / "decided_by.json"

    def read_fingerprint(self) -> str | None:
        """The fingerprint that `begin` wrote; None when there is none."""
        try:
            return self.fingerprint_file.read_text(encoding="utf-8").strip() or None
        except FileNotFoundError:
            return None

    def begin(self, fingerprint: str, decided_by: Mapping[str, Any]) -> bool:
        """Makes the folder ready for work under `fingerprint`; True when earlier checkpoints may be resumed.

        `decided_by` is what the fingerprint is a hash of. Whatever another fingerprint left is removed first, so it is
        never mixed in: `keep_aside` before saves what is worth it.
        """
        resumable = self.read_fingerprint() == fingerprint
        with files.disk_errors(self.path):
            if not resumable:
                files.discard(self.path)
            self.path.mkdir(parents=True, exist_ok=True)
        if not resumable:
            files.write_json(self.decided_by, decided_by)
            files.write_text(self.fingerprint_file, fingerprint + "\n")
        return resumable

    def keep_aside(self, aside: Path) -> bool:
        """Moves the folder to `aside`, in the place of what is there; False when there is no work in it to keep."""
        if not self.result.exists() and not any(self.checkpoints.rglob("checkpoint-*")):
            return False
        with files.disk_errors(aside):
            aside.parent.mkdir(exist_ok=True)
            files.discard(aside)
            self.path.rename(aside)
        return True

    def read_result(self) -> StageResult | None:
        """The result; None when it is missing or not one."""
        body = read_json(self.result)
        if not isinstance(body, dict):
            return None
        stage, fingerprint, seconds = body.get("stage"), body.get("fingerprint"), body.get("seconds")
        outputs, summary = body.get("outputs"), body.get("summary")
        if not (isinstance(stage, str) and isinstance(fingerprint, str) and isinstance(seconds, (int, float))):
            return None
        if not (isinstance(outputs, dict) and isinstance(summary, dict)):
            return None
        return StageResult(stage, fingerprint, float(seconds), outputs, summary)

    def write_result(self, result: StageResult) -> None:
        """Declares the stage finished. Call it last: everything in `outputs` is then whole on disk."""
        files.write_json(self.result, result)

    def hash_outputs(self, names: list[str]) -> dict[str, str]:
        """Content hashes of paths relative to this folder. Raises `ArtifactError` when one is not there."""
        for name in names:
            if not (self.path / name).exists():
                raise ArtifactError(f"the {self.name} stage ended without its output {self.path / name}")
        return {name: files.hash_path(self.path / name) for name in sorted(names)}

    def altered_outputs(self, result: StageResult) -> list[str]:
        """Outputs of `result` that are missing or no longer have the content they were recorded with."""
        return [
            name
            for name, expected in result.outputs.items()
            if not (self.path / name).exists() or files.hash_path(self.path / name) != expected
        ]


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run."""

    path: Path

    @property
    def manifest(self) -> Path:
        """What ran, on what, from what, with which outcome."""
        return self.path / "manifest.json"

    @property
    def config(self) -> Path:
        """The resolved config."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """One JSON object a logged step."""
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """Sampled texts with their scores, one JSON object a line."""
        return self.path / "samples.jsonl"

    @property
    def report(self) -> Path:
        """The report."""
        return self.path / "report.html"

    @property
    def wandb_id(self) -> Path:
        """Id of this run at Weights & Biases, shared by all stages and resumes."""
        return self.path / "wandb_id"

    @property
    def stages(self) -> Path:
        """Parent of the stage folders."""
        return self.path / "stages"

    @property
    def previous(self) -> Path:
        """Parent of what stages had made before a change of the config, or of their inputs, had them start over."""
        return self.path / "previous"

    def stage(self, name: str) -> StageFolder:
        """The folder of stage `name`, whether it is there or not."""
        return StageFolder(self.stages / name)

    def create(self) -> None:
        """Makes the folder. Raises `UserError` when a file is in the way or the folder cannot be written."""
        with files.disk_errors(self.path):
            try:
                self.stages.mkdir(parents=True, exist_ok=True)
            except (FileExistsError, NotADirectoryError) as error:
                raise UserError(f"the run folder {self.path} cannot be made: {error.filename} is a file") from error
            except PermissionError as error:
                raise UserError(f"no permission to write the run folder {self.path}: set run.dir to another") from error

    def clean_partial(self) -> list[Path]:
        """Removes what a killed run left (see `files.clean_partial`); call it while holding `lock`.

        Beside `stages` only leftovers of the run's own files go: somebody may have set run.dir to a folder of theirs.
        """
        own = (self.manifest, self.config, self.metrics, self.samples, self.report, self.wandb_id)
        return files.clean_partial_files(own) + files.clean_partial(self.stages) + files.clean_partial(self.previous)

    @contextmanager
    def lock(self) -> Iterator[int]:
        """Keeps other processes out of the folder while the block runs; a killed process holds nothing.

        Yields the lock's file descriptor: a child process that inherits it keeps the lock as long as it lives.
        Raises `UserError` when another process works in the folder.
        """
        with files.disk_errors(self.path):
            descriptor = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(
                    f"another process is working in {self.path}: wait for it, stop it, or set run.dir to another folder"
                ) from error
            except OSError as error:
                # A file system without locks cannot protect the folder; that is no reason not to run.
                if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                    raise
            yield descriptor
        finally:
            os.close(descriptor)
