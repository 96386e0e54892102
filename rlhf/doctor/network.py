"""W&B and the hub. A run needs neither, so nothing here is red, and nothing here waits for more than a few seconds."""

from __future__ import annotations

import importlib.util

from rlhf.config import RLHFConfig
from rlhf.config.data import paths_of
from rlhf.data.hub_access import why_silent
from rlhf.doctor.finding import Finding, green, yellow
from rlhf.models.paths import is_local
from rlhf.runs.wandb_logger import has_api_key, resolve_mode, server_address

SECONDS = 3.0


def check_wandb(config: RLHFConfig, seconds: float = SECONDS) -> Finding:
    """Whether metrics go to W&B, and whether its server answers where they go there while the run runs."""
    name, asked = "W&B", config.tracking.wandb
    if importlib.util.find_spec("wandb") is None:
        return yellow(name, "wandb is not installed; metrics go to metrics.jsonl alone", "pip install wandb")
    mode = resolve_mode(config.tracking)
    if mode == "disabled":
        return green(name, "disabled; metrics go to metrics.jsonl alone")
    if mode == "offline":
        if asked == "online" and not has_api_key():
            return yellow(name, "tracking.wandb=online, but there is no API key: runs log offline", "wandb login")
        login = "" if has_api_key() else "no API key: "
        return green(name, f"{login}runs log offline (wandb sync uploads later)")
    server = server_address()
    reason = why_silent(server, seconds)
    if reason is not None:
        return yellow(
            name,
            f"there is an API key, but {server} does not answer ({reason}); every stage tries it for 10 s, then logs "
            "offline",
            "set tracking.wandb=offline (wandb sync uploads later), or check the network, the proxy and WANDB_BASE_URL",
        )
    return green(name, f"there is an API key for {server}, which answers")


def check_hub(config: RLHFConfig, seconds: float = SECONDS) -> Finding:
    """Whether models and data can be fetched from the hub."""
    from huggingface_hub import constants, get_token

    name = "hub"
    wanted = [path for path in (config.model.path, *paths_of(config.data)) if path and not is_local(path)]
    use = f"; this config asks it for {' and '.join(wanted)}" if wanted else ""
    if constants.HF_HUB_OFFLINE:
        return green(name, f"HF_HUB_OFFLINE is set: models and data come from folders and the cache{use}")
    login = "logged in" if get_token() else "not logged in, which private and gated models need"
    reason = why_silent(constants.ENDPOINT, seconds)
    if reason is None:
        return green(name, f"{constants.ENDPOINT} answers; {login}")
    return yellow(
        name,
        f"{constants.ENDPOINT} does not answer ({reason}); folders and the cache work{use}",
        "check the network, the proxy and HF_ENDPOINT; without a network set HF_HUB_OFFLINE=1 and give folders as "
        "model.path and data.path",
    )
