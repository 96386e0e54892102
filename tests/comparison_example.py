"""Made-up runs of methods with known effects: for the tests of the comparison and its page."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from rlhf import statistics
from rlhf.runs.comparison.records import prompt_id
from rlhf.runs.files import write_json, write_text
from rlhf.runs.folder import RunFolder, StageResult
from rlhf.runs.manifest import SCHEMA

WORDS = ("the", "film", "was", "warm", "and", "witty", "but", "rather", "long", "in", "places", "indeed")
NUM_PROMPTS, NUM_UPDATES = 40, 20


def make_run(
    path: Path,
    *,
    seed: int,
    kl_coefficient: float = 0.1,
    score: float = 0.0,
    seed_spread: float = 0.1,
    num_prompts: int = NUM_PROMPTS,
    status: str = "finished",
    responses: bool = True,
    config: dict[str, Any] | None = None,
    text: str | None = None,
    longer: int = 0,
    started: str = "2026-01-01T00:00:00+00:00",
) -> RunFolder:
    """A run whose scores have mean `score`, give or take the seed's own effect; all runs share the prompts' effects."""
    run = RunFolder(path)
    run.create()
    generator = np.random.default_rng([seed, round(score * 1000) % 2**32, round(kl_coefficient * 1e6)])
    shared = np.random.default_rng(0).normal(0, 0.5, 1000)
    own = score + generator.normal(0, seed_spread)
    body: dict[str, Any] = {
        "experiment": "example",
        "seed": seed,
        "stages": ["sft", "ppo", "evaluate"],
        "run": {"dir": str(path)},
        "sft": {"batch_size": 8, "learning_rate": 1e-3, "log_every": 5},
        "ppo": {"batch_size": 16, "kl_coefficient": kl_coefficient, "policy": str(path / "stages/sft/model")},
        "evaluate": {"num_prompts": num_prompts, "confidence": 0.95},
    }
    for section, values in (config or {}).items():
        body[section] = {**body.get(section, {}), **values} if isinstance(values, dict) else values
    write_json(
        run.manifest,
        {
            "schema": SCHEMA,
            "status": status,
            "started": started,
            "seconds": 12.5,
            "config": body,
            "seed": seed,
            "code": {"commit": "0123456789abcdef", "diff_hash": None},
            "packages": {"rlhf": "0.1.0", "torch": "2.12.0"},
        },
    )
    lines = []
    for step in range(1, NUM_UPDATES + 1):
        done = 1 - math.exp(-step / 6)
        lines.append(
            {
                "stage": "ppo",
                "step": step,
                "ppo/score_mean": own * done + generator.normal(0, 0.05),
                "ppo/reward/gold": own * done * 0.8 + generator.normal(0, 0.05),
                "ppo/kl_to_reference": 5 * done / (1 + 5 * kl_coefficient),
                "ppo/entropy": 2 - done + generator.normal(0, 0.02),
                "ppo/response_length": 8 + 4 * done,
                "perf/step_seconds": 1.0,
            }
        )
    write_text(run.metrics, "".join(json.dumps(line) + "\n" for line in lines))
    entries: list[dict[str, Any]] = []
    for number in range(num_prompts):
        prompt = f"Prompt {number}: what did you think ?"
        sides: dict[str, dict[str, Any]] = {}
        for role, mean in (("baseline", 0.0), ("policy", own)):
            length = 6 + int(generator.integers(0, 5)) + (longer if role == "policy" else 0)
            answer = " " + " ".join(generator.choice(WORDS, length))
            sides[role] = {
                "response": text if text is not None and role == "policy" and number == 0 else answer,
                "score": float(mean + shared[number] + generator.normal(0, 0.3)),
                "length": length,
                "stopped": True,
            }
        sides["policy"]["kl"] = float(abs(generator.normal(4, 1)))
        entries.append({"prompt_id": prompt_id(prompt), "prompt": prompt, **sides})
    stage = run.stage("evaluate")
    stage.path.mkdir(parents=True, exist_ok=True)
    if responses:
        write_text(stage.path / "responses.jsonl", "".join(json.dumps(entry) + "\n" for entry in entries))
    scores = [entry["policy"]["score"] for entry in entries]
    summary = {
        "judge": "gold",
        "num_prompts": num_prompts,
        "win_rate": statistics.win_rate(scores, [entry["baseline"]["score"] for entry in entries]).to_json(),
        "gold_score_policy": statistics.bootstrap_mean(scores).to_json(),
        "gold_score_baseline": 0.0,
        "kl_to_reference": {"value": 5 / (1 + 5 * kl_coefficient), "low": None, "high": None},
    }
    if status == "finished":
        stage.write_result(StageResult("evaluate", "f", 1.0, {}, summary))
    return run


def make_methods(folder: Path, *, num_seeds: int = 3, effect: float = 0.6) -> list[Path]:
    """Two methods with the seeds 1, 2, ...: kl_coefficient 0.05 scores `effect` more than 0.5."""
    paths = []
    for coefficient, score in ((0.05, effect), (0.5, 0.0)):
        for seed in range(1, num_seeds + 1):
            path = folder / f"kl{coefficient:g}-seed{seed}"
            make_run(path, seed=seed, kl_coefficient=coefficient, score=score)
            paths.append(path)
    return paths
