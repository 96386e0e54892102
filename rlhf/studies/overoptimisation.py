"""Study overoptimisation: gold and proxy reward against the square root of the KL for best-of-n, PPO and DPO.

Gao, Schulman and Hilton (2023). The gold reward is the embedded corpus's; the proxies learn from comparisons that
simulated annotators label with it, and are shown in units of their standard deviation over the first policy's
responses. What is fitted are the paper's forms: best-of-n d (alpha - beta d), PPO d (alpha - beta log d), d = sqrt(KL).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.config import RLHFConfig
from rlhf.evaluation.best_of_n import best_of_n_curve, best_of_n_kl, best_of_n_rewards
from rlhf.evaluation.overoptimisation import Form, fit_with_intervals
from rlhf.runs.exhibits import Exhibits, Figure, Line, Panel, Table
from rlhf.runs.folder import RunFolder
from rlhf.studies.arms import Arm, model_of, output_of, summary_of
from rlhf.studies.curves import PPOCurve, Scores, ppo_curve

GOLD, PROXY = "gold", "proxy"
LABELS, BEST_OF_N = "labels", "best-of-n"
# Updates of a PPO run whose means are compared when a checkpoint is chosen.
_WINDOW = 3
_DISTANCE = "square root of the KL, nats"


def arms(config: RLHFConfig, run: RunFolder, policy: str) -> Sequence[Arm]:
    """The labels, the proxies, best-of-n over all of them, then PPO and DPO."""
    section = config.overoptimisation
    labels = {"stages": ["collect"], "collect.policy": policy, "collect.num_comparisons": max(section.num_comparisons)}
    comparisons = str(output_of(run, LABELS, "collect", "comparisons"))
    made = [Arm(LABELS, labels)]
    for size, num_epochs in zip(section.num_comparisons, section.num_epochs, strict=True):
        changes = {
            "stages": ["reward_model", "report"],
            "reward_model.base": policy,
            "reward_model.comparisons": comparisons,
            "reward_model.num_comparisons": size,
            "reward_model.num_epochs": num_epochs,
        }
        made.append(Arm(_proxy(size), changes))
        if size == section.ensemble_comparisons:
            members = {"reward_model.num_members": section.num_members, "reward_model.bootstrap": True}
            made.append(Arm(_ensemble(size), {**changes, **members}))
    made.append(_best_of_n(config, run, policy))
    made += [_ppo(config, run, policy, name, beta) for name, beta in _trainings(config)]
    for size in section.num_comparisons:
        made += [_dpo(run, policy, comparisons, size, beta) for beta in section.dpo_betas]
    return made


def _proxy(size: int) -> str:
    return f"proxy-{size}"


def _ensemble(size: int) -> str:
    return f"ensemble-{size}"


def _proxies(config: RLHFConfig) -> list[str]:
    section = config.overoptimisation
    names = [_proxy(size) for size in section.num_comparisons]
    return names if section.ensemble_comparisons is None else [*names, _ensemble(section.ensemble_comparisons)]


def _trainings(config: RLHFConfig) -> list[tuple[str, float]]:
    """The proxies and betas of PPO: every proxy at the smallest beta, one at all of them."""
    section = config.overoptimisation
    least = min(section.betas)
    others = sorted(set(section.betas) - {least})
    return [(name, least) for name in _proxies(config)] + [(_proxy(section.beta_comparisons), beta) for beta in others]


def _reward(config: RLHFConfig, run: RunFolder, name: str) -> dict[str, Any]:
    reward: dict[str, Any] = {"type": "model", "path": model_of(run, name, "reward_model")}
    if name.startswith("ensemble"):
        reward["aggregation"] = config.overoptimisation.aggregation
    return reward


def _best_of_n(config: RLHFConfig, run: RunFolder, policy: str) -> Arm:
    rewards: dict[str, Any] = {name: _reward(config, run, name) for name in _proxies(config)}
    changes = {
        "stages": ["best_of_n", "report"],
        "best_of_n.policy": policy,
        "best_of_n.rewards": {**rewards, GOLD: {"type": "gold"}},
        "best_of_n.judge": GOLD,
    }
    return Arm(BEST_OF_N, changes)


def _ppo(config: RLHFConfig, run: RunFolder, policy: str, name: str, beta: float) -> Arm:
    changes = {
        "stages": ["ppo", "report"],
        "ppo.policy": policy,
        "ppo.reference": policy,
        "ppo.kl_coefficient": beta,
        "ppo.rewards": {PROXY: _reward(config, run, name), GOLD: {"type": "gold", "weight": 0.0}},
    }
    if config.ppo.value_init == "reward_model" and config.ppo.value_network != "shared_trunk":
        changes["ppo.value_model"] = model_of(run, name.replace("ensemble", "proxy"), "reward_model")
    return Arm(_ppo_name(name, beta), changes)


def _ppo_name(name: str, beta: float) -> str:
    return f"ppo/{name}-beta-{beta:g}"


def _dpo(run: RunFolder, policy: str, comparisons: str, size: int, beta: float) -> Arm:
    changes = {
        "stages": ["dpo", "evaluate", "report"],
        "dpo.policy": policy,
        "dpo.reference": policy,
        "dpo.comparisons": comparisons,
        "dpo.num_comparisons": size,
        "dpo.beta": beta,
        "evaluate.baseline": policy,
        "evaluate.reference": policy,
        "evaluate.reward_model": model_of(run, _proxy(size), "reward_model"),
    }
    return Arm(f"dpo/{size}-beta-{beta:g}", changes)


def exhibits(config: RLHFConfig, arms: Mapping[str, RunFolder]) -> tuple[dict[str, Any], Exhibits]:
    """The figure, the fits, and what choosing a checkpoint by the gold reward is worth."""
    scores = Scores.read(arms[BEST_OF_N].stage("best_of_n").path / "scores.jsonl")
    curves = {
        (name, beta): ppo_curve(arms[_ppo_name(name, beta)], proxy=PROXY, gold=GOLD)
        for name, beta in _trainings(config)
    }
    fits = _fits(config, scores, curves)
    panels = [Panel("best-of-n", _DISTANCE, "reward", tuple(_best_of_n_lines(config, scores)))]
    panels.append(Panel("PPO", _DISTANCE, "reward", tuple(_ppo_lines(scores, curves))))
    dpo = _dpo_rows(config, arms)
    if dpo:
        panels.append(Panel("DPO", _DISTANCE, "reward", tuple(_dpo_lines(config, scores, dpo))))
    figure = Figure("overoptimisation", "Gold (lines) and proxy reward (dashed)", tuple(panels))
    tables = [_fit_table(fits), _checkpoint_table(curves)]
    if dpo:
        tables.append(Table("DPO", ("comparisons", "beta", "KL, nats", "gold reward", "proxy"), tuple(dpo)))
    return _summary(config, fits, curves), Exhibits(tuple(tables), (figure,), tuple(_remarks(config, fits, curves)))


Fits = dict[tuple[str, str], dict[str, Any]]
Curves = Mapping[tuple[str, float], PPOCurve]


def _summary(config: RLHFConfig, fits: Fits, curves: Curves) -> dict[str, Any]:
    """Fits of all curves, what the gold reward of PPO's came to, and the proxy of most labels less that of fewest."""
    found: dict[str, Any] = {}
    for (method, name), fit in fits.items():
        found |= {f"{method}/{_dashed(name)}/{number}": fit[number] for number in ("alpha", "beta", "r_squared")}
    for (name, beta), curve in curves.items():
        smooth = curve.smoothed(min(_WINDOW, len(curve.updates)))
        best, last = max(smooth.gold), smooth.gold[-1]
        own = {"peak": best, "end": last, "fall": best - last, "proxy_rise": smooth.proxy[-1] - smooth.proxy[0]}
        found |= {f"{_ppo_name(name, beta)}/{number}": value for number, value in own.items()}
    few, many = _proxy(config.overoptimisation.num_comparisons[0]), _proxy(config.overoptimisation.num_comparisons[-1])
    if few != many:
        least = min(config.overoptimisation.betas)
        for group, first, second, number in (
            ("best_of_n", few, many, "alpha"),
            ("ppo", f"{few}-beta-{least:g}", f"{many}-beta-{least:g}", "peak"),
        ):
            difference = found[f"{group}/{second}/{number}"] - found[f"{group}/{first}/{number}"]
            found[f"{group}/{many}_minus_{few}/{number}"] = difference
    return found


def _dashed(name: str) -> str:
    return name.replace(" ", "-")


def _sizes(config: RLHFConfig, scores: Scores) -> list[int]:
    num_samples = len(scores.by_reward[GOLD][0])
    wanted = config.best_of_n.sizes or tuple(2**power for power in range(num_samples.bit_length()))
    return [size for size in wanted if size <= num_samples]


def _fits(config: RLHFConfig, scores: Scores, curves: Curves) -> Fits:
    """The fit of the gold reward, less that of the first policy, for each proxy and method."""
    sizes = _sizes(config, scores)
    distances = [math.sqrt(best_of_n_kl(size)) for size in sizes]
    found: Fits = {}
    for name in _proxies(config):
        gold = best_of_n_rewards(scores.by_reward[name], scores.by_reward[GOLD], sizes)
        found["best_of_n", name] = _fit("best_of_n", distances, gold - gold[:, :1])
    for (name, beta), curve in curves.items():
        kept = [place for place, distance in enumerate(curve.distances) if distance > 0]
        rewards = [[curve.gold[place] - curve.gold[0] for place in kept]]
        distances = [curve.distances[place] for place in kept]
        found["ppo", f"{name} beta {beta:g}"] = _fit("reinforcement_learning", distances, rewards)
    return found


def _fit(form: Form, distances: Sequence[float], rewards: Any) -> dict[str, Any]:
    # Of a single training there is nothing to resample: its intervals are left out of the table.
    return {**fit_with_intervals(form, distances, rewards).to_json(), "num_units": len(rewards)}


def _best_of_n_lines(config: RLHFConfig, scores: Scores) -> list[Line]:
    lines = []
    for name in _proxies(config):
        curve = best_of_n_curve(scores.standardized(name), scores.by_reward[GOLD], _sizes(config, scores))
        for what, style, points in (
            ("gold", "line", [(point.distance, point.gold) for point in curve]),
            ("proxy", "dashed", [(point.distance, point.proxy) for point in curve]),
        ):
            lines.append(
                Line(
                    f"{name}: {what}",
                    tuple((x, interval.value) for x, interval in points),
                    tuple((interval.low, interval.high) for _, interval in points) if what == "gold" else None,
                    style="line" if style == "line" else "dashed",
                    group=name,
                )
            )
    return lines


def _ppo_lines(scores: Scores, curves: Curves) -> list[Line]:
    lines = []
    for (name, beta), curve in curves.items():
        mean, deviation = scores.standard(name)
        least = beta == min(other for _, other in curves)
        title = name if least else f"{name}, beta {beta:g}"
        proxy = [(value - mean) / deviation for value in curve.proxy]
        lines.append(Line(f"{title}: gold", tuple(zip(curve.distances, curve.gold, strict=True)), group=title))
        lines.append(
            Line(f"{title}: proxy", tuple(zip(curve.distances, proxy, strict=True)), style="dashed", group=title)
        )
    return lines


def _dpo_rows(config: RLHFConfig, arms: Mapping[str, RunFolder]) -> list[tuple[Any, ...]]:
    rows = []
    for size in config.overoptimisation.num_comparisons:
        for beta in config.overoptimisation.dpo_betas:
            found = summary_of(arms[f"dpo/{size}-beta-{beta:g}"], "evaluate")
            rows.append(
                (
                    str(size),
                    beta,
                    found.get("kl_to_reference"),
                    found["gold_score_policy"],
                    found.get("reward_model_score_policy"),
                )
            )
    return rows


def _dpo_lines(config: RLHFConfig, scores: Scores, rows: Sequence[tuple[Any, ...]]) -> list[Line]:
    lines = []
    for size in config.overoptimisation.num_comparisons:
        name = _proxy(size)
        mean, deviation = scores.standard(name)
        own = sorted((max(row[2]["value"], 0.0) ** 0.5, row) for row in rows if row[0] == str(size) and row[2])
        gold = [(distance, row[3]) for distance, row in own]
        proxy = [(distance, (row[4]["value"] - mean) / deviation) for distance, row in own if row[4]]
        points = tuple((distance, value["value"]) for distance, value in gold)
        band = tuple((value["low"], value["high"]) for _, value in gold)
        lines += [
            Line(f"{name}: gold", points, band, group=name),
            Line(f"{name}: proxy", tuple(proxy), style="dashed", group=name),
        ]
    return lines


def _fit_table(fits: Fits) -> Table:
    rows = []
    for (method, name), fit in fits.items():
        single = fit["num_units"] == 1
        peak = fit["peak"] or {}
        rows.append(
            (
                {"best_of_n": "best-of-n", "ppo": "PPO"}[method],
                name,
                fit["alpha"] if single else fit["alpha_interval"],
                fit["beta"] if single else fit["beta_interval"],
                fit["r_squared"],
                peak.get("distance"),
                peak.get("reward"),
                fit["warning"] or "",
            )
        )
    return Table(
        "Fits of the gold reward",
        ("method", "proxy", "alpha", "beta", "R squared", "peak at", "gain there", "remark"),
        tuple(rows),
        note="Best-of-n: d (alpha - beta d), intervals over prompts. PPO: d (alpha - beta log d), one training.",
    )


def _checkpoint_table(curves: Curves) -> Table:
    """What the gold reward, or the proxy, would have chosen among windows of updates, and the last one."""
    rows = []
    for (name, beta), curve in curves.items():
        smooth = curve.smoothed(min(_WINDOW, len(curve.updates)))
        best = max(range(len(smooth.gold)), key=smooth.gold.__getitem__)
        by_proxy = max(range(len(smooth.proxy)), key=smooth.proxy.__getitem__)
        rows.append(
            (
                name,
                f"{beta:g}",
                smooth.updates[best],
                smooth.gold[best],
                smooth.updates[by_proxy],
                smooth.gold[by_proxy],
                smooth.gold[-1],
            )
        )
    columns = ("proxy", "beta", "gold's choice: update", "gold", "proxy's choice: update", "gold", "gold at the end")
    return Table("Choosing a checkpoint of PPO", columns, tuple(rows), note=f"Means over {_WINDOW} updates.")


def _remarks(config: RLHFConfig, fits: Fits, curves: Curves) -> list[str]:
    said = []
    worst = min((fit["r_squared"], name) for (method, name), fit in fits.items() if method == "best_of_n")
    said.append(f"Best-of-n: the fit d (alpha - beta d) has R squared of at least {worst[0]:.3f} ({worst[1]}).")
    for (name, beta), curve in curves.items():
        smooth = curve.smoothed(min(_WINDOW, len(curve.updates)))
        best = max(range(len(smooth.gold)), key=smooth.gold.__getitem__)
        where = f"PPO on {name}, beta {beta:g}: gold"
        if best == len(smooth.gold) - 1:
            said.append(f"{where} is highest at the end ({smooth.gold[-1]:.2f}).")
        else:
            said.append(
                f"{where} turns down at sqrt(KL) {smooth.distances[best]:.1f} (update {smooth.updates[best]}): "
                f"{smooth.gold[best]:.2f}, {smooth.gold[-1]:.2f} at the end."
            )
    return said
