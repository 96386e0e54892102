"""Configuration: Hydra composes YAML groups and overrides, pydantic checks the result. Never imports torch."""

from rlhf.config.root import STAGES, RLHFConfig, StageName

__all__ = ["STAGES", "RLHFConfig", "StageName"]
