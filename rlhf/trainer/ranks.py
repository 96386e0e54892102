"""The trainer on one process, or on several that a launcher started from the user's own script."""

from __future__ import annotations

import atexit
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import nn

from rlhf.config.distributed import DistributedConfig
from rlhf.config.ppo import PPOConfig
from rlhf.config.zero import ZeroConfig
from rlhf.distributed.runtime import Runtime
from rlhf.distributed.slurm import adopt_slurm, under_launcher
from rlhf.errors import ConfigError
from rlhf.runs.files import fingerprint
from rlhf.trainer.settings import weights_fingerprint

if TYPE_CHECKING:
    from rlhf.stages.sampling import EncodedPrompt


def start_runtime(config: DistributedConfig, zero: ZeroConfig, seed: int) -> Runtime:
    """This rank. Under torchrun, accelerate, deepspeed or srun the number of processes is the launcher's.

    Raises `ConfigError` for several processes without a launcher: a trainer does not start any; and for frozen models
    that are to be sharded, since its caller may use them on one rank alone.
    """
    if zero.shard_frozen:
        raise ConfigError(
            "zero.shard_frozen is for `rlhf run`: the trainer keeps the reference and the reward model whole, so that "
            "the script can use them, on one rank alone too. Leave it out"
        )
    adopt_slurm(os.environ)
    if under_launcher(os.environ):
        if config.num_processes == 1:
            local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ["WORLD_SIZE"])
            config = config.model_copy(update={"num_processes": local})
    elif config.num_processes > 1:
        raise ConfigError(
            f"distributed.num_processes is {config.num_processes}, and the trainer runs in the process it is made in. "
            f"Start the script with torchrun --nproc-per-node={config.num_processes}, accelerate launch, deepspeed or "
            "srun, and leave num_processes out"
        )
    runtime = Runtime.start(config, zero, seed)
    atexit.register(runtime.stop)
    return runtime


def check_sizes(args: PPOConfig, runtime: Runtime) -> None:
    """Raises `ConfigError` when the ranks cannot share a minibatch equally."""
    size = args.batch_size // args.num_minibatches
    if size % runtime.world_size:
        raise ConfigError(
            f"args.batch_size / args.num_minibatches ({size}) must be a multiple of the {runtime.world_size} processes"
        )


def check_equal(runtime: Runtime, models: Mapping[str, nn.Module], prompts: Sequence[EncodedPrompt]) -> None:
    """Raises `ConfigError`, on all ranks, where a script made other models or prompts on another rank."""
    if runtime.world_size == 1:
        return
    mine = {name: weights_fingerprint(model) for name, model in models.items()}
    mine["train_dataset"] = fingerprint([prompt.key for prompt in prompts])
    everyone = runtime.gather_objects(mine)
    different = [name for name, value in everyone[0].items() if any(other[name] != value for other in everyone)]
    if different:
        raise ConfigError(
            f"{', '.join(different)} differ between the processes. Each process runs the whole script: load models "
            "from one folder, or call transformers.set_seed before making them, and keep the rows in one order"
        )
