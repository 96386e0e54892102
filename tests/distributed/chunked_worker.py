"""What the ranks of test_chunked.py run: a language model trained under ZeRO-3 on log-probs computed in pieces.

Usage: `chunked_worker.py FOLDER NUM_PROCESSES`; rank 0 writes FOLDER/results.pt.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from rlhf.config.distributed import DistributedConfig
from rlhf.config.zero import ZeroConfig
from rlhf.distributed.engine import TrainingEngine
from rlhf.distributed.runtime import Runtime
from rlhf.models.loading import disable_dropout
from rlhf.models.sampling import Suppressed
from rlhf.models.scoring import check_chunked, response_logprobs, response_logprobs_and_entropy
from rlhf.worker import leave
from tests.distributed.engine_worker import SHARD_ALL
from tests.distributed.ranks import save_on_main

ROWS, NUM_PROMPT, WIDTH, VOCABULARY = 4, 3, 6, 19
NUM_STEPS = 2
LENGTHS = (1, 6, 2, 5)  # the first rank's rows have 1 and 2 tokens, the second's 6 and 5


@dataclass(frozen=True)
class Case:
    architecture: str
    stage: int
    checkpointing: bool = False

    @property
    def name(self) -> str:
        return f"{self.architecture}-{self.stage}-{self.checkpointing}"


CASES = [Case("gpt2", 3), Case("llama", 3, checkpointing=True), Case("t5", 3), Case("gpt2", 2)]


class Policy(nn.Module):
    """The module an engine wraps, as PPO has it: the language model is a part of it."""

    def __init__(self, architecture: str) -> None:
        super().__init__()
        sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
        if architecture == "t5":
            sizes |= {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
            config = AutoConfig.for_model("t5", **sizes, decoder_start_token_id=0)
            self.policy = cast(PreTrainedModel, AutoModelForSeq2SeqLM.from_config(config))
        else:
            sizes |= {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
            config = AutoConfig.for_model(architecture, **sizes)
            self.policy = cast(PreTrainedModel, AutoModelForCausalLM.from_config(config))
        disable_dropout(self.policy)

    def forward(self, ids: Tensor, mask: Tensor, chunk_tokens: int | None) -> tuple[Tensor, Tensor]:
        return response_logprobs_and_entropy(
            self.policy,
            input_ids=ids,
            attention_mask=mask,
            num_prompt=NUM_PROMPT,
            temperature=0.7,
            suppressed=Suppressed((1,), 2),
            chunk_tokens=chunk_tokens,
        )


def build(case: Case) -> tuple[Policy, torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    torch.manual_seed(1)
    module = Policy(case.architecture)
    if case.checkpointing:
        module.policy.gradient_checkpointing_enable()
    module.train()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.3)
    return module, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)


def fixed_batch() -> tuple[Tensor, Tensor]:
    """Ids and mask (ROWS, NUM_PROMPT + WIDTH); the second row's prompt is shorter than the others'."""
    ids = torch.randint(2, VOCABULARY, (ROWS, NUM_PROMPT + WIDTH), generator=torch.Generator().manual_seed(7))
    mask = torch.arange(NUM_PROMPT + WIDTH) < NUM_PROMPT + torch.tensor(LENGTHS)[:, None]
    mask[1, 0] = False
    return torch.where(mask, ids, 0), mask


def loss(module: nn.Module, rows: Tensor, chunk_tokens: int | None) -> Tensor:
    """This share of the loss of the whole batch. The rows are trimmed to their longest, so that ranks differ."""
    ids, mask = fixed_batch()
    width = NUM_PROMPT + int(mask[rows, NUM_PROMPT:].sum(1).max())
    ids, mask = ids[rows, :width], mask[rows, :width]
    logprobs, entropy = module(ids, mask, chunk_tokens)
    return -torch.where(mask[:, NUM_PROMPT:], logprobs + 0.3 * entropy, 0.0).sum() / sum(LENGTHS)


def run_case(case: Case, num_processes: int) -> dict[str, Any]:
    zero = ZeroConfig.model_validate({"stage": case.stage, "extra": SHARD_ALL if case.stage == 3 else {}})
    config = DistributedConfig.model_validate({"num_processes": num_processes, "device": "cpu", "timeout_seconds": 300})
    runtime = Runtime.start(config, zero, seed=5)
    module, optimizer, scheduler = build(case)
    engine = TrainingEngine.prepare(
        module,
        optimizer,
        scheduler,
        runtime=runtime,
        zero=zero,
        micro_batch_size=1,
        accumulation_steps=2,
        max_grad_norm=100.0,
    )
    ids, mask = fixed_batch()
    arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "num_prompt": NUM_PROMPT, "temperature": 0.7}
    losses = []
    for _ in range(NUM_STEPS):
        with torch.no_grad(), engine.gathered() as whole:
            check_chunked(cast(Policy, whole).policy)
            for _ in range(1 + 2 * runtime.rank):  # the ranks need not score equally often
                logprobs = response_logprobs(cast(Policy, whole).policy, **arguments, chunk_tokens=4)
        engine.module.train()
        total = torch.zeros(())
        for row in torch.arange(ROWS)[runtime.rank :: runtime.world_size].chunk(engine.accumulation_steps):
            part = loss(engine.module, row, chunk_tokens=4 if row % 2 == 0 else 1)
            engine.backward(part)
            total += part.detach()
        engine.step()
        losses.append(float(runtime.sum_over_ranks(total)))
    return {"losses": losses, "logprobs": logprobs, "weights": engine.state_dict_for_saving()}


def main(folder: Path, num_processes: int) -> None:
    results = {case.name: run_case(case, num_processes) for case in CASES}
    save_on_main(results, folder / "results.pt", num_processes)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
    leave(0)  # as a rank does
