"""Importing a file into the preference store: reading all rows first, then writing what they hold, each label once."""

from __future__ import annotations

import difflib
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

from rlhf.data.folders import KNOWN, extension
from rlhf.data.readers import Row, read_rows
from rlhf.data.splits import ROWS_SHOWN, BadRow, OnBadRow
from rlhf.errors import ConfigError, DataError
from rlhf.preferences.exchange import lossless
from rlhf.preferences.exchange.formats import IMPORT_FORMATS
from rlhf.preferences.exchange.items import Fields, ImportedTask, ImportOptions, UnusableRowError, cleaned
from rlhf.preferences.exchange.writing import write_labelled, write_tasks
from rlhf.preferences.store import PreferenceStore, task_id
from rlhf.preferences.store.answers import check_answer, check_flags

_ROWS_SNIFFED = 20
DEFAULT_OPTIONS = ImportOptions()


@dataclass
class ImportReport:
    """What an import found and added; `str(report)` says it in a few lines."""

    format: str
    files: tuple[str, ...]
    num_rows: int = 0
    num_prompts: int = 0
    num_responses: int = 0
    num_tasks: int = 0
    num_new_tasks: int = 0
    num_labels: int = 0
    num_new_labels: int = 0
    annotators: tuple[str, ...] = ()
    unusable: Counter[str] = field(default_factory=Counter)
    bad_rows: Counter[str] = field(default_factory=Counter)
    first_of: dict[str, str] = field(default_factory=dict)
    notes: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        named = ", ".join(self.annotators[:5]) + (" ..." if len(self.annotators) > 5 else "")
        noun = "annotator" if len(self.annotators) == 1 else "annotators"
        lines = [
            f"{', '.join(self.files)}: format {self.format}, {self.num_rows:,} rows",
            f"  {self.num_prompts:,} prompts, {self.num_responses:,} responses",
            f"  {self.num_tasks:,} tasks, {self.num_new_tasks:,} of them new",
            f"  {self.num_labels:,} labels, {self.num_new_labels:,} of them new, by {len(self.annotators):,} {noun}"
            + (f": {named}" if named else ""),
        ]
        for what, counts in (("left out, nothing to learn", self.unusable), ("broken, left out", self.bad_rows)):
            lines += [f"  {what}: {n:,} x {why} (first: {self.first_of[why]})" for why, n in counts.most_common()]
        lines += [f"  note: {number:,} x {note}" for note, number in self.notes.most_common()]
        return "\n".join(lines)

    def count(self, counts: Counter[str], row: BadRow) -> None:
        """Counts a row that was left out."""
        counts[row.reason] += 1
        self.first_of.setdefault(row.reason, str(row.origin))


def import_file(
    store: PreferenceStore,
    path: Path,
    *,
    format: str = "auto",
    on_bad_row: OnBadRow = "error",
    options: ImportOptions = DEFAULT_OPTIONS,
) -> ImportReport:
    """Adds what a file, or all files of a folder, hold; what is there already is not added again.

    Nothing is written when a row is broken and `on_bad_row` is `error`. An import that was killed goes on when it is
    repeated. Raises `ConfigError` for a missing file or unknown format, `DataError` for broken rows.
    """
    files = find_import_files(path)
    name, rows = _chosen_format(chain.from_iterable(read_rows(file, str(file)) for file in files), format, path)
    report = ImportReport(name, tuple(str(file) for file in files))
    if name == "labels":
        _import_labelled(store, rows, report, on_bad_row)
        return report
    tasks: list[tuple[str, ImportedTask]] = []
    bad: list[BadRow] = []
    seen: Counter[str] = Counter()
    for row in rows:
        report.num_rows += 1
        if isinstance(row, BadRow):
            bad.append(row)
            continue
        try:
            made = _read(name, row.fields, options, seen)
        except UnusableRowError as error:
            report.count(report.unusable, BadRow(row.origin, str(error)))
        except ValueError as error:
            bad.append(BadRow(row.origin, str(error)))
        else:
            tasks += [(f"{name}, {row.origin}", task) for task in made]
    _refuse_or_count(bad, report, on_bad_row, path)
    for _, task in tasks:
        report.notes.update(task.notes)
    written = write_tasks(store, tasks, options.annotator_kind)
    _count_texts(report, [task for _, task in tasks])
    report.num_tasks, report.num_new_tasks = written.num_tasks, written.num_new_tasks
    report.num_new_labels, report.annotators = written.num_new_labels, written.annotators
    return report


def check_file(
    path: Path, *, format: str = "auto", on_bad_row: OnBadRow = "error", options: ImportOptions = DEFAULT_OPTIONS
) -> ImportReport:
    """What `import_file` would add to an empty store."""
    with (
        tempfile.TemporaryDirectory(prefix="rlhf-check-") as folder,
        PreferenceStore.create(Path(folder, "store.sqlite"), seed=0) as store,
    ):
        return import_file(store, path, format=format, on_bad_row=on_bad_row, options=options)


def find_import_files(path: Path) -> list[Path]:
    """The file, or the readable files of a folder, by name. Raises `ConfigError` when there is none."""
    if path.is_dir():
        files = sorted(entry for entry in path.iterdir() if entry.is_file() and extension(entry))
        files = [entry for entry in files if not entry.name.startswith(".") and entry.name != "card.json"]
        if not files:
            raise ConfigError(f"from={path}: the folder holds no {KNOWN}")
        return files
    if not path.exists():
        near: list[str] = []
        if path.absolute().parent.is_dir():
            near = difflib.get_close_matches(path.name, [entry.name for entry in path.absolute().parent.iterdir()], n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"from={path}: there is no such file or folder{hint}")
    if not path.is_file() or not extension(path):
        raise ConfigError(f"from={path}: cannot tell how to read it; expected {KNOWN}")
    if path.stat().st_size == 0:
        raise DataError(f"from={path}: the file is empty")
    return [path]


def _chosen_format(rows: Iterable[Row | BadRow], wanted: str, path: Path) -> tuple[str, Iterable[Row | BadRow]]:
    """The format's name, and all rows; found by the first row that fits one when not given."""
    if wanted != "auto":
        if wanted not in IMPORT_FORMATS:
            near = difflib.get_close_matches(wanted, IMPORT_FORMATS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"format={wanted} is unknown{hint}; known: auto, {', '.join(IMPORT_FORMATS)}")
        return wanted, rows
    rest = iter(rows)
    first = list(islice(rest, _ROWS_SNIFFED))
    readable = [row for row in first if isinstance(row, Row)]
    for row in readable:
        for name, known in IMPORT_FORMATS.items():
            if known.fits(row.fields):
                return name, chain(first, rest)
    if not first:
        raise DataError(f"from={path}: there is no row in it")
    if not readable:
        raise DataError(f"from={path}: none of the first {len(first)} rows can be read; {first[0]}")
    tried = "\n".join(f"  {name}: {known.describes}" for name, known in IMPORT_FORMATS.items())
    keys = ", ".join(str(key) for key in readable[0].fields) or "none"
    raise ConfigError(
        f"from={path}: the rows fit none of the formats tried; the fields of {readable[0].origin} are: {keys}.\n"
        f"Tried:\n{tried}\nName the one that is meant with format=NAME, or rename the fields."
    )


def _read(name: str, fields: Fields, options: ImportOptions, seen: Counter[str]) -> list[ImportedTask]:
    """The tasks of a row, checked. Equal rows of a rated list are told apart: each is an item of its own."""
    read = IMPORT_FORMATS[name].read
    assert read is not None
    row = cleaned(fields)
    tasks = read(row, options)
    if name == "rated_list":
        key = task_id(tasks[0].plan)
        seen[key] += 1
        if seen[key] > 1:
            tasks = read({**row, "occurrence": seen[key]}, options)
    for task in tasks:
        for label in task.labels:
            if label.answer is not None:
                check_answer(task.plan.kind, task.plan.responses, task.plan.scale, label.answer)
            check_flags(task.plan.responses, label.flags)
    return tasks


def _refuse_or_count(bad: list[BadRow], report: ImportReport, on_bad_row: OnBadRow, path: Path) -> None:
    if bad and on_bad_row == "error":
        listed = "\n".join(f"  {row}" for row in bad[:ROWS_SHOWN])
        more = f"\n  ... and {len(bad) - ROWS_SHOWN:,} more" if len(bad) > ROWS_SHOWN else ""
        raise DataError(
            f"{len(bad):,} broken rows of {report.num_rows:,} in {path}, read as {report.format}; nothing was imported:"
            f"\n{listed}{more}\nCorrect the file, leave such rows out with on_bad_row=skip, or name another format."
        )
    for row in bad:
        report.count(report.bad_rows, row)


def _count_texts(report: ImportReport, tasks: Iterable[ImportedTask | lossless.LabelledTask]) -> None:
    listed = list(tasks)
    responses = {(one.prompt, one.text, one.policy, one.number, one.seed) for task in listed for one in task.responses}
    report.num_responses = len(responses)
    report.num_prompts = len({prompt for prompt, *_ in responses})
    report.num_labels = sum(len(task.labels if isinstance(task, ImportedTask) else task.versions) for task in listed)


def _import_labelled(
    store: PreferenceStore, rows: Iterable[Row | BadRow], report: ImportReport, on_bad_row: OnBadRow
) -> None:
    """Our own format: every version, at its time."""
    headers: list[lossless.Header] = []
    tasks: list[lossless.LabelledTask] = []
    bad: list[BadRow] = []
    for row in rows:
        report.num_rows += 1
        if isinstance(row, BadRow):
            bad.append(row)
            continue
        try:
            made = lossless.read(row.fields)
        except ValueError as error:
            bad.append(BadRow(row.origin, str(error)))
        else:
            if isinstance(made, lossless.Header):
                headers.append(made)
            else:
                tasks.append(made)
    _refuse_or_count(bad, report, on_bad_row, Path(report.files[0]))
    written = write_labelled(store, headers, tasks)
    _count_texts(report, tasks)
    report.num_tasks, report.num_new_tasks = written.num_tasks, written.num_new_tasks
    report.num_new_labels, report.annotators = written.num_new_labels, written.annotators
