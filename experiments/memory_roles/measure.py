"""Peak memory of PPO's four roles and one update, on one base with adapters and as separate models.

Each layout runs in a process of its own, on the CPU, with random weights in the shape of GPT-2 small (124 million).
Usage: `python experiments/memory_roles/measure.py`; writes results.csv beside itself.
"""

from __future__ import annotations

import csv
import json
import os
import resource
import subprocess
import sys
import tempfile
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

LAYOUTS = ("separate_full", "separate_lora", "one_base", "one_base_bf16")
NUM_LAYERS, HIDDEN_SIZE, NUM_HEADS, VOCAB_SIZE = 12, 768, 12, 50257
BATCH_SIZE, NUM_PROMPT, NUM_RESPONSE = 4, 32, 32
MEBIBYTE = 2**20


def write_folders(folder: Path) -> None:
    """A base, an SFT adapter on it and a reward adapter that goes on from that; and the two merged, as whole models."""
    import torch
    from peft import TaskType
    from transformers import GPT2Config, GPT2LMHeadModel

    from rlhf.config.model import ScratchConfig
    from rlhf.config.peft import LoRAConfig
    from rlhf.models import (
        ScalarModel,
        build_from_scratch,
        ensure_distinct_pad,
        load_policy,
        load_tokenizer,
        save_model,
    )
    from rlhf.models.adapters import add_adapter

    _, tokenizer = build_from_scratch(ScratchConfig(vocab_size=300), ["any text will do"] * 20, 1)
    torch.manual_seed(1)
    shape = GPT2Config(
        n_layer=NUM_LAYERS,
        n_embd=HIDDEN_SIZE,
        n_head=NUM_HEADS,
        vocab_size=VOCAB_SIZE,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    base, sft, reward = (str(folder / name) for name in ("base", "sft", "reward"))
    save_model(GPT2LMHeadModel(shape), tokenizer, Path(base))
    policy = add_adapter(load_policy(base), base, LoRAConfig(), task=TaskType.CAUSAL_LM, seed=1, key="base")
    save_model(policy, tokenizer, Path(sft))
    scalar = ScalarModel.from_policy(base, seed=1)
    padded = ensure_distinct_pad(load_tokenizer(base), scalar.model)
    scorer = add_adapter(scalar.model, sft, LoRAConfig(), task=TaskType.SEQ_CLS, seed=1, key="sft")
    save_model(scorer, padded, Path(reward))
    save_model(load_policy(sft), tokenizer, folder / "sft_whole")
    save_model(ScalarModel.load(reward).model, padded, folder / "reward_whole")


class Roles:
    """The four roles of a layout, called alike."""

    def __init__(self, layout: str, folder: Path) -> None:
        import torch
        from peft import TaskType

        from rlhf.config.peft import LoRAConfig
        from rlhf.models import ScalarModel, disable_dropout, load_policy
        from rlhf.models.adapters import add_adapter
        from rlhf.models.shared_base import SharedBase

        self.base: SharedBase | None = None
        self.models: dict[str, Any] = {}
        sft, reward = str(folder / "sft"), str(folder / "reward")
        if layout.startswith("one_base"):
            self.base = SharedBase.build(
                policy=sft,
                reference=sft,
                reward_model=reward,
                value_model=None,
                lora=LoRAConfig(),
                model_config=None,
                seed=1,
                dtype=torch.bfloat16 if layout.endswith("bf16") else torch.float32,
            )
            self.parameters = [part for part in self.base.parameters() if part.requires_grad]
            return
        if layout == "separate_full":
            self.models = {
                "policy": load_policy(folder / "sft_whole"),
                "value": ScalarModel.load(folder / "reward_whole"),
            }
        else:
            base, lora = str(folder / "base"), LoRAConfig()
            critic = ScalarModel.from_policy(base, seed=1)
            # The wrapper is not needed: PEFT puts the adapters into the model that it is given.
            add_adapter(critic.model, sft, lora, task=TaskType.SEQ_CLS, seed=1, key="sft")
            policy = add_adapter(load_policy(base), sft, lora, task=TaskType.CAUSAL_LM, seed=1, key="sft")
            self.models = {"policy": policy, "value": critic}
        self.models |= {
            "reference": load_policy(folder / "sft_whole").requires_grad_(False),
            "reward": ScalarModel.load(folder / "reward_whole").requires_grad_(False),
        }
        for model in self.models.values():
            disable_dropout(model)
        self.parameters = [part for model in self.models.values() for part in model.parameters() if part.requires_grad]

    def language_model(self, role: str) -> AbstractContextManager[Any]:
        """A context that gives the model of policy or reference."""
        if self.base is None:
            return nullcontext(self.models[role])
        return self.base.role("policy" if role == "policy" else "reference")

    def values(self, role: str, ids: Any, mask: Any) -> Any:
        """Values of value or reward."""
        if self.base is None:
            return self.models[role].response_values(ids, mask, NUM_PROMPT)
        return self.base.response_values("value" if role == "value" else "reward", ids, mask, NUM_PROMPT)


def run_layout(layout: str, folder: Path) -> dict[str, float]:
    """Loads the roles, scores a batch with all four, and makes one optimiser step of policy and critic."""
    import torch

    from rlhf.models.scoring import response_logprobs_and_entropy
    from rlhf.ops.losses import ppo_policy_loss, ppo_value_loss

    before = peak()
    roles = Roles(layout, folder)
    loaded = resident()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 260, (BATCH_SIZE, NUM_PROMPT + NUM_RESPONSE), generator=generator)
    mask = torch.ones_like(ids, dtype=torch.bool)

    def logprobs(role: str) -> Any:
        with roles.language_model(role) as model:
            return response_logprobs_and_entropy(
                model, input_ids=ids, attention_mask=mask, num_prompt=NUM_PROMPT, temperature=1.0
            )[0]

    with torch.no_grad():
        old, reference = logprobs("policy"), logprobs("reference")
        old_values, score = roles.values("value", ids, mask)[:, :-1], roles.values("reward", ids, mask)[:, -1:]
    optimizer = torch.optim.AdamW(roles.parameters, lr=1e-5)
    real = mask[:, NUM_PROMPT:]
    returns = score - (old - reference).sum(dim=1, keepdim=True) + torch.zeros_like(old_values)
    policy_loss, count, _ = ppo_policy_loss(
        logprobs=logprobs("policy"),
        old_logprobs=old,
        advantages=returns - old_values,
        mask=real,
        clip_low=0.2,
        clip_high=0.2,
    )
    value_loss, _, _ = ppo_value_loss(
        values=roles.values("value", ids, mask)[:, :-1], old_values=old_values, returns=returns, mask=real, clip=0.2
    )
    ((policy_loss + 0.1 * value_loss) / count).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return {
        "libraries_mib": before / MEBIBYTE,
        "loaded_mib": loaded / MEBIBYTE,
        "peak_mib": peak() / MEBIBYTE,
        "trained_parameters": sum(part.numel() for part in roles.parameters),
        "largest_kl": float((old - reference).abs().max()),
    }


def peak() -> int:
    """The largest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident() -> int:
    """Resident memory of this process now, in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def main() -> None:
    """Runs every layout in a fresh process and writes the table."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, __file__, "write", folder], check=True)
        for layout in LAYOUTS:
            command = [sys.executable, __file__, layout, folder]
            result = subprocess.run(command, check=True, capture_output=True, text=True)
            rows.append({"layout": layout, **json.loads(result.stdout.splitlines()[-1])})
            print(rows[-1], flush=True)
    for row in rows:
        row["peak_ratio"] = row["peak_mib"] / rows[0]["peak_mib"]
    with (Path(__file__).parent / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(
            {name: round(value, 3) if isinstance(value, float) else value for name, value in row.items()}
            for row in rows
        )


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    elif sys.argv[1] == "write":
        write_folders(Path(sys.argv[2]))
    else:
        import torch
        import transformers  # noqa: F401  counted as libraries, not as models

        import rlhf.models.shared_base  # noqa: F401

        torch.set_num_threads(1)
        print(json.dumps(run_layout(sys.argv[1], Path(sys.argv[2]))))
