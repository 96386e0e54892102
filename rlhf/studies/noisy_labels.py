"""Study noisy_labels: PPO against one reward model and against an ensemble, on labels of which a share is wrong.

Coste et al. (2024) optimise the worst of an ensemble's members, or their mean less their variance, under 25 % label
noise. A seed decides the labels, their noise, the reward models and PPO; the first policy is that of the run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.config import RLHFConfig
from rlhf.runs.exhibits import Exhibits, Figure, Line, Panel, Table
from rlhf.runs.folder import RunFolder
from rlhf.studies.arms import Arm, model_of, output_of, summary_of
from rlhf.studies.curves import PPOCurve, ppo_curve
from rlhf.studies.seeds import Estimate, mean_of, over_seeds, seeds_of

SINGLE = "single"
PROXY, GOLD = "proxy", "gold"
# Updates of a PPO run that are averaged for its last and its best reward.
_WINDOW = 5


def arms(config: RLHFConfig, run: RunFolder, policy: str) -> Sequence[Arm]:
    """For each seed the labels, the reward models, and PPO against each reward."""
    section = config.noisy_labels
    made = []
    for seed in seeds_of(config, section.num_seeds):
        own = {"seed": seed}
        comparisons = str(output_of(run, f"seed-{seed}/labels", "collect", "comparisons"))
        training = {**own, "stages": ["reward_model", "report"], "reward_model.base": policy}
        training["reward_model.comparisons"] = comparisons
        made += [
            Arm(f"seed-{seed}/labels", {**own, "stages": ["collect"], "collect.policy": policy}),
            Arm(f"seed-{seed}/reward-{SINGLE}", training),
            Arm(
                f"seed-{seed}/reward-ensemble",
                {
                    **training,
                    "reward_model.num_members": section.num_members,
                    "reward_model.bootstrap": section.bootstrap,
                },
            ),
        ]
        made += [_ppo(config, run, policy, seed, name) for name in _rewards(config)]
    return made


def _ppo(config: RLHFConfig, run: RunFolder, policy: str, seed: int, name: str) -> Arm:
    trained = SINGLE if name == SINGLE else "ensemble"
    reward: dict[str, Any] = {"type": "model", "path": model_of(run, f"seed-{seed}/reward-{trained}", "reward_model")}
    if name != SINGLE:
        reward["aggregation"] = name
    changes = {
        "seed": seed,
        "stages": ["ppo", "report"],
        "ppo.policy": policy,
        "ppo.reference": policy,
        "ppo.rewards": {PROXY: reward, GOLD: {"type": "gold", "weight": 0.0}},
    }
    if config.ppo.value_init == "reward_model" and config.ppo.value_network != "shared_trunk":
        # Both begin with the same critic, so that the reward alone tells them apart.
        changes["ppo.value_model"] = model_of(run, f"seed-{seed}/reward-{SINGLE}", "reward_model")
    return Arm(f"seed-{seed}/ppo-{name}", changes)


def exhibits(config: RLHFConfig, arms: Mapping[str, RunFolder]) -> tuple[dict[str, Any], Exhibits]:
    """Gold reward along PPO for each reward, and how far it falls from its best to the end."""
    seeds = seeds_of(config, config.noisy_labels.num_seeds)
    found = {
        name: [ppo_curve(arms[f"seed-{seed}/ppo-{name}"], proxy=PROXY, gold=GOLD) for seed in seeds]
        for name in _rewards(config)
    }
    accuracy = {
        kind: over_seeds(
            [summary_of(arms[f"seed-{seed}/reward-{kind}"], "reward_model").get("accuracy") for seed in seeds]
        )
        for kind in (SINGLE, "ensemble")
    }
    ends = {name: _ends(curves) for name, curves in found.items()}
    table = Table(
        "Gold reward",
        ("reward of PPO", "accuracy without noise", "best", "at the end", "fall", "KL at the end, nats"),
        tuple(
            (
                _title(name),
                accuracy[SINGLE if name == SINGLE else "ensemble"].to_json(),
                *(ends[name][key].to_json() for key in ("best", "last", "fall", "kl")),
            )
            for name in found
        ),
        note=f"Means over {_WINDOW} updates; mean and 95 % t-interval over {len(seeds)} seeds.",
    )
    by_seed = Table(
        "By seed",
        ("seed", *(f"{_title(name)}: {what}" for name in found for what in ("best", "at the end"))),
        tuple(
            (str(seed), *(ends[name][key].samples[place] for name in found for key in ("best", "last")))
            for place, seed in enumerate(seeds)
        ),
    )
    summary: dict[str, Any] = {
        f"{name}_{key}": estimate.to_json() for name, of_name in ends.items() for key, estimate in of_name.items()
    }
    for name in ends.keys() - {SINGLE}:
        summary[f"{name}_lead"] = ends[name]["last"].minus(ends[SINGLE]["last"]).to_json()
        summary[f"{name}_less_fall"] = ends[SINGLE]["fall"].minus(ends[name]["fall"]).to_json()
    figure = Figure(
        "noisy_labels",
        "Gold reward under label noise",
        (
            Panel("mean and interval over seeds", "PPO update", "gold reward", tuple(_bands(found))),
            Panel("every seed", "square root of the KL", "gold reward", tuple(_paths(found, seeds))),
        ),
    )
    return summary, Exhibits((table, by_seed), (figure,), tuple(_remarks(ends)))


def _rewards(config: RLHFConfig) -> list[str]:
    return [SINGLE, *config.noisy_labels.aggregations]


def _title(name: str) -> str:
    return "one reward model" if name == SINGLE else f"ensemble, {name.replace('_', ' ')}"


def _ends(curves: Sequence[PPOCurve]) -> dict[str, Estimate]:
    """Best and last gold reward (means over windows), how far the one falls to the other, and the KL at the end."""
    smooth = [curve.smoothed(min(_WINDOW, len(curve.updates))) for curve in curves]
    best, last = [max(curve.gold) for curve in smooth], [curve.gold[-1] for curve in smooth]
    return {
        "best": mean_of(best),
        "last": mean_of(last),
        "fall": mean_of([high - end for high, end in zip(best, last, strict=True)]),
        "kl": mean_of([curve.distances[-1] ** 2 for curve in smooth]),
    }


def _bands(found: Mapping[str, Sequence[PPOCurve]]) -> list[Line]:
    lines = []
    for name, curves in found.items():
        means = [mean_of(values) for values in zip(*(curve.gold for curve in curves), strict=True)]
        points = tuple((float(update), mean.value) for update, mean in zip(curves[0].updates, means, strict=True))
        band = tuple((mean.low, mean.high) for mean in means) if math.isfinite(means[0].low) else None
        lines.append(Line(_title(name), points, band))
    return lines


def _paths(found: Mapping[str, Sequence[PPOCurve]], seeds: Sequence[int]) -> list[Line]:
    return [
        Line(
            f"{_title(name)}, seed {seed}",
            tuple(zip(curve.distances, curve.gold, strict=True)),
            style="line" if name == SINGLE else "dashed",
            group=_title(name),
        )
        for name, curves in found.items()
        for seed, curve in zip(seeds, curves, strict=True)
    ]


def _remarks(ends: Mapping[str, Mapping[str, Estimate]]) -> list[str]:
    single = ends[SINGLE]
    said = []
    for name, own in ends.items():
        if name == SINGLE:
            continue
        lead = own["last"].minus(single["last"])
        said.append(
            f"{_title(name)}: gold ends at {own['last'].value:.2f} after a best of {own['best'].value:.2f}; one reward "
            f"model ends at {single['last'].value:.2f} after {single['best'].value:.2f}. At the end the ensemble leads "
            f"by {lead.value:+.2f} [{lead.low:+.2f}, {lead.high:+.2f}]."
        )
    return said
