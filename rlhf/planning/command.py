"""`rlhf plan`: composes the config, plans it and prints the answer. A plan that says no is an answer: exit code 0."""

from __future__ import annotations

import gc
import json
from collections.abc import Sequence

from rlhf.config import RLHFConfig
from rlhf.config.compose import load_config
from rlhf.config.root import uneven_batches
from rlhf.errors import EXIT_SUCCESS


def run_plan(arguments: Sequence[str]) -> int:
    """Prints the plan, as JSON with `--json`. Raises `ConfigError` for what cannot be planned."""
    as_json = "--json" in arguments
    wanted = [argument for argument in arguments if argument != "--json"]
    config, assumed = with_even_batches(load_config(wanted, uneven_batches=True).config)
    # The command is short-lived, and the collector takes a sixth of its time, looking at what is being imported.
    gc.disable()
    from rlhf.planning.plan import make_plan
    from rlhf.planning.render import render, to_json

    plan = make_plan(config)
    if as_json:
        print(json.dumps({**to_json(plan), "assumed": assumed}, indent=2))
    else:
        print(render(plan))
        if assumed:
            print(
                f"\nplanned with {' '.join(assumed)}: the {config.distributed.world_size} processes cannot share the "
                "batch that the config gives, so a run needs this too"
            )
    # Else the interpreter looks once more at everything imported before it ends, which takes a fifth of the command.
    gc.freeze()
    return EXIT_SUCCESS


def with_even_batches(config: RLHFConfig) -> tuple[RLHFConfig, list[str]]:
    """The config with the next larger batches that its ranks can share, and the overrides that make them.

    What is asked is whether a training fits on so many processes; the batch need not have been thought of yet.
    """
    larger = uneven_batches(config)
    sections = {stage: getattr(config, stage).model_copy(update={"batch_size": size}) for stage, size in larger.items()}
    return config.model_copy(update=sections), [f"{stage}.batch_size={size}" for stage, size in larger.items()]
