"""Study frontier: sentiment against the KL to the reference for DPO, PPO on a learned reward, and PPO on the true one.

Rafailov et al. 2023 (arXiv 2305.18290), figure 2 left. The true reward is P(positive) of the embedded corpus. A point
of DPO is a training at one beta, judged on held-out prompts; PPO has a point for each window of updates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.config import RLHFConfig
from rlhf.errors import ArtifactError
from rlhf.evaluation.frontier import Frontier, Point, mean_lead
from rlhf.runs.exhibits import Exhibits, Figure, Line, Panel, Table
from rlhf.runs.folder import RunFolder
from rlhf.studies.arms import Arm, model_of, output_of, summary_of
from rlhf.studies.curves import PPOCurve, ppo_curve

LABELS, REWARD = "labels", "reward"
TRUE, LEARNED = "true", "learned"
DPO, PPO, PPO_TRUE = "dpo", "ppo", "ppo_true"
TITLES = {DPO: "DPO", PPO: "PPO, learned reward", PPO_TRUE: "PPO, true reward"}


def arms(config: RLHFConfig, run: RunFolder, policy: str) -> Sequence[Arm]:
    """The labels, the reward model, PPO at each target, DPO at each beta."""
    section = config.frontier
    comparisons = str(output_of(run, LABELS, "collect", "comparisons"))
    made = [
        Arm(LABELS, {"stages": ["collect"], "collect.policy": policy}),
        Arm(
            REWARD,
            {
                "stages": ["reward_model", "report"],
                "reward_model.base": policy,
                "reward_model.comparisons": comparisons,
            },
        ),
    ]
    made += [
        _ppo(config, run, policy, method, target) for method in _ppo_methods(config) for target in _targets(config)
    ]
    for beta in section.dpo_betas:
        changes = {
            "stages": ["dpo", "evaluate", "report"],
            "dpo.policy": policy,
            "dpo.reference": policy,
            "dpo.comparisons": comparisons,
            "dpo.beta": beta,
            "evaluate.baseline": policy,
            "evaluate.reference": policy,
        }
        made.append(Arm(_dpo_name(beta), changes))
    return made


def _targets(config: RLHFConfig) -> tuple[float, ...]:
    return config.frontier.ppo_targets


def _ppo_methods(config: RLHFConfig) -> tuple[str, ...]:
    return (PPO, PPO_TRUE) if config.frontier.true_reward else (PPO,)


def _methods(config: RLHFConfig) -> tuple[str, ...]:
    return (DPO, *_ppo_methods(config))


def _ppo_name(method: str, target: float) -> str:
    return f"{method}/target-{target:g}"


def _dpo_name(beta: float) -> str:
    return f"{DPO}/beta-{beta:g}"


def _ppo(config: RLHFConfig, run: RunFolder, policy: str, method: str, target: float) -> Arm:
    """Both kinds log both rewards; one of them has a weight."""
    learned = model_of(run, REWARD, "reward_model")
    changes = {
        "stages": ["ppo", "report"],
        "ppo.policy": policy,
        "ppo.reference": policy,
        "ppo.kl_target_nats_per_sequence": target,
        "ppo.rewards": {
            LEARNED: {"type": "model", "path": learned, "weight": float(method == PPO)},
            TRUE: {"type": "sentiment", "weight": float(method == PPO_TRUE)},
        },
    }
    if config.ppo.value_init == "reward_model" and config.ppo.value_network != "shared_trunk":
        changes["ppo.value_model"] = learned
    return Arm(_ppo_name(method, target), changes)


def exhibits(config: RLHFConfig, arms: Mapping[str, RunFolder]) -> tuple[dict[str, Any], Exhibits]:
    """Points and frontier of each method, and how far one lies above another at equal KL."""
    start, dpo = _dpo_points(config, arms)
    curves = {
        (method, target): ppo_curve(arms[_ppo_name(method, target)], proxy=LEARNED, gold=TRUE)
        for method in _ppo_methods(config)
        for target in _targets(config)
    }
    points = {DPO: dpo}
    for method in _ppo_methods(config):
        own = [curves[method, target] for target in _targets(config)]
        points[method] = [point for curve in own for point in _windows(curve, config.frontier.window)]
    frontiers = {method: Frontier.through(start, own) for method, own in points.items()}
    leads = _leads(frontiers)
    summary: dict[str, Any] = {"frontier/sentiment_of_reference": start}
    for method in _methods(config):
        summary[f"frontier/{method}_reach_nats"] = frontiers[method].reach
        summary[f"frontier/{method}_largest_sentiment"] = frontiers[method].knots[-1][1]
    summary |= {f"frontier/{first}_minus_{second}": lead for (first, second), lead in leads.items()}
    summary |= {name: value for name, value in _at_equal_kl(frontiers).items() if not math.isnan(value)}
    accuracy = summary_of(arms[REWARD], "reward_model").get("accuracy")
    if accuracy is not None:
        summary["frontier/reward_model_accuracy"] = accuracy
    figure = Figure(
        "frontier", "Sentiment against the KL to the reference", (_panel(config, start, points, frontiers),)
    )
    tables = (_point_table(config, curves, dpo), _lead_table(frontiers, leads))
    return summary, Exhibits(tables, (figure,), tuple(_remarks(frontiers, leads)))


def _dpo_points(config: RLHFConfig, arms: Mapping[str, RunFolder]) -> tuple[float, list[Point]]:
    """P(positive) of the first policy, and (KL, P(positive)) at each beta, in the order of the section."""
    found: list[Point] = []
    start = math.nan
    for beta in config.frontier.dpo_betas:
        arm = arms[_dpo_name(beta)]
        summary = summary_of(arm, "evaluate")
        try:
            kl, own, before = (
                float(summary[name]["value"]) for name in ("kl_to_reference", "sentiment_policy", "sentiment_baseline")
            )
        except (KeyError, TypeError) as error:
            raise ArtifactError(
                f"{arm.path}: stage evaluate has no sentiment and KL of its responses; the study needs data=embedded"
            ) from error
        found.append((kl, _positive(own)))
        start = _positive(before)
    return start, found


def _positive(sentiment: float) -> float:
    """P(positive) as reward `sentiment` has it, of a mean of opinions in [-1, 1]."""
    return 0.5 * (1.0 + sentiment)


def _windows(curve: PPOCurve, width: int) -> list[Point]:
    """Means of (KL, true reward) over windows of updates that do not overlap."""
    starts = range(0, len(curve.updates) - width + 1, width)
    squares = [distance**2 for distance in curve.distances]
    return [
        (math.fsum(squares[at : at + width]) / width, math.fsum(curve.gold[at : at + width]) / width) for at in starts
    ]


def _leads(frontiers: Mapping[str, Frontier]) -> dict[tuple[str, str], float]:
    names = list(frontiers)
    pairs = [(first, second) for place, first in enumerate(names) for second in names[place + 1 :]]
    return {(first, second): mean_lead(frontiers[first], frontiers[second]) for first, second in pairs}


def _at_equal_kl(frontiers: Mapping[str, Frontier]) -> dict[str, float]:
    """Each method's reward at half the KL that all of them reach."""
    half = min(frontier.reach for frontier in frontiers.values()) / 2
    found = {f"frontier/{method}_at_equal_kl": frontier.at(half) for method, frontier in frontiers.items()}
    return {"frontier/equal_kl_nats": half, **found}


def _panel(
    config: RLHFConfig, start: float, points: Mapping[str, Sequence[Point]], frontiers: Mapping[str, Frontier]
) -> Panel:
    lines = []
    for method in _methods(config):
        lines.append(Line(TITLES[method], frontiers[method].knots, group=method))
        lines.append(Line(f"{TITLES[method]}: points", tuple(sorted(points[method])), style="dots", group=method))
    title = f"first policy: {start:.2f} at a KL of 0"
    return Panel(title, "KL to the reference, nats a response", "P(positive)", tuple(lines))


def _point_table(config: RLHFConfig, curves: Mapping[tuple[str, float], PPOCurve], dpo: Sequence[Point]) -> Table:
    """Where each training ends."""
    rows: list[tuple[Any, ...]] = [
        (TITLES[DPO], f"beta {beta:g}", kl, reward, None)
        for beta, (kl, reward) in zip(config.frontier.dpo_betas, dpo, strict=True)
    ]
    for (method, target), curve in curves.items():
        last = slice(-config.frontier.window, None)
        count = len(curve.updates[last])
        kl = math.fsum(distance**2 for distance in curve.distances[last]) / count
        rows.append(
            (
                TITLES[method],
                f"target {target:g} nats",
                kl,
                math.fsum(curve.gold[last]) / count,
                math.fsum(curve.proxy[last]) / count,
            )
        )
    columns = ("method", "setting", "KL, nats", "P(positive)", "learned reward")
    note = f"DPO: held-out prompts. PPO: training prompts, mean of the last {config.frontier.window} updates."
    return Table("Where each training ends", columns, tuple(rows), note=note)


def _lead_table(frontiers: Mapping[str, Frontier], leads: Mapping[tuple[str, str], float]) -> Table:
    rows = [
        (TITLES[first], TITLES[second], lead, min(frontiers[first].reach, frontiers[second].reach))
        for (first, second), lead in leads.items()
    ]
    columns = ("method", "against", "lead in P(positive)", "up to a KL of, nats")
    return Table("Leads at equal KL", columns, tuple(rows), note="Means over the KLs from 0 to where both end.")


def _remarks(frontiers: Mapping[str, Frontier], leads: Mapping[tuple[str, str], float]) -> list[str]:
    said = []
    for (first, second), lead in leads.items():
        above, below, by = (first, second, lead) if lead >= 0 else (second, first, -lead)
        end = min(frontiers[first].reach, frontiers[second].reach)
        said.append(
            f"At equal KL, up to {end:.1f} nats, {TITLES[above]} lies above {TITLES[below]} by {by:.3f} on average."
        )
    return said
