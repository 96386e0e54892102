"""Makes notebooks/runs: trains the tiny runs that the notebooks read, and keeps of them what is read.

    python notebooks/make_runs.py [BUILD_FOLDER]          # about ten minutes on two idle cores

A run that is finished in the build folder is not trained again.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

KEPT = Path(__file__).parent / "runs"
# Every run is on the embedded corpus, small enough for one core.
COMMON = [
    "experiment=quickstart",
    "tracking.wandb=disabled",
    "distributed.device=cpu",
    "distributed.num_threads=1",
    "model.scratch.num_layers=1",
    "model.scratch.hidden_size=64",
    "model.scratch.num_heads=2",
    "data.num_demonstrations=4000",
    "sft.max_steps=300",
    "sft.batch_size=16",
    "collect.num_comparisons=1500",
    "collect.num_validation_comparisons=100",
    "collect.num_test_comparisons=300",
    "reward_model.max_steps=150",
    "reward_model.batch_size=16",
    "reward_model.log_every=10",
    # The gold reward is watched and not optimised.
    "ppo.rewards={proxy: {type: model}, gold: {type: gold, weight: 0.0}}",
    "ppo.num_updates=40",
    "ppo.batch_size=64",
    "ppo.learning_rate=1e-3",
    "ppo.samples_every=20",
    "ppo.num_samples_shown=4",
    "ppo.guards=warn",
    "evaluate.num_prompts=100",
    "evaluate.num_samples_shown=10",
]
WALK = "walk_through"
FROM_WALK = [
    f"ppo.policy={WALK}/stages/sft/model",
    f"ppo.reward_model={WALK}/stages/reward_model/model",
    f"evaluate.baseline={WALK}/stages/sft/model",
    f"evaluate.reward_model={WALK}/stages/reward_model/model",
    "stages=[ppo,evaluate]",
]
EXACT = [
    "experiment=closed_form",
    "tracking.wandb=disabled",
    "closed_form.algorithms=[ppo]",
    "closed_form.betas=[0.1, 0.4]",
    "closed_form.num_responses=40960",
]
PATTERNS = (
    *("manifest.json", "config.yaml", "metrics.jsonl", "samples.jsonl", "stages/*/result.json"),
    *("stages/*/exhibits.json", "stages/*/mistakes.jsonl", "stages/*/responses.jsonl"),
)
MOST_MISTAKES = 20


def runs() -> dict[str, list[str]]:
    """The runs by name, with their arguments; the walk-through comes first, since others start from its models."""
    made = {WALK: [*COMMON, "ppo.kl_coefficient=0.1"]}
    for name, coefficient in (("free", 0.0), ("held", 0.2)):
        for seed in (1, 2, 3):
            made[f"{name}_seed{seed}"] = [*COMMON, *FROM_WALK, f"ppo.kl_coefficient={coefficient}", f"seed={seed}"]
    made["exact_optimum"] = EXACT
    return made


def keep(source: Path, target: Path) -> None:
    """Copies what the notebooks read."""
    shutil.rmtree(target, ignore_errors=True)
    for pattern in PATTERNS:
        for file in sorted(source.glob(pattern)):
            place = target / file.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            text = file.read_text(encoding="utf-8")
            if file.name == "mistakes.jsonl":
                text = "".join(text.splitlines(keepends=True)[:MOST_MISTAKES])
            if file.name == "manifest.json":
                # What is of this machine tells the notebooks nothing.
                body = json.loads(text)
                text = json.dumps({**body, "hardware": {}, "attempts": []}, indent=2) + "\n"
            place.write_text(text, encoding="utf-8")


def main(build: Path) -> None:
    """Trains what is not finished and copies everything."""
    build.mkdir(parents=True, exist_ok=True)
    for name, arguments in runs().items():
        command = [sys.executable, "-m", "rlhf", "run", *arguments, f"run.dir={name}"]
        subprocess.run(command, cwd=build, check=True)
        keep(build / name, KEPT / name)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/notebooks"))
