"""Turns the rows of a source into records of one kind, in splits; shared by the sources `files` and `hub`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Generic

from rlhf.config.data import FileData, HubData, SplitConfig
from rlhf.data.formats import FORMATS, RowError, as_kind, detect_format
from rlhf.data.readers import Row
from rlhf.data.splits import SPLITS, BadRow, Origin, SplitName, Splits, is_empty, refuse_or_skip, split_key, split_of
from rlhf.data.token_ids import with_texts
from rlhf.errors import ConfigError, DataError
from rlhf.records import Comparison, Demonstration, Prompt, RatedResponse, Record, RecordT

RowsBySplit = Mapping[SplitName | None, Iterable[Row | BadRow]]
KIND_NAMES: dict[type[Record], str] = {
    Prompt: "prompts",
    Demonstration: "demonstrations",
    Comparison: "comparisons",
    RatedResponse: "rated responses",
}
ROWS_SNIFFED = 20


@dataclass(frozen=True)
class Placed(Generic[RecordT]):
    """A record, the place of its row, and the split whose file it is in (None: hashing decides)."""

    split: SplitName | None
    origin: Origin
    record: RecordT
    key: str


def assemble(rows_by_split: RowsBySplit, config: FileData | HubData, kind: type[RecordT]) -> Splits[RecordT]:
    """Reads all rows as `kind`. Of equal prompts the first is kept when prompts are wanted.

    Rows under None are split by hash, and so is a share of the train rows for a split that has no rows of its own.
    A row whose prompt also occurs in the rows of a split that is held out longer is a broken row: it leaks.

    Raises `ConfigError` when the format is unknown or cannot give `kind`, `DataError` for broken rows unless they may
    be skipped, and when no row is left to train on.
    """
    source = f"data.path={config.path}"
    bad_rows: list[BadRow] = []
    placed: list[Placed[RecordT]] = []
    num_rows, last = 0, None
    for split, rows in rows_by_split.items():
        for entry in _parse(rows, split, config, kind):
            # A row may hold several comparisons.
            num_rows += entry.origin != last
            last = entry.origin
            if isinstance(entry, BadRow):
                bad_rows.append(entry)
            else:
                placed.append(entry)
    if not num_rows:
        raise DataError(f"{source}: there is no row in it")
    shares = shares_of_train(config.splits, set(rows_by_split))
    kept: dict[SplitName, list[Placed[RecordT]]] = {name: [] for name in SPLITS}
    for entry in _without_leaks(placed, bad_rows):
        split = entry.split if entry.split in ("validation", "test") else split_of(entry.key, shares)
        kept[split].append(entry)
    if kind is Prompt:
        kept = {name: _first_of_each_key(kept[name]) for name in SPLITS}
    reported = refuse_or_skip(bad_rows, num_rows, config.on_bad_row, source)
    if not kept["train"]:
        raise DataError(f"{source}: no row is left to train on; {reported}")
    records = {name: [entry.record for entry in kept[name]] for name in SPLITS}
    origins = {name: [entry.origin for entry in kept[name]] for name in SPLITS}
    return Splits(records["train"], records["validation"], records["test"], reported, origins)


def _parse(
    rows: Iterable[Row | BadRow], split: SplitName | None, config: FileData | HubData, kind: type[RecordT]
) -> Iterator[Placed[RecordT] | BadRow]:
    """Every row as a record of the wanted kind or as a broken row."""
    source = f"data.path={config.path}"
    name, all_rows = choose_format(with_texts(rows, config.decode_with), config.format, source)
    if name is None:
        yield from (row for row in all_rows if isinstance(row, BadRow))
        return
    check_gives(name, kind, source)
    example: Record | None = None
    num_given = 0
    for row in all_rows:
        if isinstance(row, BadRow):
            yield row
            continue
        records: list[RecordT] = []
        try:
            for full in FORMATS[name].records(row.fields, kind):
                record = as_kind(full, kind, row.fields, FORMATS[name].prompt_fields)
                if record is None:
                    example = full
                    raise RowError(f"the row gives no {KIND_NAMES[kind].removesuffix('s')}")
                if kind is Prompt and is_empty(record.prompt):
                    raise RowError("the prompt is empty")
                records.append(record)
        except RowError as error:
            yield BadRow(row.origin, str(error))
        else:
            num_given += 1
            yield from (Placed(split, row.origin, record, split_key(record)) for record in records)
    if example is not None and not num_given:
        less = "prompts" if isinstance(example, Prompt) else "demonstrations and prompts"
        raise ConfigError(f"{source}: {KIND_NAMES[kind]} are wanted, but its rows (format {name}) give only {less}")


def choose_format(
    rows: Iterator[Row | BadRow], configured: str, source: str
) -> tuple[str | None, Iterator[Row | BadRow]]:
    """The configured format, or that of the first row that can be read; and all rows, those looked at included.

    Several rows are looked at, so that a broken first row does not decide. None when no row could be read at all.
    """
    if configured != "auto":
        return configured, rows
    seen: list[Row | BadRow] = []
    fallback: str | None = None
    unknown: ConfigError | None = None
    num_readable = 0
    for row in rows:
        seen.append(row)
        if isinstance(row, BadRow):
            continue
        num_readable += 1
        try:
            name = detect_format(row.fields)
            fallback = fallback or name
            FORMATS[name].parse(row.fields)
        except ConfigError as error:
            unknown = unknown or error
        except RowError:
            pass
        else:
            return name, chain(seen, rows)
        if num_readable == ROWS_SNIFFED:
            break
    if fallback is None and unknown is not None:
        raise ConfigError(f"{source}: {unknown}\nName the one that is meant with data.format, or rename the fields.")
    return fallback, chain(seen, rows)


def check_gives(format_name: str, kind: type[Record], source: str) -> None:
    """Raises `ConfigError` when no row of the format can give records of this kind."""
    gives = FORMATS[format_name].gives
    if kind not in gives:
        given = " and ".join(KIND_NAMES[other] for other in gives)
        raise ConfigError(
            f"{source}: {KIND_NAMES[kind]} are wanted, but its rows (format {format_name}) give only {given}"
        )


def shares_of_train(splits: SplitConfig, own: set[SplitName | None]) -> SplitConfig:
    """The shares that hashing takes from the train rows: none for a split that has rows of its own."""
    return splits.model_copy(
        update={
            "validation": 0.0 if "validation" in own else splits.validation,
            "test": 0.0 if "test" in own else splits.test,
        }
    )


def _first_of_each_key(placed: list[Placed[RecordT]]) -> list[Placed[RecordT]]:
    first: dict[str, Placed[RecordT]] = {}
    for entry in placed:
        first.setdefault(entry.key, entry)
    return list(first.values())


def _without_leaks(placed: list[Placed[RecordT]], bad_rows: list[BadRow]) -> Iterator[Placed[RecordT]]:
    """Leaves out rows whose prompt is also in the rows of a split that is held out longer: test, then validation."""
    held_out: dict[str, tuple[SplitName, Origin]] = {}
    for name in ("test", "validation"):
        for entry in placed:
            if entry.split == name:
                held_out.setdefault(entry.key, (entry.split, entry.origin))
    for entry in placed:
        split, origin = held_out.get(entry.key, (entry.split, entry.origin))
        if split == entry.split:
            yield entry
        else:
            bad_rows.append(BadRow(entry.origin, f"leaks into {split}: the same prompt is in {origin}"))
