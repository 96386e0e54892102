"""The file of a preference store: opening it safely, a connection a thread, transactions, errors in plain words."""

from __future__ import annotations

import glob
import os
import secrets
import sqlite3
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from rlhf.errors import ConfigError, DataError, DiskFullError, ReadOnlyError, StorageError, UserError
from rlhf.preferences.store.schema import APPLICATION_ID, SCHEMA_VERSION, schema_sql

Clock = Callable[[], datetime]
# A writer holds the lock for milliseconds; whoever waits this long waits for a process that hangs.
BUSY_SECONDS = 30.0
_MAGIC = b"SQLite format 3\0"


def utc_now() -> datetime:
    """The time, aware of its zone."""
    return datetime.now(UTC)


def time_text(time: datetime) -> str:
    """UTC in ISO 8601, always with microseconds: of one width, so that the texts sort like the times.

    Raises `ValueError` for a time without a zone.
    """
    if time.tzinfo is None:
        raise ValueError(f"a preference store keeps times in UTC and needs their zone; got {time!r} without one")
    return time.astimezone(UTC).isoformat(timespec="microseconds")


class _Connection:
    """What a thread keeps; it can be referred to weakly, which a connection cannot."""

    def __init__(self, path: Path, mode: str = "rw") -> None:
        self.sqlite = sqlite3.connect(
            f"{path.absolute().as_uri()}?mode={mode}",
            uri=True,
            timeout=BUSY_SECONDS,
            isolation_level=None,
            check_same_thread=False,
        )
        self.sqlite.row_factory = sqlite3.Row
        self.sqlite.execute("PRAGMA foreign_keys = ON")
        # FULL syncs the write-ahead log at every commit: what was acknowledged survives a power cut.
        self.sqlite.execute("PRAGMA synchronous = FULL")


class Database:
    """An open preference store; any number of threads and processes may write to one at once.

    Every thread gets a connection of its own. A process that forks must open the store in the child: SQLite's locks
    do not survive a fork. The file needs a file system of this machine, as SQLite's write-ahead log has shared memory.
    `clock` gives the time; it is asked while the write lock is held, so that leases end in the order of the writes.
    """

    def __init__(self, path: Path, clock: Clock) -> None:
        self.path = path
        self.clock = clock
        self._local = threading.local()
        self._open: weakref.WeakSet[_Connection] = weakref.WeakSet()
        self._guard = threading.Lock()
        # Threads of one process queue here: SQLite itself makes them poll, which is slow and unfair.
        self._writing = threading.Lock()
        self._process = os.getpid()
        self._seed = 0

    @classmethod
    def create(cls, path: Path, *, seed: int, clock: Clock = utc_now) -> Self:
        """A new store at `path`, which appears there whole or not at all. `seed` decides order and sides.

        Raises `ConfigError` when something is there already or the folder is missing, `ReadOnlyError` and
        `DiskFullError` when it cannot be written.
        """
        if not path.parent.is_dir():
            raise ConfigError(
                f"the preference store {path} needs the folder {path.parent}, which is not there; make it"
            )
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
        try:
            with _plain_errors(path):
                connection = _Connection(temporary, "rwc").sqlite
                try:
                    connection.execute("PRAGMA journal_mode = WAL")
                    connection.executescript(f"BEGIN IMMEDIATE;\n{schema_sql()}\nCOMMIT;")
                    connection.execute("INSERT INTO settings VALUES ('seed', ?)", (str(seed),))
                finally:
                    connection.close()
                # A link, unlike a rename, never replaces what another process put there meanwhile.
                os.link(temporary, path)
        except FileExistsError as error:
            raise ConfigError(f"there is already a file at {path}; open it, or name another place") from error
        finally:
            for left in path.parent.glob(f"{glob.escape(temporary.name)}*"):
                left.unlink()
        _sync_folder(path.parent)
        return cls.open(path, clock=clock)

    @classmethod
    def open(cls, path: Path, *, clock: Clock = utc_now) -> Self:
        """The store at `path`.

        Raises `ConfigError` when nothing is there, `DataError` when it is no preference store or one of another
        version, `ReadOnlyError` when it cannot be written.
        """
        _check_header(path)
        store = cls(path, clock)
        try:
            with _plain_errors(path):
                connection = store._connection()
                _check_version(connection, path)
                store._seed = int(connection.execute("SELECT value FROM settings WHERE name = 'seed'").fetchone()[0])
                # A store that cannot be written must say so now, not when somebody has labelled. It takes a write to
                # find out: SQLite begins the transaction in any case.
                connection.execute("BEGIN IMMEDIATE")
                connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
                connection.execute("ROLLBACK")
        except BaseException:  # a signal as well: whatever it is rises, with the connection closed
            store.close()
            raise
        return store

    @classmethod
    def open_or_create(cls, path: Path, *, seed: int, clock: Clock = utc_now) -> Self:
        """The store at `path`, made when there is none; a store that is there keeps its own seed."""
        if not path.exists():
            try:
                return cls.create(path, seed=seed, clock=clock)
            except ConfigError:
                # Another process may have been quicker.
                if not path.exists():
                    raise
        return cls.open(path, clock=clock)

    @property
    def seed(self) -> int:
        """What the order of tasks and the sides of responses are drawn from."""
        return self._seed

    def close(self) -> None:
        """Closes the connections of all threads; a later call opens a new one."""
        with self._guard:
            for connection in list(self._open):
                connection.sqlite.close()
            self._open.clear()
            self._local = threading.local()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        """A transaction that holds the write lock from its start; it is on disk when the block has ended."""
        with _plain_errors(self.path), self._writing:
            connection = self._connection()
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:  # a signal as well: whatever it is rises, with nothing half written
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

    @contextmanager
    def _read(self) -> Iterator[sqlite3.Connection]:
        """Several queries that see one state of the database."""
        with _plain_errors(self.path):
            connection = self._connection()
            connection.execute("BEGIN")
            try:
                yield connection
            finally:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")

    def _now(self) -> str:
        return time_text(self.clock())

    def _connection(self) -> sqlite3.Connection:
        """This thread's connection."""
        if os.getpid() != self._process:
            raise RuntimeError(f"the preference store {self.path} was opened before a fork; open it in the new process")
        held: _Connection | None = getattr(self._local, "connection", None)
        if held is None:
            held = _Connection(self.path)
            with self._guard:
                self._local.connection = held
                self._open.add(held)
        return held.sqlite


def _check_header(path: Path) -> None:
    if not path.exists():
        raise ConfigError(f"no preference store at {path}: nothing is there; create one, or name the one that you mean")
    if not path.is_file():
        raise ConfigError(f"a preference store is a file, and {path} is none; name the file")
    try:
        with path.open("rb") as file:
            start = file.read(len(_MAGIC))
    except OSError as error:
        raise StorageError(f"the preference store {path} cannot be read: {error.strerror}") from error
    if start != _MAGIC:
        raise DataError(f"expected a preference store at {path}, but the file is no SQLite database; name another file")


def _check_version(connection: sqlite3.Connection, path: Path) -> None:
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if application != APPLICATION_ID:
        raise DataError(
            f"expected a preference store at {path}, but it is the SQLite database of another program (application_id "
            f"{application:#x}, not {APPLICATION_ID:#x}); name another file"
        )
    if version != SCHEMA_VERSION:
        raise DataError(
            f"the preference store {path} has schema version {version}; this rlhf reads and writes version "
            f"{SCHEMA_VERSION}. Use the rlhf that made it"
        )


def _sync_folder(folder: Path) -> None:
    """Makes a new name in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _plain_errors(path: Path) -> Iterator[None]:
    """Turns what SQLite and the system say about the file into an error that names the remedy."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        found = _plain_error(getattr(error, "sqlite_errorname", ""), str(error), path)
        if found is None:
            raise
        raise found from error
    except PermissionError as error:
        raise _read_only(path) from error


def _plain_error(code: str, text: str, path: Path) -> UserError | None:
    """The error for one of SQLite's result codes; None when the code that called is to blame."""
    if code == "SQLITE_FULL":
        return DiskFullError(f"no space left on the disk for the preference store {path}; free some. It is whole")
    if code.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM")):
        return _read_only(path)
    if code.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return StorageError(
            f"the preference store {path} was locked by another process for {BUSY_SECONDS:g} seconds; nothing was "
            "written. End the process that hangs, then try again"
        )
    if code.startswith(("SQLITE_NOTADB", "SQLITE_CORRUPT")):
        return DataError(f"the preference store {path} is damaged: {text}; go on with a copy of it")
    if code.startswith("SQLITE_IOERR"):
        return StorageError(f"the disk failed the preference store {path}: {text} ({code}); nothing was acknowledged")
    return None


def _read_only(path: Path) -> ReadOnlyError:
    return ReadOnlyError(
        f"the preference store {path} must be writable, and so must its folder, where SQLite keeps its log; one of "
        "them is not. Mend the permissions, or copy the store to a place that can be written"
    )
