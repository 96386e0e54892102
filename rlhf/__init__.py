"""RLHF research framework: supervised warm start, preference collection, reward model, PPO, evaluation.

`from rlhf import PPOTrainer, PPOConfig` is PPO for people who write Python; a name is loaded when it is asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlhf.config.distributed import DistributedConfig as DistributedConfig
    from rlhf.config.peft import LoRAConfig as LoRAConfig
    from rlhf.config.ppo import PPOConfig as PPOConfig
    from rlhf.config.tracking import TrackingConfig as TrackingConfig
    from rlhf.config.zero import ZeroConfig as ZeroConfig
    from rlhf.errors import UserError as UserError
    from rlhf.stages.ppo.job import Callback as PPOCallback
    from rlhf.stages.ppo.job import TrainingView as TrainingView
    from rlhf.trainer.ppo import PPOResult as PPOResult
    from rlhf.trainer.ppo import PPOTrainer as PPOTrainer

__version__ = "0.1.0"

# Name: the module that has it, and what it is called there. Importing `rlhf` itself loads none of them.
_LAZY: dict[str, tuple[str, str]] = {
    "DistributedConfig": ("rlhf.config.distributed", "DistributedConfig"),
    "LoRAConfig": ("rlhf.config.peft", "LoRAConfig"),
    "PPOCallback": ("rlhf.stages.ppo.job", "Callback"),
    "PPOConfig": ("rlhf.config.ppo", "PPOConfig"),
    "PPOResult": ("rlhf.trainer.ppo", "PPOResult"),
    "PPOTrainer": ("rlhf.trainer.ppo", "PPOTrainer"),
    "TrackingConfig": ("rlhf.config.tracking", "TrackingConfig"),
    "TrainingView": ("rlhf.stages.ppo.job", "TrainingView"),
    "UserError": ("rlhf.errors", "UserError"),
    "ZeroConfig": ("rlhf.config.zero", "ZeroConfig"),
}

__all__ = [
    "DistributedConfig",
    "LoRAConfig",
    "PPOCallback",
    "PPOConfig",
    "PPOResult",
    "PPOTrainer",
    "TrackingConfig",
    "TrainingView",
    "UserError",
    "ZeroConfig",
    "__version__",
]


if not TYPE_CHECKING:  # a type checker that saw it would take any name for one of ours

    def __getattr__(name: str) -> object:
        if name not in _LAZY:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module, attribute = _LAZY[name]
        value: object = getattr(importlib.import_module(module), attribute)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
