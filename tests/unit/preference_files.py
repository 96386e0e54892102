"""Files for the tests of import and export, and stores to import them into."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rlhf.preferences.exchange import ImportOptions, ImportReport, import_file
from rlhf.preferences.store import Choice, PreferenceStore, Tie

Row = Mapping[str, Any]


def new_store(folder: Path, name: str = "store.sqlite", seed: int = 1) -> PreferenceStore:
    """An empty store without annotators."""
    return PreferenceStore.create(folder / name, seed=seed)


def write_rows(path: Path, rows: Iterable[Row]) -> Path:
    """JSON Lines, or a JSON list by the name; `.gz` is compressed."""
    listed = list(rows)
    text = json.dumps(listed) if ".json" in path.suffixes else "".join(f"{json.dumps(row)}\n" for row in listed)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


def import_rows(
    store: PreferenceStore,
    rows: Iterable[Row],
    name: str = "rows.jsonl",
    options: ImportOptions | None = None,
    **how: Any,
) -> ImportReport:
    """Imports rows by way of a file beside the store."""
    path = write_rows(store.path.parent / name, rows)
    return import_file(store, path, options=options or ImportOptions(), **how)


def said(store: PreferenceStore) -> set[tuple[str, str, str]]:
    """(prompt, annotator, text of the choice or the name of another answer) of every current label."""
    tasks, responses, prompts = store.tasks(), store.responses(), store.prompts()
    found = set()
    for label in store.current_labels():
        answer = label.answer
        text = responses[answer.preferred].text if isinstance(answer, Choice) else type(answer).__name__
        found.add((str(prompts[tasks[label.task].prompt].prompt), label.annotator, "tie" if answer == Tie() else text))
    return found


def hh_row(number: int, turns: int, chosen: str = "yes", rejected: str = "no") -> dict[str, str]:
    """A pair of transcripts that differ in the last of `turns` answers."""
    before = "".join(f"\n\nHuman: question {number}.{turn}\n\nAssistant: answer {turn}" for turn in range(turns - 1))
    prompt = f"{before}\n\nHuman: last question {number}\n\nAssistant:"
    return {"chosen": f"{prompt} {chosen} {number}", "rejected": f"{prompt} {rejected} {number}"}
