"""Finds the files of a data path: a file, or a folder with a file for each split. Reads no rows."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

from rlhf.data.splits import SPLITS, SplitName
from rlhf.errors import ConfigError, DataError

EXTENSIONS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
COMPRESSED = ".gz"
KNOWN = "JSONL (.jsonl, .ndjson), JSON (.json), CSV (.csv), TSV (.tsv), each also as .gz, or Parquet (.parquet)"
_SPLIT_NAME = re.compile(r"(?:^|[-_. ])(train|validation|valid|val|dev|test)(?:ing|set|s)?(?![a-z])", re.IGNORECASE)
_SPLIT_OF_NAME: dict[str, SplitName] = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}


def extension(path: Path) -> str:
    """The extension that tells how to read the file, without `.gz`; empty when we cannot read such files."""
    name = path.name.lower()
    inner = Path(name.removesuffix(COMPRESSED)).suffix
    if inner not in EXTENSIONS or (inner == ".parquet" and name.endswith(COMPRESSED)):
        return ""
    return inner


def split_of_name(name: str) -> SplitName | None:
    """The split that a file or data-set split is named after: `train.jsonl`, `valid-00000-of-00002.parquet`, `dev`."""
    found = _SPLIT_NAME.search(name)
    return _SPLIT_OF_NAME[found.group(1).lower()] if found else None


def find_files(path_text: str) -> dict[SplitName | None, list[Path]]:
    """The files to read, by split; the key None holds a file that hashing splits.

    Raises `ConfigError` when the path is not there or nothing in it can be read, `DataError` when it is empty or may
    not be read. In a folder with files named after splits, other files are ignored.
    """
    path = Path(path_text).expanduser()
    try:
        if path.is_dir():
            found = _files_of_folder(path, path_text)
        elif path.exists():
            found = {None: [path]}
        else:
            raise ConfigError(_missing(path, path_text))
        for files in found.values():
            for file in files:
                _check_file(file)
    except PermissionError as error:
        raise DataError(
            f"data.path={path_text}: {error.filename or path} may not be read by this user; change its permissions"
        ) from error
    return found


def name_of(file: Path, path_text: str) -> str:
    """How messages name a file: relative to the data folder's parent, as the user wrote it."""
    path = Path(path_text).expanduser()
    return str(Path(path_text) / file.relative_to(path)) if path.is_dir() else path_text


def _files_of_folder(folder: Path, path_text: str) -> dict[SplitName | None, list[Path]]:
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    files = [entry for entry in entries if extension(entry) and entry.is_file()]
    if not files:
        present = ", ".join(entry.name + ("/" if entry.is_dir() else "") for entry in entries[:10]) or "nothing"
        raise ConfigError(f"data.path={path_text}: the folder {folder.resolve()} holds no {KNOWN}; it holds {present}")
    by_split: dict[SplitName | None, list[Path]] = {}
    for file in files:
        split = split_of_name(file.name)
        if split is not None:
            by_split.setdefault(split, []).append(file)
    if "train" in by_split:
        return {name: by_split[name] for name in SPLITS if name in by_split}
    if not by_split and len(files) == 1:
        return {None: files}
    raise ConfigError(
        f"data.path={path_text}: cannot tell which file of {folder.resolve()} to train on; it holds "
        f"{', '.join(file.name for file in files[:10])}. Name one train.<extension> (and validation.*, test.*), "
        "or set data.path to one file"
    )


def _check_file(file: Path) -> None:
    if not file.is_file():
        raise ConfigError(f"data.path: {file} is not a regular file")
    if not extension(file):
        raise ConfigError(f"data.path: cannot tell how to read {file}; expected {KNOWN}")
    if not os.access(file, os.R_OK):
        raise PermissionError(13, "Permission denied", str(file))
    if file.stat().st_size == 0:
        raise DataError(f"data.path: {file} is empty")


def _missing(path: Path, path_text: str) -> str:
    absolute = Path(os.path.abspath(path))
    message = f"data.path={path_text}: there is no such file or folder; looked for {absolute}"
    parent = absolute.parent
    while not parent.is_dir():
        parent = parent.parent
    if parent != absolute.parent:
        return f"{message}; the nearest folder that exists is {parent}"
    names = sorted(entry.name for entry in parent.iterdir() if not entry.name.startswith("."))
    near = difflib.get_close_matches(absolute.name, names, n=3, cutoff=0.5)
    if near:
        return f"{message}; did you mean {' or '.join(near)}?"
    readable = [name for name in names if extension(Path(name))][:5]
    return f"{message}; data files there: {', '.join(readable)}" if readable else message
