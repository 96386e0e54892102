"""Study compare_arms: the arms that its section names, and a table and curves of the results that it names.

An ablation in one config: what several arms need (SFT, labels, a reward model) is made once by this run, and every arm
takes what it neither makes nor names from there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlhf.config import STAGES, STUDIES, RLHFConfig
from rlhf.config.errors import close_names, did_you_mean
from rlhf.errors import ArtifactError, ConfigError
from rlhf.runs.exhibits import Exhibits, Figure, Line, Panel, Table
from rlhf.runs.folder import RunFolder
from rlhf.runs.jsonable import read_lines
from rlhf.stage_inputs import own_model
from rlhf.studies.arms import ARMS_FOLDER, Arm
from rlhf.studies.measures import result_of, series_of
from rlhf.studies.seeds import Estimate, mean_of, over_seeds, seeds_of

DEFAULT_STAGES = ("ppo", "evaluate", "report")
# In a value of an arm: the folder of the arms of its seed.
ARMS_PLACE = "{arms}"
_POLICY_KEYS = (
    *("collect.policy", "reward_model.base", "ppo.policy", "ppo.reference", "dpo.policy", "dpo.reference"),
    *("best_of_n.policy", "evaluate.baseline", "evaluate.reference"),
)
_NUM_NAMES_SHOWN = 12


def arms(config: RLHFConfig, run: RunFolder, policy: str) -> Sequence[Arm]:
    """The arms of every seed, in the order of the config. Raises `ConfigError` for a section that compares nothing."""
    section = config.compare_arms
    if len(section.arms) < 2:
        raise ConfigError(
            f"stage compare_arms compares at least two arms, and compare_arms.arms has {len(section.arms)}: give each "
            "a name and the keys that it changes, such as compare_arms.arms={low: {ppo: {kl_coefficient: 0.01}}, "
            "high: {ppo: {kl_coefficient: 0.1}}}"
        )
    if not section.results:
        raise ConfigError("compare_arms.results names nothing to compare: add evaluate/win_rate or ppo/score_mean@last")
    made = []
    for seed in seeds_of(config, section.num_seeds):
        folder = str(run.path / ARMS_FOLDER / _prefix(seed))
        for name, wanted in section.arms.items():
            own = dict(_leaves(config.model_dump(mode="json"), _placed(wanted, folder)))
            stages = own.setdefault("stages", list(DEFAULT_STAGES))
            _check_stages(name, stages)
            shared = {**_from_policy(policy), **_from_this_run(config, run, stages)}
            given = {key: value for key, value in shared.items() if not _is_set(config, key) and key not in own}
            made.append(Arm(f"{_prefix(seed)}/{name}", {"seed": seed, **given, **own}))
    _check_results(config, made)
    return made


def _prefix(seed: int) -> str:
    return f"seed-{seed}"


def _leaves(values: Mapping[str, Any], changes: Mapping[str, Any], parents: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted keys to set. A mapping is merged into the config's, key by key, unless it has another `type`."""
    for name, value in changes.items():
        key, before = f"{parents}{name}", values.get(name)
        if (
            isinstance(value, Mapping)
            and isinstance(before, Mapping)
            and value.get("type") in (None, before.get("type"))
        ):
            yield from _leaves(before, value, f"{key}.")
        else:
            yield key, value


def _placed(value: Any, folder: str) -> Any:
    """The value with the arms' folder in the place of its marker."""
    if isinstance(value, Mapping):
        return {name: _placed(one, folder) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_placed(one, folder) for one in value]
    return value.replace(ARMS_PLACE, folder) if isinstance(value, str) else value


def _check_stages(arm: str, stages: Any) -> None:
    nested = [stage for stage in stages if stage in STUDIES] if isinstance(stages, list) else []
    if nested:
        raise ConfigError(f"compare_arms.arms.{arm}.stages has {nested[0]}, which is a study: an arm is a plain run")


def _from_policy(policy: str) -> dict[str, str]:
    return dict.fromkeys(_POLICY_KEYS, policy)


def _from_this_run(config: RLHFConfig, run: RunFolder, stages: Sequence[str]) -> dict[str, Any]:
    """Comparisons and reward model of this run, for an arm that makes none of its own."""
    found: dict[str, Any] = {}
    if "collect" not in stages and "collect" in config.stages:
        comparisons = str(run.stage("collect").path / "comparisons")
        found |= {"reward_model.comparisons": comparisons, "dpo.comparisons": comparisons}
    model = own_model(config, run, "reward_model")
    if "reward_model" not in stages and model is not None:
        found |= {"ppo.reward_model": model, "evaluate.reward_model": model}
        if not config.best_of_n.rewards:
            found["best_of_n.rewards"] = {"proxy": {"type": "model", "path": model}}
    return found


def _is_set(config: RLHFConfig, key: str) -> bool:
    section, name = key.split(".")
    return getattr(getattr(config, section), name) not in (None, {})


def _check_results(config: RLHFConfig, made: Sequence[Arm]) -> None:
    """Every result and curve is of a stage that an arm has: a slip should not show after the last arm."""
    having = {str(stage) for arm in made for stage in arm.changes["stages"]}
    section = config.compare_arms
    for field, entry in [("results", one) for one in section.results] + [("curves", one) for one in section.curves]:
        stage = entry.partition("/")[0]
        if stage not in having:
            near = did_you_mean(close_names(stage, sorted(having)))
            known = f"no arm has stage {stage}" if stage in STAGES else f"there is no stage {stage}"
            raise ConfigError(f"compare_arms.{field} has {entry}, and {known}{near}")


def exhibits(config: RLHFConfig, arms: Mapping[str, RunFolder]) -> tuple[dict[str, Any], Exhibits]:
    """Results by arm, differences between arms, curves. Raises `ArtifactError` for a result that no arm has."""
    section = config.compare_arms
    seeds = seeds_of(config, section.num_seeds)
    folders = {name: [arms[f"{_prefix(seed)}/{name}"] for seed in seeds] for name in section.arms}
    found = {
        name: {
            result: over_seeds([result_of(one, result, section.window) for one in own]) for result in section.results
        }
        for name, own in folders.items()
    }
    for result in section.results:
        if all(math.isnan(own[result].value) for own in found.values()):
            raise ArtifactError(_nothing_of(result, folders))
    summary = {f"{name}/{_key(result)}": _cell(one) for name, own in found.items() for result, one in own.items()}
    tables = [_result_table(config, found)]
    leads = _leads(found, section.differences)
    if leads:
        tables.append(_lead_table(config, leads))
    for (first, second), own in leads.items():
        summary |= {f"{first}_minus_{second}/{_key(result)}": _cell(lead) for result, lead in own.items()}
    summary = {name: value for name, value in summary.items() if value is not None}
    return summary, Exhibits(tuple(tables), _figures(config, folders), tuple(_remarks(found, leads)))


Found = Mapping[str, Mapping[str, Estimate]]
Leads = Mapping[tuple[str, str], Mapping[str, Estimate]]


def _key(result: str) -> str:
    """The result's name in the summary: a metric's name, such as other tools take it."""
    return result.replace("@", "_")


def _cell(estimate: Estimate) -> Any:
    """An estimate, the number alone where one training has no interval, None where there is nothing."""
    if math.isnan(estimate.value):
        return None
    return estimate.to_json() if math.isfinite(estimate.high) else estimate.value


def _nothing_of(result: str, folders: Mapping[str, Sequence[RunFolder]]) -> str:
    metric, at, _ = result.partition("@")
    stage = metric.partition("/")[0]
    names: set[str] = set()
    for one in (one for own in folders.values() for one in own):
        if at:
            names |= {name for line in read_lines(one.metrics) if line.get("stage") == stage for name in line}
        else:
            finished = one.stage(stage).read_result()
            names |= {name.removeprefix(f"{stage}/") for name in (finished.summary if finished else {})}
    names -= {"stage", "step"}
    wanted = metric if at else metric.removeprefix(f"{stage}/")
    shown = sorted(names)[:_NUM_NAMES_SHOWN]
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return (
        f"compare_arms.results has {result}, and no arm has it{did_you_mean(close_names(wanted, sorted(names)))}. "
        f"Stage {stage} has {', '.join(shown) or 'nothing'}{more}. Finished arms are not run again."
    )


def _leads(found: Found, differences: Sequence[str]) -> Leads:
    """The results of the first arm less those of the second, paired by seed, for each difference."""
    leads = {}
    for difference in differences:
        first, _, second = difference.partition("/")
        leads[first, second] = {result: one.minus(found[second][result]) for result, one in found[first].items()}
    return leads


def _result_table(config: RLHFConfig, found: Found) -> Table:
    section = config.compare_arms
    rows = tuple((name, *(_cell(one) for one in own.values())) for name, own in found.items())
    window = f"Of metrics along a stage: means over {section.window} steps." if "@" in "".join(section.results) else ""
    note = " ".join(part for part in (window, _about_seeds(section.num_seeds)) if part)
    return Table("Results", ("arm", *section.results), rows, note=note)


def _about_seeds(num_seeds: int) -> str:
    if num_seeds > 1:
        return f"Mean and 95 % t-interval over {num_seeds} seeds."
    return "One seed: an interval is over prompts, and says nothing of another training."


def _lead_table(config: RLHFConfig, leads: Leads) -> Table:
    section = config.compare_arms
    rows = tuple(
        (f"{first} less {second}", *(_cell(one) for one in own.values())) for (first, second), own in leads.items()
    )
    return Table("Differences", ("arms", *section.results), rows, note=_about_seeds(section.num_seeds))


def _remarks(found: Found, leads: Leads) -> Iterator[str]:
    for (first, second), own in leads.items():
        for result, lead in own.items():
            if not math.isnan(lead.value):
                interval = f" [{lead.low:+.3g}, {lead.high:+.3g}]" if math.isfinite(lead.high) else ""
                values = f"{found[first][result].value:.3g} against {found[second][result].value:.3g}"
                yield f"{result}: {first} less {second} {lead.value:+.3g}{interval} ({values})"


def _figures(config: RLHFConfig, folders: Mapping[str, Sequence[RunFolder]]) -> tuple[Figure, ...]:
    section = config.compare_arms
    panels = []
    for metric in section.curves:
        lines = [line for name, own in folders.items() for line in _lines(config, name, own, metric)]
        if lines:
            label = "step" if section.x == "step" else "square root of the KL, nats"
            panels.append(Panel(metric, label, metric, tuple(lines)))
    if not panels:
        return ()
    note = _about_seeds(section.num_seeds) if section.num_seeds > 1 else ""
    return (Figure("arms", "The arms' trainings", tuple(panels), note=note),)


def _lines(config: RLHFConfig, name: str, own: Sequence[RunFolder], metric: str) -> list[Line]:
    """Over steps the mean of the seeds with its band; over the KL, which differs by seed, a line for each."""
    section = config.compare_arms
    series = [one for one in (series_of(folder, metric) for folder in own) if one is not None]
    if section.x == "sqrt_kl":
        return [
            Line(name, tuple(zip(one.distances, one.values, strict=True)), group=name)
            for one in (each.smoothed(section.window) for each in series)
            if one.distances
        ]
    if not series:
        return []
    steps = series[0].steps
    if any(one.steps != steps for one in series):
        return [Line(name, tuple(zip(map(float, one.steps), one.values, strict=True)), group=name) for one in series]
    means = [mean_of(values) for values in zip(*(one.values for one in series), strict=True)]
    points = tuple((float(step), mean.value) for step, mean in zip(steps, means, strict=True))
    band = tuple((mean.low, mean.high) for mean in means) if len(series) > 1 else None
    return [Line(name, points, band, group=name)]
