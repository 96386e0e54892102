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
from contextlib import ExitStack, nullcontext, suppress
from typing import Any

from rlhf import data, sbatch
from rlhf.cached_stages import cached_stage, check_cache, plan_or_take
from rlhf.config import STUDIES_OF_RUNS, RLHFConfig, StageName, config_from_values, config_hash, config_to_yaml
from rlhf.config.distributed import DistributedConfig
from rlhf.config.ppo import BOOKKEEPING as PPO_BOOKKEEPING
from rlhf.config.preferences import BOOKKEEPING as PREFERENCES_BOOKKEEPING
from rlhf.config.training import BOOKKEEPING as TRAINING_BOOKKEEPING
from rlhf.distributed.endings import ending
from rlhf.distributed.follower import follow
from rlhf.distributed.gpus import claimed_gpus
from rlhf.distributed.launch import SUPERVISOR_PID, launch
from rlhf.distributed.leader import Leader
from rlhf.distributed.nodes import NodePlace, place_of, remove_left_secrets
from rlhf.distributed.slurm import adopt_slurm, under_launcher
from rlhf.errors import (
    EXIT_STOPPED,
    EXIT_SUCCESS,
    EXIT_WAITING,
    ConfigError,
    Stopped,
    StorageError,
    UserError,
)
from rlhf.pipeline import StagePlan, begin_stage, default_run_folder, plan_stage, preflight
from rlhf.preferences.waiting import people_wanted, wait_as_configured, what_to_do
from rlhf.runs import console, manifest, preemption
from rlhf.runs.files import write_text
from rlhf.runs.folder import RunFolder
from rlhf.runs.report import write_report
from rlhf.runs.sweep_agent import check_sweep
from rlhf.runs.wandb_logger import outside_the_sweep, record_run, sync_command
from rlhf.studies.arms import check_alone, check_arms, run_study
from rlhf.terminal import forgive_all, say, warn
from rlhf.worker import exit_code_of, explain, leave, note_stop, run_stage

# What a run is, as far as its default folder is concerned: everything but where it lives, what is logged besides, on
# how many processes, sharded how, and in what portions it is computed: those may change from attempt to attempt.
_NOT_IDENTITY = (
    *("run", "tracking", "stages", "plan", "launcher", "zero", "reward_report"),
    *(f"preferences.{key}" for key in PREFERENCES_BOOKKEEPING),
    *(f"distributed.{key}" for key in DistributedConfig.model_fields if key != "precision"),
    *(f"{stage}.{key}" for stage in ("sft", "reward_model", "dpo") for key in sorted(TRAINING_BOOKKEEPING)),
    *(f"ppo.{key}" for key in sorted(PPO_BOOKKEEPING)),
)
# How long the other ranks of another launcher wait for rank 0 to write down that the run was stopped.
_NOTE_SECONDS = 10.0
# A run that failed because nothing can be written has said so; its manifest is mended when it is started again.
_FAILED_ALREADY = suppress(StorageError)


def supervise(config: RLHFConfig, command: Sequence[str], debug: bool) -> int:
    """Runs the config's stages. Returns the exit code; errors of the user rise as `UserError`."""
    forgive_all()
    check_sweep(config, os.environ)
    if config.launcher.type == "slurm":
        return sbatch.write_job(config, _prepare(config).path, command)
    place = place_of(config.distributed, os.environ)
    check_alone(config, alone=place is None and not under_launcher(os.environ))
    if place is not None:
        return _supervise_node(config, place, command, debug)
    adopt_slurm(os.environ)
    if under_launcher(os.environ):
        return _run_as_rank(_with_world_size(config), command, debug)
    run = _prepare(config)
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
    _start_manifest(config, run, command)
    try:
        code = _run_stages(config, run, command, debug, leader)
        if code == EXIT_SUCCESS:
            _finish(config, run, show_summary=show_summary)
        return code
    except (UserError, Stopped) as error:
        with _FAILED_ALREADY:
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
                prepare=lambda: (_prepare(config), held.enter_context(claimed_gpus(config.distributed, os.environ))),
                num_threads=config.distributed.fixed_threads,
                grace_seconds=config.distributed.stop_seconds,
            )
    with Leader(place) as leader:
        run = _prepare(config)
        with run.lock():
            leader.meet(run.path, values)
            code = preemption.telling(config, run, lambda: _run(config, run, command, debug, leader))
            leader.end(code)
            return code


def run_folder_of(config: RLHFConfig) -> RunFolder:
    """Where `supervise` runs the config."""
    return RunFolder(default_run_folder(config, config_hash(config, exclude=_NOT_IDENTITY)))


def _prepare(config: RLHFConfig) -> RunFolder:
    run = run_folder_of(config)
    preflight(config, run)
    check_arms(config, run)
    check_cache(config)
    run.create()
    return run


def _start_manifest(config: RLHFConfig, run: RunFolder, command: Sequence[str]) -> None:
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


def _hash_data(config: RLHFConfig, run: RunFolder | None) -> str:
    """The data's hash as fingerprints have it; written, with that of its content alone, into the manifest of `run`."""
    content = data.data_content(config.data)
    value = data.data_hash(config.data, content)
    if run is not None:
        manifest.update_manifest(run, data={"hash": value, "content": content})
    return value


def _run_stages(config: RLHFConfig, run: RunFolder, command: Sequence[str], debug: bool, leader: Leader | None) -> int:
    data_hash = _hash_data(config, run)
    with ExitStack() as held:
        for position, name in enumerate(config.stages, start=1):
            if name == "report":
                _write_report(run)
                continue
            plan = plan_stage(config, run, name, data_hash)
            if plan.finished:
                console.heading(name, position, len(config.stages), "finished earlier, nothing to do")
                # A supervisor that was killed between the result and this line has left the manifest without it.
                _record_finished(run, name)
                continue
            with cached_stage(config, run, plan, position, before_waiting=held.close) as cached:
                if cached.taken:
                    _record_finished(run, name)
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
                with _FAILED_ALREADY:
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
            arm = _prepare(own)
            with arm.lock():
                return _run(own, arm, command, debug, show_summary=False)

    _begin(config, run, plan, position)
    started = time.monotonic()
    code = run_study(config, run, plan.name, plan.inputs["policy"], run_arm)
    if code == EXIT_SUCCESS:
        _record_finished(run, plan.name)
        return code
    status = "interrupted" if code in EXIT_STOPPED else "failed"
    with _FAILED_ALREADY:
        manifest.update_stage(run, plan.name, status=status, seconds=round(time.monotonic() - started, 3))
    return code


def _finish(config: RLHFConfig, run: RunFolder, *, show_summary: bool = True) -> None:
    manifest.finish_manifest(run, EXIT_SUCCESS)
    if "report" in config.stages:
        write_report(run)  # once more, now that the manifest says finished
    record_run(run, config.tracking, config.model_dump(mode="json"), config.stages)
    if show_summary:
        console.print_summary(run)
        if (command := sync_command(run)) is not None:
            say(f"W&B is offline here; to upload: {command}")


def _write_report(run: RunFolder) -> None:
    started = time.monotonic()
    write_report(run)
    manifest.update_stage(run, "report", status="finished", seconds=round(time.monotonic() - started, 3))


def _begin(config: RLHFConfig, run: RunFolder, plan: StagePlan, position: int) -> None:
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


def _rank_command(run: RunFolder, stage: str, debug: bool) -> list[str]:
    return [sys.executable, "-m", "rlhf.worker", str(run.path), stage, *(["--debug"] if debug else [])]


def _run_in_ranks(
    config: RLHFConfig, run: RunFolder, plan: StagePlan, position: int, debug: bool, leader: Leader | None
) -> int:
    """Starts one process a rank for a stage and waits. Returns the exit code; the ranks have printed any message."""
    _begin(config, run, plan, position)
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
        _record_finished(run, plan.name)
        return EXIT_SUCCESS
    stopped_by = result.exit_code - 128 if result.exit_code in EXIT_STOPPED else None
    fields: dict[str, Any] = {"status": "failed" if stopped_by is None else "interrupted"}
    if result.exit_code == EXIT_WAITING:
        fields["status"] = "waiting"
    note = manifest.read_manifest(run).get("stages", {}).get(plan.name, {}).get("stopped")
    if stopped_by is not None and isinstance(note, dict):
        # Rank 0 wrote it, and whatever ended the run reached the ranks as SIGTERM.
        fields["stopped"] = {**note, "signal": signal.Signals(stopped_by).name}
    with _FAILED_ALREADY:
        manifest.update_stage(run, plan.name, **fields, seconds=round(time.monotonic() - started, 3))
    for line in ending(plan.name, result, stopped_by, note) if result.exit_code != EXIT_WAITING else ():
        warn(f"rlhf: {line}")
    return result.exit_code


def _record_finished(run: RunFolder, name: StageName) -> None:
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


def _with_world_size(config: RLHFConfig) -> RLHFConfig:
    """Under another launcher the number of processes is the launcher's."""
    world_size = int(os.environ["WORLD_SIZE"])
    asked = config.distributed.world_size
    if asked not in (1, world_size):
        raise ConfigError(
            f"distributed.num_processes={asked}, but the launcher started {world_size} processes. Leave the key out, "
            f"or set distributed.num_nodes={world_size} where srun starts one task on each of so many nodes."
        )
    dump = config.model_dump(mode="json")
    dump["distributed"] |= {"num_processes": world_size, "num_nodes": 1, "node_rank": None, "rendezvous": None}
    return config_from_values(dump, f"the launcher started {world_size} processes")


def _run_as_rank(config: RLHFConfig, command: Sequence[str], debug: bool) -> int:
    """The pipeline inside one rank that torchrun, accelerate, deepspeed or srun started."""
    from rlhf.distributed.runtime import Runtime

    console.quiet_libraries()
    run: RunFolder | None = None
    begun, current = False, None
    locks = ExitStack()
    try:
        runtime = Runtime.start(config.distributed, config.zero, config.seed)
        run = run_folder_of(config)
        if runtime.is_main:
            _prepare(config)
            locks.enter_context(run.lock())
            begun = True
            _start_manifest(config, run, command)
        runtime.barrier()
        data_hash = _hash_data(config, run if runtime.is_main else None)
        for position, name in enumerate(config.stages, start=1):
            if name == "report":
                if runtime.is_main:
                    _write_report(run)
                continue
            # Rank 0 looks for all, so that no rank looks at what another has begun to write.
            plan = runtime.broadcast_object(plan_stage(config, run, name, data_hash) if runtime.is_main else None)
            assert plan is not None
            cached = plan_or_take(config, run, plan, position) if runtime.is_main else None
            if plan.finished or runtime.broadcast_object(cached is not None and cached.taken):
                if runtime.is_main:
                    _record_finished(run, name)
                continue
            if runtime.is_main:
                _begin(config, run, plan, position)
                current = name
            runtime.barrier()
            run_stage(config, run, name, runtime)
            if cached is not None:
                _record_finished(run, name)
                cached.publish()
                current = None
            # Each stage starts from the same random state and with fresh library singletons, as in its own process.
            runtime = Runtime.start(config.distributed, config.zero, config.seed)
        if runtime.is_main:
            _finish(config, run)
        runtime.barrier()
    # The process boundary: every error becomes a message and an exit code.
    except (Exception, KeyboardInterrupt, SystemExit) as error:  # noqa: BLE001
        if isinstance(error, Stopped) and os.environ.get("RANK", "0") != "0":
            # Rank 0 says it for all; a launcher that sees a rank gone may not let it finish.
            if run is not None:
                _wait_for_note(run, _NOTE_SECONDS)
            leave(error.exit_code)
        code = exit_code_of(error, run)
        if run is not None and begun:
            if isinstance(error, Stopped) and current is not None:
                note_stop(run, current, error)
            with _FAILED_ALREADY:
                manifest.finish_manifest(run, code)
        explain(error, run, debug)
        # The other ranks may wait in a collective operation that this rank will never join: leave at once, so that the
        # launcher ends them.
        leave(code)
    leave(EXIT_SUCCESS)


def _wait_for_note(run: RunFolder, seconds: float) -> None:
    """Returns when the manifest no longer says that the run is going on, or cannot be read here, or time is up."""
    end = time.monotonic() + seconds
    while manifest.read_manifest(run).get("status") == "running" and time.monotonic() < end:
        time.sleep(0.05)
