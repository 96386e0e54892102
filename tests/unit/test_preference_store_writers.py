"""Many writers at once, and one that is killed: no label is lost, none is doubled, no task goes over its plan."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from contextlib import closing
from itertools import combinations
from pathlib import Path

from rlhf.preferences.store import Annotator, PreferenceStore, TaskPlan, Tie
from tests.unit.preference_store_example import add_pair, add_responses, answer_next, make_store

ROOT = Path(__file__).parents[2]
NUM_TASKS, NUM_LABELS = 20, 3
PATIENCE = 300  # what never ends is a failure


def label_everything(path: Path, name: str, hold: int) -> None:
    """What each process does: answers until nothing is left, and says what was acknowledged.

    After `hold` labels it waits until its standard input ends.
    """
    with PreferenceStore.open(path) as store:
        store.add_annotator(Annotator(name, "simulated"))
        number = 0
        while (label := answer_next(store, name)) is not None:
            print(label.token, flush=True)
            number += 1
            if number == hold:
                sys.stdin.read()


def start(path: Path, name: str, hold: int = 0) -> subprocess.Popen[str]:
    code = (
        "import sys\nfrom pathlib import Path\nfrom tests.unit.test_preference_store_writers import label_everything\n"
        "label_everything(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))"
    )
    command = [sys.executable, "-c", code, str(path), name, str(hold)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def check_whole(path: Path, acknowledged: list[str], num_labels: int) -> None:
    """Against the tables themselves: every acknowledged token is a label, once; every task has its labels, no more."""
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
        rows = connection.execute("SELECT token, task, annotator FROM labels JOIN assignments a ON a.id = assignment")
        labels = rows.fetchall()
        tasks = [row[0] for row in connection.execute("SELECT id FROM tasks")]
    assert sorted(acknowledged) == sorted(token for token, _, _ in labels)
    assert Counter(task for _, task, _ in labels) == dict.fromkeys(tasks, num_labels)
    assert max(Counter((task, name) for _, task, name in labels).values()) == 1


def test_eight_threads(tmp_path: Path) -> None:
    names = "abcdefgh"
    store = make_store(tmp_path, annotators=names)
    for number in range(NUM_TASKS):
        add_pair(store, f"q{number}", num_labels=NUM_LABELS)
    acknowledged: list[str] = []
    failed: list[BaseException] = []
    together = threading.Barrier(len(names))

    def work(name: str) -> None:
        together.wait()
        try:
            while (label := answer_next(store, name)) is not None:
                acknowledged.append(label.token)
        except BaseException as error:
            failed.append(error)
            raise

    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    store.close()
    check_whole(store.path, acknowledged, NUM_LABELS)


def test_two_tabs_with_one_token(tmp_path: Path) -> None:
    """Eight threads submit the same answer at once, as impatient clients do: one label."""
    with make_store(tmp_path) as store:
        add_pair(store)
        assignment = store.next_assignment("a", lease_seconds=60)
        assert assignment is not None
        labels: list[int] = []
        together = threading.Barrier(8)

        def work() -> None:
            together.wait()
            labels.append(store.submit(assignment.id, "a", Tie(), token="t").id)

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert labels == [labels[0]] * 8
        assert len(store.history(assignment.task)) == 1


def test_four_processes(tmp_path: Path) -> None:
    with make_store(tmp_path) as store:
        for number in range(NUM_TASKS):
            add_pair(store, f"q{number}", num_labels=NUM_LABELS)
    processes = [start(store.path, name) for name in "stuv"]
    acknowledged = []
    for process in processes:
        output, errors = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, errors
        acknowledged += output.split()
    check_whole(store.path, acknowledged, NUM_LABELS)


def test_a_killed_writer_loses_no_acknowledged_label(tmp_path: Path) -> None:
    with make_store(tmp_path) as store:
        responses = add_responses(store, "q", 30)
        store.add_tasks(TaskPlan("pairwise", pair) for pair in combinations(responses, 2))
    # The writer does not come to its end before the kill, however late that is.
    with start(store.path, "z", hold=300) as process:
        assert process.stdout is not None
        acknowledged = [process.stdout.readline().strip() for _ in range(20)]
        process.send_signal(signal.SIGKILL)
        acknowledged += process.stdout.read().split()
        assert process.wait() == -signal.SIGKILL
    assert 20 <= len(acknowledged) <= 300
    # Its log is still there: nobody was left to close the database.
    assert store.path.with_name("store.sqlite-wal").stat().st_size > 0
    with PreferenceStore.open(store.path) as again:
        tokens = [label.token for label in again.current_labels()]
        assert tokens[: len(acknowledged)] == acknowledged
        # At most one label was written whose acknowledgement did not get out.
        assert len(tokens) <= len(acknowledged) + 1
        # Others go on, and a retry with the killed one's token is known.
        assert answer_next(again, "a") is not None
        first = again.current_labels()[0]
        assert again.submit(first.assignment, "z", first.answer, token=first.token) == first


def test_threads_that_create_at_once_share_one_store(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    seeds: list[int] = []
    together = threading.Barrier(8)

    def work(seed: int) -> None:
        together.wait()
        with PreferenceStore.open_or_create(path, seed=seed) as store:
            store.add_annotator(Annotator(f"annotator-{seed}", "rule"))
            seeds.append(store.seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seeds) == 8
    assert len({*seeds}) == 1
    with PreferenceStore.open(path) as store:
        assert len(store.annotators()) == 8
