"""`zero`: how DeepSpeed ZeRO shards a training stage."""

from __future__ import annotations

import json
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from rlhf.config.base import Section

AUTO = "auto"
# Parts of a DeepSpeed JSON that would be second answers to what other sections of the config say.
_REFUSED = {
    "optimizer": "the optimiser is that of the stage's section (learning_rate, adam_beta1, ...)",
    "scheduler": "the schedule is that of the stage's section (schedule, warmup_steps, ...)",
    "bfloat16": "the part is called bf16",
    "train_batch_size": "it is sft.batch_size, reward_model.batch_size, and the minibatch of stage ppo",
}
_REFUSED_WHEN_ENABLED = {
    "fp16": "distributed.precision is fp32 or bf16",
    "amp": "distributed.precision is fp32 or bf16",
    "torch_autocast": "distributed.precision is fp32 or bf16",
    "elasticity": "a run goes on with another number of ranks by itself",
    "data_efficiency": "the data and their order are rlhf's",
    "curriculum_learning": "the data and their order are rlhf's",
    "hybrid_engine": "rollouts gather the weights by themselves",
    "autotuning": "`rlhf plan` says what fits",
}
# The rest of what DeepSpeed 0.19 reads and rlhf can train with; it ignores a top-level name that it does not know.
_ENTRIES = frozenset(
    {
        *("zero_optimization", "bf16", "data_types", "gradient_clipping", "gradient_accumulation_steps"),
        *("train_micro_batch_size_per_gpu", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"),
        *("communication_data_type", "prescale_gradients", "gradient_predivide_factor", "gradient_allreduce_op"),
        *("disable_allgather", "disable_python_gc", "steps_per_print", "wall_clock_breakdown", "memory_breakdown"),
        *("dump_state", "log_level", "activation_checkpointing", "comms_logger", "flops_profiler", "timers", "aio"),
        *("tensorboard", "wandb", "csv_monitor", "comet", "checkpoint", "use_node_local_storage", "compile"),
        *("dataloader_drop_last", "managed_gradient_accumulation"),
    }
)
# Within zero_optimization, with what is written instead.
_REFUSED_IN_ZERO = {
    "cpu_offload": "it is offload_optimizer now",
    "cpu_offload_params": "it is offload_param now",
    "cpu_offload_use_pin_memory": "it is pin_memory of offload_optimizer now",
    "zenflow": "it needs an optimiser of DeepSpeed's, and rlhf trains with torch's AdamW",
}
# Our field by the part of the JSON's zero_optimization that says the same.
_OFFLOAD = {"offload_optimizer": "offload_optimizer", "offload_parameters": "offload_param"}
_KEYS = {"stage": "stage", **_OFFLOAD}


class ZeroConfig(Section):
    """ZeRO stage and offload. Stage 0 trains without DeepSpeed: one process, or plain data parallelism.

    With `config`, a JSON file for DeepSpeed, stage and offload are the file's. `content` is what the file
    `content_of` held when the configuration was composed: the frozen config of a run says what it runs with, and does
    not read the file again. A value that contradicts the file raises `ValueError`.
    """

    stage: Literal[0, 1, 2, 3] = Field(0, description="what is sharded: 1 optimiser, 2 + gradients, 3 + parameters")
    offload_optimizer: bool = Field(False, description="keep optimiser state in CPU memory (stages 1 to 3)")
    offload_parameters: bool = Field(False, description="keep parameters in CPU memory (stage 3)")
    shard_frozen: bool = Field(
        False,
        description="shard stage ppo's reference and reward models as well, a layer gathered at a time (stage 3)",
    )
    config: str | None = Field(
        None, description="a DeepSpeed JSON file in the place of the generated configuration; zero.extra still applies"
    )
    content: dict[str, Any] = Field({}, description="what the file zero.config holds; filled in from it")
    content_of: str | None = Field(None, description="the file that zero.content was read from; filled in")
    extra: dict[str, Any] = Field({}, description="entries merged into the DeepSpeed JSON, generated or yours")

    @model_validator(mode="before")
    @classmethod
    def _take_from_file(cls, values: Any) -> Any:
        """Reads `config`, and fills in what the file decides. Wrong types are left for the fields to complain about."""
        if not isinstance(values, Mapping):
            return values
        values, path, content = dict(values), values.get("config"), values.get("content") or {}
        if values.get("content_of") != path or not content:
            # The content given is another file's, or there is none yet. Without a file it may be given as it is.
            if isinstance(path, str):
                content = read_deepspeed_file(path)
            elif values.get("content_of") is not None:
                content = {}
            values |= {"content": content, "content_of": path}
        if isinstance(content, Mapping) and content:
            values |= _taken(content, values, path if isinstance(path, str) else "zero.content")
        return values

    @model_validator(mode="after")
    def _offload_needs_a_stage(self) -> ZeroConfig:
        if self.offload_optimizer and self.stage == 0:
            raise ValueError("offload_optimizer needs zero.stage 1, 2 or 3")
        if self.offload_parameters and self.stage != 3:
            raise ValueError("offload_parameters needs zero.stage 3")
        if self.shard_frozen and self.stage != 3:
            raise ValueError("shard_frozen needs zero.stage 3: below it parameters are whole on every rank")
        return self

    @model_validator(mode="after")
    def _file_is_for_deepspeed(self) -> ZeroConfig:
        if self.content and self.stage == 0:
            raise ValueError(
                f"{self.file}: stage 0 runs without DeepSpeed, so nothing would read the file. Give "
                'zero_optimization.stage 1, 2 or 3 in it (or "auto", and set zero.stage), or leave zero.config out'
            )
        return self

    @model_validator(mode="after")
    def _extra_fits(self) -> ZeroConfig:
        if self.extra and self.stage == 0:
            raise ValueError(
                f"zero.extra has {', '.join(self.extra)}, and stage 0 runs without DeepSpeed, so nothing would read "
                "it. Choose zero=stage1, stage2 or stage3, or leave zero.extra out"
            )
        for name, value in _decided(self.extra, "zero.extra").items():
            ours, part = getattr(self, name), self.extra["zero_optimization"][_KEYS[name]]
            if isinstance(part, Mapping) and "device" not in part:
                continue  # more about the offload that our key asks for
            if ours != value:
                raise ValueError(
                    f"zero.extra has zero_optimization.{_KEYS[name]}, by which zero.{name} would be "
                    f"{json.dumps(value)}, but zero.{name} is {json.dumps(ours)}. Set zero.{name}, and leave "
                    f"{_KEYS[name]} out of zero.extra"
                )
        return self

    @model_validator(mode="after")
    def _can_be_saved(self) -> ZeroConfig:
        for source, body in ((self.file, self.content), ("zero.extra", self.extra)):
            section = body.get("zero_optimization")
            if not isinstance(section, Mapping):
                continue
            for key in _OFFLOAD.values():
                part = section.get(key)
                if isinstance(part, Mapping) and part.get("device") == "nvme":
                    raise ValueError(
                        f"{source} has zero_optimization.{key}.device=nvme, and a training that is swapped to NVMe "
                        "cannot be saved: it would be lost with the first interruption. Use cpu, or more ranks"
                    )
            if isinstance(section, Mapping) and section.get("mics_shard_size", -1) not in (-1, AUTO):
                raise ValueError(
                    f"{source} has zero_optimization.mics_shard_size, which is not supported: leave it out"
                )
        return self

    @property
    def file(self) -> str:
        """Where `content` comes from, for messages."""
        return self.config or "zero.content"


def read_deepspeed_file(path: str) -> dict[str, Any]:
    """A DeepSpeed JSON file's content. Raises `ValueError` that says where in the file the mistake is."""
    try:
        body = json.loads(Path(path).expanduser().read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except OSError as error:
        raise ValueError(f"config: {path} cannot be read ({error.strerror}); expected a DeepSpeed JSON file") from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"config: {path} is no JSON: line {error.lineno}, column {error.colno}: {error.msg}"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"config: {path} is no text in UTF-8, byte {error.start} is not") from error
    except _TwiceError as error:
        raise ValueError(f'config: {path} has the key "{error}" twice in one object; leave one out') from error
    if not isinstance(body, dict) or not body:
        raise ValueError(f"config: {path} must hold a JSON object with DeepSpeed's settings, {{...}}, and it is not")
    return body


class _TwiceError(Exception):
    """A key that stands twice in one JSON object."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise _TwiceError(key)
        result[key] = value
    return result


def contradiction(file: str, key: str, theirs: object, ours: str, remedy: str) -> str:
    """The text of an error about a DeepSpeed JSON that says something else than the configuration."""
    return f'{file} has {key}={json.dumps(theirs)}, but {ours}. {remedy}, or write "auto" there'


def _taken(content: Mapping[str, Any], values: Mapping[str, Any], file: str) -> dict[str, Any]:
    """Our fields as the file decides them. Raises `ValueError` where it contradicts `values` or decides too much."""
    found = _decided(content, file)
    for name, value in found.items():
        if name in values and values[name] != value:
            key = _KEYS[name]
            ours, theirs = f"zero.{name} is {json.dumps(values[name])}", content["zero_optimization"][key]
            remedy = f"Leave zero.{name} out (a preset zero=... sets it too)"
            raise ValueError(contradiction(file, f"zero_optimization.{key}", theirs, ours, remedy))
    return found


def _decided(content: Mapping[str, Any], file: str) -> dict[str, Any]:
    """Our fields as entries of a DeepSpeed JSON decide them. Raises `ValueError` for entries that are not theirs."""
    for key, whose in _REFUSED.items():
        if content.get(key) not in (None, AUTO):
            raise ValueError(f"{file} has {key}={json.dumps(content[key])}, but {whose}. Leave {key} out")
    for key, whose in _REFUSED_WHEN_ENABLED.items():
        part = content.get(key, {})
        if not isinstance(part, Mapping) or part.get("enabled") not in (None, False, AUTO):
            raise ValueError(f"{file} has {key}={json.dumps(part)}, but {whose}. Leave {key} out")
    for key in content:
        if key not in _ENTRIES and key not in _REFUSED and key not in _REFUSED_WHEN_ENABLED:
            names = get_close_matches(key, _ENTRIES, n=1)
            hint = f"; did you mean {names[0]}?" if names else ""
            raise ValueError(f"{file} has {key}, which is no entry of a DeepSpeed JSON that rlhf can train with{hint}")
    if not isinstance(content.get("bf16", {}), Mapping):
        raise ValueError(f'{file}: bf16 must be an object such as {{"enabled": "auto"}}')
    section = content.get("zero_optimization", {})
    if not isinstance(section, Mapping):
        raise ValueError(f"{file}: zero_optimization must be an object, it is {json.dumps(section)}")
    for key, instead in _REFUSED_IN_ZERO.items():
        if section.get(key) not in (None, False, AUTO):
            raise ValueError(f"{file} has zero_optimization.{key}, and {instead}")
    for key in _OFFLOAD.values():
        part = section.get(key)
        if isinstance(part, Mapping) and part.get("ratio", 1) not in (1, AUTO):
            raise ValueError(
                f"{file} has zero_optimization.{key}.ratio={json.dumps(part['ratio'])}: a part of the optimiser on the "
                "CPU needs an optimiser of DeepSpeed's, and rlhf trains with torch's AdamW. Leave ratio out"
            )
    stage = section.get("stage", AUTO)
    if stage != AUTO and (isinstance(stage, bool) or stage not in (0, 1, 2, 3)):
        raise ValueError(f'{file}: zero_optimization.stage must be 0, 1, 2, 3 or "auto", it is {json.dumps(stage)}')
    found: dict[str, Any] = {} if stage == AUTO else {"stage": int(stage)}
    for name, key in _OFFLOAD.items():
        part = section.get(key, AUTO)
        if part != AUTO:
            found[name] = isinstance(part, Mapping) and part.get("device") not in (None, "none")
    return found
