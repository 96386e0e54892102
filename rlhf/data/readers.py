"""Reads rows from JSONL, JSON, CSV, TSV and Parquet files. A row that cannot be read becomes a `BadRow`, not an error.

Text is UTF-8, with or without a byte-order mark; blank lines are ignored. `.gz` is read through.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from rlhf.data.folders import COMPRESSED, extension
from rlhf.data.splits import BadRow, Origin
from rlhf.errors import ConfigError, DataError

UTF8_MARK = b"\xef\xbb\xbf"
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
PARQUET_BATCH = 4096
LIST_KEYS = ("data", "rows", "examples", "instances")


class Row(NamedTuple):
    """One row: field names to values."""

    origin: Origin
    fields: dict[str, Any]


def read_rows(file: Path, name: str) -> Iterator[Row | BadRow]:
    """All rows of a file, in order. `name` is how messages call the file.

    Raises `DataError` when the file as a whole cannot be read.
    """
    readers = {
        ".jsonl": _read_jsonl,
        ".ndjson": _read_jsonl,
        ".json": _read_json,
        ".csv": _read_csv,
        ".tsv": _read_csv,
        ".parquet": _read_parquet,
    }
    try:
        yield from readers[extension(file)](file, name)
    except PermissionError as error:
        raise DataError(f"{name} may not be read by this user; change its permissions") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{name} cannot be read: {error}") from error


def _open(file: Path) -> IO[bytes]:
    if file.name.lower().endswith(COMPRESSED):
        return gzip.open(file, "rb")  # type: ignore[return-value]  # GzipFile offers what is used of IO[bytes]
    return file.open("rb")


def _check_encoding(start: bytes, name: str) -> None:
    if start.startswith(UTF16_MARKS):
        raise DataError(f"{name} is UTF-16; save it as UTF-8")


def _read_jsonl(file: Path, name: str) -> Iterator[Row | BadRow]:
    with _open(file) as lines:
        for number, line in enumerate(lines, start=1):
            if number == 1:
                _check_encoding(line, name)
                line = line.removeprefix(UTF8_MARK)
            if line.isspace() or not line:
                continue
            origin = Origin(name, number)
            try:
                value = json.loads(line.decode("utf-8"))
                if b"\\ud" in line or b"\\uD" in line:
                    json.dumps(value, ensure_ascii=False).encode()
            except UnicodeError as error:
                yield BadRow(origin, not_utf8(error))
            except (ValueError, RecursionError) as error:
                yield BadRow(origin, _malformed(error))
            else:
                yield _object_row(origin, value)


def not_utf8(error: UnicodeError) -> str:
    """The reason given for a row with bytes or escapes that are no text."""
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 (byte 0x{error.object[error.start]:02x} at position {error.start + 1})"
    return "holds half of a surrogate pair, which UTF-8 cannot encode"


def _malformed(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"malformed JSON ({error.msg} at column {error.colno})"
    return f"malformed JSON ({error})"


def _object_row(origin: Origin, value: Any) -> Row | BadRow:
    if isinstance(value, dict):
        return Row(origin, value)
    return BadRow(origin, f"a row is a JSON object, found {json_type(value)}")


def json_type(value: Any) -> str:
    """What a JSON user calls the type of a value."""
    names = {str: "text", bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _read_json(file: Path, name: str) -> Iterator[Row | BadRow]:
    """A list of objects, an object with that list under one of `LIST_KEYS`, or JSON Lines under another name."""
    with _open(file) as stream:
        content = stream.read()
    _check_encoding(content, name)
    content = content.removeprefix(UTF8_MARK)
    first_line = content.lstrip().split(b"\n", 1)[0]
    if first_line.startswith(b"{") and _is_json(first_line):
        yield from _read_jsonl(file, name)
        return
    try:
        value = json.loads(content.decode("utf-8"))
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeError as error:
        raise DataError(f"{name} cannot be read: {not_utf8(error)}") from error
    except (ValueError, RecursionError) as error:
        line = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise DataError(
            f"{name}{line}: {_malformed(error)}. A .json file is read as a whole; as .jsonl, with one object a line, "
            "single broken rows can be left out"
        ) from error
    if isinstance(value, dict):
        lists = [value[key] for key in LIST_KEYS if isinstance(value.get(key), list)]
        value = lists[0] if lists else [value]
    if not isinstance(value, list):
        raise DataError(f"{name} holds {json_type(value)}; expected a list of objects")
    for number, row in enumerate(value, start=1):
        yield _object_row(Origin(name, number, "row"), row)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _read_csv(file: Path, name: str) -> Iterator[Row | BadRow]:
    """Comma- or tab-separated values whose first line names the columns."""
    with _open(file) as stream:
        content = stream.read()
    _check_encoding(content, name)
    # Bytes that are not UTF-8 become lone surrogates, so that only the rows that hold them are lost.
    text = content.removeprefix(UTF8_MARK).decode("utf-8", errors="surrogateescape")
    separator = "\t" if extension(file) == ".tsv" else ","
    rows = _csv_rows(text.splitlines(keepends=True) if "\n" not in text else text.split("\n"), separator)
    header: list[str] | None = None
    for number, cells in rows:
        origin = Origin(name, number)
        if not isinstance(cells, str) and not any(cell.strip() for cell in cells):
            continue
        if header is None:
            header = _csv_header(cells, name)
        elif isinstance(cells, str):
            yield BadRow(origin, f"malformed CSV ({cells}); is a quote not closed, or not doubled inside a field?")
        elif len(cells) != len(header):
            yield BadRow(origin, f"{len(cells)} columns, expected {len(header)} ({', '.join(header)})")
        elif any(_has_surrogate(cell) for cell in cells):
            yield BadRow(origin, "not UTF-8")
        else:
            yield Row(origin, dict(zip(header, cells, strict=True)))


def _csv_header(cells: list[str] | str, name: str) -> list[str]:
    if isinstance(cells, str) or any(_has_surrogate(cell) for cell in cells):
        raise DataError(f"{name}, line 1: the header cannot be read as UTF-8 CSV")
    header = [cell.strip() for cell in cells]
    if len(set(header)) != len(header) or not all(header):
        raise DataError(f"{name}, line 1: the first line must name every column once, found {', '.join(header)}")
    return header


def _csv_rows(lines: list[str], separator: str) -> Iterator[tuple[int, list[str] | str]]:
    """(number of the first line, cells) of every record; for malformed cells what is wrong instead.

    After a malformed record reading goes on at the line after its first, so that a stray quote costs one row.
    """
    start = 0
    while start < len(lines):
        rest = (lines[index] + "\n" for index in range(start, len(lines)))
        reader = csv.reader(rest, delimiter=separator, strict=True)
        line_of_record = start
        try:
            for cells in reader:
                yield line_of_record + 1, cells
                line_of_record = start + reader.line_num
            return
        except csv.Error as error:
            yield line_of_record + 1, str(error)
            start = line_of_record + 1


def _has_surrogate(text: str) -> bool:
    if text.isascii():
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _read_parquet(file: Path, name: str) -> Iterator[Row | BadRow]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(f"{name}: reading Parquet needs pyarrow; install it with `pip install pyarrow`") from error
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=PARQUET_BATCH):
                for row in arrow_rows(batch, name, number):
                    number += 1
                    yield row
    except pyarrow.ArrowException as error:
        raise DataError(f"{name} cannot be read as Parquet: {error}") from error


def arrow_rows(batch: Any, name: str, num_before: int) -> Iterator[Row | BadRow]:
    """The rows of a pyarrow record batch or table, numbered from `num_before` + 1."""
    try:
        rows = batch.to_pylist()
    except UnicodeDecodeError:
        # One text that is not UTF-8 spoils the conversion of the whole batch: find it row by row.
        for index in range(batch.num_rows):
            origin = Origin(name, num_before + index + 1, "row")
            try:
                yield Row(origin, batch.slice(index, 1).to_pylist()[0])
            except UnicodeDecodeError as error:
                yield BadRow(origin, not_utf8(error))
        return
    for index, fields in enumerate(rows):
        yield Row(Origin(name, num_before + index + 1, "row"), fields)
