"""The table of docs/planning.md: `python -m rlhf.planning.table` prints PPO of 7B, 13B and 70B on 1 to 512 GPUs.

Arguments are overrides of the config, as of every verb; the shapes are those of Llama 2 (Touvron et al. 2023,
arXiv 2307.09288), whose config.json are in the folder `shapes` beside this file.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rlhf.config.compose import load_config
from rlhf.planning.plan import make_plan
from rlhf.planning.render import duration, size

SHAPES = Path(__file__).parent / "shapes"
MODELS = ("7b", "13b", "70b")
NUM_GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_SETTING = (
    "stages=[ppo]",
    "ppo.batch_size=512",
    "ppo.micro_batch_size=1",
    "ppo.rollout_batch_size=16",
    "ppo.gradient_checkpointing=true",
    "ppo.logprob_chunk_tokens=512",
    "ppo.max_response_tokens=512",
    "data.max_prompt_tokens=512",
)
_LAYOUTS = {"full": (), "LoRA": ("peft=lora",)}


def main(arguments: Sequence[str]) -> None:
    """Prints the table as Markdown."""
    print("| model | GPUs | trained | fits | peak a rank | largest part at the peak | host memory a rank | an update |")
    print("|---|---|---|---|---|---|---|---|")
    for model in MODELS:
        for number in NUM_GPUS:
            for layout, overrides in _LAYOUTS.items():
                print(_row(model, number, layout, [*_SETTING, *overrides, *arguments]))


def _row(model: str, number: int, layout: str, overrides: list[str]) -> str:
    nodes = max(1, number // 8)
    own = [
        f"model.path={SHAPES / f'llama-2-{model}'}",
        f"distributed.num_nodes={nodes}",
        f"distributed.num_processes={number // nodes}",
        f"zero={'stage3' if number > 1 else 'none'}",
    ]
    plan = make_plan(load_config([*own, *overrides]).config)
    stage = plan.stages[0]
    worst = max(stage.phases, key=lambda phase: phase.device)
    part = max(worst.parts, key=lambda name: worst.parts[name])
    time = duration(stage.work.seconds) if stage.work.seconds is not None and plan.fits else ""
    verdict = "yes" if plan.fits else "no"
    largest = f"{worst.name}: {part} {size(worst.parts[part])}"
    return (
        f"| {model.upper()} | {number} | {layout} | {verdict} | {size(stage.peak)} | {largest} | {size(stage.host)} "
        f"| {time} |"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
