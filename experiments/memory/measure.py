"""Peak memory and CPU time of an update's forward and backward pass, log-probs computed at once and in pieces.

Usage: python experiments/memory/measure.py [--output results.csv]. Every line comes from a process of its own.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HIDDEN_SIZE, NUM_LAYERS, NUM_PROMPT = 256, 2, 16
NUM_ROWS, NUM_RESPONSE = 16, 128
AT_ONCE, PYTORCH, ALONE = "at once", "linear_cross_entropy 512", "512, no entropy"
# The vocabularies of GPT-2 and of Llama 3.
CASES = (
    (50_257, "update", (AT_ONCE, "1024", "512", "128", ALONE, PYTORCH)),
    (50_257, "score", (AT_ONCE, "512", "128")),
    (128_256, "update", (AT_ONCE, "1024", "512")),
)
COLUMNS = ("vocabulary", "tokens", "task", "method", "peak_mb", "seconds", "value")


def _megabytes_now() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def measure(vocabulary: int, task: str, method: str) -> dict[str, Any]:
    """Peak of the resident memory above the one before the pass, and CPU seconds; all in this process."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from rlhf.models.scoring import response_hidden_states, response_logprobs, response_logprobs_and_entropy

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=4 * HIDDEN_SIZE,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    ids = torch.randint(vocabulary, (NUM_ROWS, NUM_PROMPT + NUM_RESPONSE))
    mask = torch.ones_like(ids, dtype=torch.bool)

    batch: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "num_prompt": NUM_PROMPT}

    def library() -> torch.Tensor:
        if method == ALONE:
            return response_logprobs(model, **batch, temperature=1.0, chunk_tokens=512).mean()
        chunk_tokens = None if method == AT_ONCE else int(method)
        logprobs, entropy = response_logprobs_and_entropy(model, **batch, temperature=1.0, chunk_tokens=chunk_tokens)
        return (logprobs + 0.01 * entropy).mean()

    def pytorch() -> torch.Tensor:
        """PyTorch's own operation: log-probs without entropies, and only for a plain linear head."""
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=512)
        hidden = response_hidden_states(model, **batch)
        return -torch.nn.functional.linear_cross_entropy(
            hidden.flatten(0, 1),
            model.lm_head.weight,
            ids[:, NUM_PROMPT:].flatten(),
            reduction="none",
            options=options,
        ).mean()

    run: Callable[[], torch.Tensor] = pytorch if method == PYTORCH else library
    before = _megabytes_now()
    start = time.process_time()
    if task == "score":
        with torch.no_grad():
            value = run()
    else:
        value = run()
        value.backward()  # type: ignore[no-untyped-call]
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    return {"peak_mb": round(peak - before), "seconds": round(seconds, 2), "value": round(value.item(), 5)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results.csv")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(*json.loads(arguments.case))))
        return
    # The allocator then hands every large block back at once, so that resident memory is what tensors take.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000", "OMP_NUM_THREADS": "1"}
    with arguments.output.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for vocabulary, task, methods in CASES:
            for method in methods:
                command = [sys.executable, __file__, "--case", json.dumps([vocabulary, task, method])]
                done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
                found = json.loads(done.stdout.splitlines()[-1])
                line = {"vocabulary": vocabulary, "tokens": NUM_ROWS * NUM_RESPONSE, "task": task, "method": method}
                writer.writerow(line | found)
                file.flush()
                print(*(line | found).values(), sep="\t", flush=True)


if __name__ == "__main__":
    main()
