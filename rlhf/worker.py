"""What a rank does: `python -m rlhf.worker RUN_FOLDER STAGE` runs one stage of a run folder. The launcher starts it."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from rlhf.config import RLHFConfig, StageName
from rlhf.distributed import stopping
from rlhf.errors import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_SUCCESS, Stopped, UserError, WaitingForLabels
from rlhf.runs import manifest
from rlhf.runs.console import quiet_libraries
from rlhf.runs.files import storage_error
from rlhf.runs.folder import RunFolder, StageResult
from rlhf.terminal import flush_all, forgive_all, warn

if TYPE_CHECKING:
    from rlhf.distributed.runtime import Runtime

# One line a stage: the module whose `run(context)` does the work.
STAGE_MODULES: dict[str, str] = {
    "sft": "rlhf.stages.sft",
    "collect": "rlhf.stages.collect",
    "reward_model": "rlhf.stages.reward_model",
    "reward_report": "rlhf.stages.reward_report",
    "ppo": "rlhf.stages.ppo.loop",
    "dpo": "rlhf.stages.dpo",
    "best_of_n": "rlhf.stages.best_of_n",
    "evaluate": "rlhf.stages.evaluate",
    "closed_form": "rlhf.studies.closed_form",
    "active_selection": "rlhf.studies.active_selection",
}


def run_stage(config: RLHFConfig, run: RunFolder, name: StageName, runtime: Runtime) -> None:
    """Runs one stage on this rank and, on rank 0, records its result. All ranks return together."""
    from rlhf.pipeline import resolve_inputs
    from rlhf.planning.during_run import StageMemory
    from rlhf.runs.tracking import StageSinks
    from rlhf.stages.context import StageContext

    started = time.monotonic()
    stage = run.stage(name)
    inputs = resolve_inputs(config, run, name)
    with StageSinks(run, config.tracking, name, config.model_dump(mode="json"), runtime.is_main) as sinks:
        context = StageContext(config=config, run=run, stage=stage, runtime=runtime, inputs=inputs, sinks=sinks)
        module = importlib.import_module(STAGE_MODULES[name])
        if runtime.is_main:
            from rlhf.distributed.facts import compute_facts

            manifest.update_stage(run, name, compute=compute_facts(runtime))
        memory = StageMemory.start(config, name, context.inputs, runtime)
        output = module.run(context)
        measured = runtime.gather_objects(memory.meter.read())
        if runtime.is_main:
            result = StageResult(
                stage=name,
                fingerprint=stage.read_fingerprint() or "",
                seconds=time.monotonic() - started,
                outputs=stage.hash_outputs(output.outputs),
                summary={**output.summary, **memory.summary(measured)},
            )
            stage.write_result(result)
            sinks.record(result, inputs)
    runtime.barrier()


def explain(error: BaseException, run: RunFolder | None, debug: bool) -> int:
    """Prints what went wrong on standard error, as a message unless `debug` asks for the traceback; the exit code."""
    if isinstance(error, KeyboardInterrupt):
        return stopping.explain_stop(error)
    error, stopped_by = _of_user(error, run), stopping.requested()
    if debug or not (isinstance(error, UserError) or stopped_by is not None):
        warn("".join(traceback.format_exception(error)).rstrip())
    if isinstance(error, WaitingForLabels):
        if os.environ.get("RANK", "0") == "0":
            warn(f"rlhf: {error}")
    elif isinstance(error, UserError):
        warn(f"rlhf: error: {error}")
    elif stopped_by is not None:
        warn(f"rlhf: {Stopped(stopped_by)} ({type(error).__name__} while stopping: {error})")
    else:
        warn(f"rlhf: internal error: {type(error).__name__}: {error}")
    return exit_code_of(error, run)


def exit_code_of(error: BaseException, run: RunFolder | None) -> int:
    """What the process ends with because of `error`."""
    if isinstance(error, KeyboardInterrupt):
        return error.exit_code if isinstance(error, Stopped) else EXIT_INTERRUPTED
    error, stopped_by = _of_user(error, run), stopping.requested()
    if isinstance(error, UserError):
        return error.exit_code
    # While stopping it is mostly a rank that was told to end a moment earlier and closed its connections.
    return EXIT_FAILURE if stopped_by is None else 128 + stopped_by


def _of_user(error: BaseException, run: RunFolder | None) -> BaseException:
    """A full or read-only disk under whatever name a library gives it becomes the error that says so, as does an exit.

    A rank that stage code ends by `sys.exit(0)` is no success: nothing has been recorded, and the other ranks wait.
    """
    if isinstance(error, UserError):
        return error
    if isinstance(error, SystemExit) and stopping.requested() is None:
        return _exit_error(error)
    if "rlhf.distributed.determinism" in sys.modules:
        from rlhf.distributed.determinism import explain_refusal

        error = explain_refusal(error) or error
    return storage_error(error, run.path if run is not None else Path.cwd()) or error


def _exit_error(error: SystemExit) -> UserError:
    # W&B puts a function of its own in the place of sys.exit.
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/wandb/sdk/" not in frame.filename]
    where = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    code = "" if error.code is None else repr(error.code)
    explained = UserError(
        f"something in the stage called sys.exit({code}){where}; a stage ends by returning. "
        "Raise an error there if it is one, else return."
    )
    explained.__cause__ = error
    return explained


def note_stop(run: RunFolder, name: StageName, stopped: Stopped) -> None:
    """Rank 0 writes down at which step its stage stopped, for the message and the manifest."""
    if os.environ.get("RANK", "0") != "0":
        return
    # The stop itself went well: a disk that is full now is the next start's affair.
    with contextlib.suppress(UserError, OSError):
        manifest.note_stop(run, name, stopped)


def main(arguments: list[str]) -> int:
    """Entry point of a rank process. Returns its exit code."""
    debug = "--debug" in arguments
    folder, name = [argument for argument in arguments if argument != "--debug"]
    run = RunFolder(Path(folder))
    from rlhf.distributed.launch import die_with_parent

    try:
        stopping.install()
        die_with_parent()
        from rlhf.config import config_from_file

        quiet_libraries()
        config = config_from_file(run.config)
        from rlhf.distributed.runtime import Runtime

        runtime = Runtime.start(config.distributed, config.zero, config.seed)
        run_stage(config, run, name, runtime)  # type: ignore[arg-type]  # checked against STAGES by the supervisor
    except WaitingForLabels as waiting:
        return waiting.exit_code  # the supervisor says it, or waits
    except Stopped as stopped:
        note_stop(run, name, stopped)  # type: ignore[arg-type]
        return stopped.exit_code
    # The process boundary: every error becomes a message and an exit code.
    except (Exception, KeyboardInterrupt, SystemExit) as error:  # noqa: BLE001
        return explain(error, run, debug)
    return EXIT_SUCCESS


def leave(code: int) -> NoReturn:
    """Ends this process at once. Everything is on disk, and all ranks have passed the stage's last barrier.

    An orderly end would destroy process group and interpreter under threads of gloo and DeepSpeed, which at times
    aborts a rank whose work is done ("terminate called without an active exception").
    """
    flush_all()
    os._exit(code)


if __name__ == "__main__":
    forgive_all()
    leave(main(sys.argv[1:]))
