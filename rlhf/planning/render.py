"""A plan as text for people and as JSON for programs."""

from __future__ import annotations

from typing import Any

from rlhf.planning.lengths import TrainedStage
from rlhf.planning.phases import COMPONENTS, libraries_bytes
from rlhf.planning.plan import GIB, Plan, StagePlan

_TITLES: dict[TrainedStage, str] = {"sft": "SFT", "reward_model": "reward model", "ppo": "PPO"}


def size(value: float) -> str:
    """A number of bytes for people, in MiB or GiB."""
    if value >= 10 * GIB:
        return f"{value / GIB:,.1f} GiB"
    return f"{value / GIB:.2f} GiB" if value >= GIB else f"{value / 2**20:,.0f} MiB"


def duration(seconds: float) -> str:
    """A time for people."""
    for limit, unit, length in ((120, "s", 1), (7200, "min", 60), (172_800, "h", 3600)):
        if seconds < limit:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds / 86_400:.3g} days"


def render(plan: Plan) -> str:
    """The whole plan; its last line is the verdict."""
    parts = [_setting_line(plan)]
    for stage in plan.stages:
        parts.append("\n".join(_stage_lines(plan, stage)))
    return "\n\n".join([*parts, verdict(plan)])


def verdict(plan: Plan) -> str:
    """`fits: yes` or `fits: no`, with the peak, the limit and on how many devices."""
    worst = max(plan.stages, key=lambda stage: stage.peak / stage.limit)
    host = max(stage.host for stage in plan.stages) * plan.setting.ranks_per_node
    on_host = f"; a host needs {size(host)} of memory" if host and plan.setting.device == "cuda" else ""
    line = (
        f"fits: {'yes' if plan.fits else 'no'} (peak {size(worst.peak)} a rank in stage {worst.stage}, limit "
        f"{size(worst.limit)}, {_devices(plan)}{on_host})"
    )
    if plan.fits:
        return line
    if not worst.changes:
        return f"{line}\nno change of the config that is tried here helps: take a smaller model or a larger GPU"
    for change in worst.changes:
        if change.alone is not None and change.alone <= worst.limit:
            return f"{line}\nfirst change: {' '.join(change.overrides)} (peak {size(change.alone)})"
    first = worst.changes[0]
    line += f"\nfirst change: {' '.join(first.overrides)} (peak {size(first.peak)}; it takes more, see above)"
    return line if worst.changes[-1].fits else f"{line}\nall the changes above together do not make it fit"


def _devices(plan: Plan) -> str:
    number = plan.setting.num_ranks
    if plan.setting.device == "cpu":
        return f"{number} process{'' if number == 1 else 'es'} on this machine's CPU"
    return f"{number} × {plan.device}"


def _setting_line(plan: Plan) -> str:
    setting = plan.setting
    zero = f"ZeRO-{setting.stage}" if setting.stage else "without ZeRO"
    offloads = [
        name
        for name, wanted in (
            ("optimiser", setting.zero.offload_optimizer),
            ("parameters", setting.zero.offload_parameters),
        )
        if wanted
    ]
    extra = f", {' and '.join(offloads)} offloaded" if offloads else ""
    return f"{_devices(plan)}, {zero}{extra}, {'bf16' if setting.bfloat16 else 'fp32'}; memory a rank"


def _stage_lines(plan: Plan, stage: StagePlan) -> list[str]:
    architecture = stage.source.architecture
    layer = architecture.layers // max(1, architecture.num_layers)
    head = "head tied to it" if architecture.tied else f"head {architecture.head:,}"
    heads = f"{architecture.num_heads} heads, {architecture.num_kv_heads} of keys and values"
    sizes = f"{architecture.num_layers} layers of {layer:,}, embedding {architecture.embedding:,}, {head}; {heads}"
    lines = [
        f"── {_TITLES[stage.stage]}: {architecture.name} ──",
        f"{architecture.total:,} parameters: {sizes}",
    ]
    shown = [name for name in COMPONENTS if any(phase.parts.get(name) for phase in stage.phases)]
    rows = [["phase", *shown, "total", "on the host"]]
    for phase in stage.phases:
        cells = [size(phase.parts[name]) if phase.parts.get(name) else "" for name in shown]
        rows.append([phase.name, *cells, size(phase.device), size(phase.host) if phase.host else ""])
    lines += _table(rows)
    if plan.setting.device == "cpu":
        lines.append(
            f"peak {size(stage.peak)}: the worst moment, what the C allocator keeps of other moments, and "
            f"{size(libraries_bytes(plan.setting))} that libraries load on first use"
        )
    elif stage.host:
        lines.append(
            f"on the host at most {size(stage.host)} a rank, {size(stage.host * plan.setting.ranks_per_node)} for the "
            f"{plan.setting.ranks_per_node} of a host"
        )
    if stage.estimated:
        lines.append(
            f"activations are an estimate on the safe side: the code of {architecture.config.model_type} could not be "
            "counted as it runs"
        )
    lines.append(_micro_batch_line(stage))
    lines.append(_work_line(stage))
    if stage.changes:
        lines.append("to make it fit, one on top of the other:")
        for change in stage.changes:
            note = "fits" if change.fits else "not yet"
            lines.append(f"  {' '.join(change.overrides):<48} peak {size(change.peak):>10}  {note}")
    return lines


def _micro_batch_line(stage: StagePlan) -> str:
    rows = stage.largest_micro_batch
    largest = f"the largest that fits is {rows}" if rows else "not even 1 fits"
    return f"micro-batch {stage.micro_batch_size}: {largest}"


def _work_line(stage: StagePlan) -> str:
    work = stage.work
    unit = "update" if stage.stage == "ppo" else "step"
    text = f"{'an' if unit == 'update' else 'a'} {unit}: {work.tokens:,.0f} tokens, {work.flops:.3g} FLOPs"
    if work.seconds is None:
        return text
    text += f", {duration(work.seconds)}"
    if work.rollout_seconds is not None:
        text += f" ({duration(work.rollout_seconds)} of it sampling)"
    return text if work.steps is None else f"{text}; {work.steps:,} {unit}s: {duration(work.steps * work.seconds)}"


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def to_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain values; sizes in bytes, times in seconds."""
    setting = plan.setting
    return {
        "fits": plan.fits,
        "device": plan.device,
        "num_ranks": setting.num_ranks,
        "ranks_per_node": setting.ranks_per_node,
        "zero": setting.zero.model_dump(mode="json"),
        "precision": "bf16" if setting.bfloat16 else "fp32",
        "stages": {stage.stage: _stage_json(stage) for stage in plan.stages},
    }


def _stage_json(stage: StagePlan) -> dict[str, Any]:
    architecture = stage.source.architecture
    return {
        "fits": stage.fits,
        "peak_bytes": round(stage.peak),
        "limit_bytes": round(stage.limit),
        "host_bytes": round(stage.host),
        "activations_estimated": stage.estimated,
        "model": {
            "name": architecture.name,
            "parameters": architecture.total,
            "embedding": architecture.embedding,
            "layers": architecture.layers,
            "active_layers": architecture.active_layers,
            "head": architecture.head,
            "tied": architecture.tied,
            "num_layers": architecture.num_layers,
            "num_heads": architecture.num_heads,
            "num_kv_heads": architecture.num_kv_heads,
            "hidden_size": architecture.hidden_size,
            "vocab_size": architecture.vocab_size,
        },
        "phases": [
            {
                "name": phase.name,
                "worst_moment": phase.moment,
                "device_bytes": round(phase.device),
                "host_bytes": round(phase.host),
                "parts": {name: round(value) for name, value in phase.parts.items()},
            }
            for phase in stage.phases
        ],
        "micro_batch_size": stage.micro_batch_size,
        "largest_micro_batch_size": stage.largest_micro_batch,
        "work": {
            "tokens": round(stage.work.tokens),
            "flops": stage.work.flops,
            "seconds": stage.work.seconds,
            "rollout_seconds": stage.work.rollout_seconds,
            "steps": stage.work.steps,
        },
        "changes": [
            {
                "overrides": list(change.overrides),
                "peak_bytes": round(change.peak),
                "fits": change.fits,
                "peak_bytes_alone": None if change.alone is None else round(change.alone),
            }
            for change in stage.changes
        ],
    }
