"""Configuration: Hydra composes YAML groups and overrides, pydantic checks the result. Never imports torch."""

from rlhf.config.compose import LoadedConfig, load_config, packaged_config_folder, render_sources
from rlhf.config.root import STAGES, STUDIES, STUDIES_OF_RUNS, RLHFConfig, StageName
from rlhf.config.serialize import config_from_file, config_from_values, config_hash, config_to_yaml

__all__ = [
    "STAGES",
    "STUDIES",
    "STUDIES_OF_RUNS",
    "LoadedConfig",
    "RLHFConfig",
    "StageName",
    "config_from_file",
    "config_from_values",
    "config_hash",
    "config_to_yaml",
    "load_config",
    "packaged_config_folder",
    "render_sources",
]
