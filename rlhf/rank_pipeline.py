"""The pipeline inside ranks that another launcher started: each is its own supervisor, and rank 0 alone writes."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack

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
from rlhf.cached_stages import plan_or_take
from rlhf.config import RLHFConfig, config_from_values
from rlhf.errors import EXIT_SUCCESS, ConfigError, Stopped
from rlhf.pipeline import plan_stage
from rlhf.runs import console, manifest
from rlhf.runs.folder import RunFolder
from rlhf.worker import exit_code_of, explain, leave, note_stop, run_stage

# How long the other ranks of another launcher wait for rank 0 to write down that the run was stopped.
_NOTE_SECONDS = 10.0


def with_world_size(config: RLHFConfig) -> RLHFConfig:
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


def run_as_rank(config: RLHFConfig, command: Sequence[str], debug: bool) -> int:
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
            prepare(config)
            locks.enter_context(run.lock())
            begun = True
            start_manifest(config, run, command)
        runtime.barrier()
        data_hash = hash_data(config, run if runtime.is_main else None)
        for position, name in enumerate(config.stages, start=1):
            if name == "report":
                if runtime.is_main:
                    write_run_report(run)
                continue
            # Rank 0 looks for all, so that no rank looks at what another has begun to write.
            plan = runtime.broadcast_object(plan_stage(config, run, name, data_hash) if runtime.is_main else None)
            assert plan is not None
            cached = plan_or_take(config, run, plan, position) if runtime.is_main else None
            if plan.finished or runtime.broadcast_object(cached is not None and cached.taken):
                if runtime.is_main:
                    record_finished(run, name)
                continue
            if runtime.is_main:
                begin(config, run, plan, position)
                current = name
            runtime.barrier()
            run_stage(config, run, name, runtime)
            if cached is not None:
                record_finished(run, name)
                cached.publish()
                current = None
            # Each stage starts from the same random state and with fresh library singletons, as in its own process.
            runtime = Runtime.start(config.distributed, config.zero, config.seed)
        if runtime.is_main:
            finish(config, run)
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
            with FAILED_ALREADY:
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
