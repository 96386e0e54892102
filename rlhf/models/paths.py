"""Checks of model paths that need no torch: does the folder hold a model, and with what is it to be mended."""

from __future__ import annotations

import difflib
import json
from pathlib import Path

from rlhf.errors import ArtifactError, ConfigError

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "*.safetensors.index.json", "pytorch_model.bin.index.json")
# A tokenizer is one file, or a pair of files; each line is one way to have one.
_TOKENIZERS = (
    ("tokenizer.json",),
    ("tokenizer.model",),
    ("spiece.model",),
    ("vocab.json", "merges.txt"),
    ("vocab.txt",),
)
_ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# Beside it lie the folders of an ensemble's members, each a model folder by itself.
ENSEMBLE_FILE = "rlhf_ensemble.json"
_SAVE_TOKENIZER = 'AutoTokenizer.from_pretrained("the model it belongs to").save_pretrained("{folder}")'


def is_local(path: str) -> bool:
    """Whether `path` can only be meant as a folder: a hub id is `name` or `owner/name` and nothing else."""
    return (
        path.startswith(("/", ".", "~"))
        or path.endswith("/")
        or "\\" in path
        or path.count("/") > 1
        or Path(path).exists()
    )


def check_model_path(path: str, key: str) -> None:
    """Checks that a local `path` is a model folder, or an adapter's with its base, in Hugging Face format.

    The tokenizer belongs to it; an adapter may leave that to its base. A hub id passes unchecked: only the hub knows
    it. `key` is the config key that named the path, for the message.

    Raises `ConfigError` when nothing is there, `ArtifactError` when the folder lacks a part or its config is broken.
    """
    if not path.strip():
        raise ConfigError(f"{key} is empty; give a local folder or a hub id, or leave it null")
    if not is_local(path):
        return
    folder = Path(path).expanduser()
    if not folder.exists():
        raise ConfigError(_missing_folder_message(folder, key))
    if not folder.is_dir():
        raise ConfigError(f"{key}: {folder.absolute()} is a file; expected a model folder in Hugging Face format")
    if is_ensemble(folder):
        for member in member_folders(folder, key):
            check_model_path(member, key)
        return
    if is_adapter(folder):
        _check_adapter(folder, key)
        return
    _check_config(folder, key)
    _check_weights(folder, key)
    if not has_tokenizer(folder):
        raise ArtifactError(
            f"{key}: {folder.absolute()} has no tokenizer (expected tokenizer.json, tokenizer.model, or vocab.json "
            f"with merges.txt). Add it with {_SAVE_TOKENIZER.format(folder=folder)}"
        )


def is_adapter(path: str | Path) -> bool:
    """Whether `path` is a folder with an adapter in PEFT's format, which needs a base model."""
    return (Path(path).expanduser() / _ADAPTER_CONFIG).is_file()


def is_ensemble(path: str | Path) -> bool:
    """Whether `path` is a folder with several reward models that belong together."""
    return (Path(path).expanduser() / ENSEMBLE_FILE).is_file()


def member_folders(path: str | Path, key: str = "model.path") -> list[str]:
    """The folders of the members of the ensemble in `path`, in order. Raises `ArtifactError` for a broken list."""
    folder = Path(path).expanduser()
    place = (folder / ENSEMBLE_FILE).absolute()
    try:
        content = json.loads(place.read_text(encoding="utf-8"))
        members = [str(folder / name) for name in content["members"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"{key}: {place} is not the list of an ensemble's members ({error}); save it again"
        ) from error
    if len(members) < 2:
        raise ArtifactError(f"{key}: {place} names {len(members)} members; an ensemble has two or more. Save it again")
    return members


def single_model(path: str, key: str = "model.path") -> str:
    """`path` itself, or the first member's folder of an ensemble: what stands for it where one model is needed."""
    return member_folders(path, key)[0] if is_ensemble(path) else path


def base_of(path: str | Path, key: str = "model.path") -> str:
    """The folder or hub id of the model that the adapter in folder `path` was trained on.

    Raises `ArtifactError` when the adapter does not say it, when the folder is gone, or when it holds an adapter too.
    """
    folder = Path(path).expanduser()
    place = (folder / _ADAPTER_CONFIG).absolute()
    try:
        content = json.loads((folder / _ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{key}: {place} is not valid JSON ({error}); save the adapter again") from error
    base = content.get("base_model_name_or_path") if isinstance(content, dict) else None
    if not isinstance(base, str) or not base.strip():
        raise ArtifactError(
            f"{key}: {place} does not name the model that the adapter belongs to; write the model's folder or hub id "
            "there as base_model_name_or_path"
        )
    if not is_local(base):
        return base
    if not Path(base).expanduser().is_dir():
        raise ArtifactError(
            f"{key}: the adapter {folder.absolute()} belongs to the base model {base}, and there is no such folder. "
            f"Put the base back, or write its new place into base_model_name_or_path of {place}"
        )
    if is_adapter(base):
        raise ArtifactError(
            f"{key}: the adapter {folder.absolute()} belongs to {base}, which is an adapter itself. Merge that one "
            "into its base: AutoPeftModelForCausalLM.from_pretrained(base).merge_and_unload().save_pretrained(folder)"
        )
    return base


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder holds the files of a tokenizer."""
    return any(all((folder / name).is_file() for name in names) for names in _TOKENIZERS)


def _missing_folder_message(folder: Path, key: str) -> str:
    message = f"{key}: there is no model folder {folder.absolute()}"
    parent = folder.absolute().parent
    if not parent.is_dir():
        return f"{message}, nor its parent folder. Check the spelling; a hub id has the form owner/name"
    names = sorted(entry.name for entry in parent.iterdir() if entry.is_dir())
    near = difflib.get_close_matches(folder.name, names, n=3, cutoff=0.5)
    if near:
        return f"{message}. Did you mean {' or '.join(str(parent / name) for name in near)}?"
    return f"{message}. Check the spelling; a hub id has the form owner/name"


def _check_adapter(folder: Path, key: str) -> None:
    if not any((folder / name).is_file() for name in _ADAPTER_WEIGHTS):
        raise ArtifactError(
            f"{key}: {folder.absolute()} has no weights of its adapter (expected {_ADAPTER_WEIGHTS[0]}); save it again"
        )
    check_model_path(base_of(folder, key), f"{key} (base of the adapter {folder.absolute()})")


def _check_config(folder: Path, key: str) -> None:
    config = folder / "config.json"
    if not config.is_file():
        raise ArtifactError(
            f"{key}: {folder.absolute()} is not a model folder: it has no config.json. "
            "Expected a folder that save_pretrained of transformers wrote"
        )
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{key}: {config.absolute()} is not valid JSON ({error}); save the model again") from error
    if not isinstance(content, dict) or "model_type" not in content:
        raise ArtifactError(f"{key}: {config.absolute()} does not name a model_type; save the model again")


def _check_weights(folder: Path, key: str) -> None:
    if not any(True for pattern in _WEIGHTS for _ in folder.glob(pattern)):
        raise ArtifactError(
            f"{key}: {folder.absolute()} has no weights (expected *.safetensors or pytorch_model.bin). "
            f"If the model is still being written, wait for it; else save it again with save_pretrained"
        )
    for index in folder.glob("*.index.json"):
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ArtifactError(f"{key}: {index.absolute()} is not a valid index of weights; save again") from error
        missing = sorted(name for name in shards if not (folder / name).is_file())
        if missing:
            raise ArtifactError(f"{key}: {folder.absolute()} lacks weight files: {', '.join(missing)}; copy it again")
