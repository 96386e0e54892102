"""`rlhf plan`: composes the config, plans it and prints the answer. A plan that says no is an answer: exit code 0."""

from __future__ import annotations

import gc
import json
from collections.abc import Sequence

from rlhf.config.compose import load_config
from rlhf.errors import EXIT_SUCCESS


def run_plan(arguments: Sequence[str]) -> int:
    """Prints the plan, as JSON with `--json`. Raises `ConfigError` for what cannot be planned."""
    as_json = "--json" in arguments
    config = load_config([argument for argument in arguments if argument != "--json"]).config
    # The command is short-lived, and the collector takes a sixth of its time, looking at what is being imported.
    gc.disable()
    from rlhf.planning.plan import make_plan
    from rlhf.planning.render import render, to_json

    plan = make_plan(config)
    print(json.dumps(to_json(plan), indent=2) if as_json else render(plan))
    return EXIT_SUCCESS
