"""`rlhf serve`: from the command line to a running reward server."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rlhf
from rlhf.config import RLHFConfig
from rlhf.config.compose import load_config
from rlhf.config.rewards import ModelReward, RewardConfig
from rlhf.config.serve import ServeConfig
from rlhf.config.zero import ZeroConfig
from rlhf.data.templates import chat_template
from rlhf.errors import EXIT_SUCCESS, ConfigError
from rlhf.listening import address, listen
from rlhf.models.paths import base_of, check_model_path, is_adapter, is_ensemble, is_local, member_folders
from rlhf.rewards import checks
from rlhf.rewards.remote_client import PROTOCOL, SERVICE
from rlhf.runs.console import quiet_libraries
from rlhf.runs.files import fingerprint, hash_path
from rlhf.terminal import say, warn

if TYPE_CHECKING:
    from rlhf.distributed.runtime import Runtime
    from rlhf.rewards.composition import RewardSet
    from rlhf.serving.app import Description

SECTION = "serve.rewards"
_ONLY = "reward"


def run_serve(arguments: Sequence[str]) -> int:
    """Serves until a signal comes: 128 + its number is the exit code, as of other verbs.

    With `--json` one line of JSON says that it is ready, and where. Raises `ConfigError` for what cannot be served.
    """
    as_json = "--json" in arguments
    config = load_config(served_keys([argument for argument in arguments if argument != "--json"])).config
    section = config.serve
    check(section)
    token = _token(section)
    from rlhf.serving.server import Server

    # Before any model is loaded, which takes long.
    bound = listen(section.host, section.port, "serve.")
    try:
        quiet_libraries()
        from rlhf.distributed.runtime import Runtime
        from rlhf.serving.app import make_app
        from rlhf.serving.batching import Batcher
        from rlhf.serving.scoring import ServedRewards, warm_up

        started = time.monotonic()
        runtime = Runtime.start(config.distributed, ZeroConfig(), config.seed)
        rewards = load_rewards(config, runtime)
        description = describe(config, rewards, runtime)
        served = ServedRewards(rewards, section.max_batch_size, runtime.device)
        warm_up(served)
        batcher = Batcher(served, section.max_wait_ms / 1000, section.max_waiting_rows)
        base = address(section.host, bound.getsockname()[1])

        def ready() -> None:
            _announce(base, section, description, time.monotonic() - started, as_json)

        server = Server(make_app(section, batcher, description, token), section, ready)
        server.run(sockets=[bound])
    finally:
        bound.close()
    batcher.close()
    if server.stopped_by is None:
        return EXIT_SUCCESS
    warn(f"rlhf serve: stopped by {signal.Signals(server.stopped_by).name}; requests under way were answered")
    return 128 + server.stopped_by


def served_keys(arguments: Sequence[str]) -> list[str]:
    """The arguments with their short forms written out.

    `reward.model=PATH` is a reward model, `reward={...}` and `reward.KEY=` one reward of any type, and `rewards...` a
    weighted set: all of them keys of `serve.rewards`.
    """
    full: list[str] = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        stem = key.lstrip("-+~")
        mark = key[: len(key) - len(stem)]
        if stem == "reward.model" and equals:
            full += [f"{SECTION}.{_ONLY}.type=model", f"{SECTION}.{_ONLY}.path={value}"]
        elif stem == "reward" or stem.startswith("reward."):
            full.append(f"{mark}{SECTION}.{_ONLY}{stem.removeprefix('reward')}{equals}{value}")
        elif stem == "rewards" or stem.startswith("rewards."):
            full.append(f"{mark}serve.{stem}{equals}{value}")
        else:
            full.append(argument)
    return full


def check(section: ServeConfig) -> None:
    """What can be known wrong before torch is imported. Raises `ConfigError`."""
    if not section.rewards:
        raise ConfigError(
            "rlhf serve needs something to serve: reward.model=FOLDER_OR_HUB_ID, or another reward, such as "
            "'reward={type: math}', or several: 'rewards={helpful: {type: model, path: ...}, short: {type: length}}'"
        )
    for name, reward in section.rewards.items():
        key = f"{SECTION}.{name}"
        if isinstance(reward, ModelReward):
            if reward.path is None:
                raise ConfigError(f"{key}.path must name the reward model: the server belongs to no run")
            check_model_path(os.path.expanduser(reward.path), f"{key}.path")
        if getattr(reward, "unit", None) == "tokens":
            raise ConfigError(
                f"{key}.unit=tokens: the server is given texts, and tokens are the policy's; set {key}.unit=words"
            )
    checks.preflight(section.rewards, None, SECTION)


def load_rewards(config: RLHFConfig, runtime: Runtime) -> RewardSet:
    """The rewards of `serve`, on the runtime's device; their models score texts."""
    from rlhf.rewards.build import build_rewards, folder_loader

    load = folder_loader(None, config.model, dtype=runtime.dtype, device=runtime.device, policy_tokenizer=None)
    return build_rewards(config.serve.rewards, load_model=load, section=SECTION)


def describe(config: RLHFConfig, rewards: RewardSet, runtime: Runtime) -> Description:
    """What `/info` says: who serves what, by which hash, within which limits."""
    from rlhf.serving.app import Description
    from rlhf.serving.scoring import learned_rewards, num_positions, only_statistics, wanted_columns

    section = config.serve
    positions = [limit for reward in learned_rewards(rewards) if (limit := num_positions(reward)) is not None]
    return Description(
        {
            "service": SERVICE,
            "protocol": PROTOCOL,
            "version": rlhf.__version__,
            "hash": served_hash(config, runtime.precision),
            "rewards": {name: _shown(reward) for name, reward in section.rewards.items()},
            "statistics": only_statistics(rewards),
            "may_abstain": any(entry.reward.may_abstain for entry in rewards.rewards if entry.weight),
            "columns": wanted_columns(section.rewards, rewards),
            "device": str(runtime.device),
            "precision": runtime.precision,
            "limits": {
                "max_request_rows": section.max_request_rows,
                "max_body_bytes": int(section.max_body_mib * 2**20),
                "max_batch_size": section.max_batch_size,
                "max_tokens": min(positions) if positions else None,
            },
        }
    )


def served_hash(config: RLHFConfig, precision: str) -> str:
    """SHA-256 of what decides the scores: configs, functions' files, models' content, chat template, precision."""
    paths, template = checks.reward_model_paths(config.serve.rewards), config.model.chat_template
    return fingerprint(
        {
            "rewards": checks.content_hash(config.serve.rewards, SECTION),
            "models": {name: _content(path, config.model.revision) for name, path in paths.items()},
            "model": config.model.model_dump(mode="json", include={"attention"}),
            "chat_template": None if template is None else chat_template(template),
            "precision": precision,
        }
    )


def _content(path: str, revision: str | None) -> str:
    if is_ensemble(path):
        # A member may be an adapter, whose base lies elsewhere.
        members = [_content(member, revision) for member in member_folders(path)]
        return f"{hash_path(Path(path).expanduser())} of {' and '.join(members)}"
    if is_adapter(path):
        return f"{hash_path(Path(path).expanduser())} on {_content(base_of(path), revision)}"
    return hash_path(Path(path).expanduser()) if is_local(path) else f"hub:{path}@{revision or 'main'}"


def _shown(reward: RewardConfig) -> Mapping[str, Any]:
    """A reward as `/info` shows it: without what names this machine's files, but for a model's own name."""
    values = reward.model_dump(mode="json", exclude={"file", "token_variable", "address"})
    if isinstance(reward, ModelReward):
        values["path"] = os.path.basename(os.path.normpath(reward.path or ""))
    return values


def _token(section: ServeConfig) -> str | None:
    if section.token_variable is None:
        if section.host not in ("127.0.0.1", "localhost", "::1"):
            warn(
                f"rlhf serve: serve.host={section.host} lets other machines in, and no token is asked for; name the "
                "environment variable that holds one in serve.token_variable"
            )
        return None
    token = os.environ.get(section.token_variable)
    if not token:
        raise ConfigError(
            f"serve.token_variable={section.token_variable}: there is no such environment variable, or it is empty. "
            "Set it to the token that clients must send."
        )
    return token


def _announce(address: str, section: ServeConfig, description: Description, seconds: float, as_json: bool) -> None:
    body = description.body
    if as_json:
        say(json.dumps({"event": "ready", "address": address, "process": os.getpid(), **body}))
        return
    what = ", ".join(f"{name} ({values['type']})" for name, values in body["rewards"].items())
    say(
        f"rlhf serve: {what} at {address}, ready after {seconds:.1f} s\n"
        f"  hash {body['hash'][:12]}, {body['precision']} on {body['device']}, up to {section.max_batch_size} "
        f"responses in one pass; in a config: {{type: remote, address: {address}}}. Ctrl-C ends."
    )
