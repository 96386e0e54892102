"""The check of a model path: quick, without torch, and with a message that says what to do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.errors import ArtifactError, ConfigError, UserError
from rlhf.models.paths import check_model_path, is_local


def write_folder(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).write_text('{"model_type": "llama"}' if name == "config.json" else "{}")
    return folder


def message_of(path: Path | str, kind: type[UserError]) -> str:
    with pytest.raises(kind) as caught:
        check_model_path(str(path), "sft.base")
    text = str(caught.value)
    assert text.startswith("sft.base")
    return text


@pytest.mark.parametrize(
    "names",
    [
        ("config.json", "model.safetensors", "tokenizer.json"),
        ("config.json", "model-00001-of-00002.safetensors", "tokenizer.model"),
        ("config.json", "pytorch_model.bin", "tokenizer_config.json", "vocab.json", "merges.txt"),
    ],
)
def test_whole_folders_pass(names: tuple[str, ...], tmp_path: Path) -> None:
    check_model_path(str(write_folder(tmp_path / "model", *names)), "model.path")


def test_local_paths_and_hub_ids_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in ("/a", "./a", "../a/b", "a/", "a/b/c", "a\\b", "~/a"):
        assert is_local(path), path
    for path in ("gpt2", "EleutherAI/pythia-70m"):
        assert not is_local(path), path
        check_model_path(path, "model.path")
    (tmp_path / "gpt2").mkdir()
    assert is_local("gpt2")


def test_a_missing_folder_names_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "llama-small").mkdir()
    message = message_of(tmp_path / "lama-small", ConfigError)
    assert str(tmp_path / "lama-small") in message
    assert f"Did you mean {tmp_path / 'llama-small'}?" in message
    assert "nor its parent folder" in message_of(tmp_path / "nowhere" / "x", ConfigError)
    assert "is empty" in message_of(" ", ConfigError)


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("")
    assert "is a file" in message_of(tmp_path / "model", ConfigError)


def test_missing_parts_are_named(tmp_path: Path) -> None:
    empty = write_folder(tmp_path / "empty")
    assert "no config.json" in message_of(empty, ArtifactError)
    adapter = write_folder(tmp_path / "adapter", "adapter_config.json", "adapter_model.safetensors")
    assert "does not name the model that the adapter belongs to" in message_of(adapter, ArtifactError)
    bare = write_folder(tmp_path / "bare", "config.json", "tokenizer.json")
    assert "has no weights" in message_of(bare, ArtifactError)
    mute = write_folder(tmp_path / "mute", "config.json", "model.safetensors", "tokenizer_config.json", "vocab.json")
    message = message_of(mute, ArtifactError)
    assert "has no tokenizer" in message
    assert f'save_pretrained("{mute}")' in message


def test_broken_files_are_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", "config.json", "model.safetensors", "tokenizer.json")
    (folder / "config.json").write_text('{"model_type": ')
    assert "not valid JSON" in message_of(folder, ArtifactError)
    (folder / "config.json").write_text("{}")
    assert "model_type" in message_of(folder, ArtifactError)


def test_an_index_needs_all_its_shards(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", "config.json", "a.safetensors", "tokenizer.json")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}))
    assert "lacks weight files: b.safetensors" in message_of(folder, ArtifactError)
    index.write_text("[]")
    assert "not a valid index" in message_of(folder, ArtifactError)


def test_the_check_imports_no_torch() -> None:
    code = "import sys, rlhf.models.paths; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
