"""Files are whole or absent: a writer killed before any of its file operations leaves the old or the new state."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from rlhf.errors import DiskFullError, ReadOnlyError
from rlhf.runs import files
from rlhf.runs.jsonable import dump_json, read_json, read_lines, to_jsonable
from tests.read_only import as_nobody, make_read_only, nobodys_folder
from tests.small_disk import small_disk

OPERATIONS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")


def run_and_kill(work: Callable[[], None], operation: int) -> bool:
    """Runs `work` in a forked child that gets SIGKILL just before its n-th file operation; True when it was killed."""
    child = os.fork()
    if child == 0:
        seen = 0

        def hook(event: str, _: tuple[object, ...]) -> None:
            nonlocal seen
            if event in OPERATIONS:
                seen += 1
                if seen == operation:
                    os.kill(os.getpid(), signal.SIGKILL)

        status = 1
        try:
            sys.addaudithook(hook)
            work()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_killed_write_leaves_old_or_new(tmp_path: Path) -> None:
    target = tmp_path / "manifest.json"
    outcomes = []
    for operation in range(1, 50):
        target.write_text("old")
        killed = run_and_kill(lambda: files.write_text(target, "new"), operation)
        assert target.read_text() in ("old", "new")
        outcomes.append(target.read_text())
        files.clean_partial(tmp_path)
        assert names(tmp_path) == {"manifest.json"}
        if not killed:
            break
    assert outcomes[0] == "old"
    assert outcomes[-1] == "new"
    assert outcomes == sorted(outcomes, reverse=True)
    assert len(outcomes) >= 3


def test_killed_publication_leaves_a_whole_folder(tmp_path: Path) -> None:
    final = tmp_path / "model"
    outcomes = []
    for operation in range(1, 100):
        files.discard(final)
        final.mkdir()
        (final / "config.json").write_text("old")
        (final / "only_old.bin").write_text("old")
        temporary = files.partial_path(final)
        (temporary / "sub").mkdir(parents=True)
        (temporary / "config.json").write_text("new")
        (temporary / "sub" / "weights.bin").write_text("new")
        killed = run_and_kill(partial(files.publish_folder, temporary, final), operation)
        files.clean_partial(tmp_path)
        if (final / "config.json").read_text() == "old":
            assert names(tmp_path) == {"model", "model/config.json", "model/only_old.bin"}
            outcomes.append("old")
        else:
            assert names(tmp_path) == {"model", "model/config.json", "model/sub", "model/sub/weights.bin"}
            outcomes.append("new")
        if not killed:
            break
    # Once the new folder is whole it wins, wherever the kill came.
    assert outcomes == sorted(outcomes, reverse=True)
    assert outcomes.count("old") >= 2
    assert outcomes.count("new") >= 5


def test_recovery_itself_may_be_killed(tmp_path: Path) -> None:
    for operation in range(1, 30):
        for name, text in ((".model.ready", "new"), ("model", "old"), (".model.old", "older")):
            files.discard(tmp_path / name)
            (tmp_path / name).mkdir()
            (tmp_path / name / "a").write_text(text)
        killed = run_and_kill(lambda: files.recover_folder(tmp_path / "model"), operation)
        files.clean_partial(tmp_path)
        assert names(tmp_path) == {"model", "model/a"}
        assert (tmp_path / "model" / "a").read_text() == "new"
        if not killed:
            return
    pytest.fail("the recovery never came to its end")


def test_clean_partial_leaves_everything_else(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "x.partial").write_text("mine")
    run = tmp_path / "run"
    (run / "deep" / "model.partial").mkdir(parents=True)
    (run / "deep" / "model.partial" / "weights").write_text("half")
    (run / "deep" / "keep.bin").write_text("whole")
    (run / "a.json.partial").write_text("{")
    (run / "link").symlink_to(outside)
    found = files.clean_partial(run)
    assert {path.name for path in found} == {"model.partial", "a.json.partial"}
    assert names(run) == {"deep", "deep/keep.bin", "link"}
    assert (outside / "x.partial").exists()
    assert files.clean_partial(run / "missing") == []


def test_write_bytes_makes_folders_and_keeps_mode(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b.txt"
    files.write_text(target, "lone surrogate \ud800 and \u2028")
    assert target.read_bytes() == b"lone surrogate \\ud800 and \xe2\x80\xa8"
    plain = tmp_path / "plain"
    plain.write_text("")
    assert target.stat().st_mode == plain.stat().st_mode


def test_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "config.yaml"
    target.write_text("old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFullError, match=r"config\.yaml \(.* MiB free\)"):
        files.write_text(target, "new")
    assert target.read_text() == "old"
    assert names(tmp_path) == {"config.yaml"}


def test_disk_errors_understands_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DiskFullError), files.disk_errors(tmp_path):
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    writer = "[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"
    with pytest.raises(RuntimeError, match="unexpected pos"), files.disk_errors(tmp_path):
        raise RuntimeError(writer)
    monkeypatch.setattr(files, "free_bytes", lambda _: 0)
    with pytest.raises(DiskFullError), files.disk_errors(tmp_path):
        raise RuntimeError(writer)
    with pytest.raises(PermissionError), files.disk_errors(tmp_path):
        raise PermissionError(errno.EACCES, "no")


def test_really_full_disk(tmp_path: Path) -> None:
    """A file system of 64 KiB: every way of writing ends in the message, and nothing half-written stays."""
    with small_disk(tmp_path / "disk", "64k") as mount:
        files.write_text(mount / "kept.json", "old")
        with pytest.raises(DiskFullError, match=r"kept\.json"):
            files.write_bytes(mount / "kept.json", b"x" * 2**18)
        assert names(mount) == {"kept.json"}
        assert (mount / "kept.json").read_text() == "old"
        for save in (
            lambda path: torch.save({"a": torch.zeros(2**16)}, path),
            lambda path: path.write_bytes(np.zeros(2**16).tobytes()),
        ):
            with pytest.raises(DiskFullError), files.disk_errors(mount):
                save(mount / "weights.partial")
        files.clean_partial(mount)
        assert names(mount) == {"kept.json"}


WRITERS: dict[str, Callable[[Path], object]] = {
    "atomic file": lambda folder: files.write_text(folder / "kept.json", "new"),
    "new file": lambda folder: (folder / "new").write_text("x"),
    "file in a new folder": lambda folder: files.write_text(folder / "a" / "b" / "c", "x"),
    "folder": lambda folder: (folder / "new").mkdir(),
    "removal": lambda folder: (folder / "kept.json").unlink(),
    "renaming": lambda folder: (folder / "kept.json").rename(folder / "other.json"),
    "torch": lambda folder: torch.save({"a": torch.zeros(4)}, folder / "weights.pt"),
    "safetensors": lambda folder: save_file({"a": torch.zeros(4)}, folder / "weights.safetensors"),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_disk_that_turned_read_only_is_named(writer: str, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    files.write_text(tmp_path / "disk" / "kept.json", "old")
    with make_read_only(tmp_path / "disk") as folder:
        with pytest.raises(ReadOnlyError) as caught, files.disk_errors(folder):
            WRITERS[writer](folder)
        message = f"the folder {folder} cannot be written (its file system is read-only)"
        assert str(caught.value).startswith(message)
        assert "mount it for writing" in str(caught.value)
        assert names(folder) == {"kept.json"}
        assert (folder / "kept.json").read_text() == "old"
    with files.disk_errors(tmp_path / "disk"):
        WRITERS[writer](tmp_path / "disk")


@pytest.mark.parametrize("writer", WRITERS)
def test_a_folder_without_permission_is_named(writer: str) -> None:
    with nobodys_folder() as folder, as_nobody():
        files.write_text(folder / "kept.json", "old")
        folder.chmod(0o555)
        with pytest.raises(ReadOnlyError) as caught, files.disk_errors(folder):
            WRITERS[writer](folder)
        assert str(caught.value).startswith(f"the folder {folder} cannot be written (no permission for user")
        assert f"chmod u+w {folder}" in str(caught.value)
        assert (folder / "kept.json").read_text() == "old"
        folder.chmod(0o755)
        with files.disk_errors(folder):
            WRITERS[writer](folder)


def test_a_refusal_that_is_not_about_writing_here_passes() -> None:
    """Another file may not be read: the folder that is written to is not to blame, even if it could not be written."""
    with nobodys_folder() as folder, as_nobody():
        (folder / "run").mkdir()
        (folder / "data").mkdir()
        (folder / "data" / "secret").write_text("x")
        (folder / "data" / "secret").chmod(0)
        (folder / "run").chmod(0o555)
        with pytest.raises(PermissionError), files.disk_errors(folder / "run" / "checkpoints"):
            (folder / "data" / "secret").read_text()
        with pytest.raises(ValueError, match="not storage"), files.disk_errors(folder / "run"):
            raise ValueError("not storage")
        (folder / "run").chmod(0o755)
        folder.chmod(0o555)  # as a mounted disk's parent is; the run folder itself can be written
        with pytest.raises(RuntimeError), files.disk_errors(folder / "run"):
            raise RuntimeError("reading something else: Permission denied (os error 13)")
        folder.chmod(0o755)
        (folder / "run").chmod(0o755)


def test_hash_path_sees_names_and_contents(tmp_path: Path) -> None:
    def build(name: str, content: dict[str, str]) -> Path:
        for file, text in content.items():
            files.write_text(tmp_path / name / file, text)
        return tmp_path / name

    base = {"a": "1", "b/c": "2"}
    same = files.hash_path(build("x", base))
    assert files.hash_path(build("y", dict(reversed(base.items())))) == same
    assert files.hash_path(build("z", {"a": "1", "b/d": "2"})) != same
    assert files.hash_path(build("w", {"a": "2", "b/c": "1"})) != same
    (tmp_path / "x" / ".a.01234567.partial").write_text("left by a killed run")
    assert files.hash_path(tmp_path / "x") == same
    assert files.hash_path(tmp_path / "x" / "a") == files.hash_file(tmp_path / "x" / "a")
    assert files.hash_file(tmp_path / "x" / "a") == "6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b"
    with pytest.raises(FileNotFoundError):
        files.hash_path(tmp_path / "missing")


def test_where_the_base_of_an_adapter_lies_is_not_its_content(tmp_path: Path) -> None:
    """Else the same run in another folder, a replay for one, would end with another model."""

    def adapter(name: str, base: str, rank: int = 8) -> str:
        files.write_json(tmp_path / name / "adapter_config.json", {"base_model_name_or_path": base, "r": rank})
        files.write_text(tmp_path / name / "adapter_model.safetensors", "weights")
        return files.hash_path(tmp_path / name)

    here = adapter("a", "/runs/one/stages/sft/model")
    assert adapter("b", "/runs/one-replay/stages/sft/model") == here
    assert adapter("c", "/runs/one/stages/sft/model", rank=4) != here
    # The id of a model on a hub says which model it is.
    assert adapter("d", "gpt2") != adapter("e", "gpt2-large")


def test_fingerprint_ignores_order_only() -> None:
    assert files.fingerprint({"a": 1, "b": [1, 2]}) == files.fingerprint({"b": (1, 2), "a": 1})
    others = [{"a": 1}, {"a": 1.5}, {"a": "1"}, {"a": None}, {"a": math.nan}, {"a": math.inf}, {"a": True}, {"a": [1]}]
    assert len({files.fingerprint(other) for other in others}) == len(others)


@dataclass(frozen=True)
class Point:
    x: float
    name: Path


def test_to_jsonable() -> None:
    value = {
        "nan": math.nan,
        "inf": [math.inf, -math.inf],
        "array": np.array([1.0, np.nan], dtype=np.float32),
        "scalar": np.float32(0.5),
        "flag": np.bool_(True),
        "tensor": torch.tensor(3),
        "point": Point(1.5, Path("a/b")),
        "set": {2, 1},
        3: "key",
    }
    assert to_jsonable(value) == {
        "nan": None,
        "inf": [None, None],
        "array": [1.0, None],
        "scalar": 0.5,
        "flag": True,
        "tensor": 3,
        "point": {"x": 1.5, "name": "a/b"},
        "set": [1, 2],
        "3": "key",
    }
    assert json.loads(dump_json(value))["nan"] is None
    with pytest.raises(TypeError, match="object"):
        to_jsonable(object())


def test_readers_forgive(tmp_path: Path) -> None:
    path = tmp_path / "x"
    assert read_json(path) is None
    assert list(read_lines(path)) == []
    path.write_bytes(b'{"a": "\xe2\x80\xa8"}\n[1]\n\xff\xfe\n\n{"a": 2}\n{"a": ')
    assert [entry["a"] for entry in read_lines(path)] == ["\u2028", 2]
    assert read_json(path) is None
