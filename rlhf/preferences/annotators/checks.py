"""What can be known of annotators before torch is imported."""

from __future__ import annotations

from pathlib import Path

from rlhf.chat.checks import check_chat
from rlhf.chat.questions import PAIR_FIELDS, RANKING_FIELDS, RATING_FIELDS, read_template
from rlhf.config.annotators import (
    AnyAnnotatorConfig,
    FunctionAnnotator,
    JudgeAnnotator,
    MixtureAnnotators,
    RuleAnnotator,
    SimulatedAnnotators,
)
from rlhf.config.data import DataConfig
from rlhf.errors import ConfigError
from rlhf.rewards import checks as reward_checks

_TEMPLATES = {"template": PAIR_FIELDS, "ranking_template": RANKING_FIELDS, "rating_template": RATING_FIELDS}


def check_store(path: str | None, key: str) -> None:
    """Raises `ConfigError` where no preference store is nor can be made; `key` is the config key of the path."""
    if path is None:
        return
    store = Path(path).expanduser()
    if store.is_dir():
        raise ConfigError(f"{key}={path} is a folder; name the store's file in it, such as preferences.sqlite")
    if not store.parent.is_dir():
        raise ConfigError(f"{key}={path} needs the folder {store.parent}, which is not there; make it")


def check_annotators(config: AnyAnnotatorConfig, data: DataConfig, key: str) -> None:
    """Checks the files, folders and variables that annotators need; `key` is that of the section.

    Raises `ConfigError` or `ArtifactError` for what is not there, and for the gold reward where the data has none.
    """
    if isinstance(config, MixtureAnnotators):
        for name, part in config.parts.items():
            check_annotators(part.annotator, data, f"{key}.parts.{name}.annotator")
    elif isinstance(config, SimulatedAnnotators | RuleAnnotator):
        reward_checks.preflight({"reward": config.reward}, data, key)
    elif isinstance(config, FunctionAnnotator):
        reward_checks.check_python_file(config.file, config.function, key)
    elif isinstance(config, JudgeAnnotator):
        check_chat(config, key)
        for name, fields in _TEMPLATES.items():
            read_template(getattr(config, name), f"{key}.{name}", fields)
    elif config.instructions is not None and not Path(config.instructions).expanduser().is_file():
        raise ConfigError(f"{key}.instructions={config.instructions}: there is no such file; name one in markdown")
