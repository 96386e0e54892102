"""The folder of a sweep: what it was made from, what its trials leave, and how it is found again.

sweeps/<name>/
  sweep.yaml       the file as it was given
  sweep.json       what was made of it: storage, seed, conditions
  events.jsonl     what has happened
  optuna.log       Optuna's journal, unless the storage is a database
  trials/<number>/ the run folders
  logs/<number>.log, leases/, cache/
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.config.errors import close_names, did_you_mean
from rlhf.errors import ConfigError, UserError
from rlhf.runs.files import disk_errors, write_json, write_text
from rlhf.runs.jsonable import read_json
from rlhf.sweeps.file import SweepFile, read_sweep_file
from rlhf.sweeps.journal import Journal
from rlhf.sweeps.leases import Leases
from rlhf.sweeps.space import Condition, Space, space_of

SCHEMA = "sweep/1"
JOURNAL_STORAGE = "journal"
SQLITE = "sqlite:///"
STORAGES = (JOURNAL_STORAGE, SQLITE, "postgresql://", "mysql://")


@dataclass(frozen=True)
class SweepFolder:
    """Where everything of a sweep lies."""

    path: Path

    @property
    def name(self) -> str:
        """The sweep's name."""
        return self.path.name

    @property
    def file(self) -> Path:
        """The sweep file as it was given."""
        return self.path / "sweep.yaml"

    @property
    def description(self) -> Path:
        """What was made of it."""
        return self.path / "sweep.json"

    @property
    def cache(self) -> Path:
        """Finished stages that trials share."""
        return self.path / "cache"

    @property
    def page(self) -> Path:
        """The page of `rlhf sweep status`."""
        return self.path / "status.html"

    def trial(self, number: int) -> Path:
        """The run folder of a trial."""
        return self.path / "trials" / str(number)

    def log(self, number: int) -> Path:
        """What a trial's process printed, of all attempts."""
        return self.path / "logs" / f"{number}.log"


@dataclass(frozen=True)
class Sweep:
    """An opened sweep."""

    folder: SweepFolder
    file: SweepFile
    space: Space
    seed: int
    storage: str
    lease_seconds: float
    source: str | None = None

    @property
    def journal(self) -> Journal:
        """A reader and writer of its events, of one's own."""
        return Journal(self.folder.path / "events.jsonl")

    def leases(self) -> Leases:
        """Who works on what."""
        return Leases(self.folder.path / "leases", self.lease_seconds)

    @property
    def num_settings(self) -> int | None:
        """How many settings there are in all; None where there is no end."""
        return len(self.space.grid()) if self.file.method == "grid" else None

    @property
    def storage_url(self) -> str | None:
        """The database of Optuna's study; None for its journal file."""
        return None if self.storage == JOURNAL_STORAGE else self.storage


def digest(text: str) -> str:
    """What a sweep file is recognised by."""
    return hashlib.sha256(text.encode()).hexdigest()


def create(
    file: SweepFile, space: Space, folder: SweepFolder, *, seed: int, storage: str, lease_seconds: float
) -> bool:
    """Makes the sweep's folder; False when the same sweep is there already. Raises `ConfigError` for another one."""
    storage = checked_storage(storage)
    body = {
        "schema": SCHEMA,
        "method": file.method,
        "digest": digest(file.text),
        "source": str(file.path.absolute()),
        "seed": seed,
        "storage": storage,
        "lease_seconds": lease_seconds,
        "conditions": {name: {"on": one.on, "values": list(one.values)} for name, one in space.conditions.items()},
    }
    before = read_json(folder.description)
    if isinstance(before, dict):
        _check_same(folder, before, body)
        return False
    with disk_errors(folder.path):
        for name in ("trials", "logs", "leases"):
            (folder.path / name).mkdir(parents=True, exist_ok=True)
        write_text(folder.file, file.text)
        (folder.path / "events.jsonl").touch()
    # Last: with it the sweep is whole.
    write_json(folder.description, body)
    return True


def _check_same(folder: SweepFolder, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    if before.get("digest") != now["digest"]:
        raise ConfigError(
            f"{folder.path} was made from another sweep file (sweep.yaml in it). A sweep keeps the file it began with: "
            "give this one another name with name=NAME, or delete the folder."
        )
    for key in ("seed", "storage", "lease_seconds"):
        if before.get(key) != now[key]:
            raise ConfigError(
                f"{folder.path} is there already, with {key}={before.get(key)}, and {key}={now[key]} was asked for. "
                "Leave the argument out, or give the sweep another name with name=NAME."
            )


def open_sweep(text: str, root: Path = Path("sweeps")) -> Sweep:
    """The sweep of a name or a folder. Raises `ConfigError` when there is none, or when its file was changed."""
    folder = find(text, root)
    body = read_json(folder.description)
    try:
        if body["schema"] != SCHEMA:
            raise ValueError(body["schema"])
        conditions = {name: Condition(one["on"], tuple(one["values"])) for name, one in body["conditions"].items()}
        digested, source = str(body["digest"]), body.get("source")
        seed, storage, lease_seconds = int(body["seed"]), str(body["storage"]), float(body["lease_seconds"])
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{folder.description} is not what `rlhf sweep` wrote; create the sweep anew") from error
    file = read_sweep_file(folder.file)
    if digest(file.text) != digested:
        raise ConfigError(
            f"{folder.file} was changed after the sweep had been created, and trials of two files do not belong "
            "together: take the change back, or create another sweep from the changed file with name=NAME."
        )
    return Sweep(folder, file, space_of(file, conditions), seed, storage, lease_seconds, source)


def source_changed(sweep: Sweep) -> bool:
    """Whether the file that the sweep was created from says something else by now."""
    if sweep.source is None:
        return False
    try:
        return digest(Path(sweep.source).read_text(encoding="utf-8")) != digest(sweep.file.text)
    except (OSError, UnicodeDecodeError):
        return False


def find(text: str, root: Path) -> SweepFolder:
    """The folder of a sweep by its name below `root`, or by its path."""
    for path in (Path(text).expanduser(), root / text):
        if (path / "sweep.json").is_file():
            return SweepFolder(path)
    known = sorted(path.parent.name for path in root.glob("*/sweep.json"))
    hint = did_you_mean(close_names(text, known))
    if text.endswith((".yaml", ".yml")):
        raise ConfigError(f"{text} is a sweep file: `rlhf sweep {text}` makes the sweep and says what to start")
    there = f"; {root} has {', '.join(known)}" if known else f"; {root} has none"
    raise ConfigError(f"there is no sweep {text}{hint}{there}. `rlhf sweep FILE` creates one.")


def checked_storage(storage: str) -> str:
    """The storage, a file's path made absolute. Raises `ConfigError` for one that Optuna does not have."""
    if storage != JOURNAL_STORAGE and not storage.startswith(STORAGES[1:]):
        hint = did_you_mean(close_names(storage.partition(":")[0], ["journal", "sqlite", "postgresql", "mysql"]))
        raise ConfigError(
            f"storage={storage}: expected journal (a file in the sweep's folder), sqlite:///FILE or "
            f"postgresql://USER@HOST/DATABASE{hint}"
        )
    if storage.startswith(SQLITE):
        # Agents may be started in other folders.
        return SQLITE + str(Path(storage.removeprefix(SQLITE)).expanduser().absolute())
    return storage


def default_name(file: SweepFile) -> str:
    """The sweep's name: the file's `name`, else what the file is called."""
    return re.sub(r"[^\w.-]+", "-", file.name or file.path.stem).strip("-.") or "sweep"
