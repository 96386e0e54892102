"""What a rank does: `python -m rlhf.worker RUN_FOLDER STAGE` runs one stage of a run folder. The launcher starts it."""

from __future__ import annotations

import importlib
import os
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from rlhf.config import RLHFConfig, StageName
from rlhf.errors import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_SUCCESS, UserError
from rlhf.runs.console import quiet_libraries
from rlhf.runs.files import disk_full, is_disk_full
from rlhf.runs.folder import RunFolder, StageResult

if TYPE_CHECKING:
    from rlhf.distributed.runtime import Runtime

# One line a stage: the module whose `run(context)` does the work.
STAGE_MODULES: dict[str, str] = {
    "sft": "rlhf.stages.sft",
    "collect": "rlhf.stages.collect",
    "reward_model": "rlhf.stages.reward_model",
    "ppo": "rlhf.stages.ppo.loop",
    "evaluate": "rlhf.stages.evaluate",
    "closed_form": "rlhf.studies.closed_form",
}


def run_stage(config: RLHFConfig, run: RunFolder, name: StageName, runtime: Runtime) -> None:
    """Runs one stage on this rank and, on rank 0, records its result. All ranks return together."""
    from rlhf.distributed.memory import peak_memory_bytes
    from rlhf.pipeline import resolve_inputs
    from rlhf.stages.context import StageContext

    started = time.monotonic()
    stage = run.stage(name)
    context = StageContext(
        config=config, run=run, stage=stage, runtime=runtime, inputs=resolve_inputs(config, run, name)
    )
    output = importlib.import_module(STAGE_MODULES[name]).run(context)
    peaks = runtime.gather_objects(peak_memory_bytes(runtime.device))
    if runtime.is_main:
        result = StageResult(
            stage=name,
            fingerprint=stage.read_fingerprint() or "",
            seconds=time.monotonic() - started,
            outputs=stage.hash_outputs(output.outputs),
            summary={**output.summary, "perf/peak_memory_bytes": max(peaks)},
        )
        stage.write_result(result)
    runtime.barrier()


def explain(error: BaseException, run: RunFolder | None, debug: bool) -> int:
    """Prints what went wrong on standard error, as a message unless `debug` asks for the traceback; the exit code."""
    if isinstance(error, KeyboardInterrupt):
        print("rlhf: interrupted; the same command goes on where it stopped", file=sys.stderr)
        return EXIT_INTERRUPTED
    place = run.path if run is not None else Path.cwd()
    if not isinstance(error, UserError) and is_disk_full(error, place):
        error = disk_full(place)
    if debug or not isinstance(error, UserError):
        traceback.print_exception(error)
    if isinstance(error, UserError):
        print(f"rlhf: error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"rlhf: internal error: {type(error).__name__}: {error}", file=sys.stderr)
    return EXIT_FAILURE


def main(arguments: list[str]) -> int:
    """Entry point of a rank process. Returns its exit code."""
    debug = "--debug" in arguments
    folder, name = [argument for argument in arguments if argument != "--debug"]
    run = RunFolder(Path(folder))
    from rlhf.distributed.launch import die_with_parent

    die_with_parent()
    try:
        from rlhf.config import config_from_file

        quiet_libraries()
        config = config_from_file(run.config)
        from rlhf.distributed.runtime import Runtime

        runtime = Runtime.start(config.distributed, config.zero, config.seed)
        run_stage(config, run, name, runtime)  # type: ignore[arg-type]  # checked against STAGES by the supervisor
    # The process boundary: every error becomes a message and an exit code.
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001
        return explain(error, run, debug)
    return EXIT_SUCCESS


def leave(code: int) -> NoReturn:
    """Ends this process at once. Everything is on disk, and all ranks have passed the stage's last barrier.

    An orderly end would destroy process group and interpreter under threads of gloo and DeepSpeed, which at times
    aborts a rank whose work is done ("terminate called without an active exception").
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
