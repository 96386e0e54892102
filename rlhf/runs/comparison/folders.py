"""Which runs a command line names: run folders, or folders that hold some: an experiment's, a study's, a sweep's."""

from __future__ import annotations

import difflib
import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf.errors import ConfigError
from rlhf.runs.folder import RunFolder
from rlhf.runs.manifest import read_manifest

MANIFEST = "manifest.json"
# Below a folder that is no run, runs are looked for this deep.
DEPTH = 3
# Where a study and a sweep put their runs.
PARTS = ("arms", "trials")


@dataclass(frozen=True)
class NamedFolder:
    """A run folder and the label that the command line gave it, if any."""

    path: Path
    label: str | None = None


def run_folders(named: Sequence[tuple[str | None, str]]) -> list[NamedFolder]:
    """The runs of (label, folder) pairs in their order, each once. A folder that holds runs stands for all of them.

    Raises `ConfigError` for a folder that is not there, with the nearest one that is, and for one without a run.
    """
    found: dict[Path, NamedFolder] = {}
    for label, text in named:
        paths = [Path(text).expanduser()]
        if not paths[0].exists() and glob.has_magic(text):
            paths = [Path(path) for path in sorted(glob.glob(str(paths[0])))]
        if not paths or not paths[0].exists():
            raise ConfigError(_missing(Path(text).expanduser()))
        runs = [run for path in paths for run in _runs_in(path)]
        if not runs:
            raise ConfigError(
                f"{text} is no run folder and holds none: expected one with {MANIFEST}, or a folder of such. "
                "A run's folder is what `rlhf run` names at its start, by default runs/<experiment>/<id>."
            )
        for run in runs:
            key = run.resolve()
            if label is not None or key not in found:
                found[key] = NamedFolder(run, label)
    return list(found.values())


def is_run(path: Path) -> bool:
    """Whether a folder holds a run: it has a manifest that can be read."""
    return bool(read_manifest(RunFolder(path)))


def _runs_in(path: Path) -> list[Path]:
    """The run itself; of a study or a sweep its runs; else the runs below, by name."""
    if not path.is_dir():
        return []
    parts = [run for part in PARTS if (path / part).is_dir() for run in _below(path / part, DEPTH)]
    if parts:
        return parts
    return [path] if is_run(path) else list(_below(path, DEPTH))


def _below(folder: Path, depth: int) -> Iterator[Path]:
    for child in sorted(folder.iterdir(), key=_natural):
        if not child.is_dir() or child.name.startswith(".") or child.is_symlink():
            continue
        if is_run(child):
            yield child
        elif depth > 1:
            yield from _below(child, depth - 1)


def _natural(path: Path) -> list[tuple[int, int, str]]:
    """`trial10` after `trial9` and `trial0`; digits behind a zero are a fraction's, and ordered as text."""
    pieces: list[tuple[int, int, str]] = []
    digits = ""
    for letter in [*path.name, ""]:
        if letter.isdigit() and letter.isascii():
            digits += letter
            continue
        if digits:
            is_fraction = len(digits) > 1 and digits.startswith("0")
            pieces.append((1, 0, digits) if is_fraction else (0, int(digits), ""))
            digits = ""
        pieces.append((1, 0, letter))
    return pieces


def _missing(path: Path) -> str:
    """What is there instead: the first part of the path that is not, and the name that is nearest to it."""
    existing = path.absolute()
    wanted = existing.name
    while not existing.exists():
        wanted, existing = existing.name, existing.parent
    names = [child.name for child in existing.iterdir()] if existing.is_dir() else []
    near = difflib.get_close_matches(wanted, names, n=1, cutoff=0.5)
    hint = f" Did you mean {existing / near[0]}?" if near else f" {existing} has no {wanted}."
    return f"{path}: there is no such run folder.{hint}"
