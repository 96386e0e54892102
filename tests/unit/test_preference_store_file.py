"""The file of a preference store: made whole, guarded by the database, refused in plain words."""

from __future__ import annotations

import os
import sqlite3
import threading
from contextlib import closing
from datetime import datetime
from pathlib import Path

import pytest

from rlhf.errors import ConfigError, DataError, DiskFullError, ReadOnlyError, StorageError
from rlhf.preferences.store import SCHEMA_VERSION, PreferenceStore, Tie, database
from tests.read_only import as_nobody, make_read_only, nobodys_folder
from tests.unit.preference_store_example import HandClock, add_pair, answer_next, lease, make_store

_REST = "kind, answer, flags, comment, seconds, made_at"


def raw(path: Path) -> sqlite3.Connection:
    """A connection that knows nothing of the store, as another program's."""
    return sqlite3.connect(path, isolation_level=None)


def test_a_new_store_opens_again_with_its_seed(tmp_path: Path) -> None:
    make_store(tmp_path, seed=2**70).close()
    assert [path.name for path in tmp_path.iterdir()] == ["store.sqlite"]
    with PreferenceStore.open(tmp_path / "store.sqlite") as store:
        assert store.seed == 2**70
        assert [*store.annotators()] == ["a", "b", "c"]
    with PreferenceStore.open_or_create(tmp_path / "store.sqlite", seed=5) as store:
        assert store.seed == 2**70
    with PreferenceStore.open_or_create(tmp_path / "another ?#%.sqlite", seed=5) as store:
        assert store.seed == 5


def test_every_connection_syncs_and_checks_keys(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    found: list[tuple[object, ...]] = []

    def look() -> None:
        with store._read() as connection:
            names = ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
            found.append(tuple(connection.execute(f"PRAGMA {name}").fetchone()[0] for name in names))

    look()
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    # 2 is FULL.
    assert found == [("wal", 2, 1, 30000)] * 2


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE labels SET comment = 'better'",
        "UPDATE labels SET id = id + 100",
        "DELETE FROM labels",
        "INSERT OR REPLACE INTO labels SELECT * FROM labels",
        f"INSERT OR REPLACE INTO labels SELECT 99, assignment, version, supersedes, 'new', {_REST} FROM labels",
        f"INSERT OR REPLACE INTO labels SELECT 99, assignment, 2, id, token, {_REST} FROM labels",
        "UPDATE assignments SET shown = '[]'",
        "UPDATE assignments SET annotator = 'b'",
        "DELETE FROM assignments",
        "UPDATE responses SET text = 'better'",
        "REPLACE INTO responses SELECT id, prompt, 'better', policy, sampling, seed, number FROM responses",
        "DELETE FROM responses",
        "UPDATE prompts SET content = '\"better\"'",
        "UPDATE tasks SET gold_kind = 'tie', gold = '{}'",
        "DELETE FROM tasks",
        "DELETE FROM task_responses",
        "UPDATE instructions SET text = 'better'",
        "UPDATE annotators SET kind = 'judge'",
        "UPDATE settings SET value = '3'",
        "INSERT INTO assignments SELECT 99, task, 'b', '[]', NULL, '', leased_at, '9', 'leased' FROM assignments",
    ],
)
def test_the_database_itself_refuses_changes(tmp_path: Path, statement: str) -> None:
    with make_store(tmp_path) as store:
        store.add_instructions("Choose.")
        task = add_pair(store)
        assert answer_next(store, "a") is not None
        before = (store.history(task), store.tasks(), store.responses(), store.assignments(task))
        with closing(raw(store.path)) as connection:
            with pytest.raises(sqlite3.IntegrityError, match=r"stay as they are|no place left"):
                connection.execute(statement)
            assert connection.execute("SELECT text FROM instructions").fetchall() == [("Choose.",)]
        assert (store.history(task), store.tasks(), store.responses(), store.assignments(task)) == before


def test_every_column_is_guarded_or_meant_to_change(tmp_path: Path) -> None:
    """Sets each column of each table to itself: a new column must not slip past the guards."""
    changing = {("tasks", name) for name in ("num_labels", "num_taken", "priority")}
    changing |= {("assignments", name) for name in ("lease_ends", "state")}
    with make_store(tmp_path) as store:
        store.add_instructions("Choose.")
        store.add_policies([])
        add_pair(store)
        assert answer_next(store, "a") is not None
        with closing(raw(store.path)) as connection:
            connection.execute("INSERT INTO policies VALUES ('aa', '{}')")
            tables = connection.execute(
                "SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite%'"
            )
            allowed = set()
            for (table,) in tables.fetchall():
                for column in connection.execute(f"PRAGMA table_info({table})").fetchall():
                    try:
                        changed = connection.execute(f"UPDATE {table} SET {column[1]} = {column[1]}")
                        assert changed.rowcount > 0, f"{table} is empty: the test sees nothing"
                        allowed.add((table, column[1]))
                    except sqlite3.IntegrityError:
                        pass
    assert allowed == changing


def test_places_are_counted_by_the_database(tmp_path: Path) -> None:
    clock = HandClock()
    with make_store(tmp_path, clock) as store:
        task = add_pair(store, num_labels=3)
        held, answered = lease(store, "a"), lease(store, "b", 1000)
        store.submit(answered, "b", Tie(), token="1")

        def taken() -> tuple[int, int]:
            with store._read() as connection:
                counted = "SELECT COUNT(*) FROM assignments WHERE task = ? AND state IN ('leased', 'answered')"
                return (
                    connection.execute("SELECT num_taken FROM tasks WHERE id = ?", (task,)).fetchone()[0],
                    connection.execute(counted, (task,)).fetchone()[0],
                )

        assert taken() == (2, 2)
        clock.move(60)
        lease(store, "c")
        assert taken() == (2, 2)
        store.submit(held, "a", Tie(), token="2")
        assert taken() == (3, 3)
        store.retract(answered, "b", token="3")
        assert taken() == (2, 2)


def test_what_is_there_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    path.write_text("precious")
    with pytest.raises(ConfigError, match="already a file at"):
        PreferenceStore.create(path, seed=1)
    assert [(found.name, found.read_text()) for found in tmp_path.iterdir()] == [("store.sqlite", "precious")]


@pytest.mark.parametrize("content", [b"", b"prompt,chosen\n", b"SQLite"])
def test_a_file_that_is_no_database(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "store.sqlite"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"store\.sqlite, but the file is no SQLite database"):
        PreferenceStore.open(path)
    assert path.read_bytes() == content


def test_nothing_and_a_folder_are_no_store(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing is there; create one"):
        PreferenceStore.open(tmp_path / "store.sqlite")
    with pytest.raises(ConfigError, match=r"is a file, and .* is none"):
        PreferenceStore.open(tmp_path)
    with pytest.raises(ConfigError, match=r"needs the folder .*missing, which is not there"):
        PreferenceStore.create(tmp_path / "missing" / "store.sqlite", seed=1)
    assert [*tmp_path.iterdir()] == []


def test_the_database_of_another_program(tmp_path: Path) -> None:
    with closing(raw(tmp_path / "other.sqlite")) as connection:
        connection.execute("CREATE TABLE labels (id)")
    with pytest.raises(DataError, match="database of another program"):
        PreferenceStore.open(tmp_path / "other.sqlite")


def test_a_store_of_another_version(tmp_path: Path) -> None:
    make_store(tmp_path).close()
    with closing(raw(tmp_path / "store.sqlite")) as connection:
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    with pytest.raises(DataError, match=f"schema version {SCHEMA_VERSION + 1}; this rlhf .* version {SCHEMA_VERSION}"):
        PreferenceStore.open(tmp_path / "store.sqlite")


def test_a_damaged_store(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    store.add_instructions("x" * 100_000)
    store.close()
    content = bytearray(store.path.read_bytes())
    content[4096:] = b"\xff" * (len(content) - 4096)
    store.path.write_bytes(content)
    with pytest.raises(DataError, match=r"store\.sqlite is damaged"):
        PreferenceStore.open(store.path)


def test_a_read_only_folder(tmp_path: Path) -> None:
    make_store(tmp_path).close()
    with make_read_only(tmp_path):
        with pytest.raises(ReadOnlyError, match="must be writable, and so must its folder"):
            PreferenceStore.open(tmp_path / "store.sqlite")
        with pytest.raises(ReadOnlyError, match="must be writable"):
            PreferenceStore.create(tmp_path / "new.sqlite", seed=1)


def test_a_folder_without_permission() -> None:
    with nobodys_folder() as folder:
        with as_nobody():
            make_store(folder).close()
            folder.chmod(0o555)
            with pytest.raises(ReadOnlyError, match="must be writable"):
                PreferenceStore.open(folder / "store.sqlite")
            with pytest.raises(ReadOnlyError, match="must be writable"):
                PreferenceStore.create(folder / "new.sqlite", seed=1)
            (folder / "store.sqlite").chmod(0o444)
            folder.chmod(0o755)
            with pytest.raises(ReadOnlyError, match="must be writable"):
                PreferenceStore.open(folder / "store.sqlite")
            (folder / "store.sqlite").chmod(0o000)
            with pytest.raises(StorageError, match="cannot be read: Permission denied"):
                PreferenceStore.open(folder / "store.sqlite")
        assert [*folder.glob("*new*")] == [*folder.glob(".*")] == []


def test_a_writer_that_hangs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_store(tmp_path).close()
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.05)
    with PreferenceStore.open(tmp_path / "store.sqlite") as store, closing(raw(store.path)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StorageError, match=r"locked by another process for 0\.05 seconds"):
            add_pair(store)
        # Readers do not wait for writers.
        assert store.tasks() == {}
        other.execute("ROLLBACK")
        add_pair(store)


def test_a_full_disk_leaves_what_was_acknowledged(tmp_path: Path) -> None:
    with make_store(tmp_path) as store:
        add_pair(store)
        label = answer_next(store, "a")
        with store._read() as connection:
            pages = connection.execute("PRAGMA page_count").fetchone()[0]
        # SQLite's own limit gives the result code that a full disk gives.
        store._connection().execute(f"PRAGMA max_page_count = {pages + 2}")
        with pytest.raises(DiskFullError, match="no space left on the disk for the preference store"):
            store.add_instructions("x" * 100_000)
        assert store.current_labels() == [label]


def test_a_failed_write_changes_nothing(tmp_path: Path) -> None:
    def write_and_stop(store: PreferenceStore) -> None:
        with store._write() as connection:
            connection.execute("INSERT INTO annotators VALUES ('z', 'human', '{}')")
            raise KeyboardInterrupt

    with make_store(tmp_path) as store:
        with pytest.raises(KeyboardInterrupt):
            write_and_stop(store)
        assert "z" not in store.annotators()


def test_a_store_is_not_used_across_a_fork(tmp_path: Path) -> None:
    with make_store(tmp_path) as store:
        child = os.fork()
        if child == 0:
            code = 0
            try:
                store.annotators()
            except RuntimeError:
                code = 7
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_a_clock_has_a_zone(tmp_path: Path) -> None:
    with make_store(tmp_path) as store:
        store.clock = lambda: datetime(2026, 3, 1)
        with pytest.raises(ValueError, match=r"needs their zone"):
            store.next_assignment("a", lease_seconds=60)
