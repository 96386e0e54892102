"""Stages that a run takes from `run.cache`, or puts there: what is shared, what tells it apart, and who computes it.

A fingerprint says what decides a stage's result. What besides decides rounding and what is logged of it, such as the
number of processes or `ppo.exact_kl_rows`, is the entry's variant, so that a run with a cache has the same weights and
metrics as one without.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rlhf.config import STUDIES, RLHFConfig, StageName
from rlhf.distributed.launch import threads_per_rank
from rlhf.errors import ConfigError, StorageError
from rlhf.pipeline import StagePlan, begin_stage
from rlhf.runs import console, machine, manifest
from rlhf.runs.files import disk_errors, fingerprint
from rlhf.runs.folder import RunFolder
from rlhf.runs.jsonable import read_lines
from rlhf.runs.lease import Lease, Waiting
from rlhf.runs.metrics_file import count_lines
from rlhf.runs.stage_cache import DamagedEntryError, Entry
from rlhf.runs.tracking import StageSinks
from rlhf.terminal import say, warn

POLL_SECONDS = 0.5
# Where inputs lie and how often their state is saved changes nothing in what comes out or is logged.
_NO_VARIANT = {"save_every", "keep_checkpoints", "policy", "reference", "reward_model", "value_model", "base"}
_NO_VARIANT |= {"baseline", "comparisons", "ratings", "benchmark"}


def is_shared(config: RLHFConfig, stage: StageName) -> bool:
    """Whether a stage can be taken from a cache: it makes the same again from what its fingerprint says.

    What people label, and what lies in a store that others write to as well, is not of that kind. A study is many runs,
    which share their own stages.
    """
    if stage == "collect":
        return config.preferences.store is None and not config.preferences.asks_people
    return stage not in (*STUDIES, "report")


def check_cache(config: RLHFConfig) -> None:
    """Makes the folder `run.cache`. Raises `ConfigError` where a file is in the way, and `StorageError`."""
    if config.run.cache is None:
        return
    folder = Path(config.run.cache).expanduser()
    with disk_errors(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            file = next((place for place in (folder, *folder.parents) if place.is_file()), folder)
            raise ConfigError(f"run.cache={config.run.cache}: expected a folder, but {file} is a file") from error


def computed_with(config: RLHFConfig, run: RunFolder, stage: StageName) -> dict[str, Any]:
    """What decides rounding and what is logged of a stage besides its fingerprint, as plain values."""
    known = manifest.read_manifest(run)
    section = getattr(config, stage).model_dump(mode="json")
    distributed = config.distributed
    gpus = known.get("hardware", {}).get("gpus") or [] if distributed.device != "cpu" else []
    # The order of a sum over threads decides its rounding on a CPU.
    threads = threads_per_rank(distributed.num_processes, distributed.fixed_threads, os.environ) if not gpus else None
    return {
        "section": {name: value for name, value in section.items() if name not in _NO_VARIANT},
        "processes": distributed.world_size,
        "device": distributed.device,
        "threads": threads,
        "zero": config.zero.model_dump(mode="json"),
        "gpus": sorted({str(gpu.get("name")) for gpu in gpus}),
        "packages": {name: version for name, version in machine.package_versions().items() if name != "wandb"},
    }


def entry_of(config: RLHFConfig, run: RunFolder, plan: StagePlan) -> Entry | None:
    """Where the cache has this stage, or would have it; None for one that is not shared."""
    if config.run.cache is None or not is_shared(config, plan.name):
        return None
    variant = fingerprint(computed_with(config, run, plan.name))
    return Entry(Path(config.run.cache).expanduser() / plan.name / plan.fingerprint / variant[:16])


@dataclass
class CachedStage:
    """A stage of this run and its place in the cache: `taken` from there, or to be computed and then published."""

    config: RLHFConfig
    run: RunFolder
    plan: StagePlan
    position: int
    entry: Entry | None
    taken: bool = False

    def take(self) -> bool:
        """Takes the stage from the cache if it is there and whole. One that is damaged is set aside with a message."""
        if self.entry is None or not self.entry.exists:
            return False
        name, run, lines_before = self.plan.name, self.run, count_lines(self.run.metrics)
        try:
            about = self.entry.take(run, run.stage(name), self.plan.fingerprint, self._begin)
        except DamagedEntryError as error:
            warn(f"rlhf: the cache's stage {name} is damaged: {error}. {self._set_aside()}")
            return False
        except StorageError:
            raise
        except OSError as error:
            warn(f"rlhf: the cache's stage {name} cannot be read ({error}); it is computed")
            return False
        console.heading(name, self.position, len(self.config.stages), f"taken from the cache{self._other_code(about)}")
        self._record(about)
        self._tell_sinks(lines_before)
        self.taken = True
        return True

    def publish(self) -> None:
        """Puts the stage that this run has computed into the cache. What goes wrong is said, and no failure."""
        if self.entry is None or self.taken:
            return
        known = manifest.read_manifest(self.run)
        about = {
            "run": str(self.run.path.absolute()),
            "made": datetime.now(UTC).isoformat(timespec="seconds"),
            "code": known.get("code"),
            "compute": known.get("stages", {}).get(self.plan.name, {}).get("compute"),
            "computed_with": computed_with(self.config, self.run, self.plan.name),
        }
        try:
            self.entry.publish(self.run, self.run.stage(self.plan.name), about)
        except (OSError, StorageError) as error:
            reason = str(error).partition("\n")[0]
            warn(f"rlhf: stage {self.plan.name} could not be put into the cache {self.config.run.cache}: {reason}")

    def _set_aside(self) -> str:
        assert self.entry is not None
        try:
            return f"It is computed again; what is left of it is kept in {self.entry.set_aside()}"
        except FileNotFoundError:
            return "It is computed again"  # another run has just moved it
        except OSError as error:
            return f"It is computed, and stays there ({error})"

    def _other_code(self, about: Mapping[str, Any]) -> str:
        mine = manifest.read_manifest(self.run).get("code") or {}
        its = about.get("code") or {}
        if its == mine or not its.get("commit"):
            return ""
        return f", computed by commit {its['commit'][:8]}" + (" with changes" if its.get("diff_hash") else "")

    def _begin(self) -> None:
        """What the stage had made under another fingerprint is kept aside, as where it is computed again."""
        _, note = begin_stage(self.run, self.plan)
        if note is not None:
            say(f"rlhf: {note}")

    def _record(self, about: Mapping[str, Any]) -> None:
        assert self.entry is not None
        manifest.update_stage(
            self.run,
            self.plan.name,
            fingerprint=self.plan.fingerprint,
            inputs={name: str(path) for name, path in self.plan.inputs.items()},
            input_hashes=self.plan.decided_by.get("inputs", {}),
            stopped=None,
            compute=about.get("compute"),
            cached_from=str(self.entry.path.absolute()),
        )

    def _tell_sinks(self, lines_before: int) -> None:
        """W&B and its like get the stage's numbers and result as if this run had computed it."""
        name = self.plan.name
        own = [line for line in read_lines(self.run.metrics) if line.get("stage") == name]
        samples = [line for line in read_lines(self.run.samples) if line.get("stage") == name]
        first = count_lines(self.run.metrics) - len(own)
        result = self.run.stage(name).read_result()
        run_config = self.config.model_dump(mode="json")
        with StageSinks(self.run, self.config.tracking, name, run_config) as sinks:
            for sink in sinks.open(resume_step=0, lines_before=lines_before, lines=first):
                for number, line in enumerate(own):
                    sink.log(first + number, line["step"], _without_place(line))
                    following = own[number + 1]["step"] if number + 1 < len(own) else float("inf")
                    rows = [row for row in samples if row["step"] < following]
                    samples = [row for row in samples if row["step"] >= following]
                    for step in sorted({row["step"] for row in rows}):
                        shown = [_without_place(row) for row in rows if row["step"] == step]
                        sink.log_samples(first + number, step, shown)
            if result is not None:
                sinks.record(result, self.plan.inputs)


def _without_place(line: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name not in ("stage", "step")}


@contextmanager
def cached_stage(
    config: RLHFConfig,
    run: RunFolder,
    plan: StagePlan,
    position: int,
    before_waiting: Callable[[], None],
) -> Iterator[CachedStage]:
    """The stage, taken from the cache, or to be computed in the block, by one run of those that need it at a time.

    While another run computes it this one waits; `before_waiting` gives back what others may need meanwhile.
    """
    cached = CachedStage(config, run, plan, position, entry_of(config, run, plan))
    with ExitStack() as held:
        if cached.entry is not None and not cached.take():
            lease = _wait_for_turn(cached, before_waiting)
            if lease is not None:
                held.enter_context(lease)
                cached.entry.clean()
            if not cached.taken:
                _forget_cached(run, plan.name)
        yield cached


def _wait_for_turn(cached: CachedStage, before_waiting: Callable[[], None]) -> Lease | None:
    """The lease to compute the stage under; None when it was taken, or where no lease can be had."""
    assert cached.entry is not None
    place = cached.entry.path
    path = place.with_name(f".{place.name}.lease")
    waiting, announced = Waiting(path), False
    while True:
        try:
            lease = Lease.acquire(path, {"run": str(cached.run.path.absolute())})
        except OSError as error:
            warn(f"rlhf: nothing can be put into the cache {cached.config.run.cache}: {error}")
            return None
        # Whoever held it may have published what this run has not found before.
        if cached.take():
            if lease is not None:
                lease.release()
            return None
        if lease is not None:
            return lease
        holder = waiting.holder()
        if holder is not None and not announced:
            announced = True
            before_waiting()
            run = holder.about.get("run", "another run")
            say(f"rlhf: stage {cached.plan.name} is being computed by {run} ({holder}); waiting to share it")
        if holder is not None:
            time.sleep(POLL_SECONDS)


def plan_or_take(config: RLHFConfig, run: RunFolder, plan: StagePlan, position: int) -> CachedStage:
    """As `cached_stage`, for a rank that others wait for in a collective operation: it waits for no other run."""
    cached = CachedStage(config, run, plan, position, None if plan.finished else entry_of(config, run, plan))
    if cached.entry is not None and not cached.take():
        _forget_cached(run, plan.name)
    return cached


def _forget_cached(run: RunFolder, stage: str) -> None:
    if manifest.read_manifest(run).get("stages", {}).get(stage, {}).get("cached_from") is not None:
        manifest.update_stage(run, stage, cached_from=None)
