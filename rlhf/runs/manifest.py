"""`manifest.json`: what ran, from what, on what, with which outcome. Written atomically at every change.

    schema, status, exit_status, started, ended, seconds
    command, config, config_hash, seed
    code {commit, diff_hash, changed [file], content {folder: hash}}, packages {name: version}
    hardware {platform, cpu, cores, memory_bytes, gpus}
    data {hash, content}       the data with its settings, as fingerprints have it; the content alone
    stages {name: {status, seconds, fingerprint, inputs {name: path}, input_hashes {name: hash}, outputs {name: hash},
                   compute {device, precision, num_threads, ...}, summary, peak_memory_bytes}}
    attempts [{started, ended, seconds, command, outcome, exit_status, code}]      one for each start, oldest first

Code and packages are those with which a stage was last begun: an attempt that finds every stage finished changes
neither, and has its own in `here` until it ends. Times are UTC. An attempt that was killed cannot say so itself: the
next start finds it still "running" and writes "killed".
"""

from __future__ import annotations

import fcntl
import os
import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any, Literal, get_args

from rlhf.errors import EXIT_STOPPED, EXIT_SUCCESS, EXIT_WAITING, Stopped
from rlhf.runs import files, machine
from rlhf.runs.folder import RunFolder
from rlhf.runs.jsonable import read_json

SCHEMA = "manifest/1"
StageStatus = Literal["pending", "running", "waiting", "finished", "failed", "interrupted", "skipped"]
RunStatus = Literal["running", "waiting", "finished", "failed", "interrupted", "killed"]
_STAGE_STATUSES = get_args(StageStatus)


def read_manifest(run: RunFolder) -> dict[str, Any]:
    """The manifest, or an empty dict when there is none that can be read."""
    body = read_json(run.manifest)
    return body if isinstance(body, dict) and body.get("schema") == SCHEMA else {}


def start_manifest(
    run: RunFolder,
    *,
    command: Sequence[str],
    config: Mapping[str, Any],
    config_hash: str,
    seed: int,
    stages: Iterable[str],
) -> dict[str, Any]:
    """Begins an attempt: writes the manifest, keeping earlier attempts and what is known of the stages."""
    with _changing(run) as manifest:
        now = _now()
        code = machine.code_state()
        attempts = [dict(attempt) for attempt in manifest.get("attempts", [])]
        for attempt in attempts:
            if attempt.get("outcome") == "running":
                attempt["outcome"] = "killed"
        known = manifest.get("stages", {})
        manifest.pop("here", None)
        made_with = {"code": {**code, "content": machine.code_content()}, "packages": machine.package_versions()}
        if "code" in manifest and any(entry.get("status") == "finished" for entry in known.values()):
            made_with = {"here": made_with}
        manifest.update(
            schema=SCHEMA,
            status="running",
            exit_status=None,
            started=manifest.get("started", now),
            ended=None,
            seconds=None,
            command=list(command),
            config=dict(config),
            config_hash=config_hash,
            seed=seed,
            **made_with,
            hardware=machine.hardware(),
            stages={**known, **{name: _at_start(known.get(name, {})) for name in stages}},
            attempts=[
                *attempts,
                {
                    "started": now,
                    "ended": None,
                    "seconds": None,
                    "command": list(command),
                    "outcome": "running",
                    "exit_status": None,
                    "code": {key: value for key, value in code.items() if key != "changed"},
                },
            ],
        )
    return manifest


def update_manifest(run: RunFolder, **fields: Any) -> dict[str, Any]:
    """Sets top-level fields of the manifest."""
    with _changing(run) as manifest:
        manifest.update(fields)
    return manifest


def update_stage(run: RunFolder, stage: str, **fields: Any) -> dict[str, Any]:
    """Sets fields of a stage's entry: `status`, `seconds`, `fingerprint`, `inputs`, `outputs`, `metrics`, ...

    `peak_memory_bytes` keeps the largest value it was given, so that every rank and every resume may report its own.
    A stage that is "running" is made with the code and packages of this attempt.
    Raises `ValueError` for a status that is not a `StageStatus`.
    """
    status = fields.get("status")
    if status is not None and status not in _STAGE_STATUSES:
        raise ValueError(f"the status of a stage is one of {', '.join(_STAGE_STATUSES)}, not {status!r}")
    with _changing(run) as manifest:
        entry = manifest.setdefault("stages", {}).setdefault(stage, {"status": "pending"})
        if fields.get("peak_memory_bytes") is not None:
            fields["peak_memory_bytes"] = max(fields["peak_memory_bytes"], entry.get("peak_memory_bytes") or 0)
        entry.update(fields)
        if status == "running":
            manifest.update(manifest.pop("here", {}))
    return manifest


def note_stop(run: RunFolder, stage: str, stopped: Stopped) -> None:
    """Writes into a stage's entry by which signal it was stopped, and at which step: `stopped {signal, step}`."""
    update_stage(run, stage, stopped={"signal": signal.Signals(stopped.number).name, "step": stopped.step})


def finish_manifest(run: RunFolder, exit_status: int) -> dict[str, Any]:
    """Ends the attempt with the command's exit code; a stage still "running" failed or was interrupted with it."""
    outcome: RunStatus = "failed"
    if exit_status == EXIT_SUCCESS:
        outcome = "finished"
    elif exit_status in EXIT_STOPPED:
        outcome = "interrupted"
    elif exit_status == EXIT_WAITING:
        outcome = "waiting"
    with _changing(run) as manifest:
        now = _now()
        manifest.pop("here", None)
        attempts = manifest.get("attempts", [])
        if attempts:
            attempts[-1].update(
                ended=now, seconds=_seconds(attempts[-1]["started"], now), outcome=outcome, exit_status=exit_status
            )
        manifest.update(
            status=outcome,
            exit_status=exit_status,
            ended=now,
            # Time at work: the attempts, without the breaks between them.
            seconds=sum(attempt.get("seconds") or 0.0 for attempt in attempts),
        )
        for entry in manifest.get("stages", {}).values():
            if entry.get("status") == "running":
                entry["status"] = outcome if outcome in ("interrupted", "waiting") else "failed"
    return manifest


def _at_start(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A stage's entry when an attempt begins: one that was running when its process died was interrupted."""
    status = entry.get("status", "pending")
    return {**entry, "status": "interrupted" if status == "running" else status}


@contextmanager
def _changing(run: RunFolder) -> Iterator[dict[str, Any]]:
    """The manifest to change; written when the block ends. Supervisor and workers take turns."""
    run.create()
    with files.disk_errors(run.manifest):
        descriptor = os.open(run.path / ".manifest.lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        # On a file system without locks two writers at the same moment could lose a field; each file is still whole.
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        manifest = read_manifest(run)
        yield manifest
        files.write_json(run.manifest, manifest)
    finally:
        os.close(descriptor)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _seconds(start: str, end: str) -> float:
    return round((datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds(), 3)
