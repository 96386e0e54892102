"""Weights & Biases, kept at arm's length: imported only when used, silent, and never a reason for a run to fail.

All stages and resumes of a run folder are one W&B run, whose id lies in the folder's `wandb_id`. W&B's own step is
the line number in `metrics.jsonl`: it grows over all stages, and a resumed stage, whose lines were taken back,
repeats the numbers that W&B already has. Charts use `<stage>/step`.
"""

from __future__ import annotations

import importlib
import importlib.util
import netrc
import os
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal
from urllib.parse import urlsplit

from rlhf.config.tracking import TrackingConfig
from rlhf.runs.files import write_text
from rlhf.runs.folder import RunFolder
from rlhf.runs.jsonable import read_json, to_jsonable

Mode = Literal["online", "offline", "disabled"]
# What WANDB_MODE says, in W&B's older words too; anything else leaves it to the API key.
_MODES: dict[str, Mode] = {"disabled": "disabled", "offline": "offline", "dryrun": "offline"}
INIT_SECONDS = 10.0
FINISH_SECONDS = 60.0
# A process that was told to end is killed before long.
HURRIED_FINISH_SECONDS = 5.0
_PUBLIC_SERVER = "https://api.wandb.ai"
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

    def __init__(self, stage: str, warn: Callable[[str], None]) -> None:
        self.stage = stage
        self._warn = warn
        self._run: Any = None

    @classmethod
    def open(
        cls,
        folder: RunFolder,
        config: TrackingConfig,
        stage: str,
        run_config: Mapping[str, Any],
        warn: Callable[[str], None],
    ) -> WandbLogger | None:
        """Connects as `config` says; None when W&B is disabled or not installed. Takes about a second offline."""
        mode = resolve_mode(config)
        if config.wandb in ("online", "offline") and mode != config.wandb:
            reason = "is not installed" if mode == "disabled" else "has no API key (wandb login), so it logs offline"
            warn(f"tracking.wandb={config.wandb}, but W&B {reason}")
        if mode == "disabled":
            return None
        logger = cls(stage, warn)
        if mode == "online":
            with _Contained(logger, "could not start online, so it logs offline (wandb sync uploads later)"):
                logger._run = _init(folder, config, run_config, mode)
        if logger._run is None:
            with _Contained(logger, "could not start offline"):
                if mode == "online":
                    # The failed attempt still holds the run's id.
                    importlib.import_module("wandb").teardown()
                logger._run = _init(folder, config, run_config, "offline")
        with _Contained(logger, "failed"):
            if logger._run is not None:
                logger._run.define_metric(f"{stage}/step", hidden=True)
                logger._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        return logger

    def log(self, line: int, step: int, metrics: Mapping[str, float | None]) -> None:
        """Logs one line of `metrics.jsonl`. Names of other groups, such as `perf/`, go below the stage's."""
        if self._run is None:
            return
        values = {self._name(name): value for name, value in metrics.items() if value is not None}
        with _Contained(self, "stopped logging"):
            self._run.log({f"{self.stage}/step": step, **values}, step=line)

    def log_samples(self, line: int, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Logs sampled texts as a W&B table."""
        if self._run is None or not rows:
            return
        columns: list[str | int] = list(dict.fromkeys(name for row in rows for name in row))
        with _Contained(self, "stopped logging"):
            import wandb

            table = wandb.Table(columns=columns, data=[[_cell(row.get(str(name))) for name in columns] for row in rows])
            self._run.log({f"{self.stage}/step": step, f"{self.stage}/samples": table}, step=line)

    def close(self, *, failed: bool, hurry: bool = False) -> None:
        """Ends the connection, waiting a bounded time for uploads; what is missing can be sent by `wandb sync`.

        With `hurry` it waits `HURRIED_FINISH_SECONDS` at most, else `FINISH_SECONDS`.
        """
        if self._run is None:
            return
        run, self._run = self._run, None
        code = 1 if failed else 0
        if not hurry:
            self._finish(run, code)
            return
        # W&B's own limit is fixed when its run starts. The thread ends with the process.
        finishing = threading.Thread(target=self._finish, args=(run, code), name="wandb-finish", daemon=True)
        finishing.start()
        finishing.join(HURRIED_FINISH_SECONDS)
        if finishing.is_alive():
            self._warn(f"W&B had not finished after {HURRIED_FINISH_SECONDS:g} s; wandb sync uploads what is missing.")

    def _finish(self, run: Any, exit_code: int) -> None:
        with _Contained(self, "did not finish cleanly"):
            run.finish(exit_code=exit_code)

    def give_up(self, doing: str, error: BaseException) -> None:
        """Warns and logs no more; called for the first failure."""
        self._run = None
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        self._warn(f"W&B {doing}: {first_line}. The run goes on; metrics.jsonl has everything.")

    def _name(self, name: str) -> str:
        return name if name.startswith(f"{self.stage}/") else f"{self.stage}/{name}"


def _init(folder: RunFolder, config: TrackingConfig, run_config: Mapping[str, Any], mode: Mode) -> Any:
    # The variable also silences what W&B says outside a run, at start and at exit.
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    in_sweep = bool(os.environ.get("WANDB_SWEEP_ID"))
    return wandb.init(
        project=None if in_sweep else config.project,
        entity=None if in_sweep else config.entity,
        tags=list(config.tags) or None,
        id=run_id(folder),
        # The agent names the runs of a sweep.
        name=None if in_sweep else folder.path.resolve().name,
        group=None if in_sweep else run_config.get("experiment"),
        dir=str(folder.path),
        mode=mode,
        resume="allow",
        reinit="finish_previous",
        config=to_jsonable(run_config),
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
