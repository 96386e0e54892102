"""Run folders as finished runs leave them, a few lines each, for the tests of diff, replay and verify."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from rlhf.config import RLHFConfig, config_to_yaml
from rlhf.config.compose import load_config
from rlhf.runs.files import write_json, write_text
from rlhf.runs.folder import RunFolder, StageResult

FINGERPRINT = "f" * 64
REWARD = "9" * 64
# Without a reward model.
CHOSEN = ("stages=[sft,ppo]", "ppo.rewards={gold: {type: gold}}", "ppo.value_init=policy")


@cache
def config_of(*arguments: str) -> RLHFConfig:
    """The smoke experiment, whose stages here are sft and ppo, changed by the arguments."""
    return load_config(["experiment=smoke", *CHOSEN, *arguments]).config


def ppo_rows(scores: Iterable[float | None], **more: float) -> list[dict[str, Any]]:
    """Lines of stage ppo from step 1 on."""
    return [{"ppo/score_mean": score, "perf/step_seconds": 0.1 * step, **more} for step, score in enumerate(scores, 1)]


def write_run(
    path: Path,
    *arguments: str,
    rows: Mapping[str, list[dict[str, Any]]] | None = None,
    summaries: Mapping[str, Mapping[str, Any]] | None = None,
    outputs: Mapping[str, Mapping[str, str]] | None = None,
    decided_by: Mapping[str, Mapping[str, Any]] | None = None,
    compute: Mapping[str, Any] | None = None,
    unfinished: Iterable[str] = (),
    samples: Iterable[Mapping[str, Any]] = (),
    **manifest: Any,
) -> Path:
    """A run of `config_of(*arguments)` with the given lines and results; returns `path`."""
    config = config_of(*arguments)
    rows = {"sft": [{"sft/loss": 2.0}, {"sft/loss": 1.0}], "ppo": ppo_rows([0.5, 0.6, 0.7])} if rows is None else rows
    run = RunFolder(path)
    run.create()
    entries = {}
    lines = []
    for stage, found in rows.items():
        lines += [{"stage": stage, "step": number, **row} for number, row in enumerate(found, start=1)]
        folder = run.stage(stage)
        section = {"rewards": REWARD} if stage == "ppo" else {}
        folder.begin(FINGERPRINT, (decided_by or {}).get(stage, {"section": section, "inputs": {}}))
        made = dict((outputs or {}).get(stage, {"model": stage[0] * 64}))
        finished = stage not in unfinished
        if finished:
            summary = dict((summaries or {}).get(stage, {"final": 1.0, "perf/peak_memory_bytes": 1e9}))
            folder.write_result(StageResult(stage, FINGERPRINT, 3.0, made, summary))
        status = "finished" if finished else "interrupted"
        entries[stage] = {"status": status, "compute": dict(compute or {"device": "cpu", "num_threads": 1})}
    body = {
        "schema": "manifest/1",
        "status": "interrupted" if list(unfinished) else "finished",
        "started": "2026-01-01T00:00:00+00:00",
        "seconds": 12.0,
        "command": ["rlhf", "run", "experiment=smoke"],
        "config": config.model_dump(mode="json"),
        "seed": config.seed,
        "code": {"commit": "a" * 40, "diff_hash": None},
        "packages": {"torch": "2.8.0"},
        "hardware": {"cpu": "A processor", "cores": 2, "gpus": []},
        "data": {"hash": "d" * 64, "content": "embedded 3"},
        "stages": entries,
    }
    write_json(run.manifest, {**body, **manifest})
    write_text(run.config, config_to_yaml(config))
    write_text(run.metrics, "".join(json.dumps(line) + "\n" for line in lines))
    write_text(run.samples, "".join(json.dumps(dict(sample)) + "\n" for sample in samples))
    return path


def write_expected_file(folder: Path, entries: list[dict[str, Any]], **changes: Any) -> Path:
    """`experiments/smoke/expected.json` with these checks below `folder`; returns its path."""
    body = {
        "schema": "expected/1",
        "experiment": "smoke",
        "command": "rlhf verify experiment=smoke",
        "question": "Does it run?",
        "source": "arXiv 0000.00000",
        "checks": entries,
        **changes,
    }
    path = folder / "experiments" / "smoke" / "expected.json"
    write_text(path, json.dumps(body))
    return path


def check(**changes: Any) -> dict[str, Any]:
    """A check of the last score of stage ppo, without a band unless one is given."""
    return {"name": "score", "stage": "ppo", "metric": "ppo/score_mean", "at": "last", "why": "because", **changes}
