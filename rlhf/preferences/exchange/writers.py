"""The files of an export: the rows of each format, each read back before it is written, and the files."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.data.formats import ASSISTANT, FORMATS, HUMAN, RowError
from rlhf.data.splits import SplitName
from rlhf.errors import ConfigError, DataError
from rlhf.records import Comparison, RatedResponse, prompt_to_json, to_json

Row = dict[str, Any]
# What of a comparison stands beside its texts. A column is written when every row of every split has it, or else
# filled up with what says nothing: a column that is null throughout a file has no type for `datasets`.
_FILL: dict[str, Any] = {"margin": 0.0, "source": "", "annotator": ""}
_COLUMNS = ("margin", "annotator", "chosen_shown_first", "agreement", "num_annotators", "source")


@dataclass(frozen=True)
class Writer:
    """A format of comparisons: its extension, the row of a record (None where it cannot hold it), and the file."""

    extension: str
    row: Callable[[Comparison], Row | None]
    reads_as: str
    write: Callable[[Path, Sequence[Row]], None]


def comparison_rows(
    splits: Mapping[SplitName, Sequence[Comparison]], name: str, not_written: Counter[str]
) -> dict[SplitName, list[tuple[Comparison, Row]]]:
    """The records of each split that a format can hold, each with its row; the others are counted.

    Raises `DataError` when the prompts are texts and conversations, which no such file can hold together.
    """
    writer = WRITERS[name]
    everything = [record for records in splits.values() for record in records]
    if name != "hh":
        _check_prompts([record.prompt for record in everything], name)
    columns = [] if name == "jsonl" else _columns(everything)
    rows: dict[SplitName, list[tuple[Comparison, Row]]] = {}
    for split, records in splits.items():
        rows[split] = []
        for record in records:
            row = writer.row(record)
            reason = "the format has no ties" if row is None else _unreadable(row, writer.reads_as, record)
            if reason is not None:
                not_written[reason] += 1
            elif row is not None:
                rows[split].append((record, row | {column: _value(record, column) for column in columns}))
    return rows


def rating_rows(records: Iterable[RatedResponse], name: str) -> list[Row]:
    """Rated responses as rows of one shape."""
    if name == "jsonl":
        return [to_json(record) for record in records]
    return [
        {
            "prompt": prompt_to_json(record.prompt),
            "response": record.response,
            "rating": float(record.rating),
            "annotator": record.annotator or "",
            "source": record.source or "",
        }
        for record in records
    ]


def _columns(records: Sequence[Comparison]) -> list[str]:
    chosen = []
    for column in _COLUMNS:
        values = [getattr(record, column) for record in records]
        if all(value is not None for value in values) or (
            column in _FILL and any(value is not None for value in values)
        ):
            chosen.append(column)
    return ["probability", *chosen]


def _value(record: Comparison, column: str) -> Any:
    if column == "probability":
        return 1.0 if record.probability is None else float(record.probability)
    value = getattr(record, column)
    return _FILL[column] if value is None else value


def _check_prompts(prompts: Sequence[Any], name: str) -> None:
    kinds = {isinstance(prompt, str) for prompt in prompts}
    if len(kinds) > 1:
        raise DataError(
            f"the store has prompts that are texts and others that are conversations; format={name} holds one "
            "kind. Export each apart with prompts=text and prompts=messages, or use format=hh or format=labels"
        )
    if name == "csv" and kinds == {False}:
        raise DataError("format=csv has no lists, and the prompts are conversations; use trl, parquet, jsonl or hh")


def _unreadable(row: Row, reads_as: str, record: Comparison) -> str | None:
    """Why a row would not be read as what it is, if so."""
    try:
        read = FORMATS[reads_as].parse(row)
    except RowError as error:
        return str(error)
    assert isinstance(read, Comparison)
    same = (read.chosen, read.rejected) == (record.chosen, record.rejected)
    if reads_as == "hh":
        same = (read.chosen.strip(), read.rejected.strip()) == (record.chosen.strip(), record.rejected.strip())
    return None if same else "the text holds a marker of the format"


def _trl(record: Comparison) -> Row:
    prompt = prompt_to_json(record.prompt)
    if isinstance(prompt, str):
        return {"prompt": prompt, "chosen": record.chosen, "rejected": record.rejected}
    sides = ([{"role": "assistant", "content": text}] for text in (record.chosen, record.rejected))
    return {"prompt": prompt, **dict(zip(("chosen", "rejected"), sides, strict=True))}


def _transcript(record: Comparison) -> Row | None:
    if record.probability == 0.5:
        return None
    if isinstance(record.prompt, str):
        whole = record.prompt.endswith(ASSISTANT)
        prompt = record.prompt if whole else f"{HUMAN} {record.prompt}{ASSISTANT}"
        gap = "" if whole else " "
    else:
        names = {"user": f"{HUMAN} ", "assistant": f"{ASSISTANT} ", "system": ""}
        prompt = "".join(f"{names[message.role]}{message.content}" for message in record.prompt) + ASSISTANT
        gap = " "
    return {"chosen": f"{prompt}{gap}{record.chosen}", "rejected": f"{prompt}{gap}{record.rejected}"}


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One object a line, UTF-8."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Comma-separated, the first line the columns."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path.write_text(text.getvalue(), encoding="utf-8", newline="")


def write_parquet(path: Path, rows: Sequence[Row]) -> None:
    """One row group, the types those of the values. Raises `ConfigError` without pyarrow."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError("format=parquet needs pyarrow; install it with `pip install pyarrow`") from error
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)


WRITERS: Mapping[str, Writer] = {
    "trl": Writer(".jsonl", _trl, "preference", write_jsonl),
    "jsonl": Writer(".jsonl", to_json, "preference", write_jsonl),
    "csv": Writer(".csv", _trl, "preference", write_csv),
    "parquet": Writer(".parquet", _trl, "preference", write_parquet),
    "hh": Writer(".jsonl", _transcript, "hh", write_jsonl),
}
EXPORT_FORMATS = (*WRITERS, "labels")
