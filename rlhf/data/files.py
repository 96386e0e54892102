"""Source `files`: records from local files."""

from __future__ import annotations

import hashlib
from itertools import chain, islice

from rlhf.config.data import FileData, LabelledTextData
from rlhf.data.assemble import ROWS_SNIFFED, assemble, choose_format
from rlhf.data.folders import extension, find_files, name_of
from rlhf.data.readers import Row, read_rows
from rlhf.data.splits import Splits
from rlhf.errors import ConfigError
from rlhf.records import RecordT

SNIFFED_EXTENSIONS = (".jsonl", ".ndjson")


def load_files(config: FileData, kind: type[RecordT]) -> Splits[RecordT]:
    """All records of one kind. Errors as in `assemble`, `find_files` and `read_rows`."""
    rows = {
        split: chain.from_iterable(read_rows(file, name_of(file, config.path)) for file in files)
        for split, files in find_files(config.path).items()
    }
    return assemble(rows, config, kind)


def check_files(config: FileData) -> None:
    """Finds the files, and for JSON Lines whether the first rows fit a format; reads nothing else."""
    for files in find_files(config.path).values():
        if extension(files[0]) in SNIFFED_EXTENSIONS:
            rows = read_rows(files[0], name_of(files[0], config.path))
            choose_format(iter(rows), config.format, f"data.path={config.path}")


def check_labelled_files(config: LabelledTextData) -> None:
    """Finds the files, and for JSON Lines whether the first rows have the fields of text and label."""
    for files in find_files(config.path).values():
        if extension(files[0]) not in SNIFFED_EXTENSIONS:
            continue
        rows = islice(read_rows(files[0], name_of(files[0], config.path)), ROWS_SNIFFED)
        found = [row.fields for row in rows if isinstance(row, Row)]
        for key, name in (("text_field", config.text_field), ("label_field", config.label_field)):
            if found and not any(name in fields for fields in found):
                raise ConfigError(
                    f"data.{key}={name}: the first rows of {files[0]} have no such field; "
                    f"they have {', '.join(found[0])}"
                )


def hash_files(path_text: str) -> str:
    """SHA-256 over the names and bytes of the files that would be read."""
    digest = hashlib.sha256()
    for split, files in find_files(path_text).items():
        for file in files:
            with file.open("rb") as stream:
                content = hashlib.file_digest(stream, "sha256").hexdigest()
            # The name of a single file may change freely: it decides nothing.
            digest.update(f"{split}\0{file.name if split else ''}\0{content}\n".encode())
    return digest.hexdigest()
