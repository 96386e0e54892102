"""The pipeline: which stages run on which inputs, which are finished already, and how a stage is started.

A stage reads folders and writes folders. Its fingerprint is a hash of everything that decides its result: its config
section, the seed, the data's content and the content of its input artifacts. A stage whose result carries the same
fingerprint is skipped; one that was interrupted resumes; one that belongs to another fingerprint starts over.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf import data
from rlhf.config import STUDIES, STUDIES_OF_RUNS, RLHFConfig, StageName
from rlhf.config.active_selection import check_active_selection
from rlhf.config.best_of_n import best_of_n_rewards
from rlhf.config.peft import lora_content
from rlhf.config.ppo import BOOKKEEPING as PPO_BOOKKEEPING
from rlhf.config.preferences import annotator_files, annotator_rewards, decisive_content
from rlhf.config.training import BOOKKEEPING as TRAINING_BOOKKEEPING
from rlhf.data.templates import chat_template
from rlhf.distributed.zero import check_user_entries
from rlhf.errors import ArtifactError, ConfigError
from rlhf.evaluation import judge_checks
from rlhf.models.paths import base_of, check_model_path, is_adapter, is_ensemble, is_local, member_folders
from rlhf.preferences.annotators.checks import check_annotators, check_store
from rlhf.preferences.rounds import earlier_labels
from rlhf.preferences.waiting import store_path
from rlhf.rewards import checks as reward_checks
from rlhf.runs.decided_by import changes
from rlhf.runs.files import fingerprint, hash_path
from rlhf.runs.folder import RunFolder, StageFolder, StageResult
from rlhf.runs.jsonable import read_json
from rlhf.runs.tracking import check_tracking
from rlhf.stage_inputs import collects_ratings, inputs_of

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
    "ratings",
    "benchmark",
}


# Sections that decide where and how a study's arms are run, not what comes out.
_NOT_OF_ARMS = {
    *("run", "tracking", "plan", "launcher", "zero", "distributed", "stages", "experiment"),
    "reward_report",
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


def resolve_inputs(config: RLHFConfig, run: RunFolder, stage: StageName) -> dict[str, str]:
    """The models and folders a stage reads: what its config names, else what this run makes.

    Raises `ConfigError` when something is missing, naming the key that would provide it.
    """
    inputs = inputs_of(config, run, stage)
    return {name: os.path.expanduser(path) for name, path in inputs.items()}


def _check_data_fits(config: RLHFConfig, run: RunFolder) -> None:
    """Stages that need a kind of data which this data cannot be."""
    kind = config.data.type
    if "collect" in config.stages:
        _check_gold(config)
        for key, path in annotator_files(config.preferences).items():
            if not Path(path).expanduser().is_file():
                raise ConfigError(f"preferences.{key}={path}: there is no such file")
    if (
        "reward_model" in config.stages
        and not data.gives_comparisons(config.data)
        and config.reward_model.loss.type != "rating"
        and "comparisons" not in inputs_of(config, run, "reward_model")
    ):
        raise ConfigError(
            f"stage reward_model needs comparisons: data={kind} has none of its own, and this run has no finished "
            "stage collect. Add collect to stages, or set reward_model.comparisons=FOLDER."
        )
    if (
        "reward_model" in config.stages
        and kind not in ("files", "hub")
        and config.reward_model.loss.type == "rating"
        and config.reward_model.ratings is None
        and not ("collect" in config.stages and collects_ratings(config))
    ):
        raise ConfigError(
            f"reward_model.loss.type=rating needs rated responses, and data.type={kind} has none: set "
            "reward_model.ratings=FOLDER, or take data=files or data=hub with rows of prompt, response and rating."
        )
    if "active_selection" in config.stages:
        check_active_selection(config, config.distributed.world_size)
    has_none = not data.gives_comparisons(config.data)
    if "dpo" in config.stages and has_none and "comparisons" not in inputs_of(config, run, "dpo"):
        raise ConfigError(
            f"stage dpo needs comparisons: data={kind} has none of its own, and this run has no finished stage "
            "collect. Add collect to stages, or set dpo.comparisons=FOLDER."
        )
    if "best_of_n" in config.stages:
        _check_judge(config.best_of_n.judge, list(best_of_n_rewards(config)), kind)
    if "reward_report" in config.stages:
        _check_report_fits(config, run)
    judges = {"gold": "embedded", "classifier": "labelled_text"}
    judge = config.evaluate.judge.type
    if "evaluate" in config.stages and judges.get(judge, kind) != kind:
        raise ConfigError(
            f"evaluate.judge.type={judge} needs data={judges[judge]}; data.type is {kind}. "
            "Set evaluate.judge.type=reward_model."
        )


def _check_report_fits(config: RLHFConfig, run: RunFolder) -> None:
    """Something to report on."""
    inputs = inputs_of(config, run, "reward_report")
    if not (data.gives_comparisons(config.data) or "comparisons" in inputs or "benchmark" in inputs):
        raise ConfigError(
            f"stage reward_report has nothing to score: data.type={config.data.type} has no comparisons of its own. "
            "Set reward_report.comparisons=FOLDER or reward_report.benchmark=FILE, or take data=files or data=hh_rlhf."
        )


def _check_judge(judge: str, rewards: list[str], kind: str) -> None:
    """Of stage best_of_n: one reward measures what the others pick."""
    if judge not in rewards:
        raise ConfigError(
            f"best_of_n.judge={judge} is none of the rewards {', '.join(rewards)} (data.type={kind}; data=embedded has "
            f"the reward gold by itself). Name one of them, or add best_of_n.rewards.{judge}."
        )
    if len(rewards) == 1:
        raise ConfigError(
            f"best_of_n.rewards has the judge {judge} alone, and no reward that picks: add one, or leave rewards out "
            "to take this run's reward model"
        )


def _check_gold(config: RLHFConfig) -> None:
    """What needs to know the right answer has data that knows it."""
    kind, section = config.data.type, config.preferences
    if kind == "embedded":
        return
    if any(reward.type == "gold" for reward in annotator_rewards(section).values()):
        raise ConfigError(
            f"stage collect has annotators who see the gold reward of data=embedded; data.type is {kind}. Choose "
            "others (preferences.annotator=human, preferences.annotator.type=judge or rule), or leave collect out of "
            "stages: the reward model then takes the data's own comparisons, for instance "
            "stages=[sft,reward_model,ppo,evaluate,report]."
        )
    if section.gold_labels_test:
        raise ConfigError(
            f"preferences.test_labels=gold needs the gold reward of data=embedded; data.type is {kind}. Set "
            "preferences.test_labels=annotator."
        )
    if section.gold_share and not data.gives_comparisons(config.data):
        raise ConfigError(
            f"preferences.gold_share={section.gold_share:g} needs pairs whose answer is known: data=embedded, or data "
            f"with comparisons of its own, which data.type={kind} is not. Set preferences.gold_share=0."
        )


_SECTION_KEYS: dict[tuple[StageName, str], str] = {
    ("sft", "base"): "model.path",
    ("best_of_n", "reward_model"): "best_of_n.rewards",
    ("active_selection", "base"): "reward_model.base",
}


def preflight(config: RLHFConfig, run: RunFolder) -> None:
    """Everything about the inputs that can be known wrong before torch is imported. Raises `ConfigError`."""
    stages = [stage for stage in config.stages if stage != "report"]
    check_user_entries(config)
    check_tracking(config.tracking)
    if stages:
        data.preflight(config.data)
        _check_data_fits(config, run)
        if "collect" in stages:
            check_annotators(config.preferences.annotator, config.data, "preferences.annotator")
            check_store(config.preferences.store, "preferences.store")
        if "ppo" in stages:
            reward_checks.preflight(config.ppo.rewards, config.data)
        if "best_of_n" in stages:
            reward_checks.preflight(best_of_n_rewards(config), config.data, "best_of_n.rewards")
        if "evaluate" in stages:
            judge_checks.check_judge(config.evaluate.judge)
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
            key = name if name.startswith("preferences.") else f"{stage}.{name}"
            if "." not in name and getattr(getattr(config, stage), name, None) is None:
                key = _SECTION_KEYS.get((stage, name), key)
            if name == "benchmark":
                from rlhf.evaluation.reward_bench import check_benchmark  # numpy, which nothing else here needs

                check_benchmark(path, key)
            elif stage == "reward_report" and name == "comparisons":
                _check_splits(path, key, config.reward_report.splits)
            elif name in ("comparisons", "ratings"):
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


def _check_splits(path: str, key: str, splits: Sequence[str]) -> None:
    names = [f"{split}.jsonl" for split in splits]
    if not any((Path(path) / name).is_file() for name in names):
        raise ConfigError(
            f"{key}={path}: expected a folder of comparisons as stage collect or `rlhf preferences export` with "
            f"format=jsonl writes it, with {' or '.join(names)} (reward_report.splits). Other layouts are read with "
            "data=files data.path=PATH."
        )


def _content(path: str, revision: str | None) -> str:
    """What identifies an input: the hash of a folder's content and of an adapter's base, or a hub id with revision."""
    if is_ensemble(path):
        return "ensemble " + " ".join(_content(member, revision) for member in member_folders(path))
    if is_adapter(path):
        return f"{hash_path(Path(path))} on {_content(base_of(path), revision)}"
    if is_local(path) or Path(path).exists():
        return hash_path(Path(path))
    return f"hub:{path}@{revision or 'main'}"


def decided_by(
    config: RLHFConfig, run: RunFolder, stage: StageName, inputs: Mapping[str, str], data_hash: str
) -> dict[str, Any]:
    """Everything that decides the stage's result, as plain values. Its hash is the stage's fingerprint.

    The device and the version of this package are not among it: they decide the rounding, and `FINGERPRINT_VERSION`
    says when a result is no longer what the same config gives.
    """
    section: dict[str, Any] = getattr(config, stage).model_dump(mode="json")
    if stage == "closed_form":
        section["ppo"] = config.ppo.model_dump(mode="json")
    if stage == "active_selection":
        section |= _active_selection_content(config)
    if stage == "compare_arms":
        section["named_arms"] = section.pop("arms")
    if stage in STUDIES_OF_RUNS:
        # Its arms are runs that differ from this one in some keys, so all that decides a run decides it.
        whole = config.model_dump(mode="json", exclude=_NOT_OF_ARMS)
        section |= {"arms": {name: value for name, value in whole.items() if name not in STUDIES}}
    if stage == "ppo":
        section = {name: value for name, value in section.items() if name not in PPO_BOOKKEEPING}
        # The rewards' files count by their content, wherever they lie; their models are inputs.
        section["rewards"] = reward_checks.content_hash(config.ppo.rewards)
    if stage == "best_of_n":
        section["rewards"] = reward_checks.content_hash(best_of_n_rewards(config), "best_of_n.rewards")
    if stage == "evaluate":
        section["judge"] = judge_checks.judge_values(config.evaluate.judge)
    if stage == "collect":
        section |= _preferences_content(config, run)
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
        "data": [data.settings_of(config.data), data_hash],
        "inputs": {name: _content(path, config.model.revision) for name, path in sorted(inputs.items())},
    }


def _active_selection_content(config: RLHFConfig) -> dict[str, Any]:
    """How the study samples, who labels, and how its reward models are trained."""
    trained = config.reward_model.model_dump(mode="json", exclude={*_BOOKKEEPING, "normalization", "log_every"})
    return {
        "sampling": config.collect.sampling.model_dump(mode="json"),
        "preferences": decisive_content(config.preferences),
        "rewards": reward_checks.content_hash(annotator_rewards(config.preferences)),
        # "reward_model" would be where an input lies.
        "training": trained,
    }


def _preferences_content(config: RLHFConfig, run: RunFolder) -> dict[str, Any]:
    """What of section `preferences` decides the comparisons."""
    section = config.preferences
    content = {
        "preferences": decisive_content(section),
        "rewards": reward_checks.content_hash(annotator_rewards(section)),
        "files": {key: hash_path(Path(path).expanduser()) for key, path in annotator_files(section).items()},
    }
    if section.use_rounds == "all" and section.round:
        content["earlier_labels"] = earlier_labels(store_path(config, run.path), section.round)
    return content


def plan_stage(config: RLHFConfig, run: RunFolder, stage: StageName, data_hash: str) -> StagePlan:
    """Looks at the stage's folder and says what is to be done. The stage's inputs must be there."""
    inputs = resolve_inputs(config, run, stage)
    decisive = decided_by(config, run, stage, inputs, data_hash)
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
    if not isinstance(before, dict):
        return "it was begun with another config or other inputs"
    return changes(before, json.loads(json.dumps(plan.decided_by)), plan.name)
