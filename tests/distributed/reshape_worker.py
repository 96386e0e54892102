"""What the ranks of test_reshape.py run: trainings that are saved in one shape and go on in another.

Usage: `reshape_worker.py FOLDER NUM_PROCESSES save|load`; when loading, rank 0 writes FOLDER/loaded<NUM_PROCESSES>.pt.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlhf.config.distributed import DistributedConfig
from rlhf.config.zero import ZeroConfig
from rlhf.distributed.checkpoints import checkpoint_folder
from rlhf.distributed.engine import TrainingEngine
from rlhf.distributed.runtime import Runtime
from rlhf.errors import ArtifactError
from rlhf.worker import leave
from tests.distributed.engine_worker import ROWS, SHARD_ALL, TwoHeads, train_step

SAVED_STEPS, MORE_STEPS = 3, 3
STAGES = (0, 1, 2, 3)
# Number of ranks that saved → numbers that go on.
SHAPES = {1: (2,), 2: (1, 4)}


class WithFrozen(TwoHeads):
    """With a frozen layer that takes part and a buffer that training changes."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(11, 11)
        self.frozen.requires_grad_(False)
        self.register_buffer("num_forwards", torch.zeros((), dtype=torch.int64))

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert isinstance(self.num_forwards, torch.Tensor)
        self.num_forwards += 1
        logits, values = super().forward(tokens)
        return logits + 0.1 * self.frozen(logits), values


def build(seed: int, frozen_seed: int = 3) -> tuple[WithFrozen, torch.optim.Optimizer, Any]:
    """The trained weights depend on `seed`, the frozen ones on `frozen_seed`."""
    torch.manual_seed(seed)
    module = WithFrozen()
    torch.manual_seed(frozen_seed)
    module.frozen.reset_parameters()
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [{"params": trained[:3], "lr": 1e-2}, {"params": trained[3:], "lr": 3e-3}]
    optimizer = torch.optim.AdamW(groups, eps=1e-5, weight_decay=0.01)
    return module, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 10)


def start(stage: int, num_processes: int, *, seed: int, frozen_seed: int = 3, offload: bool = False) -> TrainingEngine:
    config = DistributedConfig(num_processes=num_processes, device="cpu", timeout_seconds=300)
    extra = SHARD_ALL if stage == 3 else {}
    zero = ZeroConfig.model_validate({"stage": stage, "offload_optimizer": offload, "extra": extra})
    module, optimizer, scheduler = build(seed, frozen_seed)
    return TrainingEngine.prepare(
        module,
        optimizer,
        scheduler,
        runtime=Runtime.start(config, zero, seed=5),
        zero=zero,
        micro_batch_size=ROWS // num_processes,
        accumulation_steps=1,
        max_grad_norm=0.5,
    )


def saved_folder(folder: Path, num_processes: int, stage: int) -> Path:
    return checkpoint_folder(folder / f"{num_processes}-{stage}", SAVED_STEPS)


def save(folder: Path, num_processes: int) -> None:
    for stage in STAGES:
        engine = start(stage, num_processes, seed=1)
        for _ in range(SAVED_STEPS):
            train_step(engine)
        engine.save_checkpoint(saved_folder(folder, num_processes, stage), shared={"stage": stage})
    # The frozen layer has changed: the checkpoint has it.
    engine = start(3, num_processes, seed=1)
    train_step(engine)
    with engine.modified() as whole:
        whole.get_parameter("frozen.weight").data.fill_(0.25)
    engine.save_checkpoint(folder / f"{num_processes}-changed" / "checkpoint-1")


def go_on(folder: Path, num_processes: int, writers: int, written: int, stage: int, offload: bool) -> dict[str, Any]:
    engine = start(stage, num_processes, seed=99, offload=offload)
    found, notes = engine.find_checkpoint(folder / f"{writers}-{written}")
    assert found == saved_folder(folder, writers, written)
    assert engine.load_checkpoint(found) == {"stage": written}
    rates = [group["lr"] for group in engine.optimizer.param_groups]
    norms = [train_step(engine) for _ in range(MORE_STEPS)]
    return {"weights": engine.state_dict_for_saving(), "norms": norms, "rates": rates, "notes": notes}


def load(folder: Path, num_processes: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for writers in [writers for writers, readers in SHAPES.items() if num_processes in readers]:
        for written in STAGES:
            for stage in STAGES:
                results[f"{writers}-{written} {stage}"] = go_on(folder, num_processes, writers, written, stage, False)
        results[f"{writers}-0 2 offload"] = go_on(folder, num_processes, writers, 0, 2, True)
        results[f"{writers}-2 3 offload"] = go_on(folder, num_processes, writers, 2, 3, True)
        for stage in (0, 2, 3):
            engine = start(stage, num_processes, seed=99)
            engine.load_checkpoint(folder / f"{writers}-changed" / "checkpoint-1")
            weights = engine.state_dict_for_saving()
            results[f"changed {writers} {stage}"] = weights.get("frozen.weight")
            # What went on from such a checkpoint writes such checkpoints.
            again = folder / f"again-{num_processes}-{writers}-{stage}" / "checkpoint-1"
            engine.save_checkpoint(again)
            assert list(again.glob("frozen-*.safetensors"))
        engine = start(2, num_processes, seed=1, frozen_seed=4)
        try:
            engine.load_checkpoint(saved_folder(folder, writers, 0))
        except ArtifactError as error:
            results[f"other base {writers}"] = str(error)
    return results


def main(folder: Path, num_processes: int, what: str) -> None:
    if what == "save":
        save(folder, num_processes)
    else:
        results = load(folder, num_processes)
        if torch.distributed.get_rank() == 0:
            torch.save(results, folder / f"loaded{num_processes}.pt")
    torch.distributed.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
    leave(0)
