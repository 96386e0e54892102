"""A run folder as a finished pipeline leaves it, made up: for the tests of the console and the report."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from rlhf.runs import manifest
from rlhf.runs.files import write_text
from rlhf.runs.folder import RunFolder, StageResult
from rlhf.runs.metrics_file import LineWriter

STAGES = ("sft", "collect", "reward_model", "ppo", "evaluate", "report")
SUMMARIES: dict[str, dict[str, Any]] = {
    "sft": {"loss": 1.312, "validation_loss": 1.345},
    "collect": {"num_comparisons": 4000},
    "reward_model": {"accuracy": {"value": 0.884, "low": 0.853, "high": 0.91}, "loss": 0.31},
    "ppo": {"score_mean": 2.31, "kl_to_reference": 8.4},
    "evaluate": {
        "win_rate": {"value": 0.834, "low": 0.801, "high": 0.866},
        "gold_score_policy": {"value": 0.71, "low": 0.68, "high": 0.74},
        "gold_score_baseline": {"value": 0.12, "low": 0.07, "high": 0.17},
        "kl_to_reference": {"value": 8.91, "low": 8.42, "high": 9.37},
        "response_length_policy": {"value": 13.9, "low": 13.4, "high": 14.4},
        "response_length_baseline": {"value": 12.1, "low": 11.5, "high": 12.7},
        "grammatical_share_policy": {"value": 0.962, "low": 0.942, "high": 0.976},
        "grammatical_share_baseline": {"value": 0.744, "low": 0.704, "high": 0.78},
        "reward_model_score_policy": {"value": 2.38, "low": 2.29, "high": 2.46},
        "judge": "gold",
        "num_prompts": 500,
    },
}


def ppo_metrics(step: int, rng: random.Random) -> dict[str, float]:
    """Curves like those of a healthy run."""
    done = 1 - math.exp(-step / 40)

    def noisy(value: float, size: float) -> float:
        return value + rng.gauss(0, size)

    return {
        "ppo/score_mean": noisy(-0.2 + 2.6 * done, 0.08),
        "ppo/kl_to_reference": max(0.0, noisy(9 * done, 0.2)),
        "ppo/kl_coefficient": 0.05,
        "ppo/objective": noisy(-0.2 + 2.1 * done, 0.08),
        "ppo/entropy": noisy(2.1 - 0.8 * done, 0.03),
        "ppo/clip_fraction": abs(noisy(0.08, 0.02)),
        "ppo/approx_kl": abs(noisy(0.012, 0.003)),
        "ppo/ratio_max": abs(noisy(2.0, 0.4)),
        "ppo/value_loss": abs(noisy(0.8 * math.exp(-step / 20) + 0.1, 0.03)),
        "ppo/explained_variance": noisy(0.8 * done, 0.03),
        "ppo/response_length": noisy(12 + 2 * done, 0.3),
        "ppo/stopped_fraction": min(1.0, noisy(0.93 + 0.05 * done, 0.01)),
        "perf/rollout_tokens_per_second": noisy(21_000, 900),
        "perf/train_tokens_per_second": noisy(9_000, 300),
        "perf/step_seconds": abs(noisy(1.1, 0.05)),
        "perf/peak_memory_bytes": 1.3e9,
    }


def make_run(path: Path, *, finished: tuple[str, ...] = STAGES, response: str | None = None) -> RunFolder:
    """Writes the folder; only stages in `finished` have results. `response` replaces every policy response."""
    rng = random.Random(0)
    run = RunFolder(path)
    run.create()
    config = {"experiment": "quickstart", "seed": 1, "evaluate": {"confidence": 0.95}, "ppo": {"num_updates": 120}}
    manifest.start_manifest(
        run,
        command=["rlhf", "run", "experiment=quickstart"],
        config=config,
        config_hash="5f0c2a" * 10,
        seed=1,
        stages=STAGES,
    )
    write_text(run.config, "experiment: quickstart\nseed: 1\nppo:\n  num_updates: 120\n")
    with LineWriter(run.metrics) as metrics, LineWriter(run.samples) as samples:
        _log_training(metrics, rng, finished)
        _log_samples(samples, rng, finished, response)
    for position, stage in enumerate(STAGES):
        if stage not in finished:
            continue
        folder = run.stage(stage)
        folder.begin(f"fingerprint-{stage}", {})
        seconds = 12.3 * (position + 1)
        folder.write_result(StageResult(stage, f"fingerprint-{stage}", seconds, {}, SUMMARIES.get(stage, {})))
        manifest.update_stage(
            run, stage, status="finished", seconds=seconds, peak_memory_bytes=2**30 + position * 2**28
        )
    if len(finished) == len(STAGES):
        manifest.finish_manifest(run, 0)
    return run


def _log_training(metrics: LineWriter, rng: random.Random, finished: tuple[str, ...]) -> None:
    for stage, kind in (("sft", "loss"), ("reward_model", "accuracy")):
        for step in range(10, 310, 10) if stage in finished else ():
            loss = 1.3 + 2 * math.exp(-step / 60) + rng.gauss(0, 0.03)
            values = {f"{stage}/loss": loss, f"{stage}/learning_rate": 1e-3 * (1 - step / 310)}
            if kind == "accuracy":
                values = {f"{stage}/loss": loss - 1.0, f"{stage}/accuracy": 0.9 - 0.3 * math.exp(-step / 60)}
            if step % 50 == 0:
                values |= {f"{stage}/validation_{name.rpartition('/')[2]}": v + 0.02 for name, v in values.items()}
            metrics.append({"stage": stage, "step": step, **values})
    for step in range(1, 121) if "ppo" in finished else ():
        metrics.append({"stage": "ppo", "step": step, **ppo_metrics(step, rng)})


def _log_samples(samples: LineWriter, rng: random.Random, finished: tuple[str, ...], response: str | None) -> None:
    for step in range(10, 130, 10) if "ppo" in finished else ():
        for _ in range(3):
            row = {
                "prompt": "The film began slowly,",
                "response": response or " but the acting was superb.",
                "score": 1.2,
            }
            samples.append({"stage": "ppo", "step": step, **row, "kl": 3.2})
    for number in range(20) if "evaluate" in finished else ():
        row = {
            "prompt": f"Visit {number} to the small museum on the hill",
            "baseline_response": " was fine, I suppose, but the guide talked talked talked and nobody listened.",
            "policy_response": response or " was a delight: the rooms were bright and the guide was wonderful.",
            "baseline_score": rng.gauss(0.1, 0.4),
            "policy_score": rng.gauss(0.7, 0.2),
        }
        samples.append({"stage": "evaluate", "step": 0, **row})


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All lines, strictly."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
