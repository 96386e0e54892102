"""Folders that may not be written: on a read-only file system, and without permission."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

NOBODY = 65534
_PR_CAPBSET_DROP = 24
# CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH: what lets the superuser pass over permissions.
_OVERRIDES = (1, 2)


@contextmanager
def make_read_only(folder: Path) -> Iterator[Path]:
    """`folder` on a read-only file system, for whoever opens something in it from now on, the superuser included.

    Mounts the folder upon itself. Files that are open stay as they are. Skips the test where nothing may be mounted.
    """
    if subprocess.run(["mount", "--bind", folder, folder], capture_output=True, check=False).returncode != 0:
        pytest.skip("this machine lets the tests mount nothing; that takes the superuser")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@contextmanager
def nobodys_folder() -> Iterator[Path]:
    """A new folder that belongs to a user without privileges (to this one, unless it is the superuser)."""
    # Others may enter it, unlike pytest's and perhaps the one that TMPDIR names.
    with TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        if os.geteuid() == 0:
            os.chown(folder, NOBODY, NOBODY)
        folder.chmod(0o755)
        yield folder


@contextmanager
def as_nobody() -> Iterator[None]:
    """As a user without privileges: no permission stops the superuser."""
    if os.geteuid() != 0:
        yield
        return
    os.setresuid(NOBODY, NOBODY, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


def respect_permissions() -> None:
    """For `preexec_fn`: the program about to be started, and what it starts, is stopped by permissions as others are.

    It stays this user, who may be the only one that can start this Python at all.
    """
    if os.geteuid() == 0:
        for capability in _OVERRIDES:
            ctypes.CDLL(None).prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
