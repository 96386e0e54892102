"""Who may enter: one secret a link, kept beside the store so that a restart keeps the links, and signed cookies."""

from __future__ import annotations

import base64
import errno
import fcntl
import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.errors import DataError, ReadOnlyError, StorageError

_TOKEN_BYTES = 32
_OWNER_ONLY = 0o600


@dataclass(frozen=True)
class Visitor:
    """Whoever made a request: `admin` may see the admin view; `name` is the annotator's, None until it is said.

    `fixed` says that the link belongs to one annotator, who cannot take another name.
    """

    admin: bool
    name: str | None
    fixed: bool = False


@dataclass(frozen=True)
class Tokens:
    """The secrets of the links: 256 bits each, in URL-safe base 64.

    With `people`, each of them has a link, and the one for all annotators does not work.
    """

    annotator: str
    admin: str
    people: Mapping[str, str]

    def visitor(self, token: str) -> Visitor | None:
        """Who holds a token; None when nobody does. Every token is compared, each in constant time."""
        found = None
        known = [(self.admin, Visitor(True, None))]
        if self.people:
            known += [(secret, Visitor(False, name, fixed=True)) for name, secret in self.people.items()]
        else:
            known.append((self.annotator, Visitor(False, None)))
        for secret, visitor in known:
            if hmac.compare_digest(secret.encode(), token.encode(errors="surrogateescape")):
                found = visitor
        return found

    def sign(self, visitor: Visitor) -> str:
        """A cookie's value that says who the visitor is, and that only the holder of the secrets can make."""
        body = json.dumps([visitor.admin, visitor.name, visitor.fixed], ensure_ascii=True).encode()
        return f"{_text(body)}.{_text(self._signature(self._key(visitor), body))}"

    def verify(self, value: str) -> Visitor | None:
        """The visitor of a cookie that `sign` made with the same secrets; None for anything else."""
        body_text, _, signature = value.partition(".")
        try:
            body = base64.urlsafe_b64decode(body_text.encode("ascii"))
            given = base64.urlsafe_b64decode(signature.encode("ascii"))
        except ValueError:
            return None
        # The signature comes first: until it is found genuine, the body may be anything, and is not even parsed.
        keys = [self.admin, *(self.people.values() if self.people else [self.annotator])]
        if not any(hmac.compare_digest(self._signature(key, body), given) for key in keys):
            return None
        visitor = Visitor(*json.loads(body))
        if visitor.fixed and visitor.name not in self.people:
            return None
        if not visitor.fixed and not visitor.admin and self.people:
            return None
        return visitor if hmac.compare_digest(self._signature(self._key(visitor), body), given) else None

    def _key(self, visitor: Visitor) -> str:
        # Each cookie hangs on the token of its link: a new token ends the sessions that the old one opened.
        secret = self.people[visitor.name] if visitor.fixed and visitor.name else self.annotator
        return self.admin if visitor.admin else secret

    def _signature(self, key: str, body: bytes) -> bytes:
        # Annotators know the token of their link, and with it alone could sign any name, also that of a judge.
        return hmac.digest(f"{self.admin} {key}".encode(), b"session " + body, hashlib.sha256)


def token_file(store: Path) -> Path:
    """Where the tokens of a store are kept."""
    return store.with_name(f"{store.name}.tokens")


def load_tokens(store: Path, people: Sequence[str], *, renew: bool = False) -> Tokens:
    """The tokens of a store, read from the file beside it; those that are missing are made and written.

    `people` are the annotators who get a link each; `renew` makes all tokens anew, so that no old link works.
    Raises `DataError` when the file is not what this wrote, `ReadOnlyError` when it cannot be written.
    """
    path = token_file(store)
    with _lock(path.parent):
        return _load(path, people, renew)


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Two pages of one store that start at once must not each make links, of which those of one would not work."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _load(path: Path, people: Sequence[str], renew: bool) -> Tokens:
    known = {} if renew else _read(path)
    listed: dict[str, str] = known.get("people", {})
    annotator = known.get("annotator") or _new_token()
    admin = known.get("admin") or _new_token()
    # A person who is not named this time keeps the token for the next.
    everybody = {**listed, **{name: listed.get(name) or _new_token() for name in people}}
    body = {"annotator": annotator, "admin": admin, "people": everybody}
    if body != known:
        write_private(path, json.dumps(body, indent=1))
    return Tokens(annotator, admin, {name: everybody[name] for name in people})


def cookie_name(store: Path) -> str:
    """The name of a store's cookie: pages of several stores on one host, whose ports share cookies, keep apart."""
    return f"rlhf_{hashlib.blake2b(os.fsencode(store.resolve()), digest_size=4).hexdigest()}"


def _new_token() -> str:
    return secrets.token_urlsafe(_TOKEN_BYTES)


def _read(path: Path) -> dict[str, Any]:
    try:
        # Whoever widened the permissions did not mean to publish the links.
        if path.stat().st_mode & 0o077:
            path.chmod(_OWNER_ONLY)
        body = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise _damaged(path, str(error)) from error
    people = body.get("people") if isinstance(body, dict) else None
    secrets_of = [body.get("annotator"), body.get("admin"), *people.values()] if isinstance(people, dict) else [None]
    if not all(isinstance(secret, str) and len(secret) >= _TOKEN_BYTES for secret in secrets_of):
        raise _damaged(path, "it does not hold the tokens")
    return dict(body)


def _damaged(path: Path, why: str) -> DataError:
    return DataError(
        f"the tokens of the labelling page cannot be read from {path}: {why}. With new_tokens=true new ones are made, "
        "and the old links stop working"
    )


def write_private(path: Path, text: str) -> None:
    """Writes a file with secrets, or replaces it as a whole; at no moment can anybody but the owner read it.

    Raises `ReadOnlyError` or `StorageError` when it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _OWNER_ONLY)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        what = f"{path}, which holds links of the labelling page, cannot be written: {error.strerror}"
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise ReadOnlyError(
                f"{what}. Mend the permissions of the folder, or copy the store to one of yours"
            ) from error
        raise StorageError(f"{what}; free some space, or copy the store to another disk") from error
    finally:
        temporary.unlink(missing_ok=True)


def _text(value: bytes) -> str:
    return base64.urlsafe_b64encode(value).decode()
