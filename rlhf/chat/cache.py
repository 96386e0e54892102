"""Replies kept on disk, so that nothing is asked, or paid, twice. One SQLite file in a folder."""

from __future__ import annotations

import json
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf.chat.protocol import ChatReply
from rlhf.errors import ConfigError, StorageError

FILE = "replies.sqlite"
_BUSY_SECONDS = 60.0
_SCHEMA = "CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY NOT NULL, reply TEXT NOT NULL) WITHOUT ROWID"


class ReplyCache:
    """Replies by the fingerprint of their request. Several threads and processes may share one."""

    def __init__(self, folder: str, key: str) -> None:
        """`key` is the config key that names the folder, for errors. Raises `ConfigError` when it cannot be had."""
        self.path = Path(os.path.expanduser(folder)) / FILE
        self._key = key
        self._lock = threading.Lock()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(self.path, timeout=_BUSY_SECONDS, check_same_thread=False)
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = NORMAL")
            with self._connection:
                self._connection.execute(_SCHEMA)
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(
                f"{key}={folder}: replies cannot be kept there: {error}. Name a folder that can be written, or set "
                f"{key}=null"
            ) from error

    def get(self, keys: Iterable[str]) -> dict[str, ChatReply]:
        """The replies that are there, by key."""
        query = "SELECT key, reply FROM replies WHERE key IN (SELECT value FROM json_each(?))"
        with self._errors():
            rows = self._connection.execute(query, (json.dumps(list(keys)),)).fetchall()
        return {key: _from_json(reply) for key, reply in rows}

    def put(self, key: str, reply: ChatReply) -> None:
        """Keeps a reply; the first one of a key stays."""
        with self._errors(), self._connection:
            self._connection.execute("INSERT OR IGNORE INTO replies VALUES (?, ?)", (key, json.dumps(vars(reply))))

    def close(self) -> None:
        """Closes the file."""
        self._connection.close()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        with self._lock:
            try:
                yield
            except sqlite3.Error as error:
                raise StorageError(f"the replies kept in {self.path} ({self._key}) cannot be used: {error}") from error


def _from_json(text: str) -> ChatReply:
    fields = json.loads(text)
    if fields["choice_logprobs"] is not None:
        fields["choice_logprobs"] = tuple(fields["choice_logprobs"])
    return ChatReply(**fields)
