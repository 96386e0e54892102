"""The notebooks: executed on the recorded runs, without training code, with the pictures that are stored in them."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "notebooks"
NAMES = ("comparing", "exact_optimum", "overoptimisation", "quickstart", "reward_model")
HEAVY = ("torch", "transformers", "trl", "rlhf.stages", "rlhf.supervisor", "rlhf.studies")
# A few kilobytes a figure: what a repository can carry.
MOST_BYTES = 1_500_000


def _pictures(notebook: Any) -> list[str]:
    return [
        "".join(output["data"]["image/svg+xml"])
        for cell in notebook["cells"]
        if cell["cell_type"] == "code"
        for output in cell["outputs"]
        if "image/svg+xml" in output.get("data", {})
    ]


def test_all_notebooks_are_here() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == list(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_and_shows_what_is_stored(name: str) -> None:
    stored = json.loads((FOLDER / f"{name}.ipynb").read_text())
    execute = runpy.run_path(str(FOLDER / "execute.py"))["execute"]
    loaded = f"import sys\nprint(sorted(set({HEAVY!r}) & set(sys.modules)))"
    done = execute(FOLDER / f"{name}.ipynb", loaded)
    assert done.cells[-1].outputs[0]["text"] == "[]\n"
    # The pictures in the repository are those of the recorded runs.
    assert _pictures(done) == _pictures(stored)
    assert _pictures(stored)
    code = [cell for cell in stored["cells"] if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] for cell in code)
    assert not any(output["output_type"] in ("error", "stream") for cell in code for output in cell["outputs"])


def test_the_recorded_runs_are_small_and_name_no_place() -> None:
    files = [path for path in (FOLDER / "runs").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < MOST_BYTES
    made = runpy.run_path(str(FOLDER / "make_runs.py"))["runs"]()
    assert {path.name for path in (FOLDER / "runs").iterdir()} == set(made)
    for file in [*files, *FOLDER.glob("*.ipynb")]:
        text = file.read_text()
        assert not any(place in text for place in ('": "/', "/home/", "/root/", "/tmp/")), file
