"""Writes an export as a folder that is there as a whole or not at all."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from rlhf.data.splits import SPLITS, Splits
from rlhf.errors import ConfigError, DataError
from rlhf.preferences.exchange import lossless
from rlhf.preferences.exchange.card import CARD_SCHEMA, make_card
from rlhf.preferences.exchange.card_text import render_card
from rlhf.preferences.exchange.export import ExportedLabels
from rlhf.preferences.exchange.writers import EXPORT_FORMATS, WRITERS, comparison_rows, rating_rows, write_jsonl
from rlhf.preferences.store import PreferenceStore
from rlhf.records import Comparison, PromptContent, RatedResponse
from rlhf.runs.files import disk_errors, partial_path, publish_folder, recover_folder
from rlhf.runs.jsonable import dump_json, read_json

Prompts = Literal["all", "text", "messages"]
RecordT = TypeVar("RecordT", Comparison, RatedResponse)


def write_export(
    exported: ExportedLabels,
    folder: Path,
    *,
    format: str = "trl",
    prompts: Prompts = "all",
    store: PreferenceStore | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes the files of the splits, `README.md` and `card.json` into a new folder; returns the card.

    `labels` is one file for all splits and takes the `store`. `prompts` keeps only those that are texts, or messages.
    Raises `ConfigError` for an unknown format and a folder that is there, unless it is an older export and `overwrite`
    is set; `DataError` when there is nothing to export or the format cannot hold it.
    """
    if format not in EXPORT_FORMATS:
        raise ConfigError(f"format={format} is unknown; an export is one of {', '.join(EXPORT_FORMATS)}")
    check_target(folder, overwrite)
    exported = _of_prompts(exported, prompts)
    temporary = partial_path(folder)
    try:
        with disk_errors(folder):
            temporary.mkdir(parents=True)
            not_written: Counter[str] = Counter()
            if format == "labels":
                if store is None:
                    raise ValueError("format=labels needs the store")
                files = _write_labels(exported, store, temporary)
            else:
                exported, files = _write_splits(exported, format, temporary, not_written)
            card = {**make_card(exported), "format": format, "not_written": dict(not_written)}
            (temporary / "README.md").write_text(render_card(card, files), encoding="utf-8")
            (temporary / "card.json").write_text(dump_json(card, indent=2) + "\n", encoding="utf-8")
        publish_folder(temporary, folder)
    finally:
        if temporary.exists():
            shutil.rmtree(temporary)
    return card


def check_target(folder: Path, overwrite: bool) -> None:
    """Raises `ConfigError` when an export may not be written there."""
    recover_folder(folder)
    if not folder.exists() and not folder.is_symlink():
        return
    if not folder.is_dir():
        raise ConfigError(f"to={folder}: there is a file of this name; name a folder that is not there yet")
    card = read_json(folder / "card.json")
    if not (isinstance(card, dict) and card.get("schema") == CARD_SCHEMA):
        if not any(folder.iterdir()):
            return
        raise ConfigError(f"to={folder}: the folder is there and is no export of ours; name one that is not there yet")
    if not overwrite:
        raise ConfigError(f"to={folder}: there is an export already; replace it with overwrite=true, or name another")


def _of_prompts(exported: ExportedLabels, prompts: Prompts) -> ExportedLabels:
    if prompts == "all":
        return exported

    def wanted(prompt: PromptContent) -> bool:
        return isinstance(prompt, str) == (prompts == "text")

    comparisons, ratings = _kept(exported.comparisons, wanted), _kept(exported.ratings, wanted)
    left = sum(
        len(before.named(name)) - len(after.named(name))
        for name in SPLITS
        for before, after in ((exported.comparisons, comparisons), (exported.ratings, ratings))
    )
    left_out = {**exported.left_out, f"prompt is not {prompts}": left} if left else exported.left_out
    return replace(exported, comparisons=comparisons, ratings=ratings, left_out=left_out)


def _kept(splits: Splits[RecordT], wanted: Callable[[PromptContent], bool]) -> Splits[RecordT]:
    train, validation, test = ([one for one in splits.named(name) if wanted(one.prompt)] for name in SPLITS)
    return Splits(train, validation, test)


def _write_splits(
    exported: ExportedLabels, format: str, folder: Path, not_written: Counter[str]
) -> tuple[ExportedLabels, dict[str, dict[str, str]]]:
    """Writes the comparisons of each split, and ratings in a folder of their own.

    Returns the export with what was written of it, and the files' names.
    """
    writer = WRITERS[format]
    compared = comparison_rows({name: exported.comparisons.named(name) for name in SPLITS}, format, not_written)
    rated = {name: rating_rows(exported.ratings.named(name), format) for name in SPLITS}
    if not any(compared.values()) and not any(rated.values()):
        raise DataError(
            f"there is nothing to export: no label of the {len(exported.selection.tasks):,} tasks counts by the rule "
            f"({exported.resolved})"
        )
    files: dict[str, dict[str, str]] = {}
    for split in SPLITS:
        rows_of = {"comparisons": [row for _, row in compared[split]], "ratings": rated[split]}
        for config, rows in rows_of.items():
            if rows:
                name = f"{'ratings/' if config == 'ratings' else ''}{split}{writer.extension}"
                (folder / name).parent.mkdir(exist_ok=True)
                writer.write(folder / name, rows)
                files.setdefault(config, {})[split] = name
    train, validation, test = ([record for record, _ in compared[name]] for name in SPLITS)
    return replace(exported, comparisons=Splits(train, validation, test)), files


def _write_labels(exported: ExportedLabels, store: PreferenceStore, folder: Path) -> Mapping[str, Mapping[str, str]]:
    tasks = (*exported.selection.tasks, *exported.selection.checks)
    if not tasks:
        raise DataError("there is nothing to export: the store has no task in these rounds")
    write_jsonl(folder / "labels.jsonl", list(lossless.rows(store, tasks)))
    return {}
