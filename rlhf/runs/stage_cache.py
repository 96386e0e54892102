"""Finished stages that runs share: what a stage has left, under everything that decided it, to be taken by another run.

    FOLDER/<stage>/<fingerprint>/<variant>/
        stage/            the stage's folder without its checkpoints
        metrics.jsonl     the stage's lines
        samples.jsonl     the stage's lines
        entry.json        hash of each of these files; by which run it was made, when, with which code

An entry is written beside its place and renamed when it is whole, so there is no half of one. Files are hard links of
the run's where the file system allows it, else copies; databases, which are written in place, are always copies.
An entry is taken when every file has its hash; one that has not is renamed to `<variant>.damaged-...` and counts no
more.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from rlhf.errors import ArtifactError
from rlhf.runs import files
from rlhf.runs.folder import RunFolder, StageFolder, StageResult
from rlhf.runs.jsonable import parse_line, read_json
from rlhf.runs.metrics_file import rewind

SCHEMA = "stage_cache/1"
ENTRY = "entry.json"
STAGE = "stage"
LINES = ("metrics.jsonl", "samples.jsonl")
_DATABASES = (".sqlite", ".sqlite-wal", ".sqlite-shm")
_ADAPTER = "adapter_config.json"


class DamagedEntryError(ArtifactError):
    """An entry of the cache is not what was written there."""


@dataclass(frozen=True)
class Entry:
    """The place of one finished stage in the cache, whether it is there or not."""

    path: Path

    @property
    def exists(self) -> bool:
        """Whether it is there; it may still be damaged."""
        return (self.path / ENTRY).exists()

    def take(
        self, run: RunFolder, stage: StageFolder, fingerprint: str, before: Callable[[], object]
    ) -> dict[str, Any]:
        """Puts the stage with its result and its lines into the run, and returns what `publish` was told about it.

        The entry is looked through and copied first; then `before` makes the stage's folder ready, and it becomes what
        the entry has, at once. A run killed meanwhile starts the stage over. Raises `DamagedEntryError` when the entry
        is not whole, `OSError` when it cannot be read, and `StorageError`; nothing has changed then.
        """
        body = self._read(fingerprint)
        temporary = files.partial_path(stage.path)
        with files.disk_errors(stage.path):
            temporary.mkdir(parents=True)
            try:
                self._copy(body["files"], temporary)
                _move_adapters(temporary, body.get("run_folder"), run)
                lines = {name: self._lines(name, body) for name in LINES}
                before()
                for name, content in lines.items():
                    _replace_lines(run.path / name, stage.name, content)
                files.publish_folder(temporary, stage.path)
            finally:
                if temporary.exists():
                    files.discard(temporary)
        about = body.get("about")
        return about if isinstance(about, dict) else {}

    def publish(self, run: RunFolder, stage: StageFolder, about: Mapping[str, Any]) -> bool:
        """Makes the run's finished stage an entry; False when there is one. `about` is told to those who take it.

        Raises `OSError` or `StorageError` when it cannot be written.
        """
        if self.exists:
            return False
        temporary = files.partial_path(self.path)
        with files.disk_errors(self.path):
            (temporary / STAGE).mkdir(parents=True)
            try:
                hashes = {}
                for name in _whole_files(stage.path):
                    target = temporary / STAGE / name
                    _link(stage.path / name, target)
                    hashes[f"{STAGE}/{name}"] = files.hash_file(target)
                for name in LINES:
                    (temporary / name).write_bytes(b"".join(_lines_of(run.path / name, stage.name)))
                    hashes[name] = files.hash_file(temporary / name)
                body = {"schema": SCHEMA, "run_folder": str(run.path.absolute()), "about": about, "files": hashes}
                files.write_json(temporary / ENTRY, body)
                files.sync_tree(temporary)
                return _rename(temporary, self.path)
            finally:
                if temporary.exists():
                    files.discard(temporary)

    def set_aside(self) -> Path:
        """Moves a damaged entry out of the way, and returns where."""
        aside = self.path.with_name(f"{self.path.name}.damaged-{os.urandom(4).hex()}")
        self.path.rename(aside)
        return aside

    def clean(self) -> None:
        """Removes what killed writers of this entry have left; only for the holder of its lease."""
        for left in self.path.parent.glob(f".{self.path.name}.*{files.PARTIAL}"):
            if left.is_dir():
                files.discard(left)

    def _read(self, fingerprint: str) -> dict[str, Any]:
        body = read_json(self.path / ENTRY)
        names = body.get("files") if isinstance(body, dict) and body.get("schema") == SCHEMA else None
        if not isinstance(names, dict) or not {f"{STAGE}/result.json", *LINES} <= names.keys():
            raise DamagedEntryError(f"{self.path / ENTRY} does not say what the entry has")
        if any(PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts for name in names):
            raise DamagedEntryError(f"{self.path / ENTRY} names files outside the entry")
        result = StageFolder(self.path / STAGE).read_result()
        if result is None or result.fingerprint != fingerprint:
            raise DamagedEntryError(f"{self.path / STAGE / 'result.json'} is not the result of this stage")
        return dict(body)

    def _copy(self, names: Mapping[str, str], target: Path) -> None:
        """Puts the stage's files into `target`. Raises `DamagedEntryError` for one that has not its hash."""
        for name, expected in names.items():
            if name.startswith(f"{STAGE}/"):
                copy = target / name.removeprefix(f"{STAGE}/")
                try:
                    _link(self.path / name, copy)
                except FileNotFoundError as error:
                    raise DamagedEntryError(f"{self.path / name} is missing") from error
                if files.hash_file(copy) != expected:
                    raise DamagedEntryError(f"{self.path / name} has another content than it was written with")

    def _lines(self, name: str, body: Mapping[str, Any]) -> bytes:
        path = self.path / name
        if not path.is_file() or files.hash_file(path) != body["files"][name]:
            raise DamagedEntryError(f"{path} has another content than it was written with")
        return path.read_bytes()


def _whole_files(folder: Path) -> Iterator[str]:
    """Names of the files in a finished stage's folder, sorted: all but checkpoints and what killed runs have left."""
    found = []
    for parent, folders, names in os.walk(folder):
        here = Path(parent)
        folders[:] = [name for name in folders if not files.is_leftover(here / name)]
        if here == folder:
            folders[:] = [name for name in folders if name != StageFolder(folder).checkpoints.name]
        found += [(here / name).relative_to(folder).as_posix() for name in names if not files.is_leftover(here / name)]
    return iter(sorted(found))


def _link(source: Path, target: Path) -> None:
    """Makes `target` a hard link of the file where that is possible and harmless, else a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if not source.name.endswith(_DATABASES):
        try:
            os.link(source, target)
            return
        except FileNotFoundError:
            raise
        except OSError:  # another file system, one without links, a file of somebody else's: a copy will do
            pass
    shutil.copyfile(source, target)


def _lines_of(path: Path, stage: str) -> Iterator[bytes]:
    """The stage's whole lines of a JSON Lines file, as they stand."""
    content = path.read_bytes() if path.exists() else b""
    # What follows the last newline is empty in a whole file, else a line that was being written.
    for line in content.split(b"\n")[:-1]:
        entry = parse_line(line)
        if entry is not None and entry.get("stage") == stage:
            yield line + b"\n"


def _replace_lines(path: Path, stage: str, lines: bytes) -> None:
    """Puts the stage's lines at the end of the run's file, in the place of any that it has."""
    rewind(path, stage, 0)
    if lines:
        with path.open("ab") as file:
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())


def _rename(temporary: Path, final: Path) -> bool:
    """Gives a finished entry its name; False when another one has it."""
    try:
        temporary.rename(final)
    except OSError:
        if final.exists():
            return False
        raise
    files.sync_folder(final.parent)
    return True


def _move_adapters(folder: Path, origin: str | None, run: RunFolder) -> None:
    """Adapters in `folder` name their base by its path: one in the run that made them lies at the same place here.

    So the files are those that the stage would have written here, and the result has their hashes.
    """
    moved = False
    for path in sorted(folder.rglob(_ADAPTER)) if origin else ():
        text = path.read_text(encoding="utf-8")
        base = json.loads(text).get("base_model_name_or_path")
        if isinstance(base, str) and Path(base).is_relative_to(str(origin)):
            here = run.path.absolute() / Path(base).relative_to(str(origin))
            files.write_text(path, text.replace(json.dumps(base)[1:-1], json.dumps(str(here))[1:-1]))
            moved = True
    if moved:
        stage = StageFolder(folder)
        result = stage.read_result()
        assert isinstance(result, StageResult), "it was read before"
        stage.write_result(replace(result, outputs=stage.hash_outputs(list(result.outputs))))
