"""A tiny configuration, its data and contexts for tests of the stages that TRL trains."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from rlhf.config import RLHFConfig
from rlhf.distributed.runtime import Runtime
from rlhf.records import Comparison, dump_line
from rlhf.runs.folder import RunFolder
from rlhf.stages.context import StageContext

QUALITIES = ("good", "fine", "great", "bad", "poor")
SPLIT_SIZES = {"train": 40, "validation": 6, "test": 7}


def write_demonstrations(folder: Path, sizes: dict[str, int] | None = None) -> None:
    """JSONL files of the splits, with responses of one to five words."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, size in (sizes or SPLIT_SIZES).items():
        lines = []
        for number in range(size):
            words = [QUALITIES[(number * 7 + place) % 5] for place in range(number % 5 + 1)]
            lines.append(json.dumps({"prompt": f"the {split} film {number}", "response": " was " + " ".join(words)}))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")


def write_comparisons(folder: Path) -> None:
    """Comparisons as stage collect writes them; good words are preferred, whatever the length."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, size in SPLIT_SIZES.items():
        records = [
            Comparison(f"the {split} film {n}", " was good" + " fine" * (n % 3), " was bad" + " poor" * (n % 4))
            for n in range(size)
        ]
        (folder / f"{split}.jsonl").write_text("".join(dump_line(record) + "\n" for record in records))


def tiny_config(folder: Path, **sections: dict[str, Any]) -> RLHFConfig:
    """A model of two layers of 32 and ten steps of eight; `sections` are merged in."""
    training = {"batch_size": 8, "max_steps": 10, "learning_rate": 1e-2, "log_every": 3, "save_every": 4}
    # Pairs are told apart so soon that a higher rate leaves gradients of rounding errors only.
    reward = {**training, "learning_rate": 1e-3}
    body: dict[str, dict[str, Any]] = {
        "tracking": {"wandb": "disabled"},
        "distributed": {"device": "cpu"},
        "model": {"scratch": {"num_layers": 2, "hidden_size": 32, "num_heads": 2, "vocab_size": 300}},
        "data": {"type": "files", "path": str(folder / "data")},
        "sft": training,
        "reward_model": reward,
    }
    for name, section in sections.items():
        body[name] = {**body.get(name, {}), **section}
    return RLHFConfig.model_validate(body)


def one_process() -> Runtime:
    """The runtime of a process on its own, without the settings that `Runtime.start` makes for a whole process."""
    return Runtime(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"), precision="fp32")


def make_context(
    config: RLHFConfig, run: Path, stage: str, inputs: dict[str, str] | None = None, runtime: Runtime | None = None
) -> StageContext:
    """The context of a stage in run folder `run`, whose folder is made."""
    folder = RunFolder(run)
    folder.stage(stage).path.mkdir(parents=True, exist_ok=True)
    return StageContext(config, folder, folder.stage(stage), runtime or one_process(), inputs or {})


def metrics_of(run: Path, stage: str) -> list[dict[str, Any]]:
    """The stage's lines of the metrics, without what time decides."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if not name.startswith("perf/")}
        for line in lines
        if line["stage"] == stage
    ]


def weight_bytes(run: Path, stage: str) -> bytes:
    """The published weights' file."""
    return (run / "stages" / stage / "model" / "model.safetensors").read_bytes()


@contextmanager
def recorded_resumes() -> Iterator[list[str]]:
    """Names of the checkpoints that trainers go on from in the block: starting over would give the same bytes."""
    from rlhf.stages.trl_checkpoints import TrainerCheckpoints

    found: list[str] = []
    whole = TrainerCheckpoints._load

    def load(self: TrainerCheckpoints, folder: Path) -> None:
        found.append(folder.name)
        whole(self, folder)

    TrainerCheckpoints._load = load  # type: ignore[method-assign]
    try:
        yield found
    finally:
        TrainerCheckpoints._load = whole  # type: ignore[method-assign]


def require_resumed_from(found: list[str], expected: list[str]) -> None:
    """Raises `RuntimeError`, which ends a rank, when trainers went on from other checkpoints."""
    if found != expected:
        raise RuntimeError(f"expected to go on from {expected}, went on from {found}")
