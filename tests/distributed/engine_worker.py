"""What the ranks of test_engine.py run: many engines one after the other in one process, results as files.

Usage: `engine_worker.py FOLDER NUM_PROCESSES`; rank 0 writes FOLDER/results.pt.
"""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn
from torch.nn import functional
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from rlhf.config.distributed import DistributedConfig
from rlhf.config.zero import ZeroConfig
from rlhf.distributed.checkpoints import checkpoint_folder
from rlhf.distributed.engine import TrainingEngine
from rlhf.distributed.runtime import Runtime
from rlhf.distributed.zero import deepspeed_json
from rlhf.worker import leave

ROWS, LENGTH, VOCABULARY, WIDTH = 8, 6, 11, 16
NUM_STEPS = 3
# In bfloat16 512 times a number and the number itself make 512 times the number again.
SCALES = (512.0,) + 64 * (1.0,)
# Not the default, under which every tensor of so small a model would stay whole at stage 3.
SHARD_ALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


class TwoHeads(nn.Module):
    """A trunk with a policy head, tied to the embedding, and a value head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.trunk = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
        self.policy_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.policy_head.weight = self.embedding.weight
        self.value_head = nn.Linear(WIDTH, 1)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        embedded = self.embedding(tokens)
        hidden = embedded + self.trunk(embedded.cumsum(1))
        return self.policy_head(hidden), self.value_head(hidden).squeeze(-1)


def fixed_batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, targets and a mask of very unequal row lengths, each (ROWS, LENGTH)."""
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=generator)
    targets = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=generator)
    lengths = torch.tensor([1, 6, 2, 3, 6, 1, 5, 4])
    return tokens, targets, torch.arange(LENGTH) < lengths[:, None]


def loss_sum(output: tuple[torch.Tensor, torch.Tensor], targets: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    logits, values = output[0].float(), output[1].float()
    policy = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(mask)
    return torch.where(mask, policy + 0.1 * (values - targets).square(), 0.0).sum()


def build(seed: int) -> tuple[TwoHeads, torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    torch.manual_seed(seed)
    module = TwoHeads()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, eps=1e-5, weight_decay=0.01)
    return module, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 10)


@dataclass(frozen=True)
class Case:
    stage: int
    accumulation_steps: int
    max_grad_norm: float = 0.5
    precision: str = "fp32"
    offload: bool = False

    @property
    def name(self) -> str:
        return f"stage{self.stage}-{self.accumulation_steps}-{self.max_grad_norm}-{self.precision}-{self.offload}"


CASES = [Case(stage, steps) for stage in (0, 1, 2, 3) for steps in (1, 2)] + [
    Case(0, 2, max_grad_norm=100.0),
    Case(3, 2, max_grad_norm=100.0),
    Case(2, 1, offload=True),
    Case(0, 1, precision="bf16"),
    Case(2, 2, precision="bf16"),
]
RESUMED = [Case(stage, 2) for stage in (0, 1, 2, 3)]
RESUMED += [Case(stage, 1, precision="bf16") for stage in (0, 1, 2, 3)]
RESUMED += [Case(2, 1, offload=True), Case(3, 2, offload=True)]


def start(case: Case, num_processes: int, build_seed: int) -> tuple[Runtime, TrainingEngine]:
    zero = ZeroConfig.model_validate(
        {"stage": case.stage, "offload_optimizer": case.offload, "extra": SHARD_ALL if case.stage == 3 else {}}
    )
    config = DistributedConfig.model_validate(
        {"num_processes": num_processes, "device": "cpu", "precision": case.precision, "timeout_seconds": 300}
    )
    runtime = Runtime.start(config, zero, seed=5)
    # Ranks start from different weights on purpose: rank 0's must win.
    module, optimizer, scheduler = build(build_seed + runtime.rank)
    engine = TrainingEngine.prepare(
        module,
        optimizer,
        scheduler,
        runtime=runtime,
        zero=zero,
        micro_batch_size=ROWS // num_processes // case.accumulation_steps,
        accumulation_steps=case.accumulation_steps,
        max_grad_norm=case.max_grad_norm,
    )
    return runtime, engine


def train_step(engine: TrainingEngine, *, noisy: bool = False) -> float:
    """One optimiser step on the fixed batch, this rank's rows in micro-batches; `noisy` drops tokens at random."""
    tokens, targets, mask = fixed_batch()
    count = mask.sum()
    if noisy:
        draws = torch.rand(mask.shape) + random.random() + float(numpy.random.rand())
        mask = mask & (draws < 2.0)
    rows = torch.arange(ROWS)[engine.runtime.rank :: engine.runtime.world_size]
    for part in rows.chunk(engine.accumulation_steps):
        engine.backward(loss_sum(engine.module(tokens[part]), targets[part], mask[part]) / count)
    return engine.step()


def check_collectives(engine: TrainingEngine) -> None:
    """Whole weights inside `gathered`, also with unequal numbers of forward passes; training goes on afterwards."""
    tokens, _, _ = fixed_batch()
    with torch.no_grad(), engine.gathered() as whole:
        assert whole is engine.unwrapped
        for _ in range(1 + 3 * engine.runtime.rank):
            logits, _ = whole(tokens)
    first = engine.runtime.gather_objects(logits.float().sum().item())
    assert len(set(first)) == 1, first
    with torch.no_grad():
        through_engine = engine.module(tokens)[0]
    assert torch.equal(through_engine.float(), logits.float())


def run_case(case: Case, num_processes: int) -> dict[str, Any]:
    runtime, engine = start(case, num_processes, build_seed=1)
    norms = []
    for step in range(NUM_STEPS):
        norms.append(train_step(engine))
        if step == 0:
            check_collectives(engine)
    assert len(set(runtime.gather_objects(tuple(norms)))) == 1
    weights = engine.state_dict_for_saving()
    assert bool(weights) == runtime.is_main
    if runtime.is_main:
        assert weights["policy_head.weight"].data_ptr() == weights["embedding.weight"].data_ptr()
    heads = engine.state_dict_for_saving("value_head.")
    assert list(heads) == (["weight", "bias"] if runtime.is_main else [])
    sharded = is_deepspeed_zero3_enabled()
    assert not sharded, "a model that is loaded now would be sharded too"
    return {"weights": weights, "norms": norms, "rate": engine.optimizer.param_groups[0]["lr"]}


def growth_of_the_sum(stage: int) -> float:
    """How much larger the gradient of one micro-batch at each of `SCALES` is than that of one, in bf16."""
    norms = []
    for scales in ((1.0,), SCALES):
        zero = ZeroConfig.model_validate({"stage": stage, "extra": SHARD_ALL if stage == 3 else {}})
        runtime = Runtime.start(DistributedConfig(device="cpu", precision="bf16", timeout_seconds=300), zero, seed=5)
        engine = TrainingEngine.prepare(
            *build(seed=1),
            runtime=runtime,
            zero=zero,
            micro_batch_size=ROWS,
            accumulation_steps=len(scales),
            max_grad_norm=1e9,
        )
        tokens, targets, mask = fixed_batch()
        for scale in scales:
            engine.backward(scale * loss_sum(engine.module(tokens), targets, mask) / mask.sum())
        norms.append(engine.step())
    return norms[1] / norms[0]


def run_resume(case: Case, num_processes: int, folder: Path) -> bool:
    """Whether two steps, a checkpoint and two more equal four steps, the second pair in a fresh engine."""
    runtime, engine = start(case, num_processes, build_seed=1)
    parent = folder / f"resume-{num_processes}-{case.name}"
    norms = [train_step(engine, noisy=True) for _ in range(2)]
    extra = {"step": 2, "state": torch.full((2,), float(runtime.rank)), "nested": {"coefficient": 0.1}}
    engine.save_checkpoint(checkpoint_folder(parent, 2), extra)
    norms += [train_step(engine, noisy=True) for _ in range(2)]
    undisturbed = engine.state_dict_for_saving()

    runtime, engine = start(case, num_processes, build_seed=99)
    found, notes = engine.find_checkpoint(parent)
    assert found == checkpoint_folder(parent, 2)
    assert notes == []
    restored = engine.load_checkpoint(found)
    assert restored["step"] == 2
    assert restored["nested"] == {"coefficient": 0.1}
    assert restored["state"].tolist() == [runtime.rank] * 2
    again = [train_step(engine, noisy=True) for _ in range(2)]
    resumed = engine.state_dict_for_saving()
    same = again == norms[2:] and all(torch.equal(resumed[name], value) for name, value in undisturbed.items())
    return all(runtime.gather_objects(same))


def run_trainer(num_processes: int, folder: Path) -> int:
    """A Hugging Face trainer on the same JSON at stage 3; returns how many processes it saw."""
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

    zero = ZeroConfig(stage=3, extra=SHARD_ALL)
    config = DistributedConfig(num_processes=num_processes, device="cpu", timeout_seconds=300)
    runtime = Runtime.start(config, zero, seed=5)
    shape = GPT2Config(vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=WIDTH, n_layer=1, n_head=2)
    json = deepspeed_json(
        zero,
        precision=runtime.precision,
        micro_batch_size=2,
        accumulation_steps=1,
        max_grad_norm=1.0,
        device_type="cpu",
    )
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=2,
        max_steps=2,
        use_cpu=True,
        deepspeed=json,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    tokens, _, _ = fixed_batch()
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    Trainer(model=GPT2LMHeadModel(shape), args=arguments, train_dataset=rows).train()
    return int(arguments.world_size)


def main(folder: Path, num_processes: int) -> None:
    results: dict[str, Any] = {case.name: run_case(case, num_processes) for case in CASES}
    for case in RESUMED:
        results["resume " + case.name] = run_resume(case, num_processes, folder)
    if num_processes == 1:
        results["sums"] = {stage: growth_of_the_sum(stage) for stage in (1, 2, 3)}
    results["trainer"] = run_trainer(num_processes, folder)
    last = run_case(CASES[-3], num_processes)  # nothing of the trainer's stage is left over
    results["after trainer"] = last
    runtime, _ = start(Case(0, 1), num_processes, build_seed=1)
    if runtime.is_main:
        torch.save(results, folder / f"results{num_processes}.pt")
    runtime.barrier()
    runtime.stop()
    runtime.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
    leave(0)  # as a rank does
