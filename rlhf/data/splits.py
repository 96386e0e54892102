"""Splits of the data, where each record came from, and the rows that were broken."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, Literal, NamedTuple, TypeVar

from rlhf.config.data import SplitConfig
from rlhf.errors import DataError
from rlhf.records import Comparison, Prompt, PromptContent, Record, prompt_key

T = TypeVar("T")
SplitName = Literal["train", "validation", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")
OnBadRow = Literal["error", "skip"]
ROWS_SHOWN = 5


class Origin(NamedTuple):
    """Where a row came from: `number` counts from 1; `unit` says what it counts ("line" or "row")."""

    file: str
    number: int
    unit: str = "line"

    def __str__(self) -> str:
        return f"{self.file}, {self.unit} {self.number}"


class BadRow(NamedTuple):
    """A row that cannot be used, and why."""

    origin: Origin
    reason: str

    def __str__(self) -> str:
        return f"{self.origin}: {self.reason}"


@dataclass(frozen=True)
class BadRows:
    """The rows that were left out, of how many. False when there is none."""

    rows: tuple[BadRow, ...] = ()
    num_rows_read: int = 0

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[BadRow]:
        return iter(self.rows)

    def __str__(self) -> str:
        """One line for the log: the count, and each kind of reason with its count and first place."""
        if not self.rows:
            return f"no broken row in {self.num_rows_read:,}"
        counts = Counter(row.reason for row in self.rows)
        kinds = []
        for reason, count in counts.most_common(ROWS_SHOWN):
            first = next(row.origin for row in self.rows if row.reason == reason)
            kinds.append(f"{count} x {reason} (first: {first})")
        if len(counts) > ROWS_SHOWN:
            kinds.append(f"{len(counts) - ROWS_SHOWN} other reasons")
        return f"left out {len(self.rows):,} of {self.num_rows_read:,} rows: " + "; ".join(kinds)


@dataclass(frozen=True)
class Splits(Generic[T]):
    """Records by split, in the order of the source.

    `bad_rows` are those that were left out because the config says so; the caller shows `str(bad_rows)`.
    `origins` runs parallel to the records of each split; a source without rows (the embedded corpus) has none.
    """

    train: list[T]
    validation: list[T]
    test: list[T]
    bad_rows: BadRows = BadRows()
    origins: dict[SplitName, list[Origin]] = field(default_factory=dict)

    def named(self, name: SplitName) -> list[T]:
        """The records of one split."""
        return {"train": self.train, "validation": self.validation, "test": self.test}[name]

    def origin(self, name: SplitName, index: int) -> Origin:
        """Where record `index` of a split came from."""
        origins = self.origins.get(name)
        return origins[index] if origins else Origin(f"the {name} split", index + 1, "record")

    def report(self, callback: Callable[[str], None]) -> None:
        """Hands `str(bad_rows)` to the callback when there is a broken row."""
        if self.bad_rows:
            callback(str(self.bad_rows))


def split_of(key: str, splits: SplitConfig) -> SplitName:
    """The split that `key`, usually `split_key(record)`, falls into: the same on every machine for a given salt."""
    digest = hashlib.blake2b(f"{splits.salt}\0{key}".encode(), digest_size=8).digest()
    share = int.from_bytes(digest, "big") / 2**64
    if share < splits.test:
        return "test"
    if share < splits.test + splits.validation:
        return "validation"
    return "train"


def split_key(record: Record) -> str:
    """What decides the split: the prompt, or for an empty prompt the (chosen) response, white space normalised."""
    if not is_empty(record.prompt) or isinstance(record, Prompt):
        return prompt_key(record.prompt)
    return prompt_key(record.chosen if isinstance(record, Comparison) else record.response)


def is_empty(prompt: PromptContent) -> bool:
    """True for a text of white space only and for a conversation without turns."""
    return not prompt.strip() if isinstance(prompt, str) else not prompt


def refuse_or_skip(bad_rows: Sequence[BadRow], num_rows_read: int, on_bad_row: OnBadRow, source: str) -> BadRows:
    """The broken rows as a `BadRows` when they may be skipped; raises `DataError` listing the first ones otherwise."""
    if bad_rows and on_bad_row == "error":
        noun = "row" if len(bad_rows) == 1 else "rows"
        listed = [f"  {row}" for row in bad_rows[:ROWS_SHOWN]]
        if len(bad_rows) > ROWS_SHOWN:
            listed.append(f"  ... and {len(bad_rows) - ROWS_SHOWN:,} more")
        raise DataError(
            f"{len(bad_rows):,} broken {noun} of {num_rows_read:,} in {source}:\n"
            + "\n".join(listed)
            + "\nCorrect the data, or leave such rows out with data.on_bad_row=skip."
        )
    return BadRows(tuple(bad_rows), num_rows_read)
