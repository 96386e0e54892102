"""Executes the notebooks, or the named ones, and stores their outputs: `python notebooks/execute.py [NAME ...]`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent
SECONDS = 120


def execute(path: Path, *extra: str) -> Any:
    """The notebook with its outputs, run from its folder; `extra` cells come last. Raises what a cell raises."""
    notebook = nbformat.read(path, as_version=4)
    notebook.cells += [nbformat.v4.new_code_cell(source) for source in extra]
    client = NotebookClient(
        notebook, timeout=SECONDS, resources={"metadata": {"path": str(FOLDER)}}, record_timing=False
    )
    return client.execute()


def main(names: list[str]) -> None:
    """Writes the outputs into the files."""
    for path in sorted(FOLDER.glob("*.ipynb")):
        if names and path.stem not in names:
            continue
        nbformat.write(execute(path), path)
        print(f"executed {path.name}")


if __name__ == "__main__":
    main(sys.argv[1:])
