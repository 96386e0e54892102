"""Many annotators at once over real HTTP, and the server killed in the middle: nothing is lost, doubled or too much.

Usually it is a smaller version of the full run, for which other programs may have a share of the processor;
RLHF_LABEL_LOAD=full makes it 40 annotators and 2,000 tasks, wants two cores to itself, and is the one that measures
how long replies take. Server, annotators and this test are three processes.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.preferences.store import PreferenceStore, Skip
from tests.command import ROOT, command, environment
from tests.web.label_example import add_pairs

FULL = os.environ.get("RLHF_LABEL_LOAD") == "full"
NUM_ANNOTATORS = 40
NUM_TASKS = 2000 if FULL else 300
# A tenth of the tasks wants labels of three annotators.
NUM_SEVERAL = NUM_TASKS // 10
# What 95 % of the replies of the full run must take at most.
LIMIT_SECONDS = 0.2
# What a request may cost the server's processor on average, whatever else runs: several times what it costs.
PROCESSOR_SECONDS = 0.02
# Annotators stop at most so many labels after the one at which the server is to be killed.
LEAD = NUM_ANNOTATORS
# What never ends is a failure.
PATIENCE = 500


@dataclass
class Server:
    """A `rlhf label` process, and how to reach it."""

    process: subprocess.Popen[str]
    port: int
    token: str


def start_server(store: Path, port: int = 0, *arguments: str) -> Server:
    """Starts the command; returns when it has printed its links."""
    process = subprocess.Popen(
        command("label", f"store={store}", f"port={port}", *arguments),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        found = re.search(r":(\d+)/\?token=(\S+)", line)
        if found:
            return Server(process, int(found[1]), found[2])
    raise AssertionError(f"the server ended: {process.communicate()[1]}")


@contextmanager
def annotators(server: Server, *holds: int) -> Iterator[subprocess.Popen[str]]:
    """The annotators, in a process of their own, which is ended at the latest with the block.

    After each number of labels in `holds` they wait for a line.
    """
    arguments = [server.port, server.token, NUM_ANNOTATORS, *holds]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.web.load_client", *map(str, arguments)],
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def make_store(path: Path) -> None:
    """Pairs, of which a tenth wants three labels."""
    with PreferenceStore.create(path, seed=1) as store:
        tasks = add_pairs(store, NUM_TASKS)
        store.replan(tasks[:NUM_SEVERAL], num_labels=3)


def check_store(path: Path, acknowledged: dict[str, list[Any]]) -> None:
    """Every acknowledged label is there once, as it was sent, and every task has exactly its plan."""
    with PreferenceStore.open(path) as store:
        labels = store.current_labels()
        tasks = store.tasks()
    by_token = {label.token: [label.id, label.assignment, label.annotator, label.kind] for label in labels}
    assert len(by_token) == len(labels)
    # A label whose acknowledgement was lost with the server was asked for again under its token.
    assert by_token == acknowledged
    answers = Counter(label.task for label in labels if not isinstance(label.answer, Skip))
    assert answers == {task: held.plan.num_labels for task, held in tasks.items()}
    assert max(Counter((label.task, label.annotator) for label in labels).values()) == 1
    assert sum(answers.values()) == NUM_TASKS + 2 * NUM_SEVERAL


def processor_seconds(process: subprocess.Popen[str]) -> float:
    """The processor time that a running process has taken so far."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def percentile(values: list[float], share: float) -> float:
    """The value that this share of the values does not pass."""
    return sorted(values)[int(share * (len(values) - 1))]


def test_all_annotators_at_once(tmp_path: Path) -> None:
    """None lost, none doubled, no task over its plan, and the server does not take longer than it may."""
    path = tmp_path / "store.sqlite"
    make_store(path)
    server = start_server(path)
    try:
        before = processor_seconds(server.process)
        with annotators(server) as process:
            output, errors = process.communicate(timeout=PATIENCE)
            assert process.returncode == 0, errors
        busy = processor_seconds(server.process) - before
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(PATIENCE) == 130
    finally:
        server.process.kill()
        _, said = server.process.communicate()
    assert "Traceback" not in said
    outcome = json.loads(output.splitlines()[-1])
    assert outcome["num_retries"] == 0
    check_store(path, outcome["labels"])
    seconds = [second for times in outcome["seconds"].values() for second in times]
    slow, cost = percentile(seconds, 0.95), busy / len(seconds)
    print(
        f"{len(outcome['labels'])} labels by {NUM_ANNOTATORS} annotators in {outcome['elapsed']:.1f} s, "
        f"{len(seconds)} requests: median {1000 * percentile(seconds, 0.5):.0f} ms, 95 % within {1000 * slow:.0f} ms, "
        f"slowest {1000 * max(seconds):.0f} ms, {1000 * cost:.1f} ms of the processor each; "
        f"load of the machine {os.getloadavg()[0]:.1f}"
    )
    assert 0 < cost < PROCESSOR_SECONDS
    if FULL:
        assert slow < LIMIT_SECONDS


def test_a_server_that_is_killed_loses_no_acknowledged_label(tmp_path: Path) -> None:
    """kill -9 at a third and at two thirds; annotators go on with the server that is started again on its port."""
    path = tmp_path / "store.sqlite"
    make_store(path)
    server = start_server(path)
    wanted = NUM_TASKS + 2 * NUM_SEVERAL
    kills = (wanted // 3, 2 * wanted // 3)
    seen: list[list[Any]] = []
    try:
        with annotators(server, *(number + LEAD for number in kills)) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            for number in kills:
                while len(seen) < number:
                    seen.append(json.loads(process.stdout.readline()))
                server.process.kill()
                server.process.communicate()
                with PreferenceStore.open(path) as store:
                    there = {label.id for label in store.current_labels()}
                assert {row[0] for row in seen} <= there
                server = start_server(path, server.port)
                process.stdin.write("\n")
                process.stdin.flush()
            output, errors = process.communicate(timeout=PATIENCE)
            assert process.returncode == 0, errors
    finally:
        server.process.kill()
        server.process.communicate()
    outcome = json.loads(output.splitlines()[-1])
    # Both times somebody found the connection gone.
    assert outcome["num_retries"] >= len(kills)
    check_store(path, outcome["labels"])
    rows = list(outcome["labels"].values())
    assert all(row in rows for row in seen)
