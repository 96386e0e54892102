"""What every attempt at a run begins with and writes down, whoever works on its stages."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from rlhf import data
from rlhf.cached_stages import check_cache
from rlhf.config import RLHFConfig, StageName, config_hash, config_to_yaml
from rlhf.config.distributed import DistributedConfig
from rlhf.config.ppo import BOOKKEEPING as PPO_BOOKKEEPING
from rlhf.config.preferences import BOOKKEEPING as PREFERENCES_BOOKKEEPING
from rlhf.config.training import BOOKKEEPING as TRAINING_BOOKKEEPING
from rlhf.distributed.nodes import remove_left_secrets
from rlhf.errors import EXIT_SUCCESS, StorageError, UserError
from rlhf.pipeline import StagePlan, begin_stage, preflight
from rlhf.runs import console, manifest
from rlhf.runs.files import write_text
from rlhf.runs.folder import RunFolder
from rlhf.runs.report import write_report
from rlhf.runs.sweep_agent import sweep_run_id
from rlhf.runs.wandb_logger import record_run
from rlhf.runs.wandb_offline import sync_command
from rlhf.studies.arms import check_arms
from rlhf.terminal import say

# What a run is, as far as its default folder is concerned: everything but where it lives, what is logged besides, on
# how many processes, sharded how, and in what portions it is computed: those may change from attempt to attempt.
NOT_IDENTITY = (
    *("run", "tracking", "stages", "plan", "launcher", "zero", "reward_report"),
    *(f"preferences.{key}" for key in PREFERENCES_BOOKKEEPING),
    *(f"distributed.{key}" for key in DistributedConfig.model_fields if key != "precision"),
    *(f"{stage}.{key}" for stage in ("sft", "reward_model", "dpo") for key in sorted(TRAINING_BOOKKEEPING)),
    *(f"ppo.{key}" for key in sorted(PPO_BOOKKEEPING)),
)
# A run that failed because nothing can be written has said so; its manifest is mended when it is started again.
FAILED_ALREADY = suppress(StorageError)


def default_run_folder(config: RLHFConfig, identity: str) -> Path:
    """`run.dir`, or `<run.root>/<experiment>/<id>`; `identity` is the hash of the config that makes the id.

    In a sweep of W&B the id is the agent's, so that a trial that is handed out again finds its checkpoint.
    """
    if config.run.dir is not None:
        return Path(config.run.dir).expanduser()
    name = sweep_run_id(os.environ) or f"seed{config.seed}-{identity[:8]}"
    return Path(config.run.root).expanduser() / config.experiment / name


def run_folder_of(config: RLHFConfig) -> RunFolder:
    """Where `supervise` runs the config."""
    return RunFolder(default_run_folder(config, config_hash(config, exclude=NOT_IDENTITY)))


def prepare(config: RLHFConfig) -> RunFolder:
    """Checks what can be checked before anything runs, and makes the run folder. Raises `UserError`."""
    run = run_folder_of(config)
    preflight(config, run)
    check_arms(config, run)
    check_cache(config)
    run.create()
    return run


def start_manifest(config: RLHFConfig, run: RunFolder, command: Sequence[str]) -> None:
    """Begins an attempt: the config and the manifest are written, and what killed attempts left is removed."""
    run.clean_partial()
    remove_left_secrets(run.path)
    write_text(run.config, config_to_yaml(config))
    manifest.start_manifest(
        run,
        command=list(command),
        config=config.model_dump(mode="json"),
        config_hash=config_hash(config),
        seed=config.seed,
        stages=list(config.stages),
    )


def hash_data(config: RLHFConfig, run: RunFolder | None) -> str:
    """The data's hash as fingerprints have it; written, with that of its content alone, into the manifest of `run`."""
    content = data.data_content(config.data)
    value = data.data_hash(config.data, content)
    if run is not None:
        manifest.update_manifest(run, data={"hash": value, "content": content})
    return value


def begin(config: RLHFConfig, run: RunFolder, plan: StagePlan, position: int) -> None:
    """Marks a stage as running, and says whether it goes on where it was interrupted."""
    resumes, note = begin_stage(run, plan)
    detail = "goes on where it was interrupted" if resumes else ""
    if note is not None:
        say(f"rlhf: {note}")
    inputs = {name: str(path) for name, path in plan.inputs.items()}
    manifest.update_stage(
        run,
        plan.name,
        status="running",
        fingerprint=plan.fingerprint,
        inputs=inputs,
        input_hashes=plan.decided_by.get("inputs", {}),
        stopped=None,
    )
    console.heading(plan.name, position, len(config.stages), detail)


def record_finished(run: RunFolder, name: StageName) -> None:
    """Takes what a finished stage says of itself into the manifest. Raises `UserError` where it has no result."""
    result = run.stage(name).read_result()
    if result is None:
        raise UserError(f"stage {name} ended without a result in {run.stage(name).path}; run the same command again.")
    manifest.update_stage(
        run,
        name,
        status="finished",
        seconds=round(result.seconds, 3),
        outputs=result.outputs,
        summary=result.summary,
        peak_memory_bytes=result.summary.get("perf/peak_memory_bytes"),
        memory_growth_bytes=result.summary.get("perf/memory_growth_bytes"),
        predicted_memory_bytes=result.summary.get("perf/predicted_memory_bytes"),
    )


def write_run_report(run: RunFolder) -> None:
    """Writes `report.html` as the stage report does."""
    started = time.monotonic()
    write_report(run)
    manifest.update_stage(run, "report", status="finished", seconds=round(time.monotonic() - started, 3))


def finish(config: RLHFConfig, run: RunFolder, *, show_summary: bool = True) -> None:
    """Ends a successful attempt: manifest, report, tracking and what the console shows."""
    manifest.finish_manifest(run, EXIT_SUCCESS)
    if "report" in config.stages:
        write_report(run)  # once more, now that the manifest says finished
    record_run(run, config.tracking, config.model_dump(mode="json"), config.stages)
    if show_summary:
        console.print_summary(run)
        if (command := sync_command(run)) is not None:
            say(f"W&B is offline here; to upload: {command}")
