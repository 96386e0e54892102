"""The supervisor behind `rlhf run`: it freezes the config, decides what is to be done and starts the ranks.

It never imports torch unless another launcher started it: then every rank is its own supervisor, works on the
stages in its own process, and rank 0 alone writes.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from typing import Any

from rlhf import sbatch
from rlhf.bookkeeping import (
    FAILED_ALREADY,
    begin,
    finish,
    hash_data,
    prepare,
    record_finished,
    run_folder_of,
    start_manifest,
    write_run_report,
)
from rlhf.cached_stages import cached_stage
from rlhf.config import STUDIES_OF_RUNS, RLHFConfig
from rlhf.distributed.endings import ending
from rlhf.distributed.follower import follow
from rlhf.distributed.gpus import claimed_gpus
from rlhf.distributed.launch import SUPERVISOR_PID, launch
from rlhf.distributed.leader import Leader
from rlhf.distributed.nodes import NodePlace, place_of
from rlhf.distributed.slurm import adopt_slurm, under_launcher
from rlhf.errors import (
    EXIT_STOPPED,
    EXIT_SUCCESS,
    EXIT_WAITING,
    Stopped,
    UserError,
)
from rlhf.pipeline import StagePlan, plan_stage
from rlhf.preferences.waiting import people_wanted, wait_as_configured, what_to_do
from rlhf.rank_pipeline import run_as_rank, with_world_size
from rlhf.runs import console, manifest, preemption
from rlhf.runs.folder import RunFolder
from rlhf.runs.sweep_agent import check_sweep
from rlhf.runs.wandb_logger import outside_the_sweep
from rlhf.studies.arms import check_alone, run_study
from rlhf.terminal import forgive_all, warn


def supervise(config: RLHFConfig, command: Sequence[str], debug: bool) -> int:
    """Runs the config's stages. Returns the exit code; errors of the user rise as `UserError`."""
    forgive_all()
    check_sweep(config, os.environ)
    if config.launcher.type == "slurm":
        return sbatch.write_job(config, prepare(config).path, command)
    place = place_of(config.distributed, os.environ)
    check_alone(config, alone=place is None and not under_launcher(os.environ))
    if place is not None:
        return _supervise_node(config, place, command, debug)
    adopt_slurm(os.environ)
    if under_launcher(os.environ):
        return run_as_rank(with_world_size(config), command, debug)
    run = prepare(config)
    with run.lock():
        return preemption.telling(config, run, lambda: _run(config, run, command, debug))


def _run(
    config: RLHFConfig,
    run: RunFolder,
    command: Sequence[str],
    debug: bool,
    leader: Leader | None = None,
    *,
    show_summary: bool = True,
) -> int:
    start_manifest(config, run, command)
    try:
        code = _run_stages(config, run, command, debug, leader)
        if code == EXIT_SUCCESS:
            finish(config, run, show_summary=show_summary)
        return code
    except (UserError, Stopped) as error:
        with FAILED_ALREADY:
            manifest.finish_manifest(run, error.exit_code)
        raise


def _supervise_node(config: RLHFConfig, place: NodePlace, command: Sequence[str], debug: bool) -> int:
    """One of several nodes: node 0 does what a single one does and leads the others."""
    values = config.model_dump(mode="json")
    if place.rank > 0:
        run = run_folder_of(config)
        with ExitStack() as held:
            return follow(
                place,
                run.path,
                values,
                lambda stage: _rank_command(run, stage, debug),
                prepare=lambda: (prepare(config), held.enter_context(claimed_gpus(config.distributed, os.environ))),
                num_threads=config.distributed.fixed_threads,
                grace_seconds=config.distributed.stop_seconds,
            )
    with Leader(place) as leader:
        run = prepare(config)
        with run.lock():
            leader.meet(run.path, values)
            code = preemption.telling(config, run, lambda: _run(config, run, command, debug, leader))
            leader.end(code)
            return code


def _run_stages(config: RLHFConfig, run: RunFolder, command: Sequence[str], debug: bool, leader: Leader | None) -> int:
    data_hash = hash_data(config, run)
    with ExitStack() as held:
        for position, name in enumerate(config.stages, start=1):
            if name == "report":
                write_run_report(run)
                continue
            plan = plan_stage(config, run, name, data_hash)
            if plan.finished:
                console.heading(name, position, len(config.stages), "finished earlier, nothing to do")
                # A supervisor that was killed between the result and this line has left the manifest without it.
                record_finished(run, name)
                continue
            with cached_stage(config, run, plan, position, before_waiting=held.close) as cached:
                if cached.taken:
                    record_finished(run, name)
                    continue
                # From the first stage that has something to do to the last; a second time it finds the choice made.
                if name == "collect":
                    code = _run_collect(config, run, plan, position, debug, leader, held)
                else:
                    held.enter_context(claimed_gpus(config.distributed, os.environ))
                    if name in STUDIES_OF_RUNS:
                        code = _run_study(config, run, plan, position, command, debug)
                    else:
                        code = _run_in_ranks(config, run, plan, position, debug, leader)
                if code == EXIT_SUCCESS:
                    cached.publish()
            if code != EXIT_SUCCESS:
                with FAILED_ALREADY:
                    manifest.finish_manifest(run, code)
                return code
    return EXIT_SUCCESS


def _run_collect(
    config: RLHFConfig,
    run: RunFolder,
    plan: StagePlan,
    position: int,
    debug: bool,
    leader: Leader | None,
    held: ExitStack,
) -> int:
    """Runs stage collect, and again once people have labelled what it asked. Nobody holds a GPU meanwhile.

    `held` has the claims on GPUs. Where it may not wait, or leads other nodes, whose schedulers count the time, it ends
    with `EXIT_WAITING` and a message.
    """
    begun = run.stage(plan.name).read_fingerprint() == plan.fingerprint
    missing = people_wanted(config, run.path) if begun else None
    if missing is not None:
        console.heading(plan.name, position, len(config.stages), "waits for people")
    while True:
        if missing is None:
            held.enter_context(claimed_gpus(config.distributed, os.environ))
            code = _run_in_ranks(config, run, plan, position, debug, leader)
            if code != EXIT_WAITING:
                return code
            held.close()
            missing = people_wanted(config, run.path, programs_are_done=True)
        else:
            manifest.update_stage(run, plan.name, status="waiting")
            if not config.preferences.wait or leader is not None:
                warn(f"rlhf: {what_to_do(config, run.path, missing)}")
                return EXIT_WAITING
            manifest.update_manifest(run, status="waiting")
            # The page ends with this process, however that ends.
            env = {**os.environ, SUPERVISOR_PID: str(os.getpid())}
            wait_as_configured(config, run.path, missing, env)
            manifest.update_manifest(run, status="running")
            missing = None


def _run_study(
    config: RLHFConfig, run: RunFolder, plan: StagePlan, position: int, command: Sequence[str], debug: bool
) -> int:
    """Runs a study's arms, each as a run of its own within this one. Returns the exit code."""

    def run_arm(own: RLHFConfig) -> int:
        with outside_the_sweep():
            arm = prepare(own)
            with arm.lock():
                return _run(own, arm, command, debug, show_summary=False)

    begin(config, run, plan, position)
    started = time.monotonic()
    code = run_study(config, run, plan.name, plan.inputs["policy"], run_arm)
    if code == EXIT_SUCCESS:
        record_finished(run, plan.name)
        return code
    status = "interrupted" if code in EXIT_STOPPED else "failed"
    with FAILED_ALREADY:
        manifest.update_stage(run, plan.name, status=status, seconds=round(time.monotonic() - started, 3))
    return code


def _rank_command(run: RunFolder, stage: str, debug: bool) -> list[str]:
    return [sys.executable, "-m", "rlhf.worker", str(run.path), stage, *(["--debug"] if debug else [])]


def _run_in_ranks(
    config: RLHFConfig, run: RunFolder, plan: StagePlan, position: int, debug: bool, leader: Leader | None
) -> int:
    """Starts one process a rank for a stage and waits. Returns the exit code; the ranks have printed any message."""
    begin(config, run, plan, position)
    started = time.monotonic()
    with nullcontext() if leader is None else leader.stage(plan.name) as peers:
        result = launch(
            _rank_command(run, plan.name, debug),
            config.distributed.num_processes,
            num_threads=config.distributed.fixed_threads,
            log_folder=run.path / "logs" / plan.name,
            peers=peers,
            grace_seconds=config.distributed.stop_seconds,
        )
    if result.exit_code == EXIT_SUCCESS:
        record_finished(run, plan.name)
        return EXIT_SUCCESS
    stopped_by = result.exit_code - 128 if result.exit_code in EXIT_STOPPED else None
    fields: dict[str, Any] = {"status": "failed" if stopped_by is None else "interrupted"}
    if result.exit_code == EXIT_WAITING:
        fields["status"] = "waiting"
    note = manifest.read_manifest(run).get("stages", {}).get(plan.name, {}).get("stopped")
    if stopped_by is not None and isinstance(note, dict):
        # Rank 0 wrote it, and whatever ended the run reached the ranks as SIGTERM.
        fields["stopped"] = {**note, "signal": signal.Signals(stopped_by).name}
    with FAILED_ALREADY:
        manifest.update_stage(run, plan.name, **fields, seconds=round(time.monotonic() - started, 3))
    for line in ending(plan.name, result, stopped_by, note) if result.exit_code != EXIT_WAITING else ():
        warn(f"rlhf: {line}")
    return result.exit_code
