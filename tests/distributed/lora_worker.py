"""What the ranks of test_lora_stages.py run: adapters under every kind of sharding, in one process.

Usage: `lora_worker FOLDER`, where the data, the comparisons, the base model and one process's runs lie already. The
stages' run of case NAME lands in FOLDER/NAME, one that was killed on the way and resumed in FOLDER/NAME-killed, and
what roles on one base became in FOLDER/roles-NAME.pt.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rlhf.config import RLHFConfig
from rlhf.config.distributed import DistributedConfig
from rlhf.config.zero import ZeroConfig
from rlhf.distributed.engine import TrainingEngine
from rlhf.distributed.runtime import Runtime
from rlhf.models.loading import load_tokenizer
from rlhf.models.scoring import response_logprobs
from rlhf.models.shared_base import TRAINED, Role, SharedBase
from rlhf.stages import reward_model, sft, trl_adapter
from rlhf.worker import leave
from tests.adapter_example import LORA, fixed_batch
from tests.distributed.trl_worker import CASES, Killed, _KillingCallback
from tests.stage_example import make_context, recorded_resumes, require_resumed_from, tiny_config

# Also the head, whose adapter the roles that give numbers do not have.
HEAD_TOO = LORA.model_copy(update={"output_head": True})
RESUMED = ("stage3",)
NUM_PROMPT = 5
# The cases of roles: kind of sharding, then what else is special.
ROLES = ("plain", "stage2", "stage3", "stage3-checkpointing")
LOW_PRECISION = ("plain-bf16", "stage2-bf16", "stage3-bf16")


def case_config(folder: Path, zero: dict[str, Any], num_processes: int, **sft_section: Any) -> RLHFConfig:
    """The tiny configuration with adapters on the model in FOLDER/base_model."""
    return tiny_config(
        folder,
        zero=zero,
        distributed={"num_processes": num_processes},
        peft=HEAD_TOO.model_dump(),
        model={"path": str(folder / "base_model")},
        sft={"micro_batch_size": 2, **sft_section},
    )


def inputs_of(folder: Path, stage: str) -> dict[str, str]:
    """Stage sft starts from the base, stage reward_model from one process's SFT adapter."""
    if stage == "sft":
        return {"base": str(folder / "base_model")}
    return {"base": str(folder / "base/stages/sft/model"), "comparisons": str(folder / "comparisons")}


def run_stages(config: RLHFConfig, folder: Path, run: Path, *, killed: bool) -> None:
    """Both stages, each after a start of the runtime; `killed` ends each at a step first and then runs it again."""
    whole = trl_adapter._TrackingCallback
    for module in (sft, reward_model):
        stage = module.__name__.rpartition(".")[2]
        if killed:
            runtime = Runtime.start(config.distributed, config.zero, config.seed)
            trl_adapter._TrackingCallback = _KillingCallback  # type: ignore[misc]
            try:
                module.run(make_context(config, run, stage, inputs_of(folder, stage), runtime))
            except Killed:
                pass
            else:
                raise RuntimeError("nothing killed the stage")
            finally:
                trl_adapter._TrackingCallback = whole  # type: ignore[misc]
        runtime = Runtime.start(config.distributed, config.zero, config.seed)
        with recorded_resumes() as found:
            module.run(make_context(config, run, stage, inputs_of(folder, stage), runtime))
        require_resumed_from(found, ["checkpoint-4"] if killed else [])
        runtime.barrier()


class PolicyAndValue(nn.Module):
    """A forward pass through two roles on one base, as PPO makes it."""

    def __init__(self, base: SharedBase) -> None:
        super().__init__()
        self.base = base

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The sum of a loss over the response tokens of these rows."""
        with self.base.role("policy") as model:
            logprobs = response_logprobs(
                model, input_ids=ids, attention_mask=mask, num_prompt=NUM_PROMPT, temperature=1.0
            )
        values = self.base.response_values("value", ids, mask, NUM_PROMPT)[:, :-1]
        errors = (logprobs + 1.0).square() + (values - 1.0).square()
        return errors[mask[:, NUM_PROMPT:]].sum()


def train_roles(folder: Path, case: str, num_processes: int) -> dict[str, Any]:
    """Three optimiser steps of both roles; whole weights before and after on rank 0, and what the roles then give."""
    sharding, _, special = case.partition("-")
    zero = ZeroConfig.model_validate(CASES[sharding])
    precision: Literal["fp32", "bf16"] = "bf16" if special == "bf16" else "fp32"
    config = DistributedConfig(num_processes=num_processes, device="cpu", precision=precision, timeout_seconds=300)
    runtime = Runtime.start(config, zero, seed=5)
    adapter, reward = str(folder / "base/stages/sft/model"), str(folder / "base/stages/reward_model/model")
    base = SharedBase.build(
        policy=adapter,
        reference=adapter,
        reward_model=reward,
        value_model=None,
        lora=HEAD_TOO,
        model_config=None,
        seed=1,
        dtype=runtime.dtype,
        own_reference=True,
    )
    if special == "checkpointing":
        base.enable_gradient_checkpointing()
    module = PolicyAndValue(base)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    optimizer = torch.optim.AdamW([part for part in module.parameters() if part.requires_grad], lr=1e-2)
    engine = TrainingEngine.prepare(
        module,
        optimizer,
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0),
        runtime=runtime,
        zero=zero,
        micro_batch_size=2,
        accumulation_steps=1,
        max_grad_norm=1.0,
    )
    ids, mask = (part.repeat(2, 1)[:4] for part in fixed_batch())
    mine = slice(runtime.rank, None, runtime.world_size)
    with torch.no_grad(), engine.gathered():
        same = torch.equal(logits_of(base, "policy", ids, mask), logits_of(base, "reference", ids, mask))
    norms = []
    for _ in range(3):
        engine.module.train()
        engine.backward(engine.module(ids[mine], mask[mine]) / int(mask[:, NUM_PROMPT:].sum()))
        norms.append(engine.step())
        engine.module.eval()
    with torch.no_grad(), engine.gathered():
        outputs = {"policy": logits_of(base, "policy", ids, mask)}
        outputs["reference"] = logits_of(base, "reference", ids, mask)
        outputs["value"] = base.response_values("value", ids, mask, NUM_PROMPT)
        outputs["reward"] = base.scores("reward", ids, mask)
    weights = engine.state_dict_for_saving("base.")
    if runtime.is_main:
        tokenizer = load_tokenizer(reward)
        for role in TRAINED:
            base.save_role(role, folder / f"saved-{num_processes}-{case}" / role, tokenizer, weights)
    with engine.modified():
        base.copy_adapter("policy", "reference")
    refreshed = engine.state_dict_for_saving("base.")
    runtime.barrier()
    return {
        "same": same,
        "before": before,
        "weights": weights,
        "norms": norms,
        "outputs": outputs,
        "refreshed": refreshed,
    }


def logits_of(base: SharedBase, role: Role, ids: Tensor, mask: Tensor) -> Tensor:
    """What the role's language model says of the batch."""
    with base.role(role) as model:
        logits: Tensor = model(input_ids=ids, attention_mask=mask).logits
    return logits


def main(folder: Path) -> None:
    """All cases, one after the other."""
    for name, zero in CASES.items():
        config = case_config(folder, zero, num_processes=2)
        run_stages(config, folder, folder / name, killed=False)
        if name in RESUMED:
            run_stages(config, folder, folder / f"{name}-killed", killed=True)
    config = case_config(folder, CASES["stage3"], num_processes=2, gradient_checkpointing=True)
    runtime = Runtime.start(config.distributed, config.zero, config.seed)
    sft.run(make_context(config, folder / "stage3-checkpointing", "sft", inputs_of(folder, "sft"), runtime))
    for name in ROLES + LOW_PRECISION:
        result = train_roles(folder, name, 2)
        if result["weights"]:
            torch.save(result, folder / f"roles-{name}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave(0)  # as a rank does
