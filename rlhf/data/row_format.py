"""What a row format is; the formats themselves are in `formats` and `paper_formats`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.records import Comparison, Record

Fields = Mapping[str, Any]


@dataclass(frozen=True)
class Format:
    """How one format is recognised and read.

    `prompt_fields` are the fields that make up the prompt; a `Prompt` keeps the others as its columns. `several`: a row
    holds several comparisons.
    """

    describes: str
    fits: Callable[[Fields], bool]
    parse: Callable[[Fields], Record]
    prompt_fields: tuple[str, ...]
    gives: tuple[type[Record], ...]
    several: Callable[[Fields], Sequence[Record]] | None = None

    def records(self, row: Fields, kind: type[Record]) -> Sequence[Record]:
        """What a row gives: several comparisons in some formats, one record of any other kind. Raises `RowError`."""
        return [self.parse(row)] if self.several is None or kind is not Comparison else self.several(row)
