"""Breaks `rlhf/ops` and `make_ppo_batch` on purpose, one line at a time, and records which test notices.

    python -m tests.mutation.run                      # everything; writes experiments/mutation/
    python -m tests.mutation.run --only gae kl_loss   # some operations; the others keep their recorded result

Each mutation is applied to a copy of the package in a temporary folder, where the module's own test files run until
the first failure. A mutation that no test notices survives: the run then ends with 1, and a test is missing.
"""

from __future__ import annotations

import argparse
import csv
import os

# Before torch is imported: a fork has none of its parent's threads.
os.environ["OMP_NUM_THREADS"] = "1"

import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path

import hypothesis
import jaxtyping
import numpy
import pytest
import torch

from tests.mutation.table import Module, Mutation
from tests.mutation.table_rest import MODULES

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "experiments" / "mutation"
# What the unit tests of the maths need besides the package.
COPIED = ("rlhf", "tests", "setup.cfg", "pyproject.toml")
TIMEOUT_SECONDS = 300
SURVIVED = "SURVIVED"


@dataclass(frozen=True)
class Outcome:
    """What happened to one mutation: the first failing test, or `SURVIVED`."""

    module: str
    mutation: Mutation
    killed_by: str
    seconds: float


def mutated(source: str, mutation: Mutation) -> str:
    """The source with the mutation. Raises `ValueError` unless the old line occurs once and something changes."""
    occurrences = source.count(mutation.old)
    if occurrences != 1:
        raise ValueError(f"{mutation.operation}: {mutation.old!r} must occur once, but occurs {occurrences} times")
    changed = source.replace(mutation.old, mutation.new)
    if changed == source:
        raise ValueError(f"{mutation.operation}: {mutation.what!r} changes nothing")
    return changed


def _copy_package(folder: Path) -> None:
    for name in COPIED:
        source, target = ROOT / name, folder / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, target)


class _Recorder:
    """A pytest plugin that writes down the first failure."""

    def __init__(self) -> None:
        self.first: str | None = None

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be imported."""
        if report.failed and self.first is None:
            self.first = f"{Path(report.nodeid).stem}::collection"

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test that fails."""
        if report.failed and self.first is None:
            file, _, name = report.nodeid.partition("::")
            self.first = f"{Path(file).stem}::{name.partition('[')[0]}"


def _run_tests(folder: Path, tests: tuple[str, ...], answer: int) -> None:
    """What the child does: pytest on the copy, its output in `output.txt`, the first failure into the pipe."""
    with (folder / "output.txt").open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    for name in [name for name in sys.modules if name.partition(".")[0] in ("rlhf", "tests")]:
        del sys.modules[name]
    signal.alarm(TIMEOUT_SECONDS)
    recorder = _Recorder()
    files = [f"tests/unit/{name}.py" for name in tests]
    status = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *files], plugins=[recorder])
    loaded = Path(sys.modules["rlhf"].__file__ or "") if "rlhf" in sys.modules else folder
    if folder not in (loaded, *loaded.parents):
        raise RuntimeError(f"the tests ran against {loaded} and not against the copy in {folder}")
    result = recorder.first or (SURVIVED if status == pytest.ExitCode.OK else "")
    os.write(answer, result.encode())


def _first_failure(folder: Path, tests: tuple[str, ...]) -> str:
    """The first test that fails in a copy of the package, or `SURVIVED`. Raises `RuntimeError` if pytest cannot run.

    The tests run in a fork of this process, which has imported torch already: most of the time is that import.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            _run_tests(folder, tests, writing)
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as answer:
        found = answer.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM:
        return f"no end within {TIMEOUT_SECONDS} seconds"
    if status != 0 or not found:
        raise RuntimeError(f"pytest could not run:\n{(folder / 'output.txt').read_text()[-4000:]}")
    return found


# What every fork then finds imported.
PRELOADED = (hypothesis, jaxtyping, numpy, torch)


def run(modules: tuple[Module, ...], only: list[str]) -> Iterator[Outcome]:
    """Applies every mutation in turn. Raises `RuntimeError` when the tests fail without one."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        _copy_package(folder)
        for module in modules:
            chosen = [mutation for mutation in module.mutations if not only or mutation.operation in only]
            if not chosen:
                continue
            found = _first_failure(folder, module.tests)
            if found != SURVIVED:
                raise RuntimeError(f"{module.path} is as it should be, and {found} fails")
            path = folder / module.path
            source = path.read_text()
            for mutation in chosen:
                started = time.monotonic()
                path.write_text(mutated(source, mutation))
                killed_by = _first_failure(folder, module.tests)
                path.write_text(source)
                yield Outcome(module.path, mutation, killed_by, time.monotonic() - started)


def _table(modules: tuple[Module, ...]) -> Iterator[tuple[str, Mutation]]:
    for module in modules:
        for mutation in module.mutations:
            yield module.path, mutation


def write_record(outcomes: list[Outcome]) -> None:
    """Writes `README.md` and `results.csv` of experiments/mutation.

    Mutations that did not run this time keep their recorded result, as long as they are in the table as they were.
    """
    RECORD.mkdir(parents=True, exist_ok=True)
    path = RECORD / "results.csv"
    known: dict[tuple[str, ...], str] = {}
    if path.is_file():
        with path.open(newline="") as file:
            known = {tuple(row[:-1]): row[-1] for row in list(csv.reader(file))[1:]}
    for outcome in outcomes:
        known[(outcome.module, *astuple(outcome.mutation))] = outcome.killed_by
    recorded = [
        (module, mutation, known[(module, *astuple(mutation))])
        for module, mutation in _table(MODULES)
        if (module, *astuple(mutation)) in known
    ]
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["module", "operation", "mutation", "old", "new", "killed_by"])
        writer.writerows([module, *astuple(mutation), killed_by] for module, mutation, killed_by in recorded)
    _write_readme(recorded)


def _write_readme(recorded: list[tuple[str, Mutation, str]]) -> None:
    killed = sum(killed_by != SURVIVED for _, _, killed_by in recorded)
    operations = len({(module, mutation.operation) for module, mutation, _ in recorded})
    lines = [
        "# Breaking the maths on purpose",
        "",
        "Question: does a test fail when a line of `rlhf/ops` or of `make_ppo_batch` is wrong? A test that repeats the",
        "formula under test would not notice.",
        "",
        "```",
        "make mutation        # or: python -m tests.mutation.run",
        "```",
        "",
        "applies each change of `tests/mutation/table.py` and `table_rest.py` to a copy of the package, runs the unit",
        "test files of that module until the first failure, and writes this table and `results.csv` (with the lines).",
        "",
        f"**{killed} of {len(recorded)} mutations of {operations} operations are noticed.**",
        "",
        "| operation | what is wrong | first failing test |",
        "|---|---|---|",
    ]
    for module, mutation, killed_by in recorded:
        lines.append(f"| `{Path(module).stem}.{mutation.operation}` | {mutation.what} | `{killed_by}` |")
    (RECORD / "README.md").write_text("\n".join(lines) + "\n")


def main(arguments: list[str] | None = None) -> int:
    """The command. 0 when every mutation was noticed, else 1."""
    parser = argparse.ArgumentParser(description="Breaks the maths on purpose and records which test notices.")
    parser.add_argument("--only", nargs="+", default=[], metavar="OPERATION", help="these operations alone")
    options = parser.parse_args(arguments)
    # Compiled code goes by second and size: a mutation of equal length would not be seen.
    sys.dont_write_bytecode = True
    outcomes = []
    for outcome in run(MODULES, options.only):
        outcomes.append(outcome)
        mutation = outcome.mutation
        print(f"{outcome.seconds:5.1f}s {mutation.operation}: {mutation.what}: {outcome.killed_by}", flush=True)
    survivors = [outcome for outcome in outcomes if outcome.killed_by == SURVIVED]
    print(f"{len(outcomes) - len(survivors)} of {len(outcomes)} mutations noticed")
    write_record(outcomes)
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
