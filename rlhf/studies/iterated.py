"""Study iterated: sample from the current policy, label, refresh the reward model on all labels, PPO, and again.

Bai et al. (2022), section 4.5, call it online RLHF: the reward model is refreshed where the policy has moved to. The
comparison spends the same number of labels at once on responses of the first policy, and trains as many updates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from rlhf.config import RLHFConfig
from rlhf.runs.exhibits import Exhibits, Figure, Line, Panel, Table
from rlhf.runs.folder import RunFolder
from rlhf.studies.arms import Arm, arm_folder, model_of, summary_of
from rlhf.studies.seeds import Estimate, over_seeds, seeds_of

ONE_BATCH = "one-batch"
_STAGES = ["collect", "reward_model", "ppo", "evaluate", "report"]


def arms(config: RLHFConfig, run: RunFolder, policy: str) -> Sequence[Arm]:
    """For each seed the rounds in order, then the same number of labels in one go."""
    made = []
    for seed in seeds_of(config, config.iterated.num_seeds):
        made += [_round(config, run, policy, seed, number) for number in range(1, config.iterated.num_rounds + 1)]
        if _with_one_batch(config):
            made.append(_one_batch(config, policy, seed))
    return made


def exhibits(config: RLHFConfig, arms: Mapping[str, RunFolder]) -> tuple[dict[str, Any], Exhibits]:
    """The judge's score after each round and after one batch, with intervals over seeds or, of one seed, prompts."""
    found = [_Standing(arms, config, label) for label in _labels(config)]
    score = _score_name(config)
    summary: dict[str, Any] = {f"{one.key}_{score}": one.score.to_json() for one in found}
    title = score.replace("_", " ")
    table = Table(
        "Rounds",
        (
            "policy after",
            "labels",
            f"{title}",
            "win rate against the first policy",
            "reward model accuracy",
            "KL, nats",
        ),
        tuple(
            (one.label, one.num_labels, *(each.to_json() for each in (one.score, one.win_rate, one.accuracy, one.kl)))
            for one in found
        ),
        note=_interval_note(config),
    )
    rounds = [one for one in found if one.label != ONE_BATCH]
    lines = [_curve(config, "in rounds", rounds)]
    if len(found) > len(rounds):
        lines.append(_curve(config, "in one batch", [found[-1]], dots=True))
    figure = Figure("rounds", "The same labels in rounds and in one go", (Panel("", "labels", title, tuple(lines)),))
    return summary, Exhibits((table,), (figure,), tuple(_remarks(config, found)))


class _Standing:
    """Where the policy stands after a round, or after one batch."""

    def __init__(self, arms: Mapping[str, RunFolder], config: RLHFConfig, label: str) -> None:
        seeds = seeds_of(config, config.iterated.num_seeds)
        folders = [arms[_name(seed, label)] for seed in seeds]
        evaluated = [summary_of(folder, "evaluate") for folder in folders]
        trained = [summary_of(folder, "reward_model") for folder in folders]
        score = _score_name(config)
        self.label = label
        self.key = label.replace("-", "_")
        self.num_labels = sum(int(summary["num_train"]) for summary in trained) // len(trained)
        self.score = over_seeds([summary[f"{score}_policy"] for summary in evaluated])
        self.baseline = over_seeds([summary[f"{score}_baseline"] for summary in evaluated])
        self.win_rate = over_seeds([summary["win_rate"] for summary in evaluated])
        self.kl = over_seeds([summary.get("kl_to_reference") for summary in evaluated])
        self.accuracy = over_seeds([summary.get("accuracy") for summary in trained])


def _round(config: RLHFConfig, run: RunFolder, policy: str, seed: int, number: int) -> Arm:
    section = config.iterated
    before = _name(seed, f"round-{number - 1}")
    current = policy if number == 1 else model_of(run, before, "ppo")
    store = config.preferences.store or str(arm_folder(run, _name(seed, "preferences.sqlite")).path)
    return Arm(
        _name(seed, f"round-{number}"),
        {
            **_common(policy, seed),
            "collect.policy": current,
            "preferences.store": store,
            "preferences.round": number,
            "preferences.use_rounds": "all",
            "reward_model.base": policy
            if number == 1 or section.reward_model_from == "first"
            else model_of(run, before, "reward_model"),
            "ppo.policy": current if section.start_from == "previous" else policy,
        },
    )


def _one_batch(config: RLHFConfig, policy: str, seed: int) -> Arm:
    """All labels at once; as many updates as the last round's policy has behind it."""
    section, collect = config.iterated, config.collect
    times = section.num_rounds
    return Arm(
        _name(seed, ONE_BATCH),
        {
            **_common(policy, seed),
            "collect.policy": policy,
            "collect.num_comparisons": times * collect.num_comparisons,
            "collect.num_validation_comparisons": times * collect.num_validation_comparisons,
            "preferences.store": None,
            "reward_model.base": policy,
            "ppo.policy": policy,
            "ppo.num_updates": config.ppo.num_updates * (times if section.start_from == "previous" else 1),
        },
    )


def _common(policy: str, seed: int) -> dict[str, Any]:
    return {
        "seed": seed,
        "stages": _STAGES,
        "ppo.reference": policy,
        "evaluate.baseline": policy,
        "evaluate.reference": policy,
    }


def _name(seed: int, label: str) -> str:
    return f"seed-{seed}/{label}"


def _with_one_batch(config: RLHFConfig) -> bool:
    return config.iterated.one_batch and not config.preferences.asks_people


def _labels(config: RLHFConfig) -> list[str]:
    rounds = [f"round-{number}" for number in range(1, config.iterated.num_rounds + 1)]
    return [*rounds, ONE_BATCH] if _with_one_batch(config) else rounds


def _score_name(config: RLHFConfig) -> str:
    return {"gold": "gold_score", "classifier": "positive_probability"}.get(config.evaluate.judge.type, "judge_score")


def _interval_note(config: RLHFConfig) -> str:
    if config.iterated.num_seeds > 1:
        return f"Mean and 95 % t-interval over {config.iterated.num_seeds} seeds."
    return "One seed; intervals are over the held-out prompts, so they say nothing of another training."


def _curve(config: RLHFConfig, name: str, found: Sequence[_Standing], *, dots: bool = False) -> Line:
    start = [(0.0, found[0].baseline)] if not dots else []
    points = [*start, *((float(one.num_labels), one.score) for one in found)]
    return Line(
        name,
        tuple((x, estimate.value) for x, estimate in points),
        tuple((estimate.low, estimate.high) for _, estimate in points),
        style="dots" if dots else "line",
    )


def _remarks(config: RLHFConfig, found: Sequence[_Standing]) -> list[str]:
    """What the numbers say, in words: each round against the one before, the last one against one batch."""
    rounds = [one for one in found if one.label != ONE_BATCH]
    said = [_compared(after, before) for before, after in pairwise(rounds)]
    if len(found) > len(rounds):
        said.append(_compared(rounds[-1], found[-1]))
    return said


def _compared(one: _Standing, other: _Standing) -> str:
    difference: Estimate = one.score.minus(other.score)
    verb = "beats" if difference.low > 0 else "is worse than" if difference.high < 0 else "cannot be told from"
    return (
        f"{one.label} {verb} {other.label}: {difference.value:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}] "
        f"({one.score.value:.3f} against {other.score.value:.3f})"
    )
