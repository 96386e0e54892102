"""Weights & Biases, kept at arm's length: imported only when used, silent, and never a reason for a run to fail.

All stages and resumes of a run folder are one W&B run, whose id lies in the folder's `wandb_id`. Names are those of
`metrics.jsonl`. W&B's own step grows with every line over all stages: it is the line's number there, raised by the
lines that a stage which began anew took back, and the lines that a resumed stage writes again are not sent again.
Charts of `<stage>/...` use `<stage>/step`; what several stages measure, `perf/...`, is shown along W&B's own step.
"""

from __future__ import annotations

import importlib
import importlib.util
import netrc
import os
import secrets
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal
from urllib.parse import urlsplit

from rlhf.config.tracking import TrackingConfig
from rlhf.runs.artifacts import Artifact, made_artifacts, report_artifact, used_artifacts
from rlhf.runs.files import write_text
from rlhf.runs.folder import RunFolder, StageResult
from rlhf.runs.jsonable import read_json, read_lines, to_jsonable
from rlhf.runs.metrics_file import count_lines
from rlhf.runs.sinks import Ending, Start, result_metrics
from rlhf.runs.wandb_offline import mend
from rlhf.terminal import say

Mode = Literal["online", "offline", "disabled"]
# What WANDB_MODE says, in W&B's older words too; anything else leaves it to the API key.
_MODES: dict[str, Mode] = {"disabled": "disabled", "offline": "offline", "dryrun": "offline"}
INIT_SECONDS = 10.0
FINISH_SECONDS = 60.0
# A process that was told to end is killed before long.
HURRIED_FINISH_SECONDS = 5.0
_PUBLIC_SERVER = "https://api.wandb.ai"
# What an agent puts into the environment for one trial.
_OF_A_TRIAL = ("WANDB_RUN_ID", "WANDB_SWEEP_ID", "WANDB_SWEEP_PARAM_PATH", "WANDB_NAME")
_OUTSIDE_WANDB = (OSError, RuntimeError, ValueError, TypeError)


def resolve_mode(config: TrackingConfig) -> Mode:
    """What `auto` means here: WANDB_MODE where set, online with an API key, else offline; without wandb disabled.

    Online without an API key is offline: W&B would ask for one at the terminal.
    """
    mode = config.wandb
    if mode == "auto":
        mode = _MODES.get(os.environ.get("WANDB_MODE", "").lower(), "auto")
        if os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1"):
            mode = "disabled"
    if mode == "disabled" or importlib.util.find_spec("wandb") is None:
        return "disabled"
    if mode == "offline" or not has_api_key():
        return "offline"
    return "online"


def has_api_key() -> bool:
    """Whether `wandb login` was done for the configured server, or WANDB_API_KEY is set. Asks no server."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(server_address()).netloc
    candidates = [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
    for candidate in candidates:
        try:
            if netrc.netrc(str(Path(candidate).expanduser())).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError, RuntimeError):
            continue
    return False


def server_address() -> str:
    """Base URL of the W&B server: the environment, then W&B's own settings file, then the public one."""
    if os.environ.get("WANDB_BASE_URL"):
        return os.environ["WANDB_BASE_URL"]
    folder = os.environ.get("WANDB_CONFIG_DIR", "~/.config/wandb")
    try:
        lines = Path(folder).expanduser().joinpath("settings").read_text(encoding="utf-8").splitlines()
    except (OSError, RuntimeError, ValueError):
        lines = []
    for line in lines:
        name, _, value = line.partition("=")
        if name.strip() == "base_url" and value.strip():
            return value.strip()
    return _PUBLIC_SERVER


def run_id(folder: RunFolder) -> str:
    """The run's W&B id: the sweep agent's (WANDB_RUN_ID), else the one in the folder, else that of its newest
    checkpoint, else a new one. It is written down in the folder.
    """
    given = os.environ.get("WANDB_RUN_ID")
    try:
        known = folder.wandb_id.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        known = ""
    chosen = given or known or _id_in_a_checkpoint(folder) or secrets.token_hex(4)
    if not known:
        write_text(folder.wandb_id, chosen + "\n")
    return chosen


def _id_in_a_checkpoint(folder: RunFolder) -> str | None:
    """The id that the newest checkpoint of any stage was written with (`StageContext.provenance`)."""
    states = folder.stages.glob("*/checkpoints/checkpoint-*/shared.json")
    for path in sorted(states, key=lambda path: path.stat().st_mtime_ns, reverse=True):
        shared = (read_json(path) or {}).get("shared", {})
        if found := shared.get("provenance", {}).get("wandb_run_id"):
            return str(found)
    return None


class _Contained:
    """Lets no failure of W&B out of the block; the first one is reported and ends the logging to W&B."""

    def __init__(self, logger: WandbLogger, doing: str) -> None:
        self.logger = logger
        self.doing = doing

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        if error is None or not _is_wandbs(error):
            return False
        self.logger.give_up(self.doing, error)
        return True


def _is_wandbs(error: BaseException) -> bool:
    """Whether W&B may be to blame. Not all of its exceptions are public or share a base, so their module decides."""
    own = type(error).__module__.partition(".")[0] == "wandb"
    return isinstance(error, Exception) and (own or isinstance(error, _OUTSIDE_WANDB))


class WandbLogger:
    """One stage's connection to the run's W&B run. After a failure every method does nothing."""

    def __init__(self, start: Start) -> None:
        self.stage = start.stage
        self._start = start
        self._run: Any = None
        # Lines below are sent already; what is added to the others' numbers, see `_raised`.
        self._sent = start.lines_before if start.resume_step else start.lines
        self._raised = _raised(start)

    @classmethod
    def open(cls, start: Start) -> WandbLogger | None:
        """Connects as the config says; None when W&B is disabled or not installed. Takes about a second offline."""
        config = start.config
        mode = resolve_mode(config)
        if config.wandb in ("online", "offline") and mode != config.wandb:
            reason = "is not installed" if mode == "disabled" else "has no API key (wandb login), so it logs offline"
            start.warn(f"tracking.wandb={config.wandb}, but W&B {reason}")
        if mode == "disabled":
            return None
        logger = cls(start)
        kept: int | None = None
        if start.resume_step is not None:
            with _Contained(logger, "could not read what it wrote offline before"):
                kept = mend(start.folder)
        if mode == "online":
            with _Contained(logger, "could not start online, so it logs offline (wandb sync uploads later)"):
                logger._run = _init(start, mode)
        if logger._run is None:
            with _Contained(logger, "could not start offline"):
                if mode == "online":
                    # The failed attempt still holds the run's id.
                    importlib.import_module("wandb").teardown()
                logger._run = _init(start, "offline")
        with _Contained(logger, "failed"):
            if logger._run is not None:
                logger._run.define_metric(f"{start.stage}/step", hidden=True)
                logger._run.define_metric(f"{start.stage}/*", step_metric=f"{start.stage}/step")
                logger._catch_up(kept)
        return logger

    def _catch_up(self, kept: int | None) -> None:
        """Sends what an attempt that was killed had handed to W&B, and W&B had neither written nor uploaded.

        `kept` is the step behind the last one in the offline files, None where that is not known.
        """
        if not self._start.resume_step:
            return
        # The server's count; what stands in for W&B may not have one.
        counted = getattr(self._run, "starting_step", None)
        if isinstance(counted, int) and counted > 0:
            kept = max(kept or 0, counted)
        if kept is None:
            return
        self._sent = min(self._sent, max(0, kept - self._raised))
        for line, entry in enumerate(read_lines(self._start.folder.metrics)):
            if self._sent <= line < self._start.lines:
                stage, step = entry.pop("stage", self.stage), entry.pop("step", line)
                self._send(line, f"{stage}/step", step, entry)

    def log(self, line: int, step: int, metrics: Mapping[str, float | None]) -> None:
        """Logs one line of `metrics.jsonl` under its names, unless an earlier start has."""
        if self._run is None or line < self._sent:
            return
        with _Contained(self, "stopped logging"):
            self._send(line, f"{self.stage}/step", step, metrics)

    def _send(self, line: int, axis: str, step: int, metrics: Mapping[str, float | None]) -> None:
        values = {name: value for name, value in metrics.items() if value is not None}
        self._run.log({axis: step, **values}, step=line + self._raised)

    def log_samples(self, line: int, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Logs sampled texts as a W&B table, in the row of the stage's newest numbers."""
        line = max(line, self._start.lines)
        if self._run is None or not rows or line < self._sent:
            return
        columns: list[str | int] = list(dict.fromkeys(name for row in rows for name in row))
        with _Contained(self, "stopped logging"):
            import wandb

            cells = [[step, *(_cell(row.get(str(name))) for name in columns)] for row in rows]
            table = wandb.Table(columns=["step", *columns], data=cells)
            self._run.log({f"{self.stage}/samples": table}, step=line + self._raised)

    def record(self, result: StageResult, inputs: Mapping[str, str]) -> None:
        """Puts the result's numbers into the run's summary, and logs what was used and made as artifacts."""
        if self._run is None:
            return
        with _Contained(self, "could not take the result"):
            self._run.summary.update(result_metrics(result.stage, result.summary))
        if self._start.config.artifacts == "none" or self._run is None:
            return
        with _Contained(self, "could not log artifacts"):
            self._log_artifacts(result, inputs)

    def _log_artifacts(self, result: StageResult, inputs: Mapping[str, str]) -> None:
        folder = self._start.folder
        experiment = str(self._start.run_config.get("experiment", "default"))
        used = used_artifacts(folder, result.stage, inputs)
        with_files = self._start.config.artifacts == "files"
        # Two inputs may be the same folder: the policy is often its own reference.
        for artifact in {artifact.version: artifact for artifact in used.values()}.values():
            # W&B's `use_artifact` asks its server, which an offline run has none of, and online it waits. This is what
            # it does before: the artifact is made known, the same content once, and is then noted as used.
            self._run._log_artifact(_draft(artifact, with_files), is_user_created=True, use_after_commit=True)
        for artifact in made_artifacts(folder, result, experiment, used):
            self._run.log_artifact(_draft(artifact, with_files), aliases=["latest", *artifact.aliases])

    def close(self, ending: Ending) -> None:
        """Ends the connection, waiting a bounded time for uploads; what is missing can be sent by `wandb sync`.

        After a stop it waits `HURRIED_FINISH_SECONDS` at most, else `FINISH_SECONDS`. In a sweep a run that was stopped
        is marked as preempted, so that its agent's server hands it out again.
        """
        if self._run is None:
            return
        run, self._run = self._run, None
        if ending.stop is None:
            self._finish(run, ending.exit_code)
            return
        # W&B's own limit is fixed when its run starts. The thread ends with the process.
        finishing = threading.Thread(target=self._end_early, args=(run, ending), name="wandb-finish", daemon=True)
        finishing.start()
        finishing.join(HURRIED_FINISH_SECONDS)
        if finishing.is_alive():
            self._start.warn(
                f"W&B had not finished after {HURRIED_FINISH_SECONDS:g} s; wandb sync uploads what is missing."
            )

    def _end_early(self, run: Any, ending: Ending) -> None:
        if os.environ.get("WANDB_SWEEP_ID"):
            with _Contained(self, "could not be told that the run was preempted"):
                run.mark_preempting()
        self._finish(run, ending.exit_code)

    def _finish(self, run: Any, exit_code: int) -> None:
        with _Contained(self, "did not finish cleanly"):
            run.finish(exit_code=exit_code)

    def give_up(self, doing: str, error: BaseException) -> None:
        """Warns and logs no more; called for the first failure."""
        self._run = None
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        self._start.warn(f"W&B {doing}: {first_line}. The run goes on; metrics.jsonl has everything.")


def record_run(folder: RunFolder, config: TrackingConfig, run_config: Mapping[str, Any], stages: Sequence[str]) -> None:
    """At the end of a run: its report, and the results of `stages`, also of those that no rank of this run has run."""
    num_lines = count_lines(folder.metrics)
    start = Start(folder, config, "report", run_config, say, lines_before=num_lines, lines=num_lines)
    logger = WandbLogger.open(start)
    if logger is None:
        return
    results = [folder.stage(stage).read_result() for stage in stages]
    with _Contained(logger, "could not take the results"):
        for result in (result for result in results if result is not None):
            logger._run.summary.update(result_metrics(result.stage, result.summary))
        if folder.report.exists() and config.artifacts != "none":
            made = report_artifact(folder, str(run_config.get("experiment", "default")))
            logger._run.log_artifact(_draft(made, with_files=True), aliases=["latest", *made.aliases])
    logger.close(Ending())


@contextmanager
def outside_the_sweep() -> Iterator[None]:
    """While the block runs, this process and its children are in no sweep: an arm of a study is a run of its own."""
    held = {name: os.environ.pop(name) for name in _OF_A_TRIAL if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(held)


def _raised(start: Start) -> int:
    """What is added to a line's number to give W&B's step: all lines that stages which began anew have taken back.

    W&B takes no step twice, and the lines in their place say something else. Kept in the folder.
    """
    file = start.folder.path / ".wandb_raised"
    try:
        raised = int(file.read_text(encoding="ascii"))
    except (OSError, ValueError):
        raised = 0
    taken_back = start.lines_before - start.lines
    if start.resume_step == 0 and taken_back > 0:
        raised += taken_back
        write_text(file, f"{raised}\n")
    return raised


def _draft(artifact: Artifact, with_files: bool) -> Any:
    """W&B's artifact: the files themselves, or one entry whose reference is the hash of the content.

    Such an entry uploads nothing and makes the version depend on the content alone, wherever it lies.
    """
    import wandb

    draft = wandb.Artifact(artifact.name, type=artifact.type, metadata=to_jsonable(artifact.metadata))
    if artifact.path is None or not with_files:
        draft.add_reference(f"sha256:{artifact.content}", name="content")
    elif artifact.path.is_dir():
        draft.add_dir(str(artifact.path), policy="immutable")
    else:
        draft.add_file(str(artifact.path), policy="immutable")
    return draft


def _init(start: Start, mode: Mode) -> Any:
    # The variable also silences what W&B says outside a run, at start and at exit.
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    config, folder = start.config, start.folder
    in_sweep = bool(os.environ.get("WANDB_SWEEP_ID"))
    # The agent names the runs of a sweep and groups them.
    named, grouped = (in_sweep or os.environ.get(variable) for variable in ("WANDB_NAME", "WANDB_RUN_GROUP"))
    return wandb.init(
        project=None if in_sweep else config.project,
        entity=None if in_sweep else config.entity,
        tags=list(config.tags) or None,
        id=run_id(folder),
        name=config.name or (None if named else folder.path.resolve().name),
        group=None if grouped else start.run_config.get("experiment"),
        dir=str(folder.path),
        mode=mode,
        resume="allow",
        reinit="finish_previous",
        # W&B merges what a sweep sets into it, section by section, and locks that.
        config=to_jsonable(start.run_config),
        allow_val_change=True,
        settings=wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            save_code=False,
            disable_code=True,
            init_timeout=INIT_SECONDS,
            finish_timeout=FINISH_SECONDS,
            finish_timeout_raises=True,
        ),
    )


def _cell(value: Any) -> Any:
    """A table cell; W&B wants one type a column, so structures become text."""
    plain = to_jsonable(value)
    return str(plain) if isinstance(plain, (list, dict)) else plain
