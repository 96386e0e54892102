"""Runs stages in forks of a process that has imported everything, and compares the plan with what they needed.

`python -m tests.distributed.plan_worker FOLDER [CASE ...]` writes FOLDER/results.json. Every case and every rank is a
fork of its own: the libraries are loaded once, and what a stage adds to a process is its growth.
"""

from __future__ import annotations

import json
import os
import random
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Their libraries are what the forks share.
import accelerate  # noqa: F401
import deepspeed
import torch

from rlhf.config import RLHFConfig, config_from_values
from rlhf.distributed.launch import reserved_port
from rlhf.distributed.runtime import Runtime
from rlhf.models.loading import load_tokenizer
from rlhf.models.scalar import ScalarModel, ensure_distinct_pad
from rlhf.models.scratch import build_from_scratch
from rlhf.planning.during_run import StageMemory
from rlhf.records import Comparison, dump_line
from rlhf.runs.console import quiet_libraries
from rlhf.runs.folder import RunFolder
from rlhf.stages import reward_model, sft
from rlhf.stages.context import StageContext
from rlhf.stages.ppo import loop

RUN = {"sft": sft.run, "reward_model": reward_model.run, "ppo": loop.run}
# Every word is a token of its own, the template adds a few.
WORDS = "abcdefghijklmnopqrstuvwxyz"
PROMPT_WORDS = 12
# Without it growth counts from the largest size that the process has ever had, see `rlhf.distributed.memory`.
FORGETS_PEAK = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Case:
    """A stage in a setting. `length`: words of the longest response."""

    stage: str
    zero: dict[str, Any] = field(default_factory=dict)
    lora: bool = False
    num_processes: int = 1
    length: int = 60
    precision: str = "fp32"
    architecture: str = "llama"
    hidden_size: int = 384
    num_layers: int = 4
    vocab_size: int = 16384
    section: dict[str, Any] = field(default_factory=dict)


CASES: dict[str, Case] = {
    "nothing": Case("sft", hidden_size=32, num_layers=1, vocab_size=400, length=20),
    "nothing ppo": Case("ppo", hidden_size=32, num_layers=1, vocab_size=400, length=20),
    "nothing zero3": Case("sft", {"stage": 3}, hidden_size=32, num_layers=1, vocab_size=400, length=20),
    "sft": Case("sft"),
    "sft long, accumulated": Case("sft", length=150, section={"micro_batch_size": 4}),
    "sft lora zero2": Case("sft", {"stage": 2}, lora=True),
    "sft zero2 x2": Case("sft", {"stage": 2}, num_processes=2),
    "sft zero3 x2": Case("sft", {"stage": 3}, num_processes=2),
    "sft checkpointing": Case("sft", section={"gradient_checkpointing": True}),
    "sft t5": Case("sft", architecture="t5"),
    "sft bf16": Case("sft", precision="bf16"),
    "reward_model zero2": Case("reward_model", {"stage": 2}),
    "reward_model lora": Case("reward_model", lora=True),
    "reward_model x2": Case("reward_model", num_processes=2),
    "ppo": Case("ppo"),
    "ppo zero3 x2": Case("ppo", {"stage": 3}, num_processes=2),
    "ppo zero1 bf16 x2": Case("ppo", {"stage": 1}, num_processes=2, precision="bf16"),
    "ppo lora": Case("ppo", lora=True),
    "ppo long, chunked": Case("ppo", length=150, section={"logprob_chunk_tokens": 256, "micro_batch_size": 4}),
    "ppo shared trunk": Case("ppo", section={"value_network": "shared_trunk"}),
}


def write_data(folder: Path, length: int) -> None:
    """Demonstrations whose longest rows are as long as the config allows, others shorter, as in real data."""
    folder.mkdir(parents=True, exist_ok=True)

    draw = random.Random(0)

    def text(words: int) -> str:
        return " " + " ".join(draw.choice(WORDS) for _ in range(words))

    for split, size in (("train", 24), ("validation", 4), ("test", 4)):
        rows = []
        for number in range(size):
            words = length if number % 2 else length - number % 9
            rows.append({"prompt": text(PROMPT_WORDS).strip(), "response": text(words)})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        comparisons = [Comparison(row["prompt"], row["response"], text(length - 1)) for row in rows]
        (folder / "comparisons").mkdir(exist_ok=True)
        (folder / "comparisons" / f"{split}.jsonl").write_text("".join(dump_line(row) + "\n" for row in comparisons))


def case_config(case: Case, folder: Path, limits: tuple[int, int]) -> RLHFConfig:
    """The config of a case; `limits` are the tokens of the longest prompt and response."""
    training = {"batch_size": 8, "max_steps": 2, "save_every": 100, "log_every": 1, "learning_rate": 1e-4}
    ppo: dict[str, Any] = {
        "num_updates": 2,
        "batch_size": 16,
        "rollout_batch_size": 16,
        "num_epochs": 1,
        "num_minibatches": 2,
    }
    ppo |= {"max_response_tokens": limits[1], "guards": "off", "exact_kl_rows": 1, "learning_rate": 1e-5}
    body: dict[str, Any] = {
        "tracking": {"wandb": "disabled"},
        "stages": [case.stage],
        "distributed": {"device": "cpu", "num_processes": case.num_processes, "precision": case.precision},
        "zero": case.zero,
        "model": {
            "scratch": {
                "architecture": case.architecture,
                "num_layers": case.num_layers,
                "hidden_size": case.hidden_size,
                "num_heads": 8,
                "vocab_size": case.vocab_size,
                "max_positions": 1024,
            }
        },
        "data": {
            "type": "files",
            "path": str(folder),
            "max_prompt_tokens": limits[0],
            "max_response_tokens": limits[1],
        },
        "sft": training,
        "reward_model": training,
        "ppo": ppo,
    }
    if case.lora:
        body["peft"] = {"type": "lora", "rank": 16, "stages": [case.stage]}
    body[case.stage] = {**body[case.stage], **case.section}
    return config_from_values(body, "test")


def make_models(case: Case, folder: Path) -> tuple[dict[str, str], tuple[int, int]]:
    """Folders of the stage's inputs, and the longest prompt and response in tokens."""
    from rlhf.data import load_demonstrations, training_texts
    from rlhf.data.tokenization import encode_pair

    write_data(folder / "data", case.length)
    config = case_config(case, folder / "data", (200, 900))
    model, tokenizer = build_from_scratch(config.model.scratch, training_texts(config.data), 1)
    policy, reward = folder / "policy", folder / "reward"
    model.save_pretrained(policy)
    tokenizer.save_pretrained(policy)
    reader = load_tokenizer(str(policy))  # which knows what an encoder's prompts look like
    rows = load_demonstrations(config.data).train
    pairs = [encode_pair(reader, row.prompt, row.response) for row in rows]
    limits = max(len(pair.prompt_ids) for pair in pairs), max(len(pair.response_ids) for pair in pairs)
    if case.stage == "sft":
        return {"base": str(policy)}, limits
    if case.stage == "reward_model":
        return {"base": str(policy), "comparisons": str(folder / "data/comparisons")}, limits
    scalar = ScalarModel.from_policy(model, seed=1)
    scalar.save(reward, ensure_distinct_pad(tokenizer, scalar.model))
    inputs = {"policy": str(policy), "reference": str(policy), "reward_model": str(reward)}
    if case.section.get("value_network") != "shared_trunk" and not case.lora:
        inputs["value_model"] = str(reward)
    return inputs, limits


def run_rank(case: Case, folder: Path, inputs: dict[str, str], limits: tuple[int, int], rank: int, port: int) -> None:
    """One rank of a case; rank 0 writes the numbers."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"WORLD_SIZE": str(case.num_processes), "LOCAL_WORLD_SIZE": str(case.num_processes)}
    config = case_config(case, folder / "data", limits)
    if case.lora and case.stage == "ppo":
        config = config.model_copy(update={"ppo": config.ppo.model_copy(update={"value_init": "policy"})})
    runtime = Runtime.start(config.distributed, config.zero, config.seed)
    run = RunFolder(folder / "run")
    run.stage(case.stage).path.mkdir(parents=True, exist_ok=True)
    context = StageContext(config, run, run.stage(case.stage), runtime, inputs)
    memory = StageMemory.start(config, case.stage, inputs, runtime)
    RUN[case.stage](context)
    measured = runtime.gather_objects(memory.meter.read())
    if runtime.is_main:
        (folder / "memory.json").write_text(json.dumps(memory.summary(measured)))
    runtime.barrier()


def fork(action: Any, *arguments: Any) -> int:
    """Runs `action` in a fork that never returns; its process id."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        action(*arguments)
        code = 0
    except BaseException:  # noqa: BLE001  # the fork must not go on as its parent
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(processes: list[int]) -> None:
    """Waits for forks to end well."""
    codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
    if any(codes):
        raise SystemExit(f"forks ended with {codes}")


def run_case(name: str, folder: Path) -> dict[str, float]:
    """Predicted and measured growth of a case, in bytes."""
    case = CASES[name]
    folder.mkdir(parents=True)

    def prepare() -> None:
        (folder / "inputs.json").write_text(json.dumps(make_models(case, folder)))

    wait([fork(prepare)])
    inputs, limits = json.loads((folder / "inputs.json").read_text())
    with reserved_port() as port:
        ranks = range(case.num_processes)
        wait([fork(run_rank, case, folder, inputs, tuple(limits), rank, port) for rank in ranks])
    result: dict[str, float] = json.loads((folder / "memory.json").read_text())
    return result


def main(arguments: list[str]) -> None:
    """Runs the named cases, or all, and writes their numbers."""
    folder, *names = arguments
    if not FORGETS_PEAK.exists():
        raise SystemExit(f"{FORGETS_PEAK} is missing: what a stage adds to a process cannot be measured on this kernel")
    quiet_libraries()
    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    results = {}
    for number, name in enumerate(names or CASES):
        results[name] = run_case(name, Path(folder) / f"case{number}")
        predicted, growth = (results[name][f"perf/{key}_bytes"] for key in ("predicted_memory", "memory_growth"))
        print(f"{name:28} {predicted / 2**20:8.0f} {growth / 2**20:8.0f} {predicted / growth - 1:+.0%}", flush=True)
        (Path(folder) / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1:])
