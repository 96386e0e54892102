"""Data sets on the hub whose rows are made by a script of their own, which `datasets` no longer runs.

The hub keeps a copy of such a data set as Parquet files on a branch, `CONFIGURATION/SPLIT/0000.parquet` and so on.
"""

from __future__ import annotations

import difflib
from typing import Any

from rlhf.config.data import HubData
from rlhf.errors import ConfigError

BRANCH = "refs/convert/parquet"
# How the hub names a split of which it keeps the beginning alone.
_BEGINNING = "partial-"


def is_about_a_script(error: RuntimeError) -> bool:
    """Whether `datasets` says that it will not run a data set's script; it has no error class for that."""
    return "scripts are no longer supported" in str(error)


def load_export(config: HubData) -> Any:
    """The Parquet copy of a data set. Raises `ConfigError` where the hub has none of this configuration."""
    import datasets

    splits = _splits(config)
    address = f"hf://datasets/{config.path}@{BRANCH}"
    files = {split: [f"{address}/{name}" for name in names] for split, names in splits.items()}
    return datasets.load_dataset("parquet", data_files=files)


def _splits(config: HubData) -> dict[str, list[str]]:
    """The files of every split of the configuration that is wanted."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RevisionNotFoundError

    said = f"data.path={config.path}: a script makes this data set, which `datasets` no longer runs"
    if config.revision is not None:
        raise ConfigError(f"{said}; the hub's copy has no revisions, and data.revision is {config.revision}: set null")
    try:
        names = sorted(HfApi().list_repo_files(config.path, repo_type="dataset", revision=BRANCH))
    except RevisionNotFoundError as error:
        raise ConfigError(
            f"{said}, and the hub has no Parquet copy. Save it with datasets<4 and save_to_disk and give that folder"
        ) from error
    found: dict[str, dict[str, list[str]]] = {}
    for name in names:
        parts = name.split("/")
        if len(parts) == 3 and name.endswith(".parquet"):
            found.setdefault(parts[0], {}).setdefault(parts[1], []).append(name)
    wanted = next(iter(found)) if config.name is None and len(found) == 1 else config.name
    if wanted not in found:
        near = difflib.get_close_matches(wanted or "", found, n=1)
        raise ConfigError(
            f"{said}; the hub's copy has no configuration {wanted} (data.name), only {', '.join(found) or 'none'}"
            + (f". Did you mean {near[0]}?" if near else "")
        )
    partial = [split for split in found[wanted] if split.startswith(_BEGINNING)]
    if partial:
        raise ConfigError(
            f"{said}, and the hub's copy holds the beginning of it alone ({', '.join(partial)}). Save it with "
            "datasets<4 and save_to_disk, and give that folder"
        )
    return found[wanted]
