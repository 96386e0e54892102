"""The pipeline: which stages run on which inputs, which are finished already, and how a stage is started.

A stage reads folders and writes folders. Its fingerprint is a hash of everything that decides its result: its config
section, the seed, the data's content and the content of its input artifacts. A stage whose result carries the same
fingerprint is skipped; one that was interrupted resumes; one that belongs to another fingerprint starts over.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf import data
from rlhf.config import RLHFConfig, StageName
from rlhf.config.peft import lora_content
from rlhf.config.ppo import BOOKKEEPING as PPO_BOOKKEEPING
from rlhf.config.provenance import flatten
from rlhf.config.training import BOOKKEEPING as TRAINING_BOOKKEEPING
from rlhf.data.templates import chat_template
from rlhf.distributed.zero import check_user_entries
from rlhf.errors import ArtifactError, ConfigError
from rlhf.models.paths import base_of, check_model_path, is_adapter, is_local
from rlhf.rewards import checks as reward_checks
from rlhf.rewards.checks import needs_reward_model, reward_model_paths
from rlhf.runs.files import fingerprint, hash_path
from rlhf.runs.folder import RunFolder, StageFolder, StageResult
from rlhf.runs.jsonable import read_json

# Raised when the code of a stage changes so that an old result is no longer what the same config gives.
FINGERPRINT_VERSION = 3

# Keys that do not decide what comes out, and where inputs lie (their content counts).
_BOOKKEEPING = {
    *TRAINING_BOOKKEEPING,
    "policy",
    "reference",
    "reward_model",
    "value_model",
    "base",
    "baseline",
    "comparisons",
}


@dataclass(frozen=True)
class StagePlan:
    """One stage of a run: its inputs (name to path or hub id), its fingerprint, and whether its output is there.

    `decided_by` is what the fingerprint is a hash of.
    """

    name: StageName
    inputs: Mapping[str, str]
    fingerprint: str
    decided_by: Mapping[str, Any]
    finished: bool


def _own_model(config: RLHFConfig, run: RunFolder, producer: StageName) -> str | None:
    """This run's model of a stage, when the stage is going to run or has finished earlier."""
    stage = run.stage(producer)
    if producer in config.stages or stage.read_result() is not None:
        return str(stage.model)
    return None


def _required(value: str | None, stage: StageName, name: str, producer: StageName) -> str:
    if value is not None:
        return value
    raise ConfigError(
        f"stage {stage} needs a {name.replace('_', ' ')}: this run has no finished stage {producer} and stages does "
        f"not list it. Add {producer} to stages, or set {stage}.{name}=FOLDER_OR_HUB_ID."
    )


def resolve_inputs(config: RLHFConfig, run: RunFolder, stage: StageName) -> dict[str, str]:
    """The models and folders a stage reads: what its config names, else what this run makes.

    Raises `ConfigError` when something is missing, naming the key that would provide it.
    """
    inputs = _inputs(config, run, stage)
    return {name: os.path.expanduser(path) for name, path in inputs.items()}


def _inputs(config: RLHFConfig, run: RunFolder, stage: StageName) -> dict[str, str]:
    sft = _own_model(config, run, "sft")
    if stage == "sft":
        base = config.sft.base or config.model.path
        return {} if base is None else {"base": base}
    if stage == "collect":
        return {"policy": _required(config.collect.policy or sft, stage, "policy", "sft")}
    if stage == "reward_model":
        base = _required(config.reward_model.base or sft or config.model.path, stage, "base", "sft")
        inputs = {"base": base}
        collected = "collect" in config.stages or run.stage("collect").read_result() is not None
        if config.reward_model.comparisons is not None:
            inputs["comparisons"] = config.reward_model.comparisons
        elif collected:
            inputs["comparisons"] = str(run.stage("collect").path / "comparisons")
        return inputs
    if stage == "ppo":
        return _ppo_inputs(config, run, sft)
    if stage == "evaluate":
        policy = _required(config.evaluate.policy or _own_model(config, run, "ppo"), stage, "policy", "ppo")
        baseline = _required(config.evaluate.baseline or sft, stage, "baseline", "sft")
        inputs = {"policy": policy, "baseline": baseline, "reference": config.evaluate.reference or baseline}
        reward_model = config.evaluate.reward_model or _own_model(config, run, "reward_model")
        if reward_model is not None:
            inputs["reward_model"] = reward_model
        elif config.evaluate.judge.type == "reward_model":
            _required(None, stage, "reward_model", "reward_model")
        return inputs
    return {}


def _ppo_inputs(config: RLHFConfig, run: RunFolder, sft: str | None) -> dict[str, str]:
    section = config.ppo
    policy = _required(section.policy or sft, "ppo", "policy", "sft")
    inputs = {"policy": policy, "reference": section.reference or policy}
    reward_model = section.reward_model or _own_model(config, run, "reward_model")
    if needs_reward_model(section.rewards):
        inputs["reward_model"] = _required(reward_model, "ppo", "reward_model", "reward_model")
    inputs |= {f"rewards.{name}.path": path for name, path in reward_model_paths(section.rewards).items()}
    if section.value_network == "shared_trunk":
        return inputs
    if section.value_model is not None:
        inputs["value_model"] = section.value_model
    elif section.value_init == "reward_model":
        if reward_model is None:
            raise ConfigError(
                "the critic of stage ppo starts from a reward model, and this run has none: set ppo.value_init=policy, "
                "or name a model in ppo.value_model."
            )
        inputs["value_model"] = reward_model
    return inputs


def _check_data_fits(config: RLHFConfig, run: RunFolder) -> None:
    """Stages that need a kind of data which this data cannot be."""
    kind = config.data.type
    if "collect" in config.stages and kind != "embedded":
        raise ConfigError(
            f"stage collect has simulated annotators, who need the gold reward of data=embedded; data.type is {kind}. "
            "Leave collect out of stages: the reward model then takes the data's own comparisons, for instance "
            "stages=[sft,reward_model,ppo,evaluate,report]."
        )
    if (
        "reward_model" in config.stages
        and kind == "embedded"
        and "comparisons" not in _inputs(config, run, "reward_model")
    ):
        raise ConfigError(
            "stage reward_model needs comparisons: data=embedded has none of its own, and this run has no finished "
            "stage collect. Add collect to stages, or set reward_model.comparisons=FOLDER."
        )
    judges = {"gold": "embedded", "classifier": "labelled_text"}
    judge = config.evaluate.judge.type
    if "evaluate" in config.stages and judges.get(judge, kind) != kind:
        raise ConfigError(
            f"evaluate.judge.type={judge} needs data={judges[judge]}; data.type is {kind}. "
            "Set evaluate.judge.type=reward_model."
        )


_SECTION_KEYS: dict[tuple[StageName, str], str] = {("sft", "base"): "model.path"}


def preflight(config: RLHFConfig, run: RunFolder) -> None:
    """Everything about the inputs that can be known wrong before torch is imported. Raises `ConfigError`."""
    stages = [stage for stage in config.stages if stage != "report"]
    check_user_entries(config)
    if stages:
        data.preflight(config.data)
        _check_data_fits(config, run)
        if "ppo" in stages:
            reward_checks.preflight(config.ppo.rewards, config.data)
    elif not any(run.stages.glob("*/result.json")):
        raise ConfigError(
            f"there is no finished stage to report in {run.path}. Give the experiment and keys of the run, or its "
            "folder as run.dir=FOLDER."
        )
    produced = {str(run.stage(stage).path) for stage in config.stages}
    for stage in stages:
        for name, path in resolve_inputs(config, run, stage).items():
            if any(path.startswith(folder + "/") for folder in produced):
                continue
            key = f"{stage}.{name}"
            if "." not in name and getattr(getattr(config, stage), name, None) is None:
                key = _SECTION_KEYS.get((stage, name), key)
            if name == "comparisons":
                _check_comparisons(path, key)
            else:
                _check_model(path, key)


def _check_model(path: str, key: str) -> None:
    """A folder that lacks something is, before anything has run, a key that names the wrong folder."""
    try:
        check_model_path(path, key)
    except ArtifactError as error:
        raise ConfigError(str(error)) from error


def _check_comparisons(path: str, key: str) -> None:
    if not (Path(path) / "train.jsonl").is_file():
        raise ConfigError(
            f"{key}={path}: expected a folder with train.jsonl (and validation.jsonl, test.jsonl) as stage collect "
            f"writes it; {Path(path).absolute() / 'train.jsonl'} is not there."
        )


def _content(path: str, revision: str | None) -> str:
    """What identifies an input: the hash of a folder's content and of an adapter's base, or a hub id with revision."""
    if is_adapter(path):
        return f"{hash_path(Path(path))} on {_content(base_of(path), revision)}"
    if is_local(path) or Path(path).exists():
        return hash_path(Path(path))
    return f"hub:{path}@{revision or 'main'}"


def decided_by(config: RLHFConfig, stage: StageName, inputs: Mapping[str, str], data_hash: str) -> dict[str, Any]:
    """Everything that decides the stage's result, as plain values. Its hash is the stage's fingerprint.

    The device and the version of this package are not among it: they decide the rounding, and `FINGERPRINT_VERSION`
    says when a result is no longer what the same config gives.
    """
    section: dict[str, Any] = getattr(config, stage).model_dump(mode="json")
    if stage == "closed_form":
        section["ppo"] = config.ppo.model_dump(mode="json")
    if stage == "ppo":
        section = {name: value for name, value in section.items() if name not in PPO_BOOKKEEPING}
        # The rewards' files count by their content, wherever they lie; their models are inputs.
        section["rewards"] = reward_checks.content_hash(config.ppo.rewards)
    template = config.model.chat_template
    return {
        "version": FINGERPRINT_VERSION,
        "stage": stage,
        "seed": config.seed,
        "precision": config.distributed.precision,
        "section": {name: value for name, value in section.items() if name not in _BOOKKEEPING},
        "model": config.model.model_dump(mode="json", exclude={"path", "chat_template"}),
        "peft": lora_content(config, stage),
        "chat_template": None if template is None else chat_template(template),
        "data": [config.data.model_dump(mode="json", exclude={"path"}), data_hash],
        "inputs": {name: _content(path, config.model.revision) for name, path in sorted(inputs.items())},
    }


def plan_stage(config: RLHFConfig, run: RunFolder, stage: StageName, data_hash: str) -> StagePlan:
    """Looks at the stage's folder and says what is to be done. The stage's inputs must be there."""
    inputs = resolve_inputs(config, run, stage)
    decisive = decided_by(config, stage, inputs, data_hash)
    value = fingerprint(decisive)
    folder = run.stage(stage)
    result = folder.read_result()
    finished = result is not None and result.fingerprint == value and not folder.altered_outputs(result)
    return StagePlan(stage, inputs, value, decisive, finished)


def begin_stage(run: RunFolder, plan: StagePlan) -> tuple[bool, str | None]:
    """Makes the stage's folder ready. Returns whether checkpoints are there to go on from, and a note for the user.

    The note says why a stage starts over that had finished, or had been interrupted, and where its work has been moved.
    """
    folder, aside, note = run.stage(plan.name), run.previous / plan.name, None
    result, same = folder.read_result(), folder.read_fingerprint() == plan.fingerprint
    if result is not None or not same:
        reason = _reason(folder, plan, result)
        if folder.keep_aside(aside):
            note = f"{plan.name} starts over: {reason}. What it had made is kept in {aside}"
    return folder.begin(plan.fingerprint, plan.decided_by) and folder.checkpoints.exists(), note


def _reason(folder: StageFolder, plan: StagePlan, result: StageResult | None) -> str:
    """Why nothing of the stage's folder can be used under `plan`."""
    if result is not None and result.fingerprint == plan.fingerprint:
        return f"its output is not what it had written ({', '.join(folder.altered_outputs(result))})"
    before = read_json(folder.decided_by)
    now = json.loads(json.dumps(plan.decided_by))
    if not isinstance(before, dict):
        return "it was begun with another config or other inputs"
    old, new = flatten(before), flatten(now)
    changed = sorted(path for path in old.keys() | new.keys() if old.get(path) != new.get(path))
    shown = [f"{_key_name(path, plan.name)} {_value(old.get(path))} → {_value(new.get(path))}" for path in changed[:4]]
    return "; ".join(shown) + (f" and {len(changed) - 4} more" if len(changed) > 4 else "")


def _key_name(path: tuple[str, ...], stage: StageName) -> str:
    """The config's key where there is one, else what the part of a fingerprint is called."""
    if path[0] == "section":
        return ".".join((stage, *path[1:]))
    if path[0] == "inputs":
        return f"the input {'.'.join(path[1:])}"
    return {"precision": "distributed.precision", "version": "the stage's code, version"}.get(path[0], ".".join(path))


def _value(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:37]}..."


def default_run_folder(config: RLHFConfig, identity: str) -> Path:
    """`run.dir`, or `<run.root>/<experiment>/<id>`; `identity` is the hash of the config that makes the id."""
    if config.run.dir is not None:
        return Path(config.run.dir).expanduser()
    return Path(config.run.root).expanduser() / config.experiment / f"seed{config.seed}-{identity[:8]}"
