"""Files that are whole or absent: atomic writes, crash-safe replacement of folders, content hashes.

What `kill -9` or a power cut can leave behind, and what `clean_partial` makes of it at the next start:

* `*.partial`, a file or a folder: unfinished, or no longer wanted. It is removed.
* `.<name>.ready`: a finished, synced folder that was about to become `<name>`. The move is completed.
* `.<name>.old`: what `<name>` was before. Removed when `<name>` is there, else moved back.

A full disk (ENOSPC, or a quota) is a `DiskFullError` and a folder that may not be written a `ReadOnlyError` wherever
this module or `disk_errors` is in charge.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from rlhf.errors import DiskFullError, ReadOnlyError, StorageError
from rlhf.runs.jsonable import dump_json, read_json

PARTIAL = ".partial"
READY = ".ready"
OLD = ".old"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FULL_TEXTS = ("no space left on device", "os error 28", "disk quota exceeded", "os error 122")
# What torch's zip writer says when the disk fills up under it; it hides the errno.
_WRITER_TEXTS = ("pytorchstreamwriter failed", "unexpected pos", "iostream error")
_ALMOST_NOTHING = 1 << 20
_READ_ONLY_TEXTS = ("read-only file system", "os error 30")
_FORBIDDEN = (errno.EACCES, errno.EPERM)
# safetensors' and torch's words, which hide the errno and the file: the folder itself must be asked.
_FORBIDDEN_TEXTS = ("permission denied", "os error 13")


class disk_errors:  # noqa: N801 - used like a function: `with disk_errors(path):`
    """Turns what a full disk or a folder that may not be written raises inside the block into a `StorageError`.

    Everything else passes unchanged. `path` is what is written. Understands OSError, and libraries that hide it
    (safetensors and torch's writer raise their own types).
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, StorageError):
            return
        found = storage_error(error, self.path)
        if found is not None:
            raise found from error


def storage_error(error: BaseException, path: Path) -> StorageError | None:
    """The message for a write to `path` that ended in `error`; None when something else is to blame."""
    if is_disk_full(error, path):
        return disk_full(path)
    place = read_only_place(error, path)
    return None if place is None else read_only(place)


def is_disk_full(error: BaseException, path: Path) -> bool:
    """Whether `error`, or what caused it, says that no space was left where `path` lies."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _FULL:
            return True
        text = str(seen).lower()
        if any(part in text for part in _FULL_TEXTS):
            return True
        if any(part in text for part in _WRITER_TEXTS) and (free_bytes(path) or 0) < _ALMOST_NOTHING:
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def disk_full(path: Path) -> DiskFullError:
    """The error for a write to `path` that found no space."""
    free = free_bytes(path)
    left = "" if free is None else f" ({free / 2**20:.1f} MiB free)"
    return DiskFullError(
        f"no space left on the disk while writing {path}{left}.\n"
        "Nothing half-written is taken for whole: free some space, or set run.dir to another disk, and "
        "give the same command again to go on."
    )


def read_only_place(error: BaseException, path: Path) -> Path | None:
    """What may not be written, when `error`, or what caused it, says so of a write to `path`; else None.

    A refusal counts when it is about `path`, what is in it or beside it, and this user really cannot write there:
    reading something else may be refused as well.
    """
    seen: BaseException | None = error
    while seen is not None:
        number, filename = (seen.errno, seen.filename) if isinstance(seen, OSError) else (None, None)
        named = Path(filename) if isinstance(filename, str) else path
        text = str(seen).lower()
        if number == errno.EROFS or any(part in text for part in _READ_ONLY_TEXTS):
            return named
        refused = number in _FORBIDDEN or (number is None and any(part in text for part in _FORBIDDEN_TEXTS))
        # What is made, renamed or removed is an entry of its folder; without a name only `path` itself can be asked.
        asked = [named, named.absolute().parent] if isinstance(filename, str) else [path]
        if refused and _concerns(named, path) and not all(os.access(_existing(place), os.W_OK) for place in asked):
            return named
        seen = seen.__cause__ or seen.__context__
    return None


def read_only(path: Path) -> ReadOnlyError:
    """The error for a write to the file or folder `path` that was refused."""
    folder = _existing(path if path.is_dir() else path.absolute().parent)
    try:
        mounted_read_only = bool(os.statvfs(folder).f_flag & os.ST_RDONLY)
    except OSError:
        mounted_read_only = False
    if mounted_read_only:
        reason = "its file system is read-only"
        remedy = "mount it for writing (a disk with errors turns read-only: see dmesg)"
    else:
        reason = f"no permission for user {os.geteuid()}"
        remedy = f"give the permission (chmod u+w {folder}, or chown)"
    return ReadOnlyError(
        f"the folder {folder} cannot be written ({reason}).\n"
        f"Nothing half-written is taken for whole: {remedy}, or set run.dir to another folder, and give the same "
        "command again to go on."
    )


def _concerns(named: Path, path: Path) -> bool:
    """Whether a failure about `named` is one of writing `path`: itself, in it, beside it or on the way to it."""
    named, path = named.absolute(), path.absolute()
    return named.is_relative_to(path) or path.is_relative_to(named) or named.parent == path.parent


def _existing(path: Path) -> Path:
    """`path`, or the nearest folder above it that is there."""
    return next(candidate for candidate in (path, *path.absolute().parents) if candidate.exists())


def free_bytes(path: Path) -> int | None:
    """Free bytes on the file system of `path` (or its nearest existing parent); None when it cannot be asked."""
    for candidate in (path, *path.absolute().parents):
        try:
            return shutil.disk_usage(candidate).free
        except OSError:
            continue
    return None


def partial_path(final: Path) -> Path:
    """A new name beside `final` for writing it; `clean_partial` removes it when the writer was killed."""
    return final.with_name(f".{final.name}.{secrets.token_hex(4)}{PARTIAL}")


def write_bytes(path: Path, content: bytes) -> None:
    """Writes `path` atomically and durably: readers see the old file or the new one, also after a power cut.

    Makes missing parent folders. Raises `StorageError`; the old file is then untouched.
    """
    temporary = partial_path(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            # After a successful replace there is nothing under this name.
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` in UTF-8. A lone surrogate, which UTF-8 cannot hold, becomes its `\\udxxx` escape."""
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"))


def write_json(path: Path, obj: Any) -> None:
    """Writes `obj` as indented JSON, atomically; see `rlhf.runs.jsonable.to_jsonable` for what it may hold."""
    write_text(path, dump_json(obj, indent=2) + "\n")


def sync_folder(folder: Path) -> None:
    """Makes created, renamed and removed entries of `folder` durable, where the file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network and user-space file systems refuse fsync on folders; there is nothing better to do there.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES):
            raise
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """fsync of every file and folder below `folder`, and of `folder` itself."""
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            if path.is_symlink() or not path.is_file():
                continue
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_folder(Path(parent))


def publish_folder(temporary: Path, final: Path) -> None:
    """Replaces folder `final` by the finished folder `temporary`, which lies on the same file system.

    1. sync the content of `temporary`
    2. `temporary` → `.<final>.ready`: from here on the new state is whole and is found again after a crash
    3. `final` → `.<final>.old`, if there is one
    4. `.<final>.ready` → `final`
    5. remove `.<final>.old`

    A crash before 2 leaves the old folder, a crash after it leaves the old or the new folder at `final`, or neither
    between 3 and 4; `recover_folder` (called by `clean_partial` and here) then finishes steps 3 to 5.
    Raises `StorageError`, and `FileNotFoundError` when `temporary` is not there.
    """
    with disk_errors(final):
        recover_folder(final)
        sync_tree(temporary)
        temporary.rename(_sibling(final, READY))
        sync_folder(final.parent)
        recover_folder(final)


def recover_folder(final: Path) -> None:
    """Finishes a `publish_folder` of `final` that was cut short; does nothing where there is none."""
    ready, old = _sibling(final, READY), _sibling(final, OLD)
    if ready.exists():
        if final.exists():
            # `old` beside `final` is from a publication whose last step was cut short; `final` replaced it.
            discard(old)
            final.rename(old)
        ready.rename(final)
        sync_folder(final.parent)
    elif old.exists() and not final.exists():
        old.rename(final)
        sync_folder(final.parent)
    discard(old)


def discard(path: Path) -> None:
    """Removes a file or folder so that a crash half-way leaves a `*.partial`, never a damaged `path`."""
    if not path.is_symlink() and not path.exists():
        return
    doomed = path if path.name.endswith(PARTIAL) else partial_path(path)
    if doomed != path:
        path.rename(doomed)
    if doomed.is_dir() and not doomed.is_symlink():
        shutil.rmtree(doomed)
    else:
        doomed.unlink()


def clean_partial(folder: Path) -> list[Path]:
    """Removes what a killed run left below `folder` and finishes interrupted folder replacements.

    Call it only while nobody else writes there. Returns the leftovers it dealt with. Links are not followed.
    """
    found: list[Path] = []
    if not folder.is_dir():
        return found
    for path in sorted(folder.iterdir()):
        final = _published_name(path)
        if path.name.endswith(PARTIAL):
            discard(path)
            found.append(path)
        elif final is not None:
            recover_folder(final)
            found.append(path)
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink():
            found += clean_partial(path)
    return found


def clean_partial_files(paths: Iterable[Path]) -> list[Path]:
    """Removes what a killed `write_bytes` of one of `paths` left beside it, and nothing else in those folders."""
    found: list[Path] = []
    for path in paths:
        pattern = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}{re.escape(PARTIAL)}")
        if path.parent.is_dir():
            found += [entry for entry in sorted(path.parent.iterdir()) if pattern.fullmatch(entry.name)]
    for entry in found:
        discard(entry)
    return found


def hash_file(path: Path) -> str:
    """SHA-256 of the file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_path(path: Path) -> str:
    """SHA-256 of a file, or of a folder: its sorted relative names, each with its file's hash.

    Leftovers of killed runs and empty folders do not count; linked files do, as files. Nor does it count where the base
    of an adapter lies: the same adapter in another run's folder has the same content.
    """
    if path.is_file():
        return hash_file(path)
    if not path.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    digest = hashlib.sha256()
    for name, file in sorted((file.relative_to(path).as_posix(), file) for file in _whole_files(path)):
        digest.update(f"{len(name.encode())} {name} {_hash_within(file)}\n".encode())
    return digest.hexdigest()


def _hash_within(file: Path) -> str:
    """The hash of a file in a folder; of an adapter's config without the place of its base."""
    if file.name == "adapter_config.json":
        body = read_json(file)
        if isinstance(body, dict) and os.path.isabs(str(body.get("base_model_name_or_path"))):
            return fingerprint({key: value for key, value in body.items() if key != "base_model_name_or_path"})
    return hash_file(file)


def fingerprint(obj: Any) -> str:
    """SHA-256 of the canonical JSON of `obj`: key order does not matter, NaN and infinities keep their identity."""
    return hashlib.sha256(dump_json(obj, canonical=True).encode("utf-8", errors="backslashreplace")).hexdigest()


def _sibling(final: Path, suffix: str) -> Path:
    return final.with_name(f".{final.name}{suffix}")


def _published_name(path: Path) -> Path | None:
    """The folder that `path` is the `.ready` or `.old` state of; None for anything else."""
    for suffix in (READY, OLD):
        if path.name.startswith(".") and path.name.endswith(suffix) and len(path.name) > len(suffix) + 1:
            return path.with_name(path.name[1 : -len(suffix)])
    return None


def _whole_files(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not is_leftover(Path(parent, name))]
        yield from (Path(parent, name) for name in names if not is_leftover(Path(parent, name)))


def is_leftover(path: Path) -> bool:
    """Whether a killed run has left this, or something that was about to become or had been something else."""
    return path.name.endswith(PARTIAL) or _published_name(path) is not None
