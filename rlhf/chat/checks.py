"""What can be known of a chat model before torch is imported: mistakes, and what decides its replies."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from rlhf.config.chat import PRACTICAL_FIELDS, ChatModelConfig
from rlhf.errors import ConfigError
from rlhf.models.paths import check_model_path, is_local


def check_chat(config: ChatModelConfig, key: str) -> None:
    """Checks that the model's folder or the variable with the address's key is there; `key` is that of the section.

    Raises `ConfigError` or `ArtifactError`. Whether the address answers is seen when it is asked.
    """
    if config.model is not None:
        check_model_path(config.model, f"{key}.model")
    secret(config, key)


def secret(config: ChatModelConfig, key: str) -> str | None:
    """The key of the address, from the environment; None where the config names no variable.

    Raises `ConfigError` when the variable is not set.
    """
    variable = config.api_key_variable
    if variable is None:
        return None
    value = os.environ.get(variable, "").strip()
    if not value:
        raise ConfigError(
            f"{key}.api_key_variable={variable}: there is no such environment variable, or it is empty; set it: "
            f"export {variable}=..."
        )
    return value


def deciding_values(config: ChatModelConfig) -> dict[str, Any]:
    """The config as JSON values without what decides only how replies are had; of a local folder its content's marks.

    For fingerprints: equal values give equal replies of an unchanged server.
    """
    values = {name: value for name, value in config.model_dump(mode="json").items() if name not in PRACTICAL_FIELDS}
    if config.model is not None and is_local(config.model):
        values["model"] = folder_marks(Path(config.model).expanduser())
    return values


def folder_marks(folder: Path) -> str:
    """A hash of the names, sizes and times of a folder's files: weights are too large to be read for this."""
    digest = hashlib.sha256()
    for file in sorted(file for file in folder.iterdir() if file.is_file()):
        status = file.stat()
        digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()
