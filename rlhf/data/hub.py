"""Source `hub`: records from a `datasets` data set, from the hub or a folder that `save_to_disk` wrote."""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf.config.data import HubData
from rlhf.data.assemble import RowsBySplit, assemble
from rlhf.data.folders import split_of_name
from rlhf.data.hub_access import http_errors, use_cache_if_hub_is_silent
from rlhf.data.hub_export import is_about_a_script, load_export
from rlhf.data.readers import Row, arrow_rows
from rlhf.data.splits import SPLITS, BadRow, SplitName, Splits
from rlhf.errors import ConfigError, DataError
from rlhf.records import RecordT

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
SAVED_DATASET = "state.json"
SAVED_DATASET_DICT = "dataset_dict.json"
BATCH = 4096


def load_hub(config: HubData, kind: type[RecordT]) -> Splits[RecordT]:
    """All records of one kind.

    Raises `ConfigError` for an unknown id, revision, configuration or folder, `DataError` when the hub cannot be
    reached or a folder is damaged; otherwise as `assemble`.
    """
    return assemble(hub_rows(config), config, kind)


def hub_rows(config: HubData) -> RowsBySplit:
    """All rows by split, before anything is made of them. Errors as in `load_hub`."""
    check_hub(config)
    return _rows_by_split(_load_folder(config) if is_saved_folder(config.path) else _load_from_hub(config), config)


def _rows_by_split(loaded: Any, config: HubData) -> RowsBySplit:
    if not isinstance(loaded, dict):
        if config.split is not None:
            raise ConfigError(f"data.split={config.split}: {config.path} is a single split; set data.split=null")
        return {None: _rows(loaded, config.path)}
    if config.split is not None:
        if config.split not in loaded:
            near = difflib.get_close_matches(config.split, loaded, n=1)
            raise ConfigError(
                f"data.split={config.split}: {config.path} has no such split; it has {', '.join(loaded)}"
                + (f". Did you mean {near[0]}?" if near else "")
            )
        return {None: _rows(loaded[config.split], f"{config.path} [{config.split}]")}
    names = choose_splits(list(loaded), config.path)
    return {split: _rows(loaded[name], f"{config.path} [{name}]") for split, name in names.items()}


def is_saved_folder(path_text: str) -> bool:
    """True for a folder that `save_to_disk` wrote."""
    folder = Path(path_text).expanduser()
    return (folder / SAVED_DATASET).is_file() or (folder / SAVED_DATASET_DICT).is_file()


def check_hub(config: HubData) -> None:
    """Raises `ConfigError` when the path can be neither a saved folder nor a hub id; does not use the network."""
    if importlib.util.find_spec("datasets") is None:
        raise ConfigError("data.type=hub needs the package datasets; install it with `pip install datasets`")
    if is_saved_folder(config.path):
        return
    folder = Path(config.path).expanduser()
    if folder.exists():
        raise ConfigError(
            f"data.path={config.path}: {folder.resolve()} is not a folder written by save_to_disk (it has neither "
            f"{SAVED_DATASET} nor {SAVED_DATASET_DICT}); for files or a folder of files use data.type=files"
        )
    if not HUB_ID.fullmatch(config.path) or config.path.startswith("."):
        raise ConfigError(
            f"data.path={config.path}: there is no such folder (looked for {os.path.abspath(folder)}), and it is not "
            "a hub id such as Anthropic/hh-rlhf"
        )


def choose_splits(names: list[str], path: str) -> dict[SplitName | None, str]:
    """Which of a data set's splits is train, validation and test, by exact name or else by the one name that says so.

    A data set with a single split of another name is split by hash. Raises `ConfigError` when it stays open.
    """
    if len(names) == 1 and split_of_name(names[0]) is None:
        return {None: names[0]}
    chosen: dict[SplitName | None, str] = {}
    for split in SPLITS:
        fitting = [name for name in names if split_of_name(name) == split]
        if split in names:
            chosen[split] = split
        elif len(fitting) == 1:
            chosen[split] = fitting[0]
        elif len(fitting) > 1:
            raise ConfigError(
                f"data.path={path}: the data set has several splits for {split}: {', '.join(fitting)}. Save the ones "
                "that are meant as train, validation and test with DatasetDict.save_to_disk and give that folder"
            )
    if "train" not in chosen:
        raise ConfigError(
            f"data.path={path}: the data set has no train split; its splits are {', '.join(names)}. Name one with "
            "data.split, which is then divided by hash"
        )
    return chosen


def hash_hub(config: HubData) -> str:
    """SHA-256 of a saved folder's files, or of the id, configuration and revision."""
    digest = hashlib.sha256()
    if not is_saved_folder(config.path):
        digest.update(f"{config.path}\0{config.name}\0{config.revision}".encode())
        return digest.hexdigest()
    folder = Path(config.path).expanduser()
    for file in sorted(entry for entry in folder.rglob("*") if entry.is_file() and not entry.name.startswith("cache-")):
        with file.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        digest.update(f"{file.relative_to(folder)}\0{content}\n".encode())
    return digest.hexdigest()


def _load_folder(config: HubData) -> Any:
    import datasets
    import pyarrow

    try:
        return datasets.load_from_disk(str(Path(config.path).expanduser()))
    except (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException) as error:
        raise DataError(f"data.path={config.path}: the saved data set is damaged: {error}") from error


def _load_or_export(config: HubData) -> Any:
    import datasets

    try:
        return datasets.load_dataset(config.path, config.name, revision=config.revision)
    except RuntimeError as error:
        if not is_about_a_script(error):
            raise
    return load_export(config)


def _load_from_hub(config: HubData) -> Any:
    from datasets.exceptions import DatasetNotFoundError, DatasetsError
    from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError

    wanted = f"data.path={config.path}" + (f", data.revision={config.revision}" if config.revision else "")
    silent = use_cache_if_hub_is_silent()
    unreachable: tuple[type[Exception], ...] = (ConnectionError, TimeoutError, HfHubHTTPError, *http_errors())
    try:
        return _load_or_export(config)
    except (DatasetNotFoundError, RevisionNotFoundError) as error:
        raise ConfigError(
            f"{wanted}: the hub has no such data set, or it is private or gated (then `hf auth login` first): "
            f"{_first_line(error)}. Check the spelling; a file or folder of files needs data.type=files"
        ) from error
    except unreachable as error:
        raise DataError(
            f"{wanted}: the hub cannot be reached ({silent or _first_line(error)}), and the data set is not in the "
            "cache. Check the network, HF_ENDPOINT and HF_HUB_OFFLINE, or "
            "save the data set where there is a network with datasets' save_to_disk and give that folder"
        ) from error
    except ValueError as error:
        # `datasets` says this way that the configuration is unknown or missing, and lists those there are.
        raise ConfigError(f"{wanted}, data.name={config.name}: {error}") from error
    except (DatasetsError, OSError) as error:
        raise DataError(f"{wanted}: the data set cannot be prepared: {error}") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")


def _rows(dataset: Any, name: str) -> Iterator[Row | BadRow]:
    number = 0
    for table in dataset.with_format("arrow").iter(batch_size=BATCH):
        yield from arrow_rows(table, name, number)
        number += table.num_rows
