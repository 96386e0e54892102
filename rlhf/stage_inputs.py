"""What each stage reads: the models and folders that its config names, else those that this run makes."""

from __future__ import annotations

from rlhf.config import STUDIES_OF_RUNS, RLHFConfig, StageName
from rlhf.config.best_of_n import best_of_n_rewards
from rlhf.config.preferences import model_inputs
from rlhf.errors import ConfigError
from rlhf.rewards.checks import needs_reward_model, reward_model_paths
from rlhf.runs.folder import RunFolder


def own_model(config: RLHFConfig, run: RunFolder, producer: StageName) -> str | None:
    """This run's model of a stage, when the stage is going to run or has finished earlier."""
    stage = run.stage(producer)
    if producer in config.stages or stage.read_result() is not None:
        return str(stage.model)
    return None


def required(value: str | None, stage: StageName, name: str, producer: StageName) -> str:
    """The input `name` of a stage; raises `ConfigError` that names the key which provides it where there is none."""
    if value is not None:
        return value
    raise ConfigError(
        f"stage {stage} needs a {name.replace('_', ' ')}: this run has no finished stage {producer} and stages does "
        f"not list it. Add {producer} to stages, or set {stage}.{name}=FOLDER_OR_HUB_ID."
    )


def inputs_of(config: RLHFConfig, run: RunFolder, stage: StageName) -> dict[str, str]:
    """The stage's inputs by name. Raises `ConfigError` when one is missing."""
    sft = own_model(config, run, "sft")
    if stage == "compare_arms":
        return _compare_arms_inputs(config, run, sft)
    if stage in STUDIES_OF_RUNS:
        return {"policy": required(getattr(config, stage).policy or sft, stage, "policy", "sft")}
    if stage == "active_selection":
        policy = required(config.active_selection.policy or sft, stage, "policy", "sft")
        return {"policy": policy, "base": config.reward_model.base or policy}
    if stage == "sft":
        base = config.sft.base or config.model.path
        return {} if base is None else {"base": base}
    if stage == "collect":
        inputs = {"policy": required(config.collect.policy or sft, stage, "policy", "sft")}
        return inputs | model_inputs(config.preferences)
    if stage == "reward_model":
        base = required(config.reward_model.base or sft or config.model.path, stage, "base", "sft")
        inputs = {"base": base}
        collected = _collected(config, run)
        if config.reward_model.ratings is not None:
            inputs["ratings"] = config.reward_model.ratings
        elif collected and collects_ratings(config):
            inputs["ratings"] = str(run.stage("collect").path / "ratings")
        if config.reward_model.comparisons is not None:
            inputs["comparisons"] = config.reward_model.comparisons
        elif collected:
            inputs["comparisons"] = str(run.stage("collect").path / "comparisons")
        return inputs
    if stage == "reward_report":
        return _report_inputs(config, run)
    if stage == "ppo":
        return _ppo_inputs(config, run, sft)
    if stage == "dpo":
        return _dpo_inputs(config, run, sft)
    if stage == "best_of_n":
        return _best_of_n_inputs(config, run, sft)
    if stage == "evaluate":
        policy = required(config.evaluate.policy or _trained_policy(config, run), stage, "policy", "ppo")
        baseline = required(config.evaluate.baseline or sft, stage, "baseline", "sft")
        inputs = {"policy": policy, "baseline": baseline, "reference": config.evaluate.reference or baseline}
        reward_model = config.evaluate.reward_model or own_model(config, run, "reward_model")
        judge = judge_model(config)
        if reward_model is not None:
            inputs["reward_model"] = reward_model
        elif config.evaluate.judge.type == "reward_model" and not judge:
            required(None, stage, "reward_model", "reward_model")
        return inputs | judge
    return {}


def _compare_arms_inputs(config: RLHFConfig, run: RunFolder, sft: str | None) -> dict[str, str]:
    """What all arms start from, and what this run makes for those that make none of their own."""
    inputs = {"policy": required(config.compare_arms.policy or sft, "compare_arms", "policy", "sft")}
    if "collect" in config.stages:
        inputs["comparisons"] = str(run.stage("collect").path / "comparisons")
    reward_model = own_model(config, run, "reward_model")
    if reward_model is not None:
        inputs["reward_model"] = reward_model
    return inputs


def judge_model(config: RLHFConfig) -> dict[str, str]:
    """The model that the judge of stage evaluate names, by its key within the section; empty where it names none."""
    judge = config.evaluate.judge
    if judge.type == "reward_model" and judge.path is not None:
        return {"judge.path": judge.path}
    if judge.type == "language_model" and judge.model is not None:
        return {"judge.model": judge.model}
    return {}


def _report_inputs(config: RLHFConfig, run: RunFolder) -> dict[str, str]:
    """The reward model; the comparisons that are named, or that this run's own learnt from; the benchmark's file."""
    section = config.reward_report
    model = required(
        section.reward_model or own_model(config, run, "reward_model"), "reward_report", "reward_model", "reward_model"
    )
    inputs = {"reward_model": model}
    comparisons = section.comparisons
    if comparisons is None and section.reward_model is None:
        collected = _collected(config, run)
        comparisons = config.reward_model.comparisons
        if comparisons is None and collected:
            comparisons = str(run.stage("collect").path / "comparisons")
    if comparisons is not None:
        inputs["comparisons"] = comparisons
    if section.benchmark is not None:
        inputs["benchmark"] = section.benchmark
    return inputs


def _ppo_inputs(config: RLHFConfig, run: RunFolder, sft: str | None) -> dict[str, str]:
    section = config.ppo
    policy = required(section.policy or sft, "ppo", "policy", "sft")
    inputs = {"policy": policy, "reference": section.reference or policy}
    reward_model = section.reward_model or own_model(config, run, "reward_model")
    if needs_reward_model(section.rewards):
        inputs["reward_model"] = required(reward_model, "ppo", "reward_model", "reward_model")
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


def _collected(config: RLHFConfig, run: RunFolder) -> bool:
    """Whether this run has comparisons of its own, or will have."""
    return "collect" in config.stages or run.stage("collect").read_result() is not None


def _trained_policy(config: RLHFConfig, run: RunFolder) -> str | None:
    """What stage evaluate judges: the model of ppo or, of a run that has dpo and no ppo, of dpo."""
    trained: tuple[StageName, ...] = ("ppo", "dpo")
    listed = [stage for stage in trained if stage in config.stages]
    return next((model for stage in listed or trained if (model := own_model(config, run, stage)) is not None), None)


def _dpo_inputs(config: RLHFConfig, run: RunFolder, sft: str | None) -> dict[str, str]:
    section = config.dpo
    policy = required(section.policy or sft, "dpo", "policy", "sft")
    inputs = {"policy": policy, "reference": section.reference or policy}
    if section.comparisons is not None:
        inputs["comparisons"] = section.comparisons
    elif _collected(config, run):
        inputs["comparisons"] = str(run.stage("collect").path / "comparisons")
    return inputs


def _best_of_n_inputs(config: RLHFConfig, run: RunFolder, sft: str | None) -> dict[str, str]:
    inputs = {"policy": required(config.best_of_n.policy or sft, "best_of_n", "policy", "sft")}
    rewards = best_of_n_rewards(config)
    if needs_reward_model(rewards):
        reward_model = own_model(config, run, "reward_model")
        if reward_model is None:
            raise ConfigError(
                "stage best_of_n needs a reward that picks: this run has no finished stage reward_model and stages "
                "does not list it. Add reward_model to stages, or name the rewards, for instance "
                "'best_of_n.rewards={proxy: {type: model, path: FOLDER}}'."
            )
        inputs["reward_model"] = reward_model
    return inputs | {f"rewards.{name}.path": path for name, path in reward_model_paths(rewards).items()}


def collects_ratings(config: RLHFConfig) -> bool:
    """Whether stage collect asks for ratings that the reward model learns from."""
    return config.preferences.kind == "rating" and config.reward_model.loss.type == "rating"
