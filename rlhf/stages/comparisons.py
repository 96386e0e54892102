"""The comparisons and ratings that a stage learns from: a folder of records, else the data's own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf.data import load_comparisons, load_ratings
from rlhf.data.splits import Splits
from rlhf.data.tokenization import fit_lengths
from rlhf.errors import DataError
from rlhf.records import Comparison, RatedResponse, RecordT, read_records

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlhf.stages.context import StageContext


def comparisons_of(
    context: StageContext, tokenizer: PreTrainedTokenizerBase, num_train: int | None = None
) -> Splits[Comparison]:
    """The comparisons of the given folder, else the data's own within the data's limits of length.

    What a policy of ours sampled was limited when it was sampled. With `num_train` the training split is its first so
    many; raises `DataError`, naming the stage's `num_comparisons`, where it has fewer.
    """
    folder = context.inputs.get("comparisons")
    if folder is None:
        splits = fit_lengths(load_comparisons(context.config.data), tokenizer, context.config.data)
    else:
        splits = _read_splits(Path(folder), Comparison)
    if num_train is None:
        return splits
    if num_train > len(splits.train):
        raise DataError(
            f"{context.stage.name}.num_comparisons={num_train}, but the training split has {len(splits.train)} "
            f"comparisons{f' ({folder})' if folder else ''}: set it to that or less, or collect more"
        )
    origins = {name: rows[:num_train] if name == "train" else rows for name, rows in splits.origins.items()}
    return replace(splits, train=splits.train[:num_train], origins=origins)


def ratings_of(context: StageContext, tokenizer: PreTrainedTokenizerBase) -> Splits[RatedResponse]:
    """The rated responses of the given folder, else the data's own within the data's limits of length."""
    folder = context.inputs.get("ratings")
    if folder is None:
        return fit_lengths(load_ratings(context.config.data), tokenizer, context.config.data)
    return _read_splits(Path(folder), RatedResponse)


def _read_splits(folder: Path, kind: type[RecordT]) -> Splits[RecordT]:
    records = {
        name: read_records(path, kind) if (path := folder / f"{name}.jsonl").is_file() else []
        for name in ("train", "validation", "test")
    }
    return Splits(records["train"], records["validation"], records["test"])
