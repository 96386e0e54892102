"""What of a config is made small so that its first steps run on a CPU; everything else is left as it is."""

from __future__ import annotations

import math
from typing import Any

from rlhf.config import RLHFConfig, config_from_values
from rlhf.config.provenance import flatten
from rlhf.config.run import RunConfig
from rlhf.config.serialize import plain_values
from rlhf.errors import ConfigError

STEPS, EXAMPLES, RESPONSES, TOKENS = 2, 4, 8, 64
# Stages that collect and sample, by the key of their settings of sampling.
_SAMPLINGS = (
    ("collect", "sampling"),
    ("evaluate", "sampling"),
    ("best_of_n", "sampling"),
    ("reward_model", "normalization", "sampling"),
)

# Sections that say where a run is written down and started, which its numbers do not depend on.
_SILENT = {("tracking",), ("launcher",), ("run",), ("preferences", "store"), ("preferences", "wait")}


def scaled(config: RLHFConfig) -> RLHFConfig:
    """The config with few steps, small batches and short responses, on one CPU process, without tracking.

    Nothing outside the folder of the proof is written: no store, no cache. Raises `ConfigError` where people label.
    """
    if "collect" in config.stages and config.preferences.asks_people:
        raise ConfigError(
            "stage collect asks people (preferences.annotator), whom a proof cannot wait for. Prove it with another "
            "annotator, such as 'preferences.annotator={type: rule, reward: {type: length}}'"
        )
    values = config.model_dump(mode="json")
    values["run"] = RunConfig().model_dump(mode="json")
    values["preferences"] |= {"store": None, "wait": False}
    for stage in ("sft", "reward_model", "dpo"):
        section = values[stage]
        section["batch_size"] = min(section["batch_size"], EXAMPLES)
        # Gradients are accumulated where they are in the config.
        accumulates = section["micro_batch_size"] is not None
        section["micro_batch_size"] = max(1, section["batch_size"] // 2) if accumulates else None
        section["max_steps"] = min(section["max_steps"] or STEPS, STEPS)
        section |= {"warmup_steps": min(section["warmup_steps"], 1), "log_every": 1, "save_every": STEPS}
    _scale_reward_model(values["reward_model"])
    values["dpo"]["num_comparisons"] = None
    _scale_ppo(values["ppo"])
    _scale_sampling_stages(values)
    values["distributed"] |= {"device": "cpu", "precision": "fp32", "num_processes": 1, "num_nodes": 1}
    values["distributed"] |= {"node_rank": None, "rendezvous": None, "num_threads": 1}
    values["zero"] = {"stage": 0}
    values["launcher"] = {"type": "local"}
    values["tracking"] |= {"wandb": "disabled"}
    return config_from_values(values, "the proof's sizes")


def _scale_reward_model(section: dict[str, Any]) -> None:
    section["num_comparisons"] = None
    section["num_members"] = min(section["num_members"], 2)
    if section["normalization"]["type"] == "sft_responses":
        section["normalization"]["num_responses"] = RESPONSES


def _scale_ppo(section: dict[str, Any]) -> None:
    """At least a row for each minibatch and whole groups of responses."""
    step = math.lcm(section["num_minibatches"], section["responses_per_prompt"])
    section["batch_size"] = min(section["batch_size"], -(-RESPONSES // step) * step)
    if section["micro_batch_size"] is not None:
        section["micro_batch_size"] = max(1, section["batch_size"] // section["num_minibatches"] // 2)
    section["rollout_batch_size"] = RESPONSES
    section["critic_warmup_updates"] = min(section["critic_warmup_updates"], 1)
    section["warmup_updates"] = min(section["warmup_updates"], 1)
    section["num_updates"] = min(section["num_updates"], STEPS + section["critic_warmup_updates"])
    section["ptx_batch_size"] = min(section["ptx_batch_size"], EXAMPLES)
    _shorten(section)
    section |= {"self_test": False, "guards": "warn", "save_every": STEPS, "exact_kl_rows": 1}


def _shorten(section: dict[str, Any]) -> None:
    """Shorter responses, with the limits within them in the same order."""
    section["max_response_tokens"] = min(section["max_response_tokens"], TOKENS)
    for name in ("min_response_tokens", "truncate_after"):
        if name in section:
            section[name] = min(section[name], section["max_response_tokens"] - 1)


def _scale_sampling_stages(values: dict[str, Any]) -> None:
    values["collect"] |= {
        "num_comparisons": RESPONSES,
        "num_validation_comparisons": EXAMPLES,
        "num_test_comparisons": EXAMPLES,
    }
    values["evaluate"] |= {"num_prompts": EXAMPLES, "bootstrap_resamples": 20, "num_samples_shown": 1}
    values["evaluate"]["num_demonstrations"] = min(values["evaluate"].get("num_demonstrations", 0), EXAMPLES)
    values["best_of_n"] |= {"num_prompts": EXAMPLES, "num_samples": 4, "sizes": None, "bootstrap_resamples": 20}
    for key in _SAMPLINGS:
        section = values
        for name in key:
            section = section.get(name, {})
        if section:
            _shorten(section)
            section["batch_size"] = RESPONSES


def changes(before: RLHFConfig, after: RLHFConfig) -> list[str]:
    """`key: old -> new` for every key that differs, of keys that the stages of the run read."""
    old, new = flatten(plain_values(before)), flatten(plain_values(after))
    unused = {"sft", "collect", "reward_model", "dpo", "ppo", "best_of_n", "evaluate"} - set(before.stages)
    found = []
    for key in old.keys() | new.keys():
        first, second = old.get(key), new.get(key)
        if first != second and key[0] not in unused and not {key[:1], key[:2]} & _SILENT:
            found.append(f"{'.'.join(key)}: {_shown(first)} -> {_shown(second)}")
    return sorted(found)


def _shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
